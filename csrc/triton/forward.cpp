#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// x through w_ih without the biases, float32 [D, rows, H, 4].
Array products_by_unit(const Array& x, const std::vector<Weights>& weights, i64 H, const Place& place) {
  const Array rows = flat_rows(x, place);
  const i64 D = i64(weights.size()), count = rows.sizes[0];
  Array found = place.empty({D, count, 4 * H}, aoti_torch_dtype_float32());
  for (i64 d = 0; d < D; ++d) {
    const Array w = by_unit(weights[size_t(d)].w_ih, place);
    product_into(view(found, {count, 4 * H}, {4 * H, 1}, d * count * 4 * H), rows, transposed(w), place);
  }
  return found;
}

}  // namespace

void lstm_fwd_triton(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                     OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_,
                     Handle h_n_, Handle c_n_, OptionalHandle c_all_, OptionalHandle gates_, OptionalHandle cache_,
                     bool peephole, bool layer_norm, OptionalHandle h_mask_, double zoneout_c, double zoneout_h,
                     OptionalHandle seed_) {
  const bool more = peephole || layer_norm || h_mask_ || zoneout_c != 0 || zoneout_h != 0;
  const Question asked(x_, weights_, directions, false, more);
  if (!asked.row)
    return instead("fastlstm::lstm_fwd_triton_jit", x_, weights_, directions, h0_, c0_, batch_sizes_, lengths_, reset_,
                   y_, h_n_, c_n_, c_all_, gates_, cache_, peephole, layer_norm, h_mask_, zoneout_c, zoneout_h, seed_);
  const Place place = Place::of(x_);
  const NoGrad no_grad;
  const Array x(x_), batch_sizes(batch_sizes_), y(y_), h_n(h_n_), c_n(c_n_), c_all(c_all_), gates(gates_),
      unused(cache_), seed(seed_);
  const std::vector<Weights> weights = Weights::split(weights_, directions, place);
  const Rows rows(x, batch_sizes, Array(lengths_), Array(reset_), place);
  const Array h0 = dense(Array(h0_), place), c0 = dense(Array(c0_), place);
  if (rows.count == 0) return;
  const i64 H = asked.H, states = directions * rows.B * H, cells = directions * rows.count * H;
  for (const Array* t : {&h_n, &c_n, &h0, &c0}) check(*t, "a state", x.dtype, states);
  check(y, "y", x.dtype, cells);
  check(c_all, "c_all", aoti_torch_dtype_float32(), cells);
  check(gates, "gates", x.dtype, 4 * cells, kAligned);
  if (rows.padded()) {
    zero(y);
    zero(c_all);
  }
  const bool fused = asked.row->inputs > 0;
  const bool even = even_weights(weights, H) && (!fused || even_input(x));
  Kernel* kernel = asked.device->find({asked.row, rows.kind(false), c_all || gates, even});
  FASTLSTM_CHECK(kernel, "fastlstm: no kernel for this call was compiled ahead");
  const Array products = fused ? Array() : products_by_unit(x, weights, H, place);
  Arguments a;
  a.set(k_x, fused ? x : products);
  set_rows(&a, rows, H, directions);
  set_weights(&a, weights, fused);
  set_biases(&a, weights);
  a.set(k_h0, h0);
  a.set(k_c0, c0);
  a.set(k_y, y);
  a.set(k_h_n, h_n);
  a.set(k_c_n, c_n);
  a.set(k_c_all, c_all);
  a.set(k_gates, gates);
  a.set(k_I, asked.I, "inputs");
  set_strides(&a, k_x_t, k_x_b, x);
  asked.device->launch(kernel, &a, (rows.B + kernel->batch - 1) / kernel->batch, directions);
}

}  // namespace fastlstm::ahead
