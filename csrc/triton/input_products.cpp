#include <algorithm>

#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// As in fastlstm/kernels/triton/input_products.py: multiplications times bytes of a number.
double most_products(Kind kind) {
  if (kind == Kind::exact) return double(i64(7) << 26);
  return double(i64(1) << (kind == Kind::tf32 ? 31 : 32));
}
constexpr i64 kGatesOfProducts = 128;
constexpr i64 kUnit = 4;  // numbers of x and of the weights that are read together, where sizes are even

bool is_even(const Array& x, const std::vector<Weights>& weights, i64 bytes) {
  const auto begins = [=](const Array& t) { return aligned(t, uintptr_t(kUnit * bytes)); };
  return x.last() % kUnit == 0 && x.strides[0] % kUnit == 0 && x.strides[x.dim - 2] % kUnit == 0 && begins(x) &&
         std::all_of(weights.begin(), weights.end(), [&](const Weights& each) { return begins(each.w_ih); });
}

// The kernel that computes them; null if PyTorch is to.
Kernel* kernel_of(const Question& asked, const Array& x, const std::vector<Weights>& weights, i64 count) {
  const double size = double(count) * double(4 * asked.H) * double(asked.I) * double(weights.size());
  const i64 bytes = bytes_of(asked.kind);
  const bool many = size * double(bytes) > most_products(asked.kind);
  // PyTorch's products of float32 may be in TF32 where the layer's are not, and the other way round.
  if (many && (bytes == 2 || is_in_tf32(true) == (asked.kind == Kind::tf32))) return nullptr;
  return asked.device->input_products(asked.kind, is_even(x, weights, bytes));
}

void multiply(const Question& asked, const Array& x, const std::vector<Weights>& weights, const Rows& rows,
              const Array& found, const Place& place) {
  const Array flat = flat_rows(x, place);
  for (size_t d = 0; d < weights.size(); ++d) {
    const Array w = by_unit(weights[d].w_ih, place);
    const i64 width = 4 * asked.H;
    product_into(view(found, {rows.count, width}, {width, 1}, i64(d) * rows.count * width), flat, transposed(w), place);
  }
}

}  // namespace

Array input_products(const Question& asked, const Array& x, const std::vector<Weights>& weights, const Rows& rows,
                     const Place& place) {
  const i64 D = i64(weights.size());
  Array found = place.empty({D, rows.count, 4 * asked.H}, aoti_torch_dtype_float32());
  Kernel* kernel = kernel_of(asked, x, weights, rows.count);
  if (!kernel) {
    multiply(asked, x, weights, rows, found, place);
    return found;
  }
  Arguments a;
  a.set(k_x, x);
  set_weights(&a, weights, true);
  a.set(k_products, found);
  a.set(k_rows, rows.count, "rows");
  a.set(k_B, x.dim == 3 ? rows.B : rows.count, "sequences");
  set_strides(&a, k_x_t, k_x_b, x);
  a.set(k_I, asked.I, "inputs");
  a.set(k_H, asked.H, "units");
  a.set(k_D, D, "directions");
  asked.device->launch(kernel, &a, tiles_of(rows.count, kernel->batch), tiles_of(4 * asked.H, kGatesOfProducts), D);
  return found;
}

}  // namespace fastlstm::ahead
