// Which rows a lane computes at each step. The forward and the backward pass share this file.
//
// A lane is a set of sequences of one direction that walks through time together: one thread computes it from the first
// step to the last. Sequences lie in slots, the longest first (lstm.h draws them), so the active rows of a lane at any
// step are its first ones.
#pragma once

#include "cpu/memory.h"

namespace fastlstm {
namespace {

// Every second call of a thread reads stored weights from their end: a stream of single steps finds there in cache what
// the call before has read last.
inline bool call_order() {
  static thread_local bool backwards = false;
  return backwards = !backwards;
}

// Row i of a lane is slot first + i * stride. Slots are sorted by length: with a stride, each lane gets as many long
// sequences as the others.
struct LaneRows {
  const Sizes& sizes;
  const Ragged& ragged;
  i64 direction, first, stride, rows;

  LaneRows(const Sizes& sizes, const Ragged& ragged, i64 direction, i64 lane, i64 lanes)
      : sizes(sizes), ragged(ragged), direction(direction) {
    if (ragged.active) {
      first = lane;
      stride = lanes;
      rows = ceil_div(larger(0, sizes.B - first), stride);
    } else {
      first = lane * sizes.B / lanes;
      stride = 1;
      rows = (lane + 1) * sizes.B / lanes - first;
    }
  }

  i64 slot(i64 i) const { return first + i * stride; }
  i64 batch(i64 i) const { return ragged.order ? ragged.order[slot(i)] : slot(i); }
  i64 length(i64 i) const { return ragged.length ? ragged.length[slot(i)] : sizes.T; }
  // Rows active at step t are rows [0, active(t)).
  i64 active(i64 t) const {
    if (!ragged.active) return rows;
    return smaller(rows, ceil_div(larger(0, ragged.active[t] - first), stride));
  }
  // Whether t is the first or the last step of row i, in the order in which this direction walks through time.
  bool starts(i64 i, i64 t) const { return direction == 0 ? t == 0 : t == length(i) - 1; }
  bool ends(i64 i, i64 t) const { return direction == 0 ? t == length(i) - 1 : t == 0; }
  i64 previous(i64 t) const { return direction == 0 ? t - 1 : t + 1; }

  // Where the numbers of sequence b lie: at step t of an array [T, B, n] or of packed rows, or in states [D, B, n].
  i64 offset(const Rows& r, i64 t, i64 b) const {
    return direction * r.direction + b * r.batch + (ragged.row_offset ? ragged.row_offset[t] * r.batch : t * r.step);
  }
  i64 offset(const States& s, i64 b) const { return direction * s.direction + b * s.batch; }
};

}  // namespace
}  // namespace fastlstm
