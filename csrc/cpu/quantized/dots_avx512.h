// AVX-512 with VNNI: an instruction adds 64 products. See dots.h.
#pragma once

namespace fastlstm {
namespace {

constexpr int kMostRows = 6;  // 6 rows x 4 vectors of sums, 4 of weights, 1 of activations: 29 of 32 registers
constexpr int32_t kFlip = 0;

template <int R>
__attribute__((noinline)) void int8_dots(const uint8_t* const* rows, const int8_t* w, i64 groups, Sums* sums) {
  constexpr int kChains = R == 1 ? 2 : 1;  // one row alone would wait for its sums
  const uint8_t* a[R];
  __m512i acc[kChains][R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    a[r] = rows[r];
#pragma GCC unroll 8
    for (int v = 0; v < 4 * kChains; ++v) acc[v / 4][r][v % 4] = _mm512_setzero_si512();
  }
  const auto term = [&](i64 g, __m512i(&to)[R][4]) FASTLSTM_INLINE_LAMBDA {
    __m512i weights[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) weights[v] = _mm512_loadu_si512(w + (4 * g + v) * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, a[r] + 4 * g, 4);
      const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) to[r][v] = _mm512_dpbusd_epi32(to[r][v], activations, weights[v]);
    }
  };
  i64 g = 0;
#pragma GCC unroll 1
  for (; g + kChains <= groups; g += kChains)
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) term(g + chain, acc[chain]);
  if (kChains > 1 && g < groups) term(g, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      _mm512_storeu_si512(sums[r] + 16 * v,
                          kChains > 1 ? _mm512_add_epi32(acc[0][r][v], acc[kChains - 1][r][v]) : acc[0][r][v]);
}

}  // namespace
}  // namespace fastlstm
