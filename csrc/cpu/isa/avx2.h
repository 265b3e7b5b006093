// AVX2 with FMA: see isa.h for what each definition means.
#pragma once

#include <immintrin.h>

namespace fastlstm {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;     // 3 rows x 4 gates = 12 of 16 registers hold sums
constexpr int kTallestTile = 5;  // taller tiles take two gates at a time
constexpr int kUnroll = 2;
constexpr int kChain = 128;

}  // namespace
}  // namespace fastlstm

#include "cpu/isa/f16c.h"
#include "cpu/isa/vector.h"

namespace fastlstm {
namespace {

FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

// The instruction is spelled out: left alone, GCC reads operands again from memory in every instruction, or moves sums
// between registers. That is up to a fifth slower.
template <class V>
FASTLSTM_INLINE V add_product(V sum, V a, V b) {
  if constexpr (sizeof(sum[0]) == sizeof(float))
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}

// Both halves are one instruction each, and NaN, the second operand, passes.
FASTLSTM_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), (__m256)x));
}

using fallback::divide;

// A mask of n lanes: the sign of each lane counts.
FASTLSTM_INLINE __m256i first_lanes(__m256i lane, i64 n) { return _mm256_sub_epi32(lane, _mm256_set1_epi32(int(n))); }
FASTLSTM_INLINE __m256i first_floats(i64 n) { return first_lanes(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), n); }
FASTLSTM_INLINE __m256i first_doubles(i64 n) { return first_lanes(_mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), n); }
FASTLSTM_INLINE Vec<float> load_first(const float* p, i64 n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_floats(n));
}
FASTLSTM_INLINE Vec<double> load_first(const double* p, i64 n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_doubles(n));
}
FASTLSTM_INLINE void store_first(float* p, Vec<float> v, i64 n) { _mm256_maskstore_ps(p, first_floats(n), (__m256)v); }
FASTLSTM_INLINE void store_first(double* p, Vec<double> v, i64 n) {
  _mm256_maskstore_pd(p, first_doubles(n), (__m256d)v);
}

FASTLSTM_INLINE Words64 multiply_low(const Words64& a, const Words64& b) {
  return (Words64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

}  // namespace
}  // namespace fastlstm
