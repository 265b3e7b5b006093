// What the products of weight gradients take in pairs (pairs.h): the columns of a, rows by groups of columns. They are
// rounded once for all panels, in slices that threads share.
#pragma once

#include "cpu/memory.h"
#include "cpu/pairs.h"

namespace fastlstm {
namespace {

// Columns 0 .. K of up to `rows` rows, in `groups` groups, each of nearly equal width. Rows are taken in blocks, each
// of which scales its columns anew, if there are scales. What they become does not depend on the number of threads.
// Without kernels there are none.
class PairColumns {
 public:
  static constexpr i64 kRows = 512;  // of a block

  PairColumns() = default;
  PairColumns(const PairKernels* kernels, i64 rows, i64 K, i64 groups, i64 threads)
      : kernels_(kernels), K_(K), groups_(groups), depth_(ceil_div(K, groups)),
        slice_(smaller(kWidestSlice, round_up(ceil_div(K, 2 * threads), kPanelColumns))),
        slices_(ceil_div(depth_, slice_)), pitch_(round_up(depth_, 16) + 16),
        block_rows_(round_up(smaller(rows, kRows), 2)), data_(blocks(rows) * groups * block_rows_ * pitch_),
        scales_(blocks(rows) * groups * pitch_), largest_(blocks(rows) * groups * slices_ * block_rows_) {}

  explicit operator bool() const { return kernels_; }
  static i64 blocks(i64 rows) { return ceil_div(rows, kRows); }
  i64 begin(i64 group) const { return group * K_ / groups_; }

  // How many slices `rows` rows have, and what rounds one of them. fill(row, k_begin, k_end, out): as WeightGrad::add.
  i64 slices(i64 rows) const { return blocks(rows) * groups_ * slices_; }
  template <class Fill>
  void round(i64 slice, i64 rows, const Fill& fill) const {
    const i64 place = slice / slices_, group = place % groups_, first = place / groups_ * kRows;
    const i64 k = slice % slices_ * slice_, n = smaller(slice_, begin(group + 1) - begin(group) - k);
    if (n <= 0) return;
    const i64 count = smaller(kRows, rows - first), numbers_pitch = pitch<float>(n);
    const Buffer<float> numbers(count * numbers_pitch);
    for (i64 row = 0; row < count; ++row) {
      float* const to = &numbers[row * numbers_pitch];
      fill(first + row, begin(group) + k, begin(group) + k + n, to);
      if (kernels_->scaled) largest_[slice * block_rows_ + row] = largest_of(to, n);
    }
    kernels_->round_columns(count, numbers.get(), numbers_pitch, n, round_up(n, 16), 0, at(place) + 2 * k, pitch_,
                            &scales_[place * pitch_ + k]);
  }

  // Whether products of a group of a block with d can be in float16: the largest numbers of a and d are in the same
  // rows. Else columns, which float16 scales by these, would lose what is added: rows that have closed their gates add
  // nothing, however large they are. d_scales: of the rows of d in the block.
  bool even(i64 block, i64 group, i64 rows, const float* d_scales) const {
    if (!kernels_->scaled) return true;
    constexpr double kUneven = 1024;
    double most_a = 0, most_d = 0, most_together = 0;
    const float* const largest = &largest_[(block * groups_ + group) * slices_ * block_rows_];
    const i64 filled = ceil_div(begin(group + 1) - begin(group), slice_);
    for (i64 row = 0; row < rows; ++row) {
      double of_a = 0;
      for (i64 slice = 0; slice < filled; ++slice) {
        const double of_slice = double(largest[slice * block_rows_ + row]);
        of_a = of_slice > of_a ? of_slice : of_a;
      }
      const double of_d = double(d_scales[row]), together = of_a * of_d;
      most_a = of_a > most_a ? of_a : most_a;
      most_d = of_d > most_d ? of_d : most_d;
      most_together = together > most_together ? together : most_together;
    }
    return !(most_a * most_d > kUneven * most_together);
  }

  // sums [columns of the group][64] = (add ? sums : 0) + a^T d, of `rows` rows of a block and `width` columns of d.
  void multiply(i64 block, i64 group, i64 rows, const float* d, i64 d_pitch, i64 width, float* sums, bool add) const {
    const i64 place = block * groups_ + group;
    alignas(64) uint16_t columns[kRows * kPanelColumns];
    alignas(64) float scales[kPanelColumns];
    kernels_->round_columns(rows, d, d_pitch, width, kPanelColumns, kLargestWeight, columns, kPanelColumns, scales);
    kernels_->multiply_columns(rows, at(place), pitch_, &scales_[place * pitch_], begin(group + 1) - begin(group),
                               columns, scales, sums, add);
  }

 private:
  static constexpr i64 kPanelColumns = 64, kWidestSlice = 256;  // of which the rows of a block stay in L2
  uint16_t* at(i64 place) const { return &data_[place * block_rows_ * pitch_]; }

  static float largest_of(const float* x, i64 n) {
    Vec<float> sizes = {};
    for_vectors<float>(n, [&](i64 k, i64 lanes) FASTLSTM_INLINE_LAMBDA {
      const Vec<float> v = load_n(x + k, lanes), size = v < 0 ? -v : v;
      sizes = size > sizes ? size : sizes;
    });
    float largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) largest = sizes[lane] > largest ? sizes[lane] : largest;
    return largest;
  }

  const PairKernels* kernels_ = nullptr;
  i64 K_ = 0, groups_ = 0, depth_ = 0;
  i64 slice_ = 0, slices_ = 0;  // columns of a slice, slices of a group of a block
  i64 pitch_ = 0, block_rows_ = 0;
  Buffer<uint16_t> data_;  // [blocks][groups][block_rows / 2][pitch][2]
  Buffer<float> scales_;   // [blocks][groups][pitch] of columns
  Buffer<float> largest_;  // [blocks][groups][slices][block_rows] of the rows of a slice
};

}  // namespace
}  // namespace fastlstm
