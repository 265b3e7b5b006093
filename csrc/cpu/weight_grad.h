// Weight gradients: sums over rows of a^T d, where a [rows, K] is what went into a product and d [rows, N] is the
// gradient of its result. They are kept in panel order, and every chunk of the backward pass adds to them. Each sum
// runs over the rows in one fixed order, whatever the number of threads is, so results are reproducible.
//
// A sum has three levels, because one long chain would be inaccurate: blocks of rows, a group of blocks, all groups.
// Blocks that fit in L2 together make a pass: a panel then takes all of them before the next one does.
#pragma once

#include "cpu/float16.h"
#include "cpu/gemm.h"
#include "cpu/long_sum.h"
#include "cpu/machine.h"
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
      : K_(K), N_(N), half_(half), panels_(ceil_div(N, kPanel<S>)), pass_rows_(rows_of_pass()) {
    if (chunks > 1 || rows > pass_rows_) sums_ = Buffer<S>(panels_ * K * kPanel<S>);
    if (chunks * ceil_div(rows, block_rows()) > kGroup) groups_ = Buffer<S>(panels_ * K * kPanel<S>);
    if (!bias) return;
    bias_ = Buffer<LongSum<S>>(panels_ * kPanelVectors);
    bias_.zero();
  }

  bool wanted() const { return panels_ > 0; }

  // Into how many independent parts `add` should be divided for this many threads: several for each, so that none waits
  // long for the last one. But each part copies its columns of a, which should be little beside its product.
  i64 parts(i64 threads) const {
    if (threads == 1) return depth_groups();
    const i64 least = ceil_div(threads, depth_groups()), most = larger(least, panels_ / kPartPanels);
    return depth_groups() * smaller(panels_, smaller(most, ceil_div(kParts * threads, depth_groups())));
  }

  // sums += a^T d over the `rows` rows of a chunk, for part `part` of `parts`. d: rows of N (padded to whole vectors)
  // at d_pitch. fill(row, k_begin, k_end, out) writes a[row][k_begin .. k_end) to out. scales: of rows of d, if
  // products are in float16. last: no chunk follows; take(panel, k_begin, k_end, sums) then copies sums [k_end -
  // k_begin][kPanel], while they are in cache.
  template <class Fill, class Take>
  void add(i64 part, i64 parts, i64 rows, const S* d, i64 d_pitch, const Fill& fill, const float* scales, bool last,
           const Take& take) const {
    const i64 panel_groups = parts / depth_groups(), group = part / panel_groups, which = part % panel_groups;
    const i64 k_begin = group * K_ / depth_groups(), k_end = (group + 1) * K_ / depth_groups(), depth = k_end - k_begin;
    const i64 panel_begin = which * panels_ / panel_groups, panel_end = (which + 1) * panels_ / panel_groups;
    const i64 a_pitch = pitch<S>(depth), most = block_rows();
    const Buffer<S> a(smaller(rows, pass_rows_) * a_pitch), own(sums_ ? 0 : depth * kPanel<S>);
    const HalfBlock half(half_ ? depth : 0, smaller(rows, most));
    const auto finish = [&](i64 panel, i64 at, i64 blocks) {
      S* sums = sums_ ? &sums_[at] : own.get();
      if (blocks > kGroup)
        for (i64 k = 0; k < depth * kPanel<S>; k += kLanes<S>) store(&sums[k], load(&groups_[at + k]) + load(&sums[k]));
      take(panel, k_begin, k_end, sums);
    };
    const auto place = [&](i64 panel) { return (panel * K_ + k_begin) * kPanel<S>; };
    if (last && !rows)  // sequences have ended in an earlier chunk
      for (i64 panel = panel_begin; panel < panel_end; ++panel) finish(panel, place(panel), blocks_);
    for (i64 begin = 0; begin < rows; begin += pass_rows_) {
      const i64 end = smaller(begin + pass_rows_, rows);
      for (i64 row = begin; row < end; ++row) fill(row, k_begin, k_end, &a[(row - begin) * a_pitch]);
      const bool rounds = half_ && !uneven(end - begin, a.get(), a_pitch, depth, scales + begin);
      if (rounds) round(half, end - begin, a.get(), a_pitch, depth);
      for (i64 panel = panel_begin; panel < panel_end; ++panel) {
        const i64 at = place(panel), width = smaller(kPanel<S>, N_ - panel * kPanel<S>);
        S* sums = sums_ ? &sums_[at] : own.get();
        for (i64 first = begin; first < end; first += most) {
          const i64 count = smaller(most, end - first), block = blocks_ + first / most;
          const S* dp = d + first * d_pitch + panel * kPanel<S>;
          if (group == 0 && bias_)
            for (i64 v = 0; v < ceil_div(width, kLanes<S>); ++v)
              bias_[panel * kPanelVectors + v].add(sum_rows<S>(dp + v * kLanes<S>, d_pitch, count));
          if (block > 0 && block % kGroup == 0) end_group(at, depth * kPanel<S>, block == kGroup);
          // This product has the k of the sums as its rows, and the rows of a and d as its k.
          if (rounds)
            add_rounded(half, count, depth, dp, d_pitch, width, sums, block % kGroup > 0);
          else
            multiply_rows<S>(depth, &a[(first - begin) * a_pitch], 1, a_pitch, count, dp, d_pitch, sums, kPanel<S>,
                             width, block % kGroup > 0);
        }
        if (last && end == rows) finish(panel, at, blocks_ + ceil_div(rows, most));
      }
    }
  }
  // After all parts of a chunk.
  void end_chunk(i64 rows) { blocks_ += ceil_div(rows, block_rows()); }

  // put(n, sum of d[.][n]) for all columns of one panel.
  template <class Put>
  void copy_bias(i64 panel, const Put& put) const {
    for (i64 n = panel * kPanel<S>; n < smaller(N_, (panel + 1) * kPanel<S>); ++n)
      put(n, bias_[n / kLanes<S>].total()[n % kLanes<S>]);
  }

  // Copies sums [count][kPanel] of one panel: row(n)[k] = sum of a[.][k] * d[.][n]. Returns how many n the panel has.
  template <class Row>
  i64 copy_panel(i64 panel, const S* sums, i64 count, const Row& row) const {
    const i64 width = smaller(kPanel<S>, N_ - panel * kPanel<S>);
    S* rows[kPanel<S>];
    for (i64 lane = 0; lane < width; ++lane) rows[lane] = row(panel * kPanel<S> + lane);
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
    return width;
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
  i64 rows_of_pass() const {
    if (half_) return kHalfRows;
    const i64 block = kRows * pitch<S>(ceil_div(K_, larger(1, depth_groups()))) * i64(sizeof(S));
    return kRows * smaller(kGroup, larger(1, this_machine().second_level / 2 / block));
  }

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
  i64 pass_rows_ = 0;
  Buffer<S> sums_,
      groups_;  // sums_: if there are several passes; groups_: of all groups but the last, if there are more
  Buffer<LongSum<S>> bias_;  // [panels of N][kPanelVectors]
  i64 blocks_ = 0;           // of earlier chunks
};

}  // namespace
}  // namespace fastlstm
