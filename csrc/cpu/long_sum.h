// Sums over all rows of a call, which may be millions. Rows are added in blocks, whose sums are short; a LongSum adds
// these up and keeps what rounding takes from it, so its error does not grow with the number of blocks.
#pragma once

#include "cpu/simd.h"

namespace fastlstm {
namespace {

// A vector of such sums, zero at first.
template <class S>
struct LongSum {
  S sum[kLanes<S>], lost[kLanes<S>];

  FASTLSTM_INLINE void add(Vec<S> term) {
    const Vec<S> before = load(sum), after = before + term, added = after - before;
    store(sum, after);
    store(lost, load(lost) + ((before - (after - added)) + (term - added)));  // exact: Knuth's two-sum
  }
  // Infinities lose NaN.
  FASTLSTM_INLINE Vec<S> total() const {
    const Vec<S> all = load(sum) + load(lost);
    return all == all ? all : load(sum);
  }
};

// The sum of a vector of columns over a block of rows at d.
template <class S>
FASTLSTM_INLINE Vec<S> sum_rows(const S* d, i64 d_pitch, i64 rows) {
  constexpr int kChains = 8;
  Vec<S> chain[kChains] = {};
  i64 row = 0;
  for (; row + kChains <= rows; row += kChains)
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) chain[k] += load(d + (row + k) * d_pitch);
  for (; row < rows; ++row) chain[0] += load(d + row * d_pitch);
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

}  // namespace
}  // namespace fastlstm
