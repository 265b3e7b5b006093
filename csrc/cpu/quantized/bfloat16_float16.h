// AVX-512 with FP16: twice as many multiply-adds as of float32. See bfloat16.h.
//
// A bfloat16 has fewer bits than a float16 but a larger range. So weights are divided by the power of two of the
// largest one of their column, and activations, which are rounded, by that of their row: of both, what is smaller than
// 2^-20 of the largest one may be lost. A chain of 32 terms is summed in float16, and chains in float32.
#pragma once

#include "cpu/quantized/bfloat16.h"

namespace fastlstm {
namespace {

constexpr double kBfloat16Rate = 36;
constexpr int kBfloat16Most = 6;  // 6 rows x 4 vectors of sums and 4 of weights: 28 of 32 registers
constexpr int kPaired = 1;
constexpr bool kScaled = true;

// Panels of scaled weights.
constexpr Preparing kPreparing{58, 2, 4, 1, kBfloat16Most};

constexpr int kLargestWeight = 7;  // they are below 2^8, activations below 2, sums of 64 products below 2^15
constexpr i64 kPairsOfChain = 32;

// Rows of activations, each by itself. A row with a NaN or an infinite number has the scale NaN.
class Bfloat16Rows {
 public:
  Bfloat16Rows() = default;
  Bfloat16Rows(i64 rows, i64 K)
      : K_(K), pitch_(round_up(K, 32) + 32),
        block_(Buffer<uint16_t>::bytes(rows * pitch_) + Buffer<float>::bytes(rows)) {
    char* at = block_.get();
    data_ = Buffer<uint16_t>(at, rows * pitch_);
    scale_ = Buffer<float>(at, rows);
  }

  const uint16_t* data(i64 row) const { return &data_[row * pitch_]; }
  float scale(i64 row) const { return scale_[row]; }

  // Past the last number zeros follow, up to a whole vector.
  void put(i64 row, const float* x) {
    __m512i largest = _mm512_setzero_si512();  // the bits of its absolute value
    const auto number = [&](i64 k, i64 n)
                            FASTLSTM_INLINE_LAMBDA { return n == 16 ? load(x + k) : load_first(x + k, n); };
    for_vectors<float>(K_, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      largest = _mm512_max_epi32(largest, _mm512_and_si512((__m512i)number(k, n), _mm512_set1_epi32(0x7fffffff)));
    });
    const int32_t found = _mm512_reduce_max_epi32(largest) >> 23, exponent = int32_t(smaller(larger(found, 1), 253));
    scale_[row] = found == 255 ? __builtin_nanf("") : power(exponent);
    const Vec<float> inverse = splat(power(254 - exponent));
    for_vectors<float>(K_, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      const __m256i halves = _mm512_cvtps_ph((__m512)(number(k, n) * inverse), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(&data_[row * pitch_ + k]), halves);
    });
  }

 private:
  static float power(int32_t exponent) {
    const int32_t bits = exponent << 23;
    float of;
    std::memcpy(&of, &bits, sizeof of);
    return of;
  }

  i64 K_ = 0, pitch_ = 0;
  Buffer<char> block_;
  Buffer<uint16_t> data_;
  Buffer<float> scale_;
};

// Makes bfloat16 weights of 16 columns, in pairs, the float16 that they are when they are scaled.
class Scaled {
 public:
  FASTLSTM_INLINE Scaled() = default;
  explicit FASTLSTM_INLINE Scaled(const float* scales) {
    // What to subtract from exponents, in both halves: it makes that of the scale 15 + kLargestWeight.
    const __m512i exponents = _mm512_srli_epi32(_mm512_loadu_si512(scales), 23);
    const __m512i less = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(15 + kLargestWeight)), 7);
    less_ = _mm512_or_si512(_mm512_and_si512(less, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(less, 16));
  }
  FASTLSTM_INLINE __m512i operator()(__m512i w) const {
    const __m512i unsigned_bits = _mm512_set1_epi16(0x7fff);
    const __m512i size = _mm512_slli_epi16(_mm512_subs_epu16(_mm512_and_si512(w, unsigned_bits), less_), 3);
    return _mm512_ternarylogic_epi32(unsigned_bits, size, w, 0xca);  // the sign of w
  }

 private:
  __m512i less_;
};

// One chain: sums[r] = (add ? sums[r] : 0) + a[r] times `pairs` pairs of a panel, prepared or not.
template <int R, bool prepared>
FASTLSTM_INLINE void float16_chain(const uint16_t* const (&a)[R], const uint16_t* w, const Scaled (&scaled)[4],
                                   i64 pairs, Columns* sums, bool add) {
  __m512h acc[R][4];
#pragma GCC unroll 32
  for (int k = 0; k < R * 4; ++k) acc[k / 4][k % 4] = _mm512_setzero_ph();
#pragma GCC unroll 1
  for (i64 pair = 0; pair < pairs; ++pair, w += 2 * kColumns) {
    __m512h weights[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i bits = _mm512_loadu_si512(w + 32 * v);
      weights[v] = _mm512_castsi512_ph(prepared ? bits : scaled[v](bits));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, a[r] + 2 * pair, 4);
      const __m512h activations = _mm512_castsi512_ph(_mm512_set1_epi32(two));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_fmadd_ph(activations, weights[v], acc[r][v]);
    }
  }
  // The sum of both halves of a lane. The upper one becomes a float32: with a bias of 15 instead of 127 in its
  // exponent, so 2^112 is missing, and weights are too large.
#pragma GCC unroll 32
  for (int k = 0; k < R * 4; ++k) {
    const __m512i halves = _mm512_castph_si512(acc[k / 4][k % 4]);
    const __m512h both = _mm512_add_ph(acc[k / 4][k % 4], _mm512_castsi512_ph(_mm512_rol_epi32(halves, 16)));
    const __m512i upper = _mm512_srai_epi32(_mm512_castph_si512(both), 3);
    const __m512 small = _mm512_castsi512_ps(_mm512_and_si512(upper, _mm512_set1_epi32(int32_t(0x8fffe000))));
    const __m512 missing = _mm512_set1_ps(0x1p112f / (1 << kLargestWeight));
    float* sum = sums[k / 4] + k % 4 * 16;
    _mm512_storeu_ps(sum, add ? _mm512_fmadd_ps(small, missing, _mm512_loadu_ps(sum)) : _mm512_mul_ps(small, missing));
  }
}

template <int R, bool prepared>
__attribute__((noinline)) void float16_dots(const uint16_t* const* rows, const uint16_t* w, const Scaled (&scaled)[4],
                                            i64 pairs, Columns* sums) {
  const uint16_t* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  i64 from = 0;
  do {
    float16_chain<R, prepared>(a, w, scaled, smaller(kPairsOfChain, pairs - from), sums, from > 0);
    from += kPairsOfChain;
    w += kPairsOfChain * 2 * kColumns;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] += kPairsOfChain * 2;
  } while (from < pairs);
}

template <int R>
void bfloat16_dots(const uint16_t* const* a, const uint16_t* w, const float* scales, i64 pairs, Columns* sums) {
  const Scaled scaled[4] = {Scaled(scales), Scaled(scales + 16), Scaled(scales + 32), Scaled(scales + 48)};
  float16_dots<R, false>(a, w, scaled, pairs, sums);
}

inline void prepared_dots(i64 n, const uint16_t* const* a, const void* data, i64 pairs, Columns* sums) {
  const auto* panel = static_cast<const uint16_t*>(data);
  with_rows<kBfloat16Most>(n,
                           [&](auto count) { float16_dots<decltype(count)::value, true>(a, panel, {}, pairs, sums); });
}

inline void prepare_panel(const uint16_t* w, const float* scales, i64 pairs, void* to) {
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int v = 0; v < 4; ++v) {
    const Scaled scaled(scales + 16 * v);
    for (i64 pair = 0; pair < pairs; ++pair) {
      const i64 at = 2 * pair * kColumns + 32 * v;
      _mm512_storeu_si512(out + at, scaled(_mm512_loadu_si512(w + at)));
    }
  }
}

}  // namespace
}  // namespace fastlstm
