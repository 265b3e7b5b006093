// AVX-512 with BF16: an instruction adds 32 products. See bfloat16.h. AMD's cores are said to start as many of them as
// of float32 multiply-adds, which are 16 products. Intel's start half as many or fewer: nothing is gained there.
#pragma once

#include "cpu/quantized/bfloat16_rows.h"

namespace fastlstm {
namespace {

constexpr double kBfloat16Rate = 56;  // of two such instructions a cycle, as on Zen 5
constexpr int kBfloat16Most = 6;      // 6 rows x 4 vectors of sums and 4 of weights: 28 of 32 registers
constexpr int kPaired = 1;
constexpr bool kScaled = false;
constexpr Preparing kPreparing{};
using Bfloat16Rows = RoundedRows<1>;

// Pairs come in two halves, each a sum of its own: of one or two rows both are added up at the same time, because the
// sums of one half alone would wait for each other.
template <int R>
__attribute__((noinline)) void bfloat16_dots(const uint16_t* const* rows, const uint16_t* w, const float*, i64 pairs,
                                             Columns* sums) {
  constexpr int kHalves = R <= 2 ? 2 : 1;
  const i64 half = ceil_div(pairs, 2);
  const uint16_t* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  const auto add = [&](i64 pair, __m512(&to)[R][4]) FASTLSTM_INLINE_LAMBDA {
    __m512bh weights[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + (4 * pair + v) * 32);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, a[r] + 2 * pair, 4);
      const __m512bh activations = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) to[r][v] = _mm512_dpbf16_ps(to[r][v], weights[v], activations);
    }
  };
#pragma GCC unroll 1
  for (int part = 0; part < 2 / kHalves; ++part) {
    const i64 begin = part * half, end = kHalves == 2 ? pairs / 2 : part == 0 ? half : pairs;
    __m512 acc[kHalves][R][4];
#pragma GCC unroll 64
    for (int k = 0; k < kHalves * R * 4; ++k) acc[k / (R * 4)][k / 4 % R][k % 4] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (i64 pair = begin; pair < end; ++pair) {
      add(pair, acc[0]);
      if constexpr (kHalves == 2) add(pair + half, acc[1]);
    }
    if (kHalves == 2 && pairs % 2) add(half - 1, acc[0]);
#pragma GCC unroll 32
    for (int k = 0; k < R * 4; ++k) {
      float* sum = sums[k / 4] + k % 4 * 16;
      __m512 total = acc[0][k / 4][k % 4];
      if constexpr (kHalves == 2) total += acc[1][k / 4][k % 4];
      if (part > 0) total = _mm512_loadu_ps(sum) + total;
      _mm512_storeu_ps(sum, total);
    }
  }
}

}  // namespace
}  // namespace fastlstm
