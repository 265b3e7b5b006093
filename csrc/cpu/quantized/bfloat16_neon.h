// aarch64 with the bfloat16 products of Armv8.6. See bfloat16.h. BFMMLA adds 32 products, of two rows and two columns
// with two pairs of terms each; BFDOT adds 8, a pair of each of 4 columns. Arm defines the sums of BFMMLA as those of a
// BFDOT with the first pair and then one with the second, each with the same roundings (not to nearest: to odd). So a
// row by itself may take BFDOT, which needs no pairs of columns side by side, and its bits are those it has beside
// others.
//
// Products a cycle by llvm-mca: of 8 rows 51 on Neoverse V1 and V2 and 25 on N2, of one row 23 and 16. Weights that are
// widened to float32 give 12 and 6, of one row 7 and 4.
#pragma once

#include <arm_neon.h>

#include "cpu/quantized/bfloat16_rows.h"

namespace fastlstm {
namespace {

constexpr double kBfloat16Rate = 40;  // between Neoverse N2 and V2
constexpr int kBfloat16Most = 8;
constexpr int kPaired = 2;
constexpr bool kScaled = false;
constexpr Preparing kPreparing{};
using Bfloat16Rows = RoundedRows<2>;

// term(pair, second) for every two pairs; second(w) reads what the panel has of the second one. An odd last pair has
// zeros beside it, as the rows have.
template <class Term>
FASTLSTM_INLINE void for_two_pairs(i64 pairs, const Term& term) {
  i64 pair = 0;
#pragma GCC unroll 1
  for (; pair + 2 <= pairs; pair += 2)
    term(pair, [](const uint16_t* w) FASTLSTM_INLINE_LAMBDA { return vld1q_u16(w + 2 * kColumns); });
  if (pair < pairs) term(pair, [](const uint16_t*) FASTLSTM_INLINE_LAMBDA { return vdupq_n_u16(0); });
}

// All columns of one row.
inline void bfloat16_row(const uint16_t* a, const uint16_t* w, i64 pairs, Columns& sums) {
  constexpr int kVectors = kColumns / 4;
  float32x4_t acc[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) acc[v] = vdupq_n_f32(0);
  for_two_pairs(pairs, [&](i64 pair, const auto& second) FASTLSTM_INLINE_LAMBDA {
    const bfloat16x4_t row = vreinterpret_bf16_u16(vld1_u16(a + 4 * pair));
    const uint16_t* at = w + 2 * pair * kColumns;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      acc[v] = vbfdotq_lane_f32(acc[v], vreinterpretq_bf16_u16(vld1q_u16(at + 8 * v)), row, 0);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      acc[v] = vbfdotq_lane_f32(acc[v], vreinterpretq_bf16_u16(second(at + 8 * v)), row, 1);
  });
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) vst1q_f32(sums + 4 * v, acc[v]);
}

// `Count` vectors of 4 columns, for R rows.
template <int R, int Count>
FASTLSTM_INLINE void bfloat16_columns(const uint16_t* const (&a)[(R + 1) / 2], const uint16_t* w, i64 pairs,
                                      Columns* sums, int first) {
  constexpr int P = (R + 1) / 2;
  float32x4_t acc[P][2 * Count];
#pragma GCC unroll 32
  for (int k = 0; k < P * 2 * Count; ++k) acc[k / (2 * Count)][k % (2 * Count)] = vdupq_n_f32(0);
  for_two_pairs(pairs, [&](i64 pair, const auto& second) FASTLSTM_INLINE_LAMBDA {
    bfloat16x8_t rows[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) rows[p] = vreinterpretq_bf16_u16(vld1q_u16(a[p] + 4 * pair));
#pragma GCC unroll 8
    for (int v = 0; v < Count; ++v) {
      const uint16_t* at = w + 2 * (pair * kColumns + 4 * (first + v));
      const uint32x4_t now = vreinterpretq_u32_u16(vld1q_u16(at)), next = vreinterpretq_u32_u16(second(at));
      const bfloat16x8_t left = vreinterpretq_bf16_u32(vzip1q_u32(now, next));
      const bfloat16x8_t right = vreinterpretq_bf16_u32(vzip2q_u32(now, next));
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        acc[p][2 * v] = vbfmmlaq_f32(acc[p][2 * v], rows[p], left);
        acc[p][2 * v + 1] = vbfmmlaq_f32(acc[p][2 * v + 1], rows[p], right);
      }
    }
  });
#pragma GCC unroll 32
  for (int k = 0; k < R * Count; ++k) {
    const int r = k / Count, v = k % Count;
    const float64x2_t left = vreinterpretq_f64_f32(acc[r / 2][2 * v]);
    const float64x2_t right = vreinterpretq_f64_f32(acc[r / 2][2 * v + 1]);
    const float64x2_t four = r % 2 ? vzip2q_f64(left, right) : vzip1q_f64(left, right);
    vst1q_f32(sums[r] + 4 * (first + v), vreinterpretq_f32_f64(four));
  }
}

template <int R>
__attribute__((noinline)) void tile_dots(const uint16_t* const* rows, const uint16_t* w, const float*, i64 pairs,
                                         Columns* sums) {
  if constexpr (R == 1) {
    bfloat16_row(rows[0], w, pairs, sums[0]);
  } else {
    constexpr int kAtOnce = R == 2 ? 8 : R <= 4 ? 4 : 2;
    const uint16_t* a[(R + 1) / 2];
    for (int p = 0; p < (R + 1) / 2; ++p) a[p] = rows[2 * p];
    for (int first = 0; first < kColumns / 4; first += kAtOnce) bfloat16_columns<R, kAtOnce>(a, w, pairs, sums, first);
  }
}

}  // namespace
}  // namespace fastlstm
