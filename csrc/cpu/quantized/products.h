// Products of rows of activations with panels of quantised weights, for both kinds of weights: what the lanes of
// forward.h are made with.
//
//   Rows       activations [n][K] as the product takes them; put(row, x) writes one
//   multiply   z[r][column] += the product of row first + r and the column of a panel, for n rows; first is a multiple
//              of kBlock
//
// Each sum is the same whatever rows are computed with it.
#pragma once

#include "cpu/gemm.h"
#include "cpu/quantized/bfloat16.h"
#include "cpu/quantized/cell.h"
#include "cpu/quantized/int8_rows.h"
#include "cpu/quantized/widened_panels.h"

namespace fastlstm {
namespace {

// A matrix of weights in panels. numbers: what `rows` has of it, [panel][pitch]; wide: bfloat16 panels in float32, or
// null.
struct Panels {
  const void* data;
  const float* numbers;
  i64 pitch, K;
  const float* wide;
};

// 8-bit weights: exact sums of products, then z = fma(scale of the row * scale of the column, sum, z).
struct Int8 {
  using Rows = Int8Rows;
  using Quotient = DefinedQuotient;
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

// 16-bit weights: products with what bfloat16.h makes of the activations, sums in float32.
struct Bfloat16 {
  using Rows = Bfloat16Rows;
  using Quotient = FastQuotient;
  static constexpr i64 kNumbers = 1, kNumbersOfProjection = 0, kBytes = 2;
  static constexpr i64 kInHidden = 0, kInBias = 0;

  static void multiply(const Panels& w, i64 panel, const Rows& rows, i64 first, i64 n, Columns* z) {
    constexpr int kMost = kBfloat16Most;
    if (w.wide && n > kMost) return multiply_wide(w, panel, rows, first, n, z);
    const i64 pairs = ceil_div(w.K, 2), together = ceil_div(n, kPaired), parts = ceil_div(together, kMost / kPaired);
    const uint16_t* data = static_cast<const uint16_t*>(w.data) + panel * pairs * 2 * kColumns;
    decltype(rows.data(0)) a[kMost];
    alignas(64) Columns sums[kMost];
    for (i64 part = 0; part < parts; ++part) {
      const i64 begin = part * together / parts * kPaired;
      const i64 end = smaller(n, (part + 1) * together / parts * kPaired);
      for (i64 r = begin; r < end; ++r) a[r - begin] = rows.data(first + r);
      with_rows<kMost>(end - begin, [&](auto count) { bfloat16_dots<decltype(count)::value>(a, data, pairs, sums); });
      for (i64 r = begin; r < end; ++r)
        for (int k = 0; k < kColumns; k += kLanes<float>) store(z[r] + k, load(z[r] + k) + load(sums[r - begin] + k));
    }
  }

 private:
  template <class WideRows>
  static void multiply_wide(const Panels& w, i64 panel, const WideRows& rows, i64 first, i64 n, Columns* z) {
    if constexpr (kWidens) {
      const i64 pairs = ceil_div(w.K, 2), groups = ceil_div(n, kPanelRows);
      for (i64 group = 0; group < groups; ++group) {
        const i64 begin = group * n / groups, end = (group + 1) * n / groups;
        const float* a[kPanelRows];
        for (i64 r = begin; r < end; ++r) a[r - begin] = rows.data(first + r);
        multiply_widened(end - begin, a, w.wide + panel * pairs * 2 * kColumns, pairs, z + begin);
      }
    }
  }
};

}  // namespace
}  // namespace fastlstm
