// The inner loop of products in bfloat16, with AVX512_BF16: of pairs.h, and of bfloat16 weights (quantized/). An
// instruction adds two products to each float32 of a vector. AMD's cores start as many of them as of float32
// multiply-adds, so they make twice as many products; Intel's start half as many or fewer, and gain nothing.
#pragma once

#include "cpu/pair_products.h"

namespace fastlstm {
namespace {

// sums = (add ? sums : 0) + the sums of a product.
struct PutAdded {
  float (*sums)[kPanel<float>];
  bool add;
  FASTLSTM_INLINE void operator()(int r, int v, __m512 sum) const {
    float* const to = sums[r] + 16 * v;
    _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + sum : sum);
  }
  PutAdded from(i64 row) const { return {sums + row, add}; }
};

// What pair_products.h takes.
struct Bfloat16Chain {
  static constexpr i64 kPairs = 128;  // 32 kB of a panel
  static constexpr int kRows = 6;     // 6 rows x 4 vectors of sums and 4 of weights: 28 of 32 registers

  // The pairs come in two halves, each a sum of its own. Of one or two rows both are added up at the same time, because
  // the sums of one half alone would wait for each other.
  template <int R, int V, class Put>
  __attribute__((noinline)) static void add(const uint16_t* const* rows, i64 a_step, i64 pair, const uint16_t* w,
                                            i64 pairs, const float (*sums)[64], const Put& put, Ahead next) {
    constexpr int kHalves = R <= 2 ? 2 : 1;
    const i64 half = ceil_div(pairs, 2);
    const uint16_t* a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = rows[r] + pair * a_step;
    const auto add_pair = [&](i64 k, __m512(&to)[R][V]) FASTLSTM_INLINE_LAMBDA {
      __m512bh weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + (4 * k + v) * 32);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t two;
        std::memcpy(&two, a[r] + k * a_step, 4);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[r][v] = _mm512_dpbf16_ps(to[r][v], weights[v], row);
      }
    };
    alignas(64) float first_half[kHalves == 1 ? R : 1][V * 16];
#pragma GCC unroll 1
    for (int part = 0; part < 2 / kHalves; ++part) {
      const i64 begin = part * half, end = kHalves == 2 ? pairs / 2 : part == 0 ? half : pairs;
      __m512 acc[kHalves][R][V];
#pragma GCC unroll 64
      for (int k = 0; k < kHalves * R * V; ++k) acc[k / (R * V)][k / V % R][k % V] = _mm512_setzero_ps();
#pragma GCC unroll 1
      for (i64 k = begin; k < end; ++k) {
        if constexpr (kHalves == 1) next.fetch();
        add_pair(k, acc[0]);
        if constexpr (kHalves == 2) add_pair(k + half, acc[1]);
      }
      if (kHalves == 2 && pairs % 2) add_pair(half - 1, acc[0]);
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k) {
        const int r = k / V, v = k % V;
        if (kHalves == 1 && part == 0) {
          _mm512_storeu_ps(first_half[kHalves == 1 ? r : 0] + 16 * v, acc[0][r][v]);
          continue;
        }
        __m512 total;
        if constexpr (kHalves == 2)
          total = acc[0][r][v] + acc[1][r][v];
        else
          total = _mm512_loadu_ps(first_half[r] + 16 * v) + acc[0][r][v];
        put(r, v, pair > 0 ? _mm512_loadu_ps(sums[r] + 16 * v) + total : total);
      }
    }
  }
};

}  // namespace
}  // namespace fastlstm
