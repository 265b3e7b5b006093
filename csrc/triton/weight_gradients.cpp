#include <algorithm>

#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// What cuBLAS computes faster, as in fastlstm/kernels/triton/weight_gradients.py.
constexpr double kMost = double(i64(1) << 34);  // multiplications times bytes of a number
constexpr i64 kMostInputs = 1024;

// Says where the gradients of weights are to go, after a check; both kernels call them by the names of the weights. The
// gradient of a bias is written to both of its places: to one twice, where one serves both biases.
void set_targets(Arguments* a, const std::vector<Array>& dweights, const Question& asked, int32_t dtype, i64 D) {
  const i64 I = asked.I, H = asked.H;
  const size_t each = dweights.size() / size_t(D);
  constexpr Slot kTargets[2][4] = {{k_w_ih, k_w_hh, k_b_ih, k_b_hh},
                                   {k_w_ih_reverse, k_w_hh_reverse, k_b_ih_reverse, k_b_hh_reverse}};
  const i64 numbers[] = {4 * H * I, 4 * H * H, 4 * H, 4 * H};
  for (size_t k = 0; k < dweights.size(); ++k) {
    check(dweights[k], "the gradient of a weight", dtype, numbers[k % each]);
    a->set(kTargets[k / each][k % each], dweights[k]);
    if (each == 3 && k % each == 2) a->set(kTargets[k / each][3], dweights[k]);
  }
}

}  // namespace

bool takes_weights(const Question& asked, const Rows& rows, i64 D) {
  const double size = double(4 * asked.H) * double(asked.I + asked.H) * double(D);
  const bool few = double(rows.count) * size * double(bytes_of(asked.kind)) <= kMost;
  return rows.kind(false) == RowsKind::dense && few && asked.I <= kMostInputs;
}

void launch_weight_gradients(const Question& asked, const Rows& rows, const Array& x_, const Array& y, const Array& h0,
                             const Array& dgates, const std::vector<Array>& dweights) {
  const Place place = Place::of(dgates.handle());
  const i64 I = asked.I, H = asked.H, D = dgates.sizes[0];
  const size_t each = dweights.size() / size_t(D);
  const Array own = x_.contiguous() ? Array() : copied(x_, place), &x = own ? own : x_;
  check(y, "y", x.dtype, rows.count * D * H);
  const Device& device = *asked.device;
  const bool even = H % 8 == 0 && even_input(x) && aligned(y, kAligned);
  Kernel *parts = device.parts_of_weights(*asked.row, even), *sums = device.sums_of_weights(*asked.row);
  FASTLSTM_CHECK(parts && sums, "fastlstm: no kernel for the gradients of weights was compiled ahead");
  // As many parts as there is room for on the GPU at a time, each of whole turns of the loop.
  const i64 high = tiles_of(4 * H, gates_of_parts(asked.row->units));
  const i64 wide = tiles_of(I, kInputsOfParts) + tiles_of(H, states_of_parts(asked.row->units));
  const i64 turns = tiles_of(rows.count, parts->batch), room = device.processors() / (high * wide * D);
  const i64 splits = tiles_of(turns, tiles_of(turns, std::max<i64>(1, room)));
  const Array found = place.empty({splits, D, 4 * H * (I + H + 1)}, aoti_torch_dtype_float32());
  Arguments a;
  a.set(k_dgates, dgates);
  a.set(k_x, x);
  a.set(k_y, y);
  a.set(k_h0, h0);
  a.set(k_parts, found);
  a.set(k_rows, rows.count, "rows");
  a.set(k_B, rows.B, "sequences");
  a.set(k_starts, h0 ? rows.B : 0, "sequences");
  a.set(k_I, I, "inputs");
  a.set(k_H, H, "units");
  a.set(k_D, D, "directions");
  a.set(k_splits, splits, "parts");
  set_targets(&a, dweights, asked, x.dtype, D);
  device.launch(parts, &a, high, wide, splits * D);
  const i64 of_bias = each > 2 ? tiles_of(4 * H, kElementsOfSums) : 0;
  device.launch(sums, &a, tiles_of(4 * H * I, kElementsOfSums) + tiles_of(4 * H * H, kElementsOfSums) + of_bias, D);
}

}  // namespace fastlstm::ahead
