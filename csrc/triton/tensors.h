// What the operators of Triton's kernels leave to PyTorch: products, sums and copies, on LibTorch's stable ABI. Results
// are passed in ("out" forms): these neither record derivatives nor change types under autocast.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <vector>

#include "bindings/array.h"

namespace fastlstm::ahead {

using Sizes_ = std::vector<i64>;

// Derivatives are off meanwhile: exported programs call operators with gradients on.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) {
    if (before_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (before_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;

 private:
  const bool before_;
};

// Where tensors of a call lie.
struct Place {
  int32_t type, index;

  static Place of(AtenTensorHandle t) {
    Place found;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &found.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &found.index));
    return found;
  }
  static Place cpu() { return {aoti_torch_device_type_cpu(), 0}; }
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }

  Array empty(const Sizes_& sizes, int32_t dtype) const;
  Array zeros(const Sizes_& sizes, int32_t dtype) const;
};

// The same memory with other sizes, `offset` elements further on.
Array view(const Array& t, const Sizes_& sizes, const Sizes_& strides, i64 offset = 0);
// Some columns of a matrix.
Array columns(const Array& t, i64 first, i64 count);
// Some rows of a matrix.
Array rows_of(const Array& t, i64 first, i64 count);
Array transposed(const Array& matrix);
Array flat_rows(const Array& t, const Place& place);  // [T, B, n] or [N, n] as [rows, n]; a copy if it has to be
Array copied(const Array& t, const Place& place);     // the same numbers, contiguous, in new memory
Array dense(Array t, const Place& place);             // the same if they are not contiguous, else the tensor itself
void copy(const Array& to, const Array& from);
void zero(const Array& t);

// a b in float32, of factors of any type.
Array product(const Array& a, const Array& b, const Place& place);
// out = a b, summed in float32 and rounded once.
void product_into(const Array& out, const Array& a, const Array& b, const Place& place);
void add(const Array& to, const Array& more);
void sum_rows(const Array& out, const Array& matrix);  // adds up in float32
void select_rows(const Array& out, const Array& matrix, const Array& index);
void put_rows(const Array& matrix, const Array& index, const Array& rows);
void zero_where(const Array& matrix, const Array& flags);                 // flags [rows, 1], bool
void put_where(const Array& t, const Array& flags, const Array& others);  // of shapes that fit
// Whether step t of sequence b is past its end, bool [T * B, 1].
Array ended(const Array& lengths, i64 T, i64 B, const Place& place);
// Whether it is its last step, or where it has none the first of its padding: bool [T, B, 1].
Array is_last(const Array& lengths, i64 T, i64 B, const Place& place);
// Numbers of ours, on the device.
Array on_device(const std::vector<i64>& numbers, const Place& place);

}  // namespace fastlstm::ahead
