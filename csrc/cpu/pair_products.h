// Products of rows of 16-bit pairs with a panel of them, [pairs][64][2], for any instruction that takes pairs. Rows and
// panels as in pairs.h.
#pragma once

#include "cpu/gemm.h"
#include "cpu/pairs.h"

namespace fastlstm {
namespace {

// Puts the sums of a product where they are.
struct PutSums {
  float (*sums)[kPanel<float>];
  FASTLSTM_INLINE void operator()(int r, int v, __m512 sum) const { _mm512_storeu_ps(sums[r] + 16 * v, sum); }
  PutSums from(i64 row) const { return {sums + row}; }
};

// put(r, v, sum) for vector v < V of the product of row r of a, n of them, with a panel; sums: what is left from chain
// to chain. Pairs of a row are a_step numbers apart. All rows pass over a part of the panel, one chain, while that is
// in L1. next: the panel that is read after this one. Chain has the pairs of a part, the rows that it takes together,
// and a function that is not inlined, so that one copy serves every product:
//
//   add<R, V>(a, a_step, pair, w, pairs, sums, put, next)
//     put(r, v, (pair > 0 ? sums[r] : 0) + the sum of `pairs` pairs of a[r], from `pair` on, with those of the panel
//     from w on), v < V. It fetches `next` meanwhile, if that is of use.
template <class Chain, int V = kPanelVectors, class Put>
inline void pair_products(i64 n, const uint16_t* const* a, i64 a_step, const uint16_t* w, i64 pairs,
                          float (*sums)[kPanel<float>], const Put& put, const void* next) {
  const i64 parts = ceil_div(n, Chain::kRows);
  i64 pair = 0;
  do {
    const i64 length = smaller(Chain::kPairs, pairs - pair);
    const auto* ahead = static_cast<const char*>(pair + length < pairs ? w + length * 128 : next);
    for (i64 part = 0; part < parts; ++part) {
      const i64 begin = part * n / parts, end = (part + 1) * n / parts;
      with_rows<Chain::kRows>(end - begin, [&](auto count) {
        constexpr int R = decltype(count)::value;
        // Each tile of rows fetches its share of what follows.
        const i64 step = round_up(ceil_div(i64(256) * R, n), 64);
        const Ahead share{ahead + begin * length * step / R, step};
        if (pair + length < pairs)
          Chain::template add<R, V>(a + begin, a_step, pair, w, length, sums + begin, PutSums{sums + begin}, share);
        else
          Chain::template add<R, V>(a + begin, a_step, pair, w, length, sums + begin, put.from(begin), share);
      });
    }
    pair += length;
    w += length * 128;
  } while (pair < pairs);
}

// Products of K columns of a, pairs of rows at a_pitch, with 64 columns d of `rows` rows. put_from(first): what puts
// the sums of columns of a from `first` on, up to kPanelRows.
template <class Chain, class PutFrom>
inline void column_products(i64 rows, const uint16_t* a, i64 a_pitch, i64 K, const uint16_t* d,
                            const PutFrom& put_from) {
  const i64 parts = ceil_div(K, kPanelRows);
  alignas(64) float products[kPanelRows][kPanel<float>];
  const uint16_t* at[kPanelRows];
  for (i64 part = 0; part < parts; ++part) {
    const i64 begin = part * K / parts, end = (part + 1) * K / parts;
    for (i64 k = begin; k < end; ++k) at[k - begin] = a + 2 * k;
    pair_products<Chain>(end - begin, at, 2 * a_pitch, d, ceil_div(rows, 2), products, put_from(begin), d);
  }
}

// PairKernels::put_pair.
inline void put_pair(const uint16_t* first, const uint16_t* second, i64 n, i64 pair, i64 K, float* panels) {
  for (i64 k = 0; k < round_up(n, kPanel<float>); k += 16) {
    const i64 lanes = larger(0, smaller(16, n - k));
    const auto row = [&](const uint16_t* from) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << lanes) - 1), from + k));
    };
    float* const to = panels + k / kPanel<float> * K * kPanel<float> + pair * kPanel<float> + k % kPanel<float>;
    _mm512_storeu_si512(to, _mm512_or_si512(row(first), second ? _mm512_slli_epi32(row(second), 16) : __m512i{}));
  }
}

}  // namespace
}  // namespace fastlstm
