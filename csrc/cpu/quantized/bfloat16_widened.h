// Any CPU: weights are widened to float32, and nothing else is rounded. See bfloat16.h.
#pragma once

#include "cpu/gemm.h"

namespace fastlstm {
namespace {

// Of two vectors of products a cycle, a seventh is spent on widening, if rows are many enough to share it.
constexpr double kBfloat16Rate = 1.45 * kLanes<float>;
constexpr int kBfloat16Most = kTallestTile, kPaired = 1;
constexpr bool kScaled = false;

// Vectors of columns that R rows take at once: enough sums to keep the multipliers busy, and as few as the registers
// hold beside the weights.
template <int R>
constexpr int kColumnsAtOnce = R == 1 && kColumns / kLanes<float> > 4 ? 8
                               : kTileRows > 4 || R < 3               ? 4
                                                                      : 2;

// Panels in float32: twice as many bytes, but nothing to do before a product.
constexpr Preparing kPreparing{1.7 * kLanes<float>, 4, 4, kBfloat16Most + 1, kPanelRows};

constexpr i64 kPairsOfChain = 64;  // of weights: a chain of multiply-adds has no more

// Two vectors of weights from one of pairs: the upper half of each float32 is the bfloat16.
FASTLSTM_INLINE void widen(const uint16_t* pairs, Vec<float>& even, Vec<float>& odd) {
  Simd<float>::Words both;
  std::memcpy(&both, pairs, sizeof both);
  even = (Vec<float>)(both << 16);
  odd = (Vec<float>)(both & 0xffff0000u);
}

// Activations in float32.
class Bfloat16Rows {
 public:
  Bfloat16Rows() = default;
  Bfloat16Rows(i64 rows, i64 K) : K_(K), pitch_(pitch<float>(round_up(K, 2))), data_(rows * pitch_) { data_.zero(); }
  const float* data(i64 row) const { return &data_[row * pitch_]; }
  void put(i64 row, const float* x) { std::memcpy(&data_[row * pitch_], x, size_t(K_) * sizeof(float)); }

 private:
  i64 K_ = 0, pitch_ = 0;
  Buffer<float> data_;
};

// sums[r] += product of R rows of activations with Count vectors of columns, from `first` on. A chain of multiply-adds
// has at most so many pairs; then it is added to the others.
template <int R, int Count>
__attribute__((noinline)) void bfloat16_columns(const float* const* rows, const uint16_t* w, i64 pairs, Columns* sums,
                                                int first) {
  const float* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  for (i64 from = 0; from < pairs; from += kPairsOfChain) {
    const i64 to = smaller(pairs, from + kPairsOfChain);
    Vec<float> acc[R][Count];
#pragma GCC unroll 32
    for (int k = 0; k < R * Count; ++k) acc[k / Count][k % Count] = Vec<float>{};
#pragma GCC unroll 1
    for (i64 pair = from; pair < to; ++pair) {
      Vec<float> even[Count], odd[Count];
#pragma GCC unroll 8
      for (int v = 0; v < Count; ++v) widen(w + 2 * (pair * kColumns + first + v * kLanes<float>), even[v], odd[v]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<float> one = splat(a[r][2 * pair]), other = splat(a[r][2 * pair + 1]);
#pragma GCC unroll 8
        for (int v = 0; v < Count; ++v) acc[r][v] = add_product(acc[r][v], one, even[v]);
#pragma GCC unroll 8
        for (int v = 0; v < Count; ++v) acc[r][v] = add_product(acc[r][v], other, odd[v]);
      }
    }
#pragma GCC unroll 32
    for (int k = 0; k < R * Count; ++k) {
      float* sum = sums[k / Count] + first + k % Count * kLanes<float>;
      store(sum, load(sum) + acc[k / Count][k % Count]);
    }
  }
}

template <int R>
void tile_dots(const float* const* a, const uint16_t* w, const float*, i64 pairs, Columns* sums) {
  constexpr int kAtOnce = kColumnsAtOnce<R>;
  std::memset(sums, 0, R * sizeof sums[0]);
  for (int first = 0; first < kColumns; first += kAtOnce * kLanes<float>)
    bfloat16_columns<R, kAtOnce>(a, w, pairs, sums, first);
}

// Prepared panels are [kColumns / kPanel][2 * pairs][kPanel].
constexpr int kPartsOfPanel = kColumns / kPanel<float>;

inline void prepare_panel(const uint16_t* w, const float*, i64 pairs, void* to) {
  float* out = static_cast<float*>(to);
  for (int part = 0; part < kPartsOfPanel; ++part)
    for (i64 pair = 0; pair < pairs; ++pair, out += 2 * kPanel<float>)
      for (int k = 0; k < kPanel<float>; k += kLanes<float>) {
        Vec<float> even, odd;
        widen(w + 2 * (pair * kColumns + part * kPanel<float> + k), even, odd);
        store(out + k, even);
        store(out + kPanel<float> + k, odd);
      }
}

// A template, so that what other widths of panels do is not compiled.
template <class Row>
inline void prepared_dots(i64 n, const float* const* a, const void* data, i64 pairs, Row* z) {
  const float* panel = static_cast<const float*>(data);
  if constexpr (kPartsOfPanel == 1)
    return multiply_panel<float>(n, a, 2 * pairs, panel, z, true, panel + 2 * pairs * kPanel<float>, 2 * kPairsOfChain);
  alignas(64) float sums[kPanelRows][kPanel<float>];
  for (int part = 0; part < kPartsOfPanel; ++part, panel += 2 * pairs * kPanel<float>) {
    multiply_panel<float>(n, a, 2 * pairs, panel, sums, false, panel + 2 * pairs * kPanel<float>, 2 * kPairsOfChain);
    for (i64 r = 0; r < n; ++r)
      for (int k = 0; k < kPanel<float>; k += kLanes<float>) {
        float* const to = z[r] + part * kPanel<float> + k;
        store(to, load(to) + load(sums[r] + k));
      }
  }
}

}  // namespace
}  // namespace fastlstm
