// Rows of a lane of the forward pass: which there are at each step, their states, and the way out of their results.
#pragma once

#include "cpu/forward/lane.h"

namespace fastlstm {
namespace {

template <class S, Cell cell>
inline ForwardLane<S, cell>::ForwardLane(const ForwardParams& p, const Plan& plan, const Extended<S>* extended,
                                         i64 direction, i64 lane)
    : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), at_(p.sizes), w_(p.weights[direction]),
      packed_(p.packed ? static_cast<const S*>(p.packed) + direction * at_.size : nullptr),
      sums_{s_, at_, packed_, pairs_in_forward<S>(s_, p.dtype)},
      direct_(packed_ ? DirectSums<S>()
                      : DirectSums<S>(s_, p.dtype, w_, come_from_memory(s_, p.dtype, p.other_weights, this_machine()))),
      backwards_(call_order()), hidden_pitch_(pitch<S>(s_.H)), state_pitch_(pitch<S>(s_.P)),
      gate_pitch_(pitch<S>(4 * s_.H)), inputs_ahead_(plan.input_steps > 0 || (kByRow && s_.layer_norm)),
      stores_y_(!s_.projected && element_bytes(p.dtype) == sizeof(S) && !kByRow), steps_(larger(1, plan.input_steps)),
      out_pitch_(s_.projected ? hidden_pitch_ : state_pitch_), extended_(extended) {
  const i64 n = rows_.rows;
  const i64 states = n * state_pitch_, cells = kHasCell ? n * hidden_pitch_ : 0;
  using Rows = Buffer<S*>;
  block_ = Buffer<char>(2 * Buffer<S>::bytes(states) + Buffer<S>::bytes(cells) + Rows::bytes(n * steps_) +
                        Rows::bytes(3 * n));
  char* at = block_.get();
  h_ = Buffer<S>(at, states);
  h_next_ = Buffer<S>(at, states);
  c_ = Buffer<S>(at, cells);
  x_row_ = Buffer<const S*>(at, n * steps_);
  rows_out_ = Rows(at, 3 * n);
  if (s_.projected) m_ = Buffer<S>(n * hidden_pitch_);
  y_row_ = rows_out_.get();
  cell_row_ = y_row_ + n;
  gates_row_ = cell_row_ + n;
  if (element_bytes(p.dtype) != sizeof(S)) x_copy_ = Buffer<S>(n * steps_ * s_.I);
  if (sums_.pairs) {
    x_pairs_ = PairRows(sums_.pairs, n * steps_, s_.I);
    h_pairs_ = PairRows(sums_.pairs, n, s_.P);
  }
  if (inputs_ahead_) input_products_ = Buffer<S>(n * steps_ * (kByRow ? gate_pitch_ : at_.tiles * kPanel<S>));
  if (kByRow) z_ = Buffer<S>(n * gate_pitch_);
  if (kByRow && p.cell.h_mask.data) h_masked_ = Buffer<S>(n * state_pitch_);
}

// Collects the input rows of the next steps_ steps.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::begin_chunk(i64 step) {
  chunk_rows_ = 0;
  for (i64 k = step; k < smaller(step + steps_, s_.T); ++k) {
    const i64 t = time(k);
    for (i64 i = 0; i < rows_.active(t); ++i) {
      const i64 offset = rows_.offset(p_.x, t, rows_.batch(i));
      if (x_copy_) {
        convert_in(&x_copy_[chunk_rows_ * s_.I], p_.x.data, p_.dtype, offset, s_.I);
        x_row_[chunk_rows_] = &x_copy_[chunk_rows_ * s_.I];
        if constexpr (sizeof(S) == sizeof(float))
          if (x_pairs_) x_pairs_.put(chunk_rows_, x_row_[chunk_rows_]);
      } else {
        x_row_[chunk_rows_] = element<const S>(p_.x.data, offset);
      }
      ++chunk_rows_;
    }
  }
  next_row_ = 0;
}

template <class S, Cell cell>
inline void ForwardLane<S, cell>::begin_step(i64 step) {
  t_ = time(step);
  reads_backwards_ = (!packed_ && backwards_) != (step % 2 != 0);
  n_ = rows_.active(t_);
  first_row_ = next_row_;
  next_row_ += n_;
  const bool all_begin = entered_ == 0;
  for (; entered_ < n_; ++entered_) load_state(entered_);
  from_zero_ = all_begin && starts_from_zero();
  out_ = (s_.projected ? m_ : h_next_).get();
  for (i64 i = 0; i < n_; ++i) {
    const i64 b = rows_.batch(i);
    if (stores_y_) y_row_[i] = element<S>(p_.y.data, rows_.offset(p_.y, t_, b));
    if (p_.c_all.data) cell_row_[i] = element<S>(p_.c_all.data, rows_.offset(p_.c_all, t_, b));
    if (p_.gates.data) gates_row_[i] = element<S>(p_.gates.data, rows_.offset(p_.gates, t_, b));
  }
  if (p_.reset) reset_states();
  if constexpr (sizeof(S) == sizeof(float))
    for (i64 i = 0; h_pairs_ && !from_zero_ && i < n_; ++i) h_pairs_.put(i, product_state(i));
}

// Whether the states of all rows are zero, as they are at first in most calls: the product with w_hh need not be made.
template <class S, Cell cell>
inline bool ForwardLane<S, cell>::starts_from_zero() const {
  const S* const state = product_state(0);
  for (i64 k = 0; k < n_ * state_pitch_; k += kLanes<S>)
    for (int lane = 0; lane < kLanes<S>; ++lane)
      if (state[k + lane] != 0) return false;  // also NaN
  return true;
}

// Rows that are reset at this step start from zero states.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::reset_states() {
  for (i64 i = 0; i < n_; ++i)
    if (p_.reset[t_ * p_.reset_step + rows_.batch(i) * p_.reset_batch]) {
      std::memset(&h_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
      if (kHasCell) std::memset(&c_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(S));
      if (h_masked_) std::memset(&h_masked_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
    }
}

template <class S, Cell cell>
inline void ForwardLane<S, cell>::end_step() {
  h_.swap(h_next_);
  for (i64 i = n_; i-- > 0 && rows_.ends(i, t_);) store_state(i);  // ending rows are the last ones, or all
}

// Sequences without any step keep their initial state; padding reads as zero.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::end_sequence() {
  for (; entered_ < rows_.rows; ++entered_) {
    load_state(entered_);
    store_state(entered_);
  }
  if (!p_.ragged.active || p_.ragged.row_offset) return;
  const size_t bytes = element_bytes(p_.dtype);
  for (i64 i = 0; i < rows_.rows; ++i)
    for (i64 t = rows_.length(i); t < s_.T; ++t) {
      const i64 b = rows_.batch(i), y = rows_.offset(p_.y, t, b);
      std::memset(static_cast<char*>(p_.y.data) + size_t(y) * bytes, 0, size_t(s_.P) * bytes);
      if (p_.c_all.data)
        std::memset(element<S>(p_.c_all.data, rows_.offset(p_.c_all, t, b)), 0, size_t(s_.H) * sizeof(S));
    }
}

// Writes units [begin, begin + count) of h to y.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::emit_hidden(i64 begin, i64 count) const {
  for (i64 i = 0; i < n_; ++i)
    convert_out(p_.y.data, p_.dtype, rows_.offset(p_.y, t_, rows_.batch(i)) + begin, &h_next_[i * state_pitch_ + begin],
                count);
}

// The initial state of row i.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::load_state(i64 i) {
  const i64 b = rows_.batch(i);
  S* h = &h_[i * state_pitch_];
  std::memset(h, 0, size_t(state_pitch_) * sizeof(S));
  if (p_.h0.data) convert_in(h, p_.h0.data, p_.dtype, rows_.offset(p_.h0, b), s_.P);
  if (h_masked_) mask_hidden(i, h);
  if (!kHasCell) return;
  S* c = &c_[i * hidden_pitch_];
  std::memset(c, 0, size_t(hidden_pitch_) * sizeof(S));
  if (p_.c0.data) convert_in(c, p_.c0.data, p_.dtype, rows_.offset(p_.c0, b), s_.H);
}

// The final state of row i.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::store_state(i64 i) {
  const i64 b = rows_.batch(i);
  convert_out(p_.h_n.data, p_.dtype, rows_.offset(p_.h_n, b), &h_[i * state_pitch_], s_.P);
  if (kHasCell) convert_out(p_.c_n.data, p_.dtype, rows_.offset(p_.c_n, b), &c_[i * hidden_pitch_], s_.H);
}

}  // namespace
}  // namespace fastlstm
