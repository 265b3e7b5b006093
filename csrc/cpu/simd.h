// Vectors through the compiler's vector extension: one source for every instruction set.
// Only what the extension cannot say (fused multiply-add, 16-bit floats) is spelled per ISA.
// Everything sits in an unnamed namespace: this file is compiled once per instruction set, and the linker must
// never merge an AVX-512 copy of a function into the portable kernels.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "lstm.h"

#if defined(__x86_64__) && defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTLSTM_INLINE inline __attribute__((always_inline))

namespace fastlstm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 rows x 4 gates = 24 of 32 registers accumulate
constexpr int kTallestTile = 6;
constexpr int kUnroll = 1;  // terms a turn of the inner loop of products
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;     // 3 rows x 4 gates = 12 of 16 registers
constexpr int kTallestTile = 5;  // taller ones take two gates at a time
constexpr int kUnroll = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
constexpr int kTallestTile = 6;
constexpr int kUnroll = 1;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 3;
constexpr int kTallestTile = 5;
constexpr int kUnroll = 1;
#endif

template <class S>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Word;
  typedef Word Words __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Word;
  typedef Word Words __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class S>
using Vec = typename Simd<S>::V;
template <class S>
constexpr int kLanes = kVectorBytes / int(sizeof(S));

template <class S>
FASTLSTM_INLINE Vec<S> load(const S* p) {
  return (Vec<S>)*reinterpret_cast<const typename Simd<S>::Unaligned*>(p);
}
template <class S>
FASTLSTM_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename Simd<S>::Unaligned*>(p) = (typename Simd<S>::Unaligned)v;
}
// The first n lanes; the others read as zero and are not written.
template <class S>
FASTLSTM_INLINE Vec<S> load_n(const S* p, i64 n) {
  if (n >= kLanes<S>) return load(p);
  Vec<S> v = {};
  std::memcpy(&v, p, size_t(n) * sizeof(S));
  return v;
}
template <class S>
FASTLSTM_INLINE void store_n(S* p, Vec<S> v, i64 n) {
  if (n >= kLanes<S>)
    store(p, v);
  else
    std::memcpy(p, &v, size_t(n) * sizeof(S));
}
template <class S>
FASTLSTM_INLINE Vec<S> splat(S s) {
  return s - Vec<S>{};
}
// Calls f(first, lanes) for the vectors of n elements; the last may be a part of one. Lambdas passed here are to be
// FASTLSTM_INLINE_LAMBDA, so that whole vectors know that they are whole.
#define FASTLSTM_INLINE_LAMBDA __attribute__((always_inline))
template <class S, class F>
FASTLSTM_INLINE void for_vectors(i64 n, const F& f) {
  i64 k = 0;
  for (; k + kLanes<S> <= n; k += kLanes<S>) f(k, i64(kLanes<S>));
  if (k < n) f(k, n - k);
}

// a * b + c. Fused wherever the hardware can; -ffp-contract=off keeps the compiler from choosing differently in
// different instantiations, which would make a row's result depend on the batch around it.
FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// sum + a * b of the inner loop of products, where every register is taken. On AVX2 it is spelled out: GCC reads
// operands again from memory in every instruction, or moves sums between registers, up to a fifth slower.
template <class V>
FASTLSTM_INLINE V add_product(V sum, V a, V b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(sum[0]) == sizeof(float))
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

constexpr i64 round_up(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr i64 ceil_div(i64 n, i64 d) { return (n + d - 1) / d; }
constexpr i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// Row pitch in elements for n values: whole vectors plus one, so that rows whose size is a power of two do not
// all fall into the same cache set.
template <class S>
constexpr i64 pitch(i64 n) {
  return round_up(n, kLanes<S>) + kLanes<S>;
}

// Aligned, uninitialised memory that lives as long as the object. (std::vector would zero it, and its
// out-of-line functions could be merged across instruction sets.)
template <class E>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(i64 n) {
    size_ = size_t(n) * sizeof(E);
    block_ = std::malloc(size_ + 64);  // aligned here: std::aligned_alloc bypasses malloc's fast path
    if (!block_) std::abort();         // on one of torch's threads there is nobody to tell
    data_ = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(block_) + 63) & ~uintptr_t(63));
  }
  ~Buffer() { std::free(block_); }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  void swap(Buffer& other) {
    exchange(block_, other.block_);
    exchange(data_, other.data_);
    exchange(size_, other.size_);
  }
  void zero() { std::memset(static_cast<void*>(data_), 0, size_); }
  E* get() const { return data_; }
  E& operator[](i64 i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  template <class T>
  static void exchange(T& a, T& b) {
    T c = a;
    a = b;
    b = c;
  }
  void* block_ = nullptr;
  E* data_ = nullptr;
  size_t size_ = 0;
};

// ---- 16-bit floats at the edges of a kernel -----------------------------------------------------------------

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
inline float half_to_float(uint16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v);
#else
  uint32_t sign = uint32_t(v & 0x8000u) << 16, magnitude = v & 0x7fffu;
  uint32_t bits = sign | (magnitude << 13);
  float f;
  if (magnitude >= 0x7c00u) {
    bits |= 0x7f800000u;  // inf, NaN
    std::memcpy(&f, &bits, 4);
    return f;
  }
  std::memcpy(&f, &bits, 4);
  return f * 0x1p112f;  // rebias the exponent by 127 - 15; exact, denormals included
#endif
}
inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {                                  // denormal half: let an addition round it
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
#endif
}

constexpr size_t element_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// dst[0..n) = src[first .. first+n), src being an array of `dtype`.
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

// Runs f(item) for every item of [0, n) on torch's threads.
template <class F>
inline void parallel(const Threads& threads, i64 n, const F& f) {
  if (threads.count <= 1 || n <= 1) {
    for (i64 item = 0; item < n; ++item) f(item);
    return;
  }
  threads.run(
      n,
      [](i64 begin, i64 end, void* context) {
        for (i64 item = begin; item < end; ++item) (*static_cast<const F*>(context))(item);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace fastlstm
