// aarch64: see dots.h. With the dot products of Armv8.2 an instruction adds 16 products of signed bytes. Without them
// four do: products have 16 bits, and neighbours of them are added to sums of 32 bits. With i8mm an instruction adds
// 32, of two rows and two columns.
//
// Products a cycle by llvm-mca, for 8 rows: with i8mm 84 on Neoverse V2 and 42 on N2; with dot products, for 2 rows, 56
// and 28, and 28 on N1; without either 14 and 7.
#pragma once

#include <arm_neon.h>

namespace fastlstm {
namespace {

constexpr int32_t kFlip = 128;

// A sum for each of 4 columns.
struct FourSums {
#if defined(__ARM_FEATURE_DOTPROD)
  int32x4_t sums = vdupq_n_s32(0);

  FASTLSTM_INLINE void add(int8x16_t a, int8x16_t w) { sums = vdotq_s32(sums, a, w); }
  FASTLSTM_INLINE int32x4_t get() const { return sums; }
#else
  int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);  // two sums a column

  FASTLSTM_INLINE void add(int8x16_t a, int8x16_t w) {
    low = vpadalq_s16(low, vmull_s8(vget_low_s8(a), vget_low_s8(w)));
    high = vpadalq_s16(high, vmull_high_s8(a, w));
  }
  FASTLSTM_INLINE int32x4_t get() const { return vpaddq_s32(low, high); }
#endif
};

constexpr int kRegistersOfSums = 16 / int(sizeof(FourSums) / sizeof(int32x4_t));

// `Count` vectors of 4 columns, for R rows.
template <int R, int Count>
FASTLSTM_INLINE void int8_columns(const uint8_t* const (&a)[R], const int8_t* w, i64 groups, Sums* sums, int first) {
  FourSums acc[R][Count];
#pragma GCC unroll 1
  for (i64 g = 0; g < groups; ++g) {
    int8x16_t four[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t bytes;
      std::memcpy(&bytes, a[r] + 4 * g, 4);
      four[r] = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
    }
#pragma GCC unroll 16
    for (int v = 0; v < Count; ++v) {
      const int8x16_t weights = vld1q_s8(w + (kColumns * g + 4 * (first + v)) * 4);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][v].add(four[r], weights);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < R * Count; ++k)
    vst1q_s32(sums[k / Count] + 4 * (first + k % Count), acc[k / Count][k % Count].get());
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

constexpr int kMostRows = 8;

// The same in matrices of two rows and two columns, of which two groups make eight terms. Up to 3 rows take no fewer
// instructions than dot products.
template <int R, int Count>
FASTLSTM_INLINE void int8_matrices(const uint8_t* const (&a)[R], const int8_t* w, i64 groups, Sums* sums, int first) {
  constexpr int P = (R + 1) / 2;
  int32x4_t acc[P][2 * Count];
#pragma GCC unroll 16
  for (int k = 0; k < 2 * P * Count; ++k) acc[k / (2 * Count)][k % (2 * Count)] = vdupq_n_s32(0);
  const auto add = [&](i64 g, const auto& second) FASTLSTM_INLINE_LAMBDA {
    int8x16_t rows[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const uint8_t *even = a[2 * p] + 4 * g, *odd = a[smaller(2 * p + 1, R - 1)] + 4 * g;
      rows[p] = vreinterpretq_s8_u8(vcombine_u8(vld1_u8(even), vld1_u8(odd)));
    }
#pragma GCC unroll 4
    for (int v = 0; v < Count; ++v) {
      const int8_t* at = w + (kColumns * g + 4 * (first + v)) * 4;
      const int32x4_t now = vreinterpretq_s32_s8(vld1q_s8(at)), next = vreinterpretq_s32_s8(second(at));
      const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(now, next));
      const int8x16_t right = vreinterpretq_s8_s32(vzip2q_s32(now, next));
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        acc[p][2 * v] = vmmlaq_s32(acc[p][2 * v], rows[p], left);
        acc[p][2 * v + 1] = vmmlaq_s32(acc[p][2 * v + 1], rows[p], right);
      }
    }
  };
  i64 g = 0;
#pragma GCC unroll 1
  for (; g + 2 <= groups; g += 2) add(g, [](const int8_t* at) { return vld1q_s8(at + 4 * kColumns); });
  // A row has room for another group: its pitch is a multiple of 64.
  if (g < groups) add(g, [](const int8_t*) { return vdupq_n_s8(0); });
#pragma GCC unroll 16
  for (int k = 0; k < R * Count; ++k) {
    const int r = k / Count, v = k % Count;
    const int64x2_t left = vreinterpretq_s64_s32(acc[r / 2][2 * v]);
    const int64x2_t right = vreinterpretq_s64_s32(acc[r / 2][2 * v + 1]);
    const int64x2_t four = r % 2 ? vzip2q_s64(left, right) : vzip1q_s64(left, right);
    vst1q_s32(sums[r] + 4 * (first + v), vreinterpretq_s32_s64(four));
  }
}

#else

constexpr int kMostRows = kRegistersOfSums / 4;

#endif

template <int R>
__attribute__((noinline)) void int8_dots(const uint8_t* const* rows, const int8_t* w, i64 groups, Sums* sums) {
  const uint8_t* a[R];
  for (int r = 0; r < R; ++r) a[r] = rows[r];
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (R > 3) {
    constexpr int kAtOnce = R == 4 ? 4 : 2;
    for (int first = 0; first < kColumns / 4; first += kAtOnce) int8_matrices<R, kAtOnce>(a, w, groups, sums, first);
  } else
#endif
  {
    constexpr int kAtOnce = R == 1 ? kRegistersOfSums : R == 2 ? kRegistersOfSums / 2 : 4;
    for (int first = 0; first < kColumns / 4; first += kAtOnce) int8_columns<R, kAtOnce>(a, w, groups, sums, first);
  }
}

}  // namespace
}  // namespace fastlstm
