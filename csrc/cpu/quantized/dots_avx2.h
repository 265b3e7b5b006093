// AVX2: see dots.h. With AVX-VNNI an instruction adds 32 products. Without it numbers are widened to 16 bits, of which
// one adds 16: the instruction that multiplies bytes would saturate.
#pragma once

namespace fastlstm {
namespace {

constexpr int32_t kFlip = 0;

inline int32_t four_at(const uint8_t* a, i64 group) {
  int32_t four;
  std::memcpy(&four, a + 4 * group, 4);
  return four;
}

#if defined(__AVXVNNI__)

constexpr int kMostRows = 3;

// `Count` vectors of 8 columns, for R rows.
template <int R, int Count>
FASTLSTM_INLINE void int8_columns(const uint8_t* const* a, const int8_t* w, i64 groups, Sums* sums, int first) {
  __m256i acc[R][Count];
#pragma GCC unroll 16
  for (int k = 0; k < R * Count; ++k) acc[k / Count][k % Count] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (i64 g = 0; g < groups; ++g) {
    __m256i four[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) four[r] = _mm256_set1_epi32(four_at(a[r], g));
#pragma GCC unroll 8
    for (int v = 0; v < Count; ++v) {
      const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + (8 * g + first + v) * 32));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][v] = _mm256_dpbusd_avx_epi32(acc[r][v], four[r], weights);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < R * Count; ++k)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[k / Count] + 8 * (first + k % Count)),
                        acc[k / Count][k % Count]);
}

template <int R>
constexpr int kVectorsAtOnce = R == 1 ? 8 : 4;

#else

constexpr int kMostRows = 2;

template <int R, int Count>
FASTLSTM_INLINE void int8_columns(const uint8_t* const* a, const int8_t* w, i64 groups, Sums* sums, int first) {
  __m256i acc[R][2 * Count];  // 4 columns each, two sums a column
#pragma GCC unroll 16
  for (int k = 0; k < 2 * R * Count; ++k) acc[k / (2 * Count)][k % (2 * Count)] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (i64 g = 0; g < groups; ++g) {
    __m256i four[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) four[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(four_at(a[r], g)));
#pragma GCC unroll 8
    for (int half = 0; half < 2 * Count; ++half) {
      const int8_t* at = w + (8 * g + first) * 32 + half * 16;
      const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(four[r], weights));
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < R * Count; ++k) {
    const int r = k / Count, v = k % Count;
    const __m256i pairs = _mm256_hadd_epi32(acc[r][2 * v], acc[r][2 * v + 1]);  // columns 0 1 4 5 2 3 6 7
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[r] + 8 * (first + v)), _mm256_permute4x64_epi64(pairs, 0xd8));
  }
}

template <int R>
constexpr int kVectorsAtOnce = R == 1 ? 4 : 2;

#endif

template <int R>
__attribute__((noinline)) void int8_dots(const uint8_t* const* rows, const int8_t* w, i64 groups, Sums* sums) {
  const uint8_t* a[R];
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  for (int first = 0; first < 8; first += kVectorsAtOnce<R>)
    int8_columns<R, kVectorsAtOnce<R>>(a, w, groups, sums, first);
}

}  // namespace
}  // namespace fastlstm
