// Products in float16, compiled for AVX-512 with FP16 (pairs.h says what they are). setup.py has the flags.
#include "cpu/float16_chain.h"
#include "cpu/pair_rows.h"

namespace fastlstm {
namespace {

constexpr i64 kColumns = kPanel<float>;

// Of panels: those of weights of 16 bits are at least 2^-133, and what is below 2^-100 is nothing to a product.
constexpr int32_t kLeastExponent = 27;

// The bits of the largest absolute value so far, of 16 columns.
FASTLSTM_INLINE __m512i larger_bits(__m512i largest, Vec<float> x) {
  return _mm512_max_epi32(largest, _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)));
}

// What 16 columns are multiplied by, so that the largest number of each has the power of two `shift`, and what that
// stands for: NaN, if not all of its numbers are finite.
struct ColumnScale {
  Vec<float> factor, scale;
  __m512i power;
  FASTLSTM_INLINE ColumnScale(__m512i largest, int shift, int32_t least) {
    const __m512i found = _mm512_srli_epi32(largest, 23);
    const __m512i exponent =
        _mm512_min_epi32(_mm512_max_epi32(found, _mm512_set1_epi32(least)), _mm512_set1_epi32(253));
    factor = (Vec<float>)_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254 + shift), exponent), 23);
    const __mmask16 strange = _mm512_cmpeq_epi32_mask(found, _mm512_set1_epi32(255));
    power = _mm512_slli_epi32(exponent, 23);
    scale = (Vec<float>)_mm512_mask_mov_epi32(power, strange, _mm512_set1_epi32(0x7fc00000));
  }
};

// Two rows of 16 numbers as pairs of float16.
FASTLSTM_INLINE __m512i pairs_of(Vec<float> first, Vec<float> second) {
  const __m256i low = _mm512_cvtps_ph((__m512)first, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph((__m512)second, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Vector by vector: pair p is written where rows 2p and before were.
void pack(float* panel, i64 K) {
  const i64 pairs = ceil_div(K, 2);
  alignas(64) float scales[kColumns], factors[kColumns];
  for (int k = 0; k < kColumns; k += 16) {
    __m512i largest = _mm512_setzero_si512();
    for (i64 row = 0; row < K; ++row) largest = larger_bits(largest, load(panel + row * kColumns + k));
    const ColumnScale of(largest, kLargestWeight, kLeastExponent);
    store(scales + k, of.scale);
    store(factors + k, of.factor);
  }
  for (i64 pair = 0; pair < pairs; ++pair)
    for (int k = 0; k < kColumns; k += 16) {
      const float* const from = panel + 2 * pair * kColumns + k;
      const Vec<float> factor = load(factors + k);
      const Vec<float> second = 2 * pair + 1 < K ? load(from + kColumns) * factor : Vec<float>{};
      _mm512_storeu_si512(panel + pair * kColumns + k, pairs_of(load(from) * factor, second));
    }
  std::memcpy(panel + pairs * kColumns, scales, sizeof scales);
}

void pack_pairs(float* panel, i64 K) {
  const i64 pairs = ceil_div(K, 2);
  for (int k = 0; k < kColumns; k += 16) {
    __m512i both = _mm512_setzero_si512();
    for (i64 pair = 0; pair < pairs; ++pair) {
      const __m512i bits = _mm512_loadu_si512(panel + pair * kColumns + k);
      both = _mm512_max_epu16(both, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
    }
    const __m512i low = _mm512_slli_epi32(both, 16), high = _mm512_and_si512(both, _mm512_set1_epi32(0x7fff0000));
    const ColumnScale of(_mm512_max_epi32(low, high), kLargestWeight, kLeastExponent);
    const Scaled scaled(of.power);
    for (i64 pair = 0; pair < pairs; ++pair) {
      float* const at = panel + pair * kColumns + k;
      _mm512_storeu_si512(at, scaled(_mm512_loadu_si512(at)));
    }
    store(panel + pairs * kColumns + k, of.scale);
  }
}

void multiply(i64 rows, const PairMatrix& a, const float* const* exact, i64 K, const float* panel, i64 width,
              float (*sums)[kColumns], bool add, const float* next, float least) {
  const i64 pairs = ceil_div(K, 2);
  const auto* w = reinterpret_cast<const uint16_t*>(panel);
  const float* const scales = panel + pairs * kColumns;
  const Division<kPanelRows> part(
      rows, [&](i64 r) { return a.scales[r * a.step]; }, least, [&] { return largest_row(scales, K); });
  alignas(64) float products[kPanelRows][kColumns];
  const uint16_t* at[kPanelRows];
  float *out[kPanelRows], of_rows[kPanelRows];
  for (i64 place = 0; place < rows; ++place) {
    const i64 r = part.row_of[place];
    at[place] = a.data + r * a.pitch;
    out[place] = sums[r];
    of_rows[place] = place < part.count ? a.scales[r * a.step] : 1.0f;
  }
  const PutScaled put{out, scales, of_rows, add};
  with_rows<kPanelVectors>(ceil_div(width, 16), [&](auto vectors) {
    pair_products<Float16Chain, decltype(vectors)::value>(part.count, at, 2, w, pairs, products, put, next);
  });
  for (i64 first = part.count; first < rows; first += kExactRows)
    with_rows<kExactRows>(rows - first, [&](auto count) {
      constexpr int R = decltype(count)::value;
      const float* x[R];
      for (int r = 0; r < R; ++r) x[r] = exact[part.row_of[first + r]];
      const auto number = [&](int r, i64 k) FASTLSTM_INLINE_LAMBDA { return k < K ? x[r][k] : 0.0f; };
      float32_dots<R>(number, w, kAsTheyAre, pairs, products + first);
    });
  for (i64 place = part.count; place < rows; ++place)
    for (int v = 0; v < 4; ++v) put(int(place), v, _mm512_loadu_ps(&products[place][16 * v]));
}

void round_columns(i64 rows, const float* x, i64 pitch, i64 n, i64 width, int largest, uint16_t* to, i64 to_pitch,
                   float* scales) {
  for (i64 k = 0; k < width; k += 16) {
    if (k >= n) {
      store(scales + k, Vec<float>{});
      for (i64 row = 0; row < rows; row += 2) _mm512_storeu_si512(to + row * to_pitch + 2 * k, _mm512_setzero_si512());
      continue;
    }
    __m512i bits = _mm512_setzero_si512();
    for (i64 row = 0; row < rows; ++row) bits = larger_bits(bits, load(x + row * pitch + k));
    const ColumnScale of(bits, largest, 1 + largest);
    store(scales + k, of.scale);
    for (i64 row = 0; row < rows; row += 2) {
      const float* const from = x + row * pitch + k;
      const Vec<float> second = row + 1 < rows ? load(from + pitch) * of.factor : Vec<float>{};
      _mm512_storeu_si512(to + row * to_pitch + 2 * k, pairs_of(load(from) * of.factor, second));
    }
  }
}

void multiply_columns(i64 rows, const uint16_t* a, i64 a_pitch, const float* a_scales, i64 K, const uint16_t* d,
                      const float* d_scales, float* sums, bool add) {
  float* out[kPanelRows];
  column_products<Float16Chain>(rows, a, a_pitch, K, d, [&](i64 first) {
    for (i64 k = 0; k < smaller(kPanelRows, K - first); ++k) out[k] = sums + (first + k) * kColumns;
    return PutScaled{out, d_scales, a_scales + first, add};
  });
}

}  // namespace

extern const PairKernels avx512fp16_products;
const PairKernels avx512fp16_products = {"avx512fp16", 64,       true,     round_row,     pack,
                                         pack_pairs,   put_pair, multiply, round_columns, multiply_columns};

}  // namespace fastlstm
