// Products in bfloat16, compiled for AVX-512 with BF16 (pairs.h says what they are). setup.py has the flags.
#include "cpu/bfloat16_chain.h"

namespace fastlstm {
namespace {

constexpr i64 kColumns = kPanel<float>;

// To nearest even; NaN stays NaN, and what is smaller than 2^-126 becomes zero.
FASTLSTM_INLINE __m256i bfloat16_of(Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

FASTLSTM_INLINE void store_rounded(uint16_t* to, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bfloat16_of(x));
}

// Two rows of 16 numbers as pairs.
FASTLSTM_INLINE __m512i pairs_of(Vec<float> first, Vec<float> second) {
  const __m512i low = _mm512_cvtepu16_epi32(bfloat16_of(first)), high = _mm512_cvtepu16_epi32(bfloat16_of(second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

float round_row(const float* x, i64 K, uint16_t* to) {
  i64 k = 0;
  for (; k + 16 <= K; k += 16) store_rounded(to + k, load(x + k));
  if (k < K) store_rounded(to + k, load_first(x + k, K - k));
  return 1;
}

// What a panel ends with: 1 for each column, or NaN if not all of its numbers are finite, which are pairs by now.
void put_scales(float* panel, i64 pairs) {
  for (int k = 0; k < kColumns; k += 16) {
    __m512i largest = _mm512_setzero_si512();
    for (i64 pair = 0; pair < pairs; ++pair) {
      const __m512i bits = _mm512_loadu_si512(panel + pair * kColumns + k);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
    }
    const __m512i low = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(largest, 16);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(_mm512_max_epi32(low, high), _mm512_set1_epi32(0x7f80));
    store(panel + pairs * kColumns + k,
          (Vec<float>)_mm512_mask_mov_ps(_mm512_set1_ps(__builtin_nanf("")), finite, _mm512_set1_ps(1)));
  }
}

void pack(float* panel, i64 K) {
  const i64 pairs = ceil_div(K, 2);
  for (i64 pair = 0; pair < pairs; ++pair)
    for (int k = 0; k < kColumns; k += 16) {
      const float* const from = panel + 2 * pair * kColumns + k;
      const Vec<float> second = 2 * pair + 1 < K ? load(from + kColumns) : Vec<float>{};
      _mm512_storeu_si512(panel + pair * kColumns + k, pairs_of(load(from), second));
    }
  put_scales(panel, pairs);
}

void pack_pairs(float* panel, i64 K) { put_scales(panel, ceil_div(K, 2)); }

void multiply(i64 rows, const PairMatrix& a, const float* const*, i64 K, const float* panel, i64 width,
              float (*sums)[kColumns], bool add, const float* next, float) {
  alignas(64) float products[kPanelRows][kColumns];
  const uint16_t* at[kPanelRows];
  for (i64 r = 0; r < rows; ++r) at[r] = a.data + r * a.pitch;
  with_rows<kPanelVectors>(ceil_div(width, 16), [&](auto vectors) {
    pair_products<Bfloat16Chain, decltype(vectors)::value>(rows, at, 2, reinterpret_cast<const uint16_t*>(panel),
                                                           ceil_div(K, 2), products, PutAdded{sums, add}, next);
  });
}

void round_columns(i64 rows, const float* x, i64 pitch, i64 n, i64 width, int, uint16_t* to, i64 to_pitch, float*) {
  for (i64 row = 0; row < rows; row += 2)
    for (i64 k = 0; k < width; k += 16) {
      const float* const from = x + row * pitch + k;
      const Vec<float> first = k < n ? load(from) : Vec<float>{};
      const Vec<float> second = k < n && row + 1 < rows ? load(from + pitch) : Vec<float>{};
      _mm512_storeu_si512(to + row * to_pitch + 2 * k, pairs_of(first, second));
    }
}

void multiply_columns(i64 rows, const uint16_t* a, i64 a_pitch, const float*, i64 K, const uint16_t* d, const float*,
                      float* sums, bool add) {
  column_products<Bfloat16Chain>(rows, a, a_pitch, K, d, [&](i64 first) {
    return PutAdded{reinterpret_cast<float (*)[kColumns]>(sums) + first, add};
  });
}

}  // namespace

extern const PairKernels avx512bf16_products;
const PairKernels avx512bf16_products = {"avx512bf16", 40,       false,    round_row,     pack,
                                         pack_pairs,   put_pair, multiply, round_columns, multiply_columns};

}  // namespace fastlstm
