// Any other CPU, and x86 without AVX2: see isa.h for what each definition means.
#pragma once

namespace fastlstm {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 3;
constexpr int kTallestTile = 5;
constexpr int kUnroll = 1;
constexpr int kChain = 128;

}  // namespace
}  // namespace fastlstm

#include "cpu/isa/fallback.h"
#include "cpu/isa/vector.h"

namespace fastlstm {
namespace {

FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

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
using fallback::store_first;

}  // namespace
}  // namespace fastlstm
