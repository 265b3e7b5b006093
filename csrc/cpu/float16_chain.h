// The inner loop of products in float16, with AVX-512 FP16: of pairs.h, and of bfloat16 weights (quantized/).
#pragma once

#include "cpu/pair_products.h"

namespace fastlstm {
namespace {

constexpr int kFloat16Rows = 6;  // 6 rows x 4 vectors of sums and 4 of weights: 28 of 32 registers
constexpr i64 kPairsOfChain = 32;

// The number whose exponent has these bits.
inline float power_of(int32_t exponent) {
  const int32_t bits = exponent << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// Rounds x [K] to float16 after a division by the power of two of its largest number, which it returns, below zero if
// not all numbers are finite. Past the last number zeros follow, up to a whole vector.
inline float round_row(const float* x, i64 K, uint16_t* to) {
  const auto number = [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA { return n == 16 ? load(x + k) : load_first(x + k, n); };
  __m512i largest = _mm512_setzero_si512();  // the bits of its absolute value
  __mmask16 finite = 0xffff;
  for_vectors<float>(K, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
    const __m512i bits = _mm512_and_si512((__m512i)number(k, n), _mm512_set1_epi32(0x7fffffff));
    const __mmask16 is_finite = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    largest = _mm512_mask_max_epi32(largest, is_finite, largest, bits);
    finite &= is_finite;
  });
  const int32_t exponent = int32_t(smaller(larger(_mm512_reduce_max_epi32(largest) >> 23, 1), 253));
  const Vec<float> inverse = splat(power_of(254 - exponent));
  for_vectors<float>(K, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
    const __m256i halves = _mm512_cvtps_ph((__m512)(number(k, n) * inverse), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), halves);
  });
  return finite == 0xffff ? power_of(exponent) : -power_of(exponent);
}

// Makes pairs of bfloat16 numbers of 16 columns, bit by bit, the float16 numbers that they are when each column is
// divided by a power of two, of float32, and multiplied by 2^kLargestWeight.
class Scaled {
 public:
  explicit FASTLSTM_INLINE Scaled(__m512i powers) {
    // What to subtract from exponents, in both halves: it makes that of the power 15 + kLargestWeight.
    const __m512i exponents = _mm512_srli_epi32(powers, 23);
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

// The upper halves of lanes, float16, as float32: with a bias of 15 instead of 127 in their exponents, so 2^112 is
// missing. What becomes of weights is too large, though.
FASTLSTM_INLINE __m512 small_float(__m512i halves) {
  const __m512i bits = _mm512_and_si512(_mm512_srai_epi32(halves, 3), _mm512_set1_epi32(int32_t(0x8fffe000)));
  return _mm512_castsi512_ps(bits);
}
constexpr float kMissing = 0x1p112f / (1 << kLargestWeight);

// One chain: put(r, v, sum) for vector v < V of (add ? sums[r] : 0) + a[r] times `pairs` pairs of a panel w, times
// 2^-kLargestWeight. Pairs of a[r] are a_step numbers apart. weights(v, bits) makes vector v of a pair, as it lies in
// memory, float16.
template <int R, int V, class Weights, class Put>
FASTLSTM_INLINE void float16_chain(const uint16_t* const (&a)[R], i64 a_step, const uint16_t* w, const Weights& weights,
                                   i64 pairs, const float (*sums)[64], bool add, const Put& put) {
  __m512h acc[R][V];
#pragma GCC unroll 32
  for (int k = 0; k < R * V; ++k) acc[k / V][k % V] = _mm512_setzero_ph();
  i64 at = 0;
#pragma GCC unroll 1
  for (i64 pair = 0; pair < pairs; ++pair, w += 128, at += a_step) {
    __m512h column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = _mm512_castsi512_ph(weights(v, _mm512_loadu_si512(w + 32 * v)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, a[r] + at, 4);
      const __m512h row = _mm512_castsi512_ph(_mm512_set1_epi32(two));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ph(row, column[v], acc[r][v]);
    }
  }
  // The sum of both halves of a lane.
#pragma GCC unroll 32
  for (int k = 0; k < R * V; ++k) {
    const __m512i halves = _mm512_castph_si512(acc[k / V][k % V]);
    const __m512h both = _mm512_add_ph(acc[k / V][k % V], _mm512_castsi512_ph(_mm512_rol_epi32(halves, 16)));
    const __m512 small = small_float(_mm512_castph_si512(both)), missing = _mm512_set1_ps(kMissing);
    const float* const sum = sums[k / V] + k % V * 16;
    put(k / V, k % V, add ? _mm512_fmadd_ps(small, missing, _mm512_loadu_ps(sum)) : _mm512_mul_ps(small, missing));
  }
}

// rows[r] = (add ? rows[r] : 0) + sums times the scales of their columns and of their row.
struct PutScaled {
  float* const* rows;
  const float *columns, *of_rows;
  bool add;
  FASTLSTM_INLINE void operator()(int r, int v, __m512 sum) const {
    const Vec<float> scaled = (Vec<float>)sum * load(columns + 16 * v) * of_rows[r];
    float* const to = rows[r] + 16 * v;
    store(to, add ? load(to) + scaled : scaled);
  }
  PutScaled from(i64 row) const { return {rows + row, columns, of_rows + row, add}; }
};

// sums[r] = product of row r of a, R of them, with a panel, chain by chain.
template <int R, class Weights>
FASTLSTM_INLINE void float16_dots(const uint16_t* const* rows, i64 a_step, const uint16_t* w, const Weights& weights,
                                  i64 pairs, float (*sums)[64]) {
  const uint16_t* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  i64 from = 0;
  do {
    float16_chain<R, 4>(a, a_step, w, weights, smaller(kPairsOfChain, pairs - from), sums, from > 0, PutSums{sums});
    from += kPairsOfChain;
    w += kPairsOfChain * 128;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] += kPairsOfChain * a_step;
  } while (from < pairs);
}

// sums[r] = product of R rows with a panel in float32: number(r, k) is number k of row r, 2 * pairs of them.
template <int R, class Number, class Weights>
FASTLSTM_INLINE void float32_dots(const Number& number, const uint16_t* w, const Weights& weights, i64 pairs,
                                  float (*sums)[64]) {
  __m512 acc[R][4];
#pragma GCC unroll 32
  for (int k = 0; k < R * 4; ++k) acc[k / 4][k % 4] = _mm512_setzero_ps();
#pragma GCC unroll 1
  for (i64 pair = 0; pair < pairs; ++pair, w += 128) {
    __m512 first[R], second[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      first[r] = _mm512_set1_ps(number(r, 2 * pair));
      second[r] = _mm512_set1_ps(number(r, 2 * pair + 1));
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i two = weights(v, _mm512_loadu_si512(w + 32 * v));
      const auto widened = [](__m512i halves) FASTLSTM_INLINE_LAMBDA {
        return _mm512_mul_ps(small_float(halves), _mm512_set1_ps(kMissing));
      };
      const __m512 even = widened(_mm512_slli_epi32(two, 16)), odd = widened(two);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        acc[r][v] = _mm512_fmadd_ps(second[r], odd, _mm512_fmadd_ps(first[r], even, acc[r][v]));
    }
  }
#pragma GCC unroll 32
  for (int k = 0; k < R * 4; ++k) _mm512_storeu_ps(sums[k / 4] + k % 4 * 16, acc[k / 4][k % 4]);
}
constexpr int kExactRows = 4;  // 4 rows x 4 vectors of sums, 8 numbers and 4 of weights

// The power of two of a row's largest number from which on its sums with K weights, the largest of which have the
// powers `scales`, are so large that errors of float16 may show in open gates.
constexpr float kLargeSums = 8;
inline float largest_row(const float* scales, i64 K) {
  const __m512 left = _mm512_max_ps(_mm512_loadu_ps(scales), _mm512_loadu_ps(scales + 16));
  const __m512 right = _mm512_max_ps(_mm512_loadu_ps(scales + 32), _mm512_loadu_ps(scales + 48));
  return kLargeSums / (_mm512_reduce_max_ps(_mm512_max_ps(left, right)) * __builtin_sqrtf(float(K)));
}

// Of panels that are float16 already.
constexpr auto kAsTheyAre = [](int, __m512i bits) FASTLSTM_INLINE_LAMBDA { return bits; };

// Of a panel that is float16 already: what pair_products.h takes.
struct Float16Chain {
  static constexpr i64 kPairs = kPairsOfChain;
  static constexpr int kRows = kFloat16Rows;
  template <int R, int V, class Put>
  __attribute__((noinline)) static void add(const uint16_t* const* rows, i64 a_step, i64 pair, const uint16_t* w,
                                            i64 pairs, const float (*sums)[64], const Put& put, Ahead) {
    const uint16_t* a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = rows[r] + pair * a_step;
    float16_chain<R, V>(a, a_step, w, kAsTheyAre, pairs, sums, pair > 0, put);
  }
};

}  // namespace
}  // namespace fastlstm
