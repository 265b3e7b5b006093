// Between the dtype of tensors and the compute type S of the kernels: float for float32, bfloat16 and float16, double
// for float64. 16-bit numbers are converted at the edges of a kernel and nowhere else.
#pragma once

#include "cpu/memory.h"

namespace fastlstm {
namespace {

inline float bf16_to_float(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);  // NaN stays NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                  // to nearest even
}

constexpr size_t element_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// dst[0..n) = src[first .. first + n); src is an array of `dtype`.
template <class S>
inline void convert_in(S* dst, const void* src, Dtype dtype, i64 first, i64 n) {
  if (dtype == Dtype::bf16) {
    for (i64 k = 0; k < n; ++k) dst[k] = S(bf16_to_float(static_cast<const uint16_t*>(src)[first + k]));
  } else if (dtype == Dtype::f16) {
    for (i64 k = 0; k < n; ++k) dst[k] = S(half_to_float(static_cast<const uint16_t*>(src)[first + k]));
  } else {
    std::memcpy(dst, static_cast<const S*>(src) + first, size_t(n) * sizeof(S));
  }
}
// dst[first .. first + n) = src[0..n); dst is an array of `dtype`.
template <class S>
inline void convert_out(void* dst, Dtype dtype, i64 first, const S* src, i64 n) {
  if (dtype == Dtype::bf16) {
    for (i64 k = 0; k < n; ++k) static_cast<uint16_t*>(dst)[first + k] = float_to_bf16(float(src[k]));
  } else if (dtype == Dtype::f16) {
    for (i64 k = 0; k < n; ++k) static_cast<uint16_t*>(dst)[first + k] = float_to_half(float(src[k]));
  } else {
    std::memcpy(static_cast<S*>(dst) + first, src, size_t(n) * sizeof(S));
  }
}

// An array of `dtype` as an array of S: the array itself, or a converted copy of 16-bit numbers.
template <class S>
class AsCompute {
 public:
  AsCompute(const void* data, Dtype dtype, i64 n) : data_(static_cast<const S*>(data)) {
    if (data && element_bytes(dtype) != sizeof(S)) {
      copy_ = Buffer<S>(n);
      convert_in(copy_.get(), data, dtype, 0, n);
      data_ = copy_.get();
    }
  }
  const S* get() const { return data_; }

 private:
  Buffer<S> copy_;
  const S* data_;
};

}  // namespace
}  // namespace fastlstm
