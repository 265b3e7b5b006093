// A tensor argument of an operator, read once. torch::stable::Tensor asks libtorch again for every size, stride and
// pointer, and shares ownership through a heap block. For a call of one LSTM step that is a third of its time.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/check.h"
#include "lstm.h"
#include "out_of_memory.h"

namespace fastlstm {

// A tensor that an operator returns. (TORCH_BOX would copy a torch::stable::Tensor, with its ownership, twice.)
struct Output {
  AtenTensorHandle handle;
};

class Array {
 public:
  void* data = nullptr;
  i64 dim = 0;
  const i64 *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1;  // torch's own number; compare with aoti_torch_dtype_*()

  Array() = default;
  // Takes ownership of the handle: operators own their arguments. What repeats one number along its last dimension,
  // such as a gradient of zeros that nobody has written, becomes a tensor that kernels can read.
  explicit Array(AtenTensorHandle handle) : handle_(handle) {
    read();
    if (dim && strides[dim - 1] == 0 && last() > 1) {
      AtenTensorHandle copy;
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(
          torch::stable::contiguous(torch::stable::Tensor(release().handle)).get(), &copy));
      handle_ = copy;
      read();
    }
  }
  // A new tensor, contiguous and uninitialised, on the CPU.
  static Array empty(std::initializer_list<i64> shape, int32_t dtype) {
    i64 strides[4], step = 1;
    for (size_t k = shape.size(); k-- > 0; step *= std::max(shape.begin()[k], i64(1))) strides[k] = step;
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(i64(shape.size()), shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0,
                                 &handle))
      throw OutOfMemory(size_t(step) * aoti_torch_dtype_element_size(dtype));
    return Array(handle);
  }
  // Memory of somebody else, who has to outlive it; so have sizes and strides.
  static Array view(void* data, i64 dim, const i64* sizes, const i64* strides, int32_t dtype) {
    Array view;
    view.data = data;
    view.dim = dim;
    view.sizes = sizes;
    view.strides = strides;
    view.dtype = dtype;
    return view;
  }
  explicit Array(std::optional<AtenTensorHandle> handle) : Array(handle ? Array(*handle) : Array()) {}
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(handle_, other.handle_);
    data = other.data;
    dim = other.dim;
    sizes = other.sizes;
    strides = other.strides;
    dtype = other.dtype;
    return *this;
  }
  ~Array() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // Gives the tensor away. The array can still be read as long as the tensor exists.
  Output release() { return {std::exchange(handle_, nullptr)}; }

  // What lies at k of the first dimension. It is a view: this array has to outlive it.
  Array at(i64 k) const {
    return view(static_cast<char*>(data) + k * strides[0] * i64(aoti_torch_dtype_element_size(dtype)), dim - 1,
                sizes + 1, strides + 1, dtype);
  }

  // Null in a part of another tensor.
  AtenTensorHandle handle() const { return handle_; }
  explicit operator bool() const { return dtype >= 0; }
  i64 last(i64 k = 1) const { return sizes[dim - k]; }

  bool has_shape(std::initializer_list<i64> shape) const {
    if (dim != i64(shape.size())) return false;
    const i64* n = sizes;
    for (i64 expected : shape)
      if (*n++ != expected) return false;
    return true;
  }
  bool contiguous() const {
    i64 expected = 1;
    for (i64 k = dim; k-- > 0; expected *= sizes[k])
      if (sizes[k] != 1 && strides[k] != expected) {
        for (i64 j = 0; j < dim; ++j)
          if (sizes[j] == 0) return true;
        return false;
      }
    return true;
  }
  bool last_dense() const {
    if (last() <= 1 || strides[dim - 1] == 1) return true;
    return std::find(sizes, sizes + dim, 0) != sizes + dim;  // nothing to read
  }
  std::string shape_text() const { return text(sizes, sizes + dim); }

  void check_shape(const char* name, std::initializer_list<i64> shape) const {
    FASTLSTM_CHECK(has_shape(shape), "fastlstm: expected ", name, " of shape ", text(shape.begin(), shape.end()),
                   ", got ", shape_text());
  }
  // Also checks that its numbers are there: whoever saves memory may have freed the storage of a tensor in between.
  void check_dtype(const char* name, int32_t expected) const {
    FASTLSTM_CHECK(dtype == expected, "fastlstm: expected ", name, " to be ", dtype_text(expected),
                   " with this input, got ", dtype_text(dtype));
    check_storage(name);
  }
  void check_storage(const char* name) const {
    if (!handle_) return;  // part of another tensor
    i64 end = 1, offset, bytes;
    for (i64 k = 0; k < dim; ++k) {
      if (sizes[k] == 0) return;
      end += (sizes[k] - 1) * strides[k];
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle_, &offset));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle_, &bytes));
    const i64 needed = (offset + end) * i64(aoti_torch_dtype_element_size(dtype));
    FASTLSTM_CHECK(bytes >= needed, "fastlstm: the storage of ", name, " ", shape_text(), " has ", bytes,
                   " bytes instead of ", needed, ": it was resized after the tensor was made, or freed");
  }

 private:
  void read() {
    i64 *n, *s;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &n));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &s));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    sizes = n;
    strides = s;
  }
  template <class It>
  static std::string text(It begin, It end) {
    std::string s = "[";
    for (It it = begin; it != end; ++it) s += (it == begin ? "" : ", ") + std::to_string(*it);
    return s + "]";
  }

  AtenTensorHandle handle_ = nullptr;
};

inline std::vector<Array> to_arrays(const std::vector<AtenTensorHandle>& handles) {
  std::vector<Array> arrays;
  arrays.reserve(handles.size());
  for (AtenTensorHandle handle : handles) arrays.emplace_back(handle);
  return arrays;
}

}  // namespace fastlstm
