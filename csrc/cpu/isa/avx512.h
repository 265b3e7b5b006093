// AVX-512 (F, BW, DQ, VL): see isa.h for what each definition means.
#pragma once

#include <immintrin.h>

namespace fastlstm {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 rows x 4 gates = 24 of 32 registers hold sums
constexpr int kTallestTile = 6;
constexpr int kUnroll = 1;
constexpr int kChain = 128;

}  // namespace
}  // namespace fastlstm

#include "cpu/isa/f16c.h"
#include "cpu/isa/vector.h"

namespace fastlstm {
namespace {

FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

template <class V>
FASTLSTM_INLINE V add_product(V sum, V a, V b) {
  return fma(a, b, sum);
}

// Both halves are one instruction each, and NaN, the second operand, passes.
FASTLSTM_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  return (Vec<float>)_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), (__m512)x));
}

// A 14-bit reciprocal and one correction of the quotient: a third of the time of a division.
FASTLSTM_INLINE Vec<float> divide(Vec<float> a, Vec<float> b) {
  const Vec<float> reciprocal = (Vec<float>)_mm512_rcp14_ps((__m512)b);
  const Vec<float> quotient = a * reciprocal;
  return fma(fma(-b, quotient, a), reciprocal, quotient);
}

// The first n numbers, n < kLanes; the memory of other lanes is neither read nor written.
FASTLSTM_INLINE Vec<float> load_first(const float* p, i64 n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FASTLSTM_INLINE Vec<double> load_first(const double* p, i64 n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}

FASTLSTM_INLINE void store_first(float* p, Vec<float> v, i64 n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
FASTLSTM_INLINE void store_first(double* p, Vec<double> v, i64 n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}

FASTLSTM_INLINE Words64 multiply_low(const Words64& a, const Words64& b) {
  return (Words64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}

}  // namespace
}  // namespace fastlstm
