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
#include "cpu/pair_rows.h"
#include "cpu/quantized/bfloat16.h"
#include "cpu/quantized/cell.h"
#include "cpu/quantized/int8_rows.h"

namespace fastlstm {
namespace {

// A matrix of weights in panels. numbers: what `rows` has of it, [panel][pitch]; prepared: panels that products of many
// rows take instead, or null.
struct Panels {
  const void* data;
  const float* numbers;
  i64 pitch, K;
  const char* prepared;
};

// 8-bit weights: exact sums of products, then z = fma(scale of the row * scale of the column, sum, z).
struct Int8 {
  using Rows = Int8Rows;
  using Arithmetic = DefinedArithmetic;
  static constexpr i64 kNumbers = 5, kNumbersOfProjection = 2;
  static constexpr i64 kInHidden = 2, kInBias = 4;  // where w_hh and the bias begin among the numbers of a panel
  static constexpr bool kPrepares = false;

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
  using Arithmetic = FastArithmetic;
  static constexpr i64 kNumbers = 3, kNumbersOfProjection = 1;
  static constexpr i64 kInHidden = 1, kInBias = 2;
  static constexpr bool kPrepares = kPreparing.rate > 0;

  template <class AnyRows>
  static void multiply(const Panels& w, i64 panel, const AnyRows& rows, i64 first, i64 n, Columns* z) {
    const i64 pairs = ceil_div(w.K, 2);
    const float* scales = scales_of(w, panel);
    if constexpr (kPrepares)
      if (w.prepared && n >= kPreparing.least)
        return each_part<kPreparing.most, 1, !kScaled>(
            w, panel, rows, first, n, z, [&](i64 count, const auto* a, Columns* sums) {
              prepared_dots(count, a, w.prepared + panel * prepared_bytes(w), pairs, sums);
            });
    const uint16_t* data = data_of(w, panel);
    each_part<kBfloat16Most, kPaired, kAdds>(w, panel, rows, first, n, z, [&](i64 count, const auto* a, Columns* sums) {
      bfloat16_dots(count, a, data, scales, pairs, sums);
    });
  }

  static i64 prepared_bytes(const Panels& w) { return ceil_div(w.K, 2) * 2 * kColumns * kPreparing.bytes; }

  template <class Out>
  static void prepare(const Panels& w, i64 panel, Out* out) {
    prepare_panel(data_of(w, panel), scales_of(w, panel), ceil_div(w.K, 2), out);
  }

 private:
  static const uint16_t* data_of(const Panels& w, i64 panel) {
    return static_cast<const uint16_t*>(w.data) + panel * ceil_div(w.K, 2) * 2 * kColumns;
  }

  static const float* scales_of(const Panels& w, i64 panel) { return w.numbers + panel * w.pitch; }

  // Calls product(count, rows, sums) for parts of `most` rows or fewer, each a multiple of `together` but the last, and
  // adds the sums to z, unless the product does that by itself.
  template <i64 most, i64 together, bool adds, class AnyRows, class Product>
  static void each_part(const Panels& w, i64 panel, const AnyRows& rows, i64 first, i64 n, Columns* z,
                        const Product& product) {
    const i64 groups = ceil_div(n, together), parts = ceil_div(groups, most / together);
    for (i64 part = 0; part < parts; ++part) {
      const i64 begin = part * groups / parts * together, end = smaller(n, (part + 1) * groups / parts * together);
      if constexpr (kScaled)
        add_scaled<most>(w, panel, rows, first + begin, end - begin, z + begin, product);
      else
        add_part<most, adds>(rows, first + begin, end - begin, z + begin, product);
    }
  }

  template <i64 most, bool adds, class AnyRows, class Product>
  static void add_part(const AnyRows& rows, i64 first, i64 n, Columns* z, const Product& product) {
    decltype(rows.data(0)) a[most];
    for (i64 r = 0; r < n; ++r) a[r] = rows.data(first + r);
    if constexpr (adds) return product(n, a, z);
    alignas(64) Columns sums[most];
    product(n, a, sums);
    for (i64 r = 0; r < n; ++r)
      for (int k = 0; k < kColumns; k += kLanes<float>) store(z[r] + k, load(z[r] + k) + load(sums[r] + k));
  }

  template <i64 most, class AnyRows, class Product>
  static void add_scaled(const Panels& w, i64 panel, const AnyRows& rows, i64 first, i64 n, Columns* z,
                         const Product& product) {
    const float* const scales = scales_of(w, panel);
    const Division<most> part(
        n, [&](i64 r) { return rows.scale(first + r); }, 1, [&] { return AnyRows::largest_scale(scales, w.K); });
    decltype(rows.data(0)) a[most];
    alignas(64) Columns sums[most];
    for (i64 place = 0; place < part.count; ++place) a[place] = rows.data(first + part.row_of[place]);
    if (part.count > 0) product(part.count, a, sums);
    for (i64 k = part.count; k < n; k += AnyRows::kExactRows)
      with_rows<AnyRows::kExactRows>(n - k, [&](auto constant) {
        constexpr int R = decltype(constant)::value;
        const float* exact[R];
        for (int r = 0; r < R; ++r) exact[r] = rows.exact(first + part.row_of[k + r]);
        AnyRows::template exact_dots<R>(exact, data_of(w, panel), scales, ceil_div(w.K, 2), sums + k);
      });
    for (i64 place = 0; place < n; ++place) {
      const i64 r = part.row_of[place];
      const float scale = place < part.count ? rows.scale(first + r) : 1.0f;
      float* const to = z[r];
      for (int k = 0; k < kColumns; k += kLanes<float>)
        store(to + k, load(to + k) + load(sums[place] + k) * load(scales + k) * scale);
    }
  }
};

}  // namespace
}  // namespace fastlstm
