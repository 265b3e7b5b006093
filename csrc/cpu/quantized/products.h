// Products of rows of activations with panels of quantised weights, for both kinds of weights: what the lanes of
// forward.h are made with.
//
//   Rows       activations [n][K] as the product takes them; put(row, x) writes one
//   multiply   z[r][column] += the product of row first + r and the column of a panel, for n rows
//
// Each sum is the same whatever rows are computed with it.
#pragma once

#include "cpu/gemm.h"
#include "cpu/quantized/cell.h"
#include "cpu/quantized/int8_rows.h"

namespace fastlstm {
namespace {

// What the gate sums of a panel are, of one row.
using Columns = float[kColumns];

// A matrix of weights in panels. numbers: what `rows` has of it, [panel][pitch].
struct Panels {
  const void* data;
  const float* numbers;
  i64 pitch, K;
};

// 8-bit weights: exact sums of products, then z = fma(scale of the row * scale of the column, sum, z).
struct Int8 {
  using Rows = Int8Rows;
  static constexpr i64 kNumbers = 5, kNumbersOfProjection = 2, kBytes = 1;
  static constexpr i64 kInHidden = 2, kInBias = 4;  // where w_hh and the bias begin among the numbers of a panel

  static void multiply(const Panels& w, i64 panel, const Rows& rows, i64 first, i64 n, Columns* z) {
    const i64 groups = ceil_div(w.K, 4), parts = ceil_div(n, kMostRows);
    const int8_t* data = static_cast<const int8_t*>(w.data) + panel * groups * 4 * kColumns;
    const float* numbers = w.numbers + panel * w.pitch;
    alignas(64) Sums sums[kMostRows];
    const uint8_t* a[kMostRows];
    for (i64 part = 0; part < parts; ++part) {
      const i64 begin = part * n / parts, end = (part + 1) * n / parts;
      for (i64 r = begin; r < end; ++r) a[r - begin] = rows.data(first + r);
      with_rows<kMostRows>(end - begin, [&](auto count) { int8_dots<decltype(count)::value>(a, data, groups, sums); });
      for (i64 r = begin; r < end; ++r) add(rows.scale(first + r), numbers, sums[r - begin], z[r]);
    }
  }

 private:
  static FASTLSTM_INLINE void add(const Scale& of, const float* numbers, const Sums& sums, Columns& z) {
    using Int = Simd<float>::Int;
    const int32_t zero = of.zero - kFlip;
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; k += kLanes<float>) {
      Int sum, whole = __builtin_convertvector(load(numbers + kColumns + k), Int);
      std::memcpy(&sum, sums + k, sizeof sum);
      sum -= whole * zero;
      const Vec<float> scale = load(numbers + k) * of.scale;
      store(z + k, fused(scale, __builtin_convertvector(sum, Vec<float>), load(z + k)));
    }
  }
};

// Activations in float32.
class FloatRows {
 public:
  FloatRows() = default;
  FloatRows(i64 rows, i64 K) : K_(K), pitch_(pitch<float>(round_up(K, 2))), data_(rows * pitch_) { data_.zero(); }
  const float* data(i64 row) const { return &data_[row * pitch_]; }
  void put(i64 row, const float* x) { std::memcpy(&data_[row * pitch_], x, size_t(K_) * sizeof(float)); }

 private:
  i64 K_ = 0, pitch_ = 0;
  Buffer<float> data_;
};

// Two vectors of weights from one of pairs: the upper half of each float32 is the bfloat16.
FASTLSTM_INLINE void widen(const uint16_t* pairs, Vec<float>& even, Vec<float>& odd) {
  Simd<float>::Words both;
  std::memcpy(&both, pairs, sizeof both);
  even = (Vec<float>)(both << 16);
  odd = (Vec<float>)(both & 0xffff0000u);
}

// sums[r] += product of R rows of activations with Count vectors of columns. A chain of multiply-adds has as many terms
// as one of gemm.h; then it is added to the others.
template <int R, int Count>
__attribute__((noinline)) void bfloat16_dots(const float* const* rows, const uint16_t* w, i64 pairs,
                                             float* const* sums) {
  constexpr i64 kChain = 64;
  const float* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  for (i64 from = 0; from < pairs; from += kChain) {
    const i64 to = smaller(pairs, from + kChain);
    Vec<float> acc[R][Count];
#pragma GCC unroll 32
    for (int k = 0; k < R * Count; ++k) acc[k / Count][k % Count] = Vec<float>{};
#pragma GCC unroll 1
    for (i64 pair = from; pair < to; ++pair) {
      Vec<float> even[Count], odd[Count];
#pragma GCC unroll 8
      for (int v = 0; v < Count; ++v) widen(w + 2 * (pair * kColumns + v * kLanes<float>), even[v], odd[v]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<float> first = splat(a[r][2 * pair]), second = splat(a[r][2 * pair + 1]);
#pragma GCC unroll 8
        for (int v = 0; v < Count; ++v) acc[r][v] = add_product(acc[r][v], first, even[v]);
#pragma GCC unroll 8
        for (int v = 0; v < Count; ++v) acc[r][v] = add_product(acc[r][v], second, odd[v]);
      }
    }
#pragma GCC unroll 32
    for (int k = 0; k < R * Count; ++k) {
      float* sum = sums[k / Count] + k % Count * kLanes<float>;
      store(sum, load(sum) + acc[k / Count][k % Count]);
    }
  }
}

// 16-bit weights: products in float32.
struct Bfloat16 {
  using Rows = FloatRows;
  static constexpr i64 kNumbers = 1, kNumbersOfProjection = 0, kBytes = 2;
  static constexpr i64 kInHidden = 0, kInBias = 0;

  static void multiply(const Panels& w, i64 panel, const Rows& rows, i64 first, i64 n, Columns* z) {
    constexpr int kMost = kTileRows, kAtOnce = 4;
    const i64 pairs = ceil_div(w.K, 2), parts = ceil_div(n, kMost);
    const uint16_t* data = static_cast<const uint16_t*>(w.data) + panel * pairs * 2 * kColumns;
    const float* a[kMost];
    alignas(64) Columns sums[kMost];
    for (i64 part = 0; part < parts; ++part) {
      const i64 begin = part * n / parts, end = (part + 1) * n / parts;
      for (i64 r = begin; r < end; ++r) a[r - begin] = rows.data(first + r);
      std::memset(sums, 0, size_t(end - begin) * sizeof sums[0]);
      for (int column = 0; column < kColumns; column += kAtOnce * kLanes<float>) {
        float* at[kMost];
        for (int r = 0; r < kMost; ++r) at[r] = sums[r] + column;
        with_rows<kMost>(end - begin, [&](auto count) {
          bfloat16_dots<decltype(count)::value, kAtOnce>(a, data + 2 * column, pairs, at);
        });
      }
      for (i64 r = begin; r < end; ++r)
        for (int k = 0; k < kColumns; k += kLanes<float>) store(z[r] + k, load(z[r] + k) + load(sums[r - begin] + k));
    }
  }
};

}  // namespace
}  // namespace fastlstm
