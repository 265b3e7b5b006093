#include "triton/tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include <cstring>

namespace fastlstm::ahead {
namespace {

namespace stable = torch::stable::detail;

// A reference of the dispatcher's own to a tensor.
StableIValue tensor(const Array& t) {
  AtenTensorHandle copy;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.handle(), &copy));
  return stable::from(copy);
}

// Calls an operator that returns a tensor, which is one of its arguments.
template <size_t n>
void call(const char* name, const char* overload, std::array<StableIValue, n> stack) {
  const bool failed = torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS;
  FASTLSTM_CHECK(!failed, "fastlstm: ", name, " failed in a call of the triton kernels");
  aoti_torch_delete_tensor_object(stable::to<AtenTensorHandle>(stack[0]));
}

Sizes_ strides_for(const Sizes_& sizes) {
  Sizes_ strides(sizes.size());
  i64 step = 1;
  for (size_t k = sizes.size(); k-- > 0; step *= std::max(sizes[k], i64(1))) strides[k] = step;
  return strides;
}

Array as_float(const Array& t, const Place& place) {
  Array found = place.empty({t.sizes[0], t.sizes[1]}, aoti_torch_dtype_float32());
  copy(found, t);
  return found;
}

void multiply(const Array& out, const Array& a, const Array& b, const Place& place) {
  const int32_t f32 = aoti_torch_dtype_float32();
  if (a.dtype == f32) {
    call("aten::mm", "out", std::array{tensor(a), tensor(b), tensor(out)});
  } else if (place.is_cpu()) {
    multiply(out, as_float(a, place), as_float(b, place), place);
  } else {
    call("aten::mm", "dtype_out",
         std::array{tensor(a), tensor(b), stable::from(torch::headeronly::ScalarType::Float), tensor(out)});
  }
}

// 1, 2, ..., int64 [count, 1].
Array counted(i64 count, const Place& place) {
  const Array ones = place.empty({count, 1}, aoti_torch_dtype_int64());
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_fill__Scalar(ones.handle(), 1.0));
  Array found = place.empty({count, 1}, aoti_torch_dtype_int64());
  call("aten::cumsum", "out",
       std::array{tensor(ones), stable::from(i64(0)), stable::from(std::nullopt), tensor(found)});
  return found;
}

}  // namespace

Array Place::empty(const Sizes_& sizes, int32_t dtype) const {
  AtenTensorHandle handle;
  const Sizes_ strides = strides_for(sizes);
  if (aoti_torch_empty_strided(i64(sizes.size()), sizes.data(), strides.data(), dtype, type, index, &handle)) {
    size_t bytes = aoti_torch_dtype_element_size(dtype);
    for (const i64 n : sizes) bytes *= size_t(n);
    throw OutOfMemory(bytes);
  }
  return Array(handle);
}

Array Place::zeros(const Sizes_& sizes, int32_t dtype) const {
  Array found = empty(sizes, dtype);
  zero(found);
  return found;
}

Array view(const Array& t, const Sizes_& sizes, const Sizes_& strides, i64 offset) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.handle(), i64(sizes.size()), sizes.data(), strides.data(), offset, &handle));
  return Array(handle);
}

Array columns(const Array& t, i64 first, i64 count) {
  return view(t, {t.sizes[0], count}, {t.strides[0], t.strides[1]}, first * t.strides[1]);
}

Array rows_of(const Array& t, i64 first, i64 count) {
  return view(t, {count, t.sizes[1]}, {t.strides[0], t.strides[1]}, first * t.strides[0]);
}

Array transposed(const Array& matrix) {
  return view(matrix, {matrix.sizes[1], matrix.sizes[0]}, {matrix.strides[1], matrix.strides[0]});
}

Array flat_rows(const Array& t, const Place& place) {
  const i64 n = t.last();
  if (t.dim == 2) return view(t, {t.sizes[0], n}, {t.strides[0], t.strides[1]});
  const i64 rows = t.sizes[0] * t.sizes[1];
  if (t.sizes[0] == 1 || t.strides[0] == t.sizes[1] * t.strides[1])
    return view(t, {rows, n}, {t.strides[1], t.strides[2]});
  Array found = place.empty({t.sizes[0], t.sizes[1], n}, t.dtype);
  copy(found, t);
  return view(found, {rows, n}, {n, 1});
}

Array copied(const Array& t, const Place& place) {
  Array found = place.empty(Sizes_(t.sizes, t.sizes + t.dim), t.dtype);
  copy(found, t);
  return found;
}

Array dense(Array t, const Place& place) { return !t || t.contiguous() ? std::move(t) : copied(t, place); }

void copy(const Array& to, const Array& from) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.handle(), from.handle(), 1));
}

void zero(const Array& t) {
  if (t) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.handle()));
}

Array product(const Array& a, const Array& b, const Place& place) {
  Array out = place.empty({a.sizes[0], b.sizes[1]}, aoti_torch_dtype_float32());
  multiply(out, a, b, place);
  return out;
}

void product_into(const Array& out, const Array& a, const Array& b, const Place& place) {
  if (out.dtype == aoti_torch_dtype_float32()) {
    multiply(out, a, b, place);
  } else {
    copy(out, product(a, b, place));
  }
}

void add(const Array& to, const Array& more) {
  AtenTensorHandle sum;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_subtract_Tensor(to.handle(), more.handle(), -1.0, &sum));
  copy(to, Array(sum));
}

void sum_rows(const Array& out, const Array& matrix) {
  call("aten::sum", "IntList_out",
       std::array{tensor(matrix), stable::from(std::optional(std::vector<i64>{0})), stable::from(false),
                  stable::from(std::nullopt), tensor(out)});
}

void select_rows(const Array& out, const Array& matrix, const Array& index) {
  call("aten::index_select", "out", std::array{tensor(matrix), stable::from(i64(0)), tensor(index), tensor(out)});
}

void put_rows(const Array& matrix, const Array& index, const Array& rows) {
  call("aten::index_copy_", "", std::array{tensor(matrix), stable::from(i64(0)), tensor(index), tensor(rows)});
}

void zero_where(const Array& matrix, const Array& flags) {
  const Array zero = Place::cpu().zeros({}, matrix.dtype);
  call("aten::masked_fill_", "Tensor", std::array{tensor(matrix), tensor(flags), tensor(zero)});
}

void put_where(const Array& t, const Array& flags, const Array& others) {
  call("aten::where", "self_out", std::array{tensor(flags), tensor(others), tensor(t), tensor(t)});
}

Array ended(const Array& lengths, i64 T, i64 B, const Place& place) {
  const Array number = counted(T, place);
  Array found = place.empty({T, B}, aoti_torch_dtype_bool());
  call("aten::gt", "Tensor_out", std::array{tensor(number), tensor(view(lengths, {1, B}, {B, 1})), tensor(found)});
  return view(found, {T * B, 1}, {1, 1});
}

Array is_last(const Array& lengths, i64 T, i64 B, const Place& place) {
  const Array number = counted(T, place), one = rows_of(number, 0, 1), last = place.empty({1, B}, lengths.dtype);
  Array found = place.empty({T, B, 1}, aoti_torch_dtype_bool());
  call("aten::maximum", "out", std::array{tensor(view(lengths, {1, B}, {B, 1})), tensor(one), tensor(last)});
  call("aten::eq", "Tensor_out", std::array{tensor(number), tensor(last), tensor(view(found, {T, B}, {B, 1}))});
  return found;
}

Array on_device(const std::vector<i64>& numbers, const Place& place) {
  const Sizes_ size{i64(numbers.size())};
  const Array here = Place::cpu().empty(size, aoti_torch_dtype_int64());
  std::memcpy(here.data, numbers.data(), numbers.size() * sizeof(i64));
  Array found = place.empty(size, aoti_torch_dtype_int64());
  copy(found, here);
  return found;
}

}  // namespace fastlstm::ahead
