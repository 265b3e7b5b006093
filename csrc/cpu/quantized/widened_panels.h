// Panels of bfloat16 weights in float32: of what many rows take at many steps the weights are widened once a call,
// where they are not so many that reading twice as many bytes would take longer.
#pragma once

#include "cpu/gemm.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {
namespace {

constexpr i64 kPairsOfChain = 64;    // of weights: a chain of multiply-adds has no more
constexpr double kWidenedRate = 31;  // products a cycle
constexpr double kWideningRate = 4;  // bytes a cycle, of weights before and after, in memory that may be new

// Two vectors of weights from one of pairs: the upper half of each float32 is the bfloat16.
FASTLSTM_INLINE void widen(const uint16_t* pairs, Vec<float>& even, Vec<float>& odd) {
  Simd<float>::Words both;
  std::memcpy(&both, pairs, sizeof both);
  even = (Vec<float>)(both << 16);
  odd = (Vec<float>)(both & 0xffff0000u);
}

// A panel in float32, [kColumns / kPanel][2 * pairs][kPanel]: what many rows read several times, at many steps.
constexpr int kPartsOfPanel = kColumns / kPanel<float>;

inline void widen_panel(const uint16_t* w, i64 pairs, float* out) {
  for (int part = 0; part < kPartsOfPanel; ++part)
    for (i64 pair = 0; pair < pairs; ++pair, out += 2 * kPanel<float>)
      for (int k = 0; k < kPanel<float>; k += kLanes<float>) {
        Vec<float> even, odd;
        widen(w + 2 * (pair * kColumns + part * kPanel<float> + k), even, odd);
        store(out + k, even);
        store(out + kPanel<float> + k, odd);
      }
}

// z[r] += product of n rows with such a panel: the same bits.
inline void multiply_widened(i64 n, const float* const* a, const float* panel, i64 pairs, Columns* z) {
  alignas(64) float sums[kPanelRows][kPanel<float>];
  for (int part = 0; part < kPartsOfPanel; ++part, panel += 2 * pairs * kPanel<float>) {
    multiply_panel<float>(n, a, 2 * pairs, panel, sums, false, panel + 2 * pairs * kPanel<float>, 2 * kPairsOfChain);
    for (i64 r = 0; r < n; ++r)
      for (int k = 0; k < kPanel<float>; k += kLanes<float>) {
        float* const to = z[r] + part * kPanel<float> + k;
        store(to, load(to) + load(&sums[r][k]));
      }
  }
}

}  // namespace
}  // namespace fastlstm
