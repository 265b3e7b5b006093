// Weight gradients: sums over rows of a^T d, where a [rows, K] is what went into a product and d [rows, N] is the
// gradient of its result. They are kept in panel order, and every chunk of the backward pass adds to them. Each sum
// runs over the rows in one fixed order, whatever the number of threads is, so results are reproducible.
//
// A sum has three levels, because one long chain would be inaccurate: blocks of rows, a group of blocks, all groups.
// Where all rows of a call fit in L2, a panel takes them one block after the other, and its sums stay in cache too.
// Else all panels take a block, then the next one.
#pragma once

#include "cpu/gemm.h"
#include "cpu/long_sum.h"
#include "cpu/machine.h"
#include "cpu/pair_columns.h"
#include "cpu/transpose.h"

namespace fastlstm {
namespace {

template <class S>
class WeightGrad {
 public:
  WeightGrad() = default;
  // The sums are [panels of N][K][kPanel]. They are not set until rows are added. bias: whether the sums of d are
  // wanted too. chunks, rows: how many chunks there will be at most, and rows of a chunk. pairs: null for products of
  // gemm.h; threads: that round for those of pairs.
  WeightGrad(i64 K, i64 N, bool bias, i64 chunks, i64 rows, const PairKernels* pairs = nullptr, i64 threads = 1)
      : K_(K), N_(N), panels_(ceil_div(N, kPanel<S>)) {
    if (pairs) columns_ = PairColumns(pairs, rows, K, ceil_div(K, kPairDepth), threads);
    const i64 all = rows * smaller(K, pairs ? kPairDepth : kDepth) * i64(pairs ? sizeof(uint16_t) : sizeof(S));
    const bool together = chunks == 1 && rows <= kGroup * block_rows() && all <= this_machine().second_level / 2;
    pass_rows_ = together ? round_up(rows, block_rows()) : block_rows();
    if (chunks > 1 || rows > pass_rows_) sums_ = Buffer<S>(panels_ * K * kPanel<S>);
    if (chunks * ceil_div(rows, block_rows()) > kGroup) groups_ = Buffer<S>(panels_ * K * kPanel<S>);
    if (!bias) return;
    bias_ = Buffer<LongSum<S>>(panels_ * kPanelVectors);
    bias_.zero();
  }

  bool wanted() const { return panels_ > 0; }

  // Into how many independent parts `add` should be divided for this many threads: several for each, so that none waits
  // long for the last one, and as many for each. But in float32 each part copies its columns of a, which should be
  // little beside its product.
  i64 parts(i64 threads) const {
    if (threads == 1) return depth_groups();
    const i64 least = ceil_div(threads, depth_groups());
    const i64 most = columns_ ? panels_ : larger(least, panels_ / kPartPanels);
    i64 groups = smaller(most, ceil_div(kParts * threads, depth_groups()));
    while (groups < panels_ && groups * depth_groups() % threads) ++groups;
    return depth_groups() * smaller(panels_, groups);
  }

  // Products of pairs need their inputs rounded before: slice by slice, of a chunk of `rows` rows. fill: as below.
  i64 slices(i64 rows) const { return columns_ ? columns_.slices(rows) : 0; }
  template <class Fill>
  void round(i64 slice, i64 rows, const Fill& fill) const {
    if constexpr (sizeof(S) == sizeof(float)) columns_.round(slice, rows, fill);
  }

  // sums += a^T d over the `rows` rows of a chunk, for part `part` of `parts`. d: rows of N (padded to whole vectors)
  // at d_pitch. fill(row, k_begin, k_end, out) writes a[row][k_begin .. k_end) to out. scales: of rows of d, if
  // products are those of pairs. last: no chunk follows; take(panel, k_begin, k_end, sums) then copies sums [k_end -
  // k_begin][kPanel], while they are in cache.
  template <class Fill, class Take>
  void add(i64 part, i64 parts, i64 rows, const S* d, i64 d_pitch, const Fill& fill, const float* scales, bool last,
           const Take& take) const {
    const i64 panel_groups = parts / depth_groups(), group = part / panel_groups, which = part % panel_groups;
    const i64 k_begin = group * K_ / depth_groups(), k_end = (group + 1) * K_ / depth_groups(), depth = k_end - k_begin;
    const i64 panel_begin = which * panels_ / panel_groups, panel_end = (which + 1) * panels_ / panel_groups;
    const i64 a_pitch = pitch<S>(depth), most = block_rows();
    const Buffer<S> own(sums_ ? 0 : depth * kPanel<S>);  // sums of one panel, if nobody needs them later
    Buffer<S> a;                                         // only for products in float32
    const auto place = [&](i64 panel) { return (panel * K_ + k_begin) * kPanel<S>; };  // in sums_ and groups_
    const auto sums_of = [&](i64 panel) { return sums_ ? &sums_[place(panel)] : own.get(); };
    const auto finish = [&](i64 panel, i64 blocks) {  // blocks: of the whole call
      S* const sums = sums_of(panel);
      if (blocks > kGroup)
        for (i64 k = 0; k < depth * kPanel<S>; k += kLanes<S>)
          store(&sums[k], load(&groups_[place(panel) + k]) + load(&sums[k]));
      take(panel, k_begin, k_end, sums);
    };
    if (last && !rows)  // sequences have ended in an earlier chunk
      for (i64 panel = panel_begin; panel < panel_end; ++panel) finish(panel, blocks_);
    for (i64 begin = 0; begin < rows; begin += pass_rows_) {
      const i64 end = smaller(begin + pass_rows_, rows);
      bool in_pairs[kGroup];  // for each block of the pass, whether its product is one of pairs
      for (i64 first = begin; first < end; first += most) {
        const i64 count = smaller(most, end - first);
        bool& rounds = in_pairs[(first - begin) / most];
        rounds = columns_ && columns_.even(first / most, group, count, scales + first);
        if (rounds) continue;
        if (!a) a = Buffer<S>((end - begin) * a_pitch);
        for (i64 row = first; row < first + count; ++row) fill(row, k_begin, k_end, &a[(row - begin) * a_pitch]);
      }
      for (i64 panel = panel_begin; panel < panel_end; ++panel) {
        const i64 width = smaller(kPanel<S>, N_ - panel * kPanel<S>);
        S* const sums = sums_of(panel);
        for (i64 first = begin; first < end; first += most) {
          const i64 count = smaller(most, end - first), block = blocks_ + first / most;
          const S* dp = d + first * d_pitch + panel * kPanel<S>;
          if (group == 0 && bias_)
            for (i64 v = 0; v < ceil_div(width, kLanes<S>); ++v)
              bias_[panel * kPanelVectors + v].add(sum_rows<S>(dp + v * kLanes<S>, d_pitch, count));
          if (block > 0 && block % kGroup == 0) end_group(place(panel), depth * kPanel<S>, block == kGroup);
          // This product has the k of the sums as its rows, and the rows of a and d as its k.
          if (in_pairs[(first - begin) / most])
            multiply_rounded(first / most, group, count, dp, d_pitch, width, sums, block % kGroup > 0);
          else
            multiply_rows<S>(depth, &a[(first - begin) * a_pitch], 1, a_pitch, count, dp, d_pitch, sums, kPanel<S>,
                             width, block % kGroup > 0);
        }
        if (last && end == rows) finish(panel, blocks_ + ceil_div(rows, most));
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
  // Of pairs a is rounded once for all panels, and d again for every so many columns of a.
  static constexpr i64 kPairDepth = 1024;
  i64 block_rows() const { return columns_ ? PairColumns::kRows : kRows; }
  i64 depth_groups() const { return ceil_div(K_, columns_ ? kPairDepth : kDepth); }

  void multiply_rounded(i64 block, i64 group, i64 rows, const S* d, i64 d_pitch, i64 width, S* sums, bool add) const {
    if constexpr (sizeof(S) == sizeof(float) && kPanel<S> == 64)
      columns_.multiply(block, group, rows, d, d_pitch, width, sums, add);
  }

  // Adds n sums from place `at` on to those of all groups; they begin anew.
  void end_group(i64 at, i64 n, bool first) const {
    for (i64 k = at; k < at + n; k += kLanes<S>)
      store(&groups_[k], first ? load(&sums_[k]) : load(&groups_[k]) + load(&sums_[k]));
  }

  i64 K_ = 0, N_ = 0;
  i64 panels_ = 0;
  PairColumns columns_;      // of a, if products are those of pairs
  i64 pass_rows_ = 0;        // rows that a panel takes before the next one does
  Buffer<S> sums_;           // if there are several passes
  Buffer<S> groups_;         // of all groups of blocks but the last one, if there are several
  Buffer<LongSum<S>> bias_;  // [panels of N][kPanelVectors]
  i64 blocks_ = 0;           // of earlier chunks
};

}  // namespace
}  // namespace fastlstm
