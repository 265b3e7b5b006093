// Rows of a direction of the backward pass: its buffers, its chunks, and where the numbers of a row are.
#pragma once

#include "cpu/backward/direction.h"

namespace fastlstm {
namespace {

template <class S>
inline BackwardDirection<S>::BackwardDirection(const BackwardParams& p, const Extended<S>* extended, i64 direction,
                                               i64 capacity)
    : p_(p), s_(p.sizes), all_(p.sizes, p.ragged, direction, 0, 1), at_(p.sizes),
      packed_(p.packed ? static_cast<const S*>(p.packed) + direction * at_.size : nullptr),
      pairs_(pairs_in_backward<S>(s_, p.dtype)), dw_(p.dw[direction]), narrow_(element_bytes(p.dtype) != sizeof(S)),
      extended_(extended), capacity_(capacity) {
  const i64 rows = capacity * s_.B, chunks = ceil_div(s_.T, capacity);
  chunk.gate_pitch = pitch<S>(s_.gate_units());
  chunk.hidden_pitch = pitch<S>(s_.H);
  chunk.state_pitch = pitch<S>(s_.P);
  chunk.dgates = padded(rows, s_.gate_units());
  if (pairs_) chunk.pairs = PairRows(pairs_, rows, s_.gate_units());
  if (s_.projected) chunk.dhidden = padded(rows, s_.P);
  if (s_.G > 1 && !p.gates.data) chunk.gates = Buffer<S>(rows * chunk.gate_pitch);
  if (extended && dw_.w_hr) chunk.m = Buffer<S>(rows * chunk.hidden_pitch);
  if (s_.layer_norm) {
    chunk.inputs = padded(rows, s_.gate_units());
    chunk.recurrent = Buffer<S>(rows * chunk.gate_pitch);
    chunk.drecurrent = padded(rows, s_.gate_units());
    chunk.normalised = Buffer<typename Chunk<S>::Normalised>(rows);
    chunk.cell = Buffer<S>(rows * chunk.hidden_pitch);
    chunk.dcell = Buffer<S>(rows * chunk.hidden_pitch);
  }
  if (p.c0.data && element_bytes(p.dtype) != sizeof(S)) {
    chunk.c0 = Buffer<S>(s_.B * s_.H);
    for (i64 i = 0; i < s_.B; ++i)
      convert_in(&chunk.c0[i * s_.H], p.c0.data, p.dtype, all_.offset(p.c0, all_.batch(i)), s_.H);
  }
  chunk.start = Buffer<i64>(capacity + 1);
  if (dw_.w_ih) {
    vectors_ = Buffer<LongSum<S>>(tiles() * vectors());
    vectors_.zero();
  }
  if (!packed_) return;  // then weight gradients are written as they are stored
  if (dw_.w_ih)
    gates_ = WeightGrad<S>(s_.layer_norm ? s_.I : s_.I + s_.P, s_.gate_units(), s_.bias && !s_.layer_norm, chunks, rows,
                           pairs_, p.threads->count());
  if (dw_.w_ih && s_.layer_norm) recurrent_ = WeightGrad<S>(s_.P, 4 * s_.H, false, chunks, rows);
  if (dw_.w_hr) projection_ = WeightGrad<S>(s_.H, s_.P, false, chunks, rows);
}

template <class S>
inline void BackwardDirection<S>::end_chunk() {
  gates_.end_chunk(chunk_rows());
  recurrent_.end_chunk(chunk_rows());
  projection_.end_chunk(chunk_rows());
}

template <class S>
inline void BackwardDirection<S>::begin_chunk(i64 first_step, i64 steps) {
  first_step_ = first_step;
  steps_ = steps;
  chunk.start[0] = 0;
  for (i64 k = 0; k < steps; ++k) chunk.start[k + 1] = chunk.start[k] + all_.active(time(first_step + k));
  has_rows_ = has_rows_ || chunk_rows() > 0;
}

// Time and slot of a row of the chunk.
template <class S>
inline void BackwardDirection<S>::locate(i64 row, i64& t, i64& slot) const {
  i64 low = 0, high = steps_ - 1;  // the last step that starts at or before this row
  while (low < high) {
    const i64 middle = (low + high + 1) / 2;
    if (chunk.start[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  t = time(first_step_ + low);
  slot = row - chunk.start[low];
}

// What the product with w_hh took at step t for sequence b: units [begin, begin + count) of h of the step before, times
// h_mask where there is one.
template <class S>
inline void BackwardDirection<S>::previous_hidden(S* out, i64 t, i64 slot, i64 b, i64 begin, i64 count) const {
  const bool start = all_.starts(slot, t);
  if (resets(p_, t, b) || (start && !p_.h0.data))
    std::memset(static_cast<void*>(out), 0, size_t(count) * sizeof(S));
  else if (start)
    convert_in(out, p_.h0.data, p_.dtype, all_.offset(p_.h0, b) + begin, count);
  else
    convert_in(out, p_.y.data, p_.dtype, all_.offset(p_.y, all_.previous(t), b) + begin, count);
  if (!p_.cell.h_mask.data) return;
  const S* mask = element<S>(p_.cell.h_mask.data, all_.offset(p_.cell.h_mask, b) + begin);
  for (i64 k = 0; k < count; ++k) out[k] *= mask[k];
}

// Columns [k_begin, k_end) of [x | h_previous] of a row of the chunk.
template <class S>
inline void BackwardDirection<S>::product_input(i64 row, i64 k_begin, i64 k_end, S* out) const {
  i64 t, slot;
  locate(row, t, slot);
  const i64 b = all_.batch(slot);
  if (k_begin < s_.I)
    convert_in(out, p_.x.data, p_.dtype, all_.offset(p_.x, t, b) + k_begin, smaller(k_end, s_.I) - k_begin);
  const i64 h_begin = larger(k_begin, s_.I) - s_.I, h_end = smaller(k_end, s_.I + s_.P) - s_.I;
  if (h_begin < h_end) previous_hidden(out + s_.I + h_begin - k_begin, t, slot, b, h_begin, h_end - h_begin);
}

// Whether the other direction has already written dx of time t: in an earlier chunk, or before this one in this chunk.
template <class S>
inline bool BackwardDirection<S>::second_at(i64 t) const {
  if (s_.D == 1) return false;
  const i64 descending = (s_.T - 1 - t) / capacity_, ascending = t / capacity_;
  return all_.direction == 0 ? descending > ascending : ascending >= descending;
}

}  // namespace
}  // namespace fastlstm
