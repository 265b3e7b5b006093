// Weight gradients: sums over rows of a^T d, where a [rows, K] is what went into a product and d [rows, N] is the
// gradient of its result. They are kept in panel order, and every chunk of the backward pass adds to them. Each sum
// runs over the rows in one fixed order, whatever the number of threads is, so results are reproducible.
//
// A sum has three levels, because one long chain would be inaccurate: blocks of rows, a group of blocks, all groups.
#pragma once

#include "cpu/float16.h"
#include "cpu/gemm.h"
#include "cpu/long_sum.h"
#include "cpu/transpose.h"

namespace fastlstm {
namespace {

template <class S>
class WeightGrad {
 public:
  WeightGrad() = default;
  // The sums are [panels of N][K][kPanel]. They are not set until rows are added. bias: whether the sums of d are
  // wanted too. chunks, rows: how many chunks there will be at most, and rows of a chunk. half: null for products of
  // gemm.h.
  WeightGrad(i64 K, i64 N, bool bias, i64 chunks, i64 rows, const Float16Kernels* half = nullptr)
      : K_(K), N_(N), half_(half), panels_(ceil_div(N, kPanel<S>)), sums_(panels_ * K * kPanel<S>) {
    if (chunks * ceil_div(rows, block_rows()) > kGroup) groups_ = Buffer<S>(panels_ * K * kPanel<S>);
    if (!bias) return;
    bias_ = Buffer<LongSum<S>>(panels_ * kPanelVectors);
    bias_.zero();
  }

  bool allocated() const { return bool(sums_); }

  // Into how many independent parts `add` should be divided for this many threads: several for each, so that none waits
  // long for the last one. But each part copies its columns of a, which should be little beside its product.
  i64 parts(i64 threads) const {
    if (threads == 1) return depth_groups();
    const i64 least = ceil_div(threads, depth_groups()), most = larger(least, panels_ / kPartPanels);
    return depth_groups() * smaller(panels_, smaller(most, ceil_div(kParts * threads, depth_groups())));
  }

  // sums += a^T d over the `rows` rows of a chunk, for part `part` of `parts`. d: rows of N (padded to whole vectors)
  // at d_pitch. fill(row, k_begin, k_end, out) writes a[row][k_begin .. k_end) to out. scales: of rows of d, if
  // products are in float16.
  template <class Fill>
  void add(i64 part, i64 parts, i64 rows, const S* d, i64 d_pitch, const Fill& fill,
           const float* scales = nullptr) const {
    const i64 panel_groups = parts / depth_groups(), group = part / panel_groups, which = part % panel_groups;
    const i64 k_begin = group * K_ / depth_groups(), k_end = (group + 1) * K_ / depth_groups();
    const i64 panel_begin = which * panels_ / panel_groups, panel_end = (which + 1) * panels_ / panel_groups;
    const i64 a_pitch = pitch<S>(k_end - k_begin), most = block_rows();
    const Buffer<S> a(smaller(rows, most) * a_pitch);
    const HalfBlock half(half_ ? k_end - k_begin : 0, smaller(rows, most));
    for (i64 first = 0; first < rows; first += most) {
      const i64 count = smaller(most, rows - first), block = blocks_ + first / most;
      for (i64 row = 0; row < count; ++row) fill(first + row, k_begin, k_end, &a[row * a_pitch]);
      const bool rounds = half_ && !uneven(count, a.get(), a_pitch, k_end - k_begin, scales + first);
      if (rounds) round(half, count, a.get(), a_pitch, k_end - k_begin);
      for (i64 panel = panel_begin; panel < panel_end; ++panel) {
        const S* dp = d + first * d_pitch + panel * kPanel<S>;
        const i64 at = (panel * K_ + k_begin) * kPanel<S>, width = smaller(kPanel<S>, N_ - panel * kPanel<S>);
        if (group == 0 && bias_)
          for (i64 v = 0; v < ceil_div(width, kLanes<S>); ++v)
            bias_[panel * kPanelVectors + v].add(sum_rows<S>(dp + v * kLanes<S>, d_pitch, count));
        if (block > 0 && block % kGroup == 0) end_group(at, (k_end - k_begin) * kPanel<S>, block == kGroup);
        if (rounds) {
          add_rounded(half, count, k_end - k_begin, dp, d_pitch, width, &sums_[at], block % kGroup > 0);
          continue;
        }
        // This product has the k of the sums as its rows, and the rows of a and d as its k.
        multiply_rows<S>(k_end - k_begin, a.get(), 1, a_pitch, count, dp, d_pitch, &sums_[at], kPanel<S>, width,
                         block % kGroup > 0);
      }
    }
  }
  // After all parts of a chunk.
  void end_chunk(i64 rows) { blocks_ += ceil_div(rows, block_rows()); }
  // Adds the last group to the others, for one panel.
  void end_panel(i64 panel) const {
    const i64 n = K_ * kPanel<S>;
    if (blocks_ > kGroup)
      for (i64 k = panel * n; k < (panel + 1) * n; k += kLanes<S>)
        store(&sums_[k], load(&groups_[k]) + load(&sums_[k]));
  }

  i64 panels() const { return panels_; }

  // Copies the sums of d of one panel: out(n) = sum of d[.][n].
  template <class Out>
  void copy_bias(i64 panel, const Out& out) const {
    for (i64 n = panel * kPanel<S>; n < smaller(N_, (panel + 1) * kPanel<S>); ++n)
      out(n) = bias_[n / kLanes<S>].total()[n % kLanes<S>];
  }

  // Copies the columns of one panel, after end_panel: row(n)[k] = sum of a[.][k_begin + k] * d[.][n] for k < count.
  template <class Row>
  void copy_panel(i64 panel, i64 k_begin, i64 count, const Row& row) const {
    const i64 width = smaller(kPanel<S>, N_ - panel * kPanel<S>);
    S* rows[kPanel<S>];
    for (i64 lane = 0; lane < width; ++lane) rows[lane] = row(panel * kPanel<S> + lane);
    const S* sums = &sums_[(panel * K_ + k_begin) * kPanel<S>];
    i64 k = 0;
    for (; k + kLine<S> <= count; k += kLine<S>, sums += kLine<S> * kPanel<S>) {
      i64 lane = 0;
      for (; lane + kLine<S> <= width; lane += kLine<S>) {
        const auto place = [&](i64 i) FASTLSTM_INLINE_LAMBDA {
          __builtin_prefetch(rows[lane + i] + k + kLine<S>, 1);
          return rows[lane + i] + k;
        };
        transpose_block<S, kLine<S>, kLine<S>>(sums + lane, kPanel<S>, kLine<S> * kPanel<S>, place);
      }
      for (; lane < width; ++lane)
        for (i64 j = 0; j < kLine<S>; ++j) rows[lane][k + j] = sums[j * kPanel<S> + lane];
    }
    for (i64 lane = 0; lane < width; ++lane)
      for (i64 j = k; j < count; ++j) rows[lane][j] = sums[(j - k) * kPanel<S> + lane];
  }

 private:
  static constexpr i64 kRows = 128;   // rows that are summed on their own: short chains are accurate, and fit L1 or L2
  static constexpr i64 kDepth = 240;  // columns of a in one block
  static constexpr i64 kGroup = 256;  // blocks: as many as a sum of all rows has in most calls
  static constexpr i64 kParts = 4;    // for each of several threads
  static constexpr i64 kPartPanels = 4;  // of a part, at least, where there are more parts than threads
  // In float16 there are half as many bytes, and chains of their own.
  static constexpr i64 kHalfRows = 4 * kRows, kHalfDepth = 2 * kDepth;
  i64 block_rows() const { return half_ ? kHalfRows : kRows; }
  i64 depth_groups() const { return ceil_div(K_, half_ ? kHalfDepth : kDepth); }

  // Whether the largest numbers of a and d are in different rows, so that columns, which float16 scales by these, would
  // lose what is added: rows that have closed their gates add nothing, however large they are. scales: of rows of d.
  static bool uneven(i64 rows, const S* a, i64 a_pitch, i64 K, const float* scales) {
    constexpr double kUneven = 1024;
    double most_a = 0, most_d = 0, most_together = 0;
    for (i64 row = 0; row < rows; ++row) {
      Vec<S> sizes = {};
      for_vectors<S>(K, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
        const Vec<S> v = load_n(a + row * a_pitch + k, n), size = v < 0 ? -v : v;
        sizes = size > sizes ? size : sizes;
      });
      S of_a = 0;
      for (int lane = 0; lane < kLanes<S>; ++lane) of_a = sizes[lane] > of_a ? sizes[lane] : of_a;
      const double of_d = double(scales[row]), together = double(of_a) * of_d;
      most_a = double(of_a) > most_a ? double(of_a) : most_a;
      most_d = of_d > most_d ? of_d : most_d;
      most_together = together > most_together ? together : most_together;
    }
    return most_a * most_d > kUneven * most_together;
  }

  // Columns of a in a block of rows, rounded to float16.
  struct HalfBlock {
    i64 pitch;
    Buffer<uint16_t> columns;
    Buffer<float> scales;
    HalfBlock(i64 K, i64 rows) : pitch(round_up(K, 16)), columns(round_up(rows, 2) * pitch), scales(pitch) {}
  };
  void round(const HalfBlock& half, i64 rows, const S* a, i64 a_pitch, i64 K) const {
    if constexpr (sizeof(S) == sizeof(float))
      half_->round_columns(rows, a, a_pitch, K, 0, half.columns.get(), half.pitch, half.scales.get());
  }
  void add_rounded(const HalfBlock& half, i64 rows, i64 K, const S* d, i64 d_pitch, i64 width, S* sums,
                   bool add) const {
    if constexpr (sizeof(S) == sizeof(float) && kPanel<S> == 64) {
      alignas(64) uint16_t columns[kHalfRows * kPanel<S>];
      alignas(64) float scales[kPanel<S>];
      half_->round_columns(rows, d, d_pitch, width, kLargestWeight, columns, kPanel<S>, scales);
      half_->multiply_columns(rows, half.columns.get(), half.pitch, half.scales.get(), K, columns, scales, sums, add);
    }
  }

  // Adds n sums from place `at` on to those of all groups; they begin anew.
  void end_group(i64 at, i64 n, bool first) const {
    for (i64 k = at; k < at + n; k += kLanes<S>)
      store(&groups_[k], first ? load(&sums_[k]) : load(&groups_[k]) + load(&sums_[k]));
  }

  i64 K_ = 0, N_ = 0;
  const Float16Kernels* half_ = nullptr;
  i64 panels_ = 0;
  Buffer<S> sums_, groups_;  // groups_: of all groups but the last one, where there are several
  Buffer<LongSum<S>> bias_;  // [panels of N][kPanelVectors]
  i64 blocks_ = 0;           // of earlier chunks
};

}  // namespace
}  // namespace fastlstm
