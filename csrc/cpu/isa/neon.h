// aarch64: see isa.h for what each definition means.
//
// Counted by llvm-mca for Neoverse N1, N2, V1, V2 and Apple M4. The inner loop of a tile of 5 rows issues 99% of the
// multiply-adds that these Neoverses can. With 6 rows the sums, the factors of the rows and a row of the panel are more
// than 32 registers: GCC keeps two sums in memory, and 92% are left. Two columns at a time would be no gain: 3 rows of
// all four reach 98% too. So no tile is taller than 5.
#pragma once

#include <arm_neon.h>

namespace fastlstm {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 5;  // 5 rows x 4 gates = 20 of 32 registers hold sums
constexpr int kTallestTile = 5;
constexpr int kUnroll = 1;
constexpr int kChain = 32;  // PyTorch's products are that much more exact here

}  // namespace
}  // namespace fastlstm

#include "cpu/isa/fallback.h"
#include "cpu/isa/vector.h"

namespace fastlstm {
namespace {

FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}

template <class V>
FASTLSTM_INLINE V add_product(V sum, V a, V b) {
  return fma(a, b, sum);
}

// One instruction each, and NaN passes both.
FASTLSTM_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  return (Vec<float>)vmaxq_f32(vminq_f32((float32x4_t)x, vdupq_n_f32(high)), vdupq_n_f32(low));
}

// A division: an estimate of the reciprocal with two corrections is five instructions more, and a sigmoid takes 7%
// longer with it on N1, 15% on V1 and 48% on Apple M4. It gains 8% on N2 and V2.
using fallback::divide;

inline float half_to_float(uint16_t v) {
  __fp16 half;
  std::memcpy(&half, &v, 2);
  return half;
}
inline uint16_t float_to_half(float f) {
  const __fp16 half = __fp16(f);
  uint16_t v;
  std::memcpy(&v, &half, 2);
  return v;
}

using fallback::load_first;
using fallback::multiply_low;
using fallback::store_first;

}  // namespace
}  // namespace fastlstm
