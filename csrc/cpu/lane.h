// Which rows a lane works on at each step: shared by the forward and the backward pass.
#pragma once

#include "lstm.h"
#include "simd.h"

namespace fastlstm {
namespace {

// Sequences first, first + stride, ... (slots) of one direction. Slots are sorted by length, so striding deals
// long and short sequences evenly to the lanes.
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
  // This direction's first and last step of a row, in the order in which it walks through time.
  bool starts(i64 i, i64 t) const { return direction == 0 ? t == 0 : t == length(i) - 1; }
  bool ends(i64 i, i64 t) const { return direction == 0 ? t == length(i) - 1 : t == 0; }
  i64 previous(i64 t) const { return direction == 0 ? t - 1 : t + 1; }

  i64 offset(const Rows& r, i64 t, i64 b) const {
    return direction * r.direction + b * r.batch + (ragged.row_offset ? ragged.row_offset[t] * r.batch : t * r.step);
  }
  i64 offset(const States& s, i64 b) const { return direction * s.direction + b * s.batch; }
};

// Element `offset` of an array of S.
template <class S>
inline S* element(void* data, i64 offset) {
  return static_cast<S*>(data) + offset;
}

}  // namespace
}  // namespace fastlstm
