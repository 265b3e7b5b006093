// aarch64: see isa.h for what each definition means.
#pragma once

#include <arm_neon.h>

namespace fastlstm {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
constexpr int kTallestTile = 6;
constexpr int kUnroll = 1;

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

using fallback::clamp;
using fallback::divide;
using fallback::float_to_half;
using fallback::half_to_float;
using fallback::load_first;
using fallback::multiply_low;

}  // namespace
}  // namespace fastlstm
