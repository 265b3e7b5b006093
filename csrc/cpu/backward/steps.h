// A step of a lane of the backward pass: what all cells share, and the gradients of a plain LSTM and an RNN.
#pragma once

#include "cpu/backward/lane.h"

namespace fastlstm {
namespace {

template <class S, Cell kCell>
inline BackwardLane<S, kCell>::BackwardLane(const BackwardParams& p, const Plan& plan, const Extended<S>* extended,
                                            i64 direction, i64 lane, const Chunk<S>& chunk)
    : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), at_(p.sizes), w_(p.weights[direction]),
      packed_(p.packed ? static_cast<const S*>(p.packed) + direction * at_.size : nullptr), chunk_(chunk),
      hidden_pitch_(pitch<S>(s_.H)), state_pitch_(pitch<S>(s_.P)), pairs_(pairs_in_backward<S>(s_, p.dtype)),
      extended_(extended) {
  dh_ = Buffer<S>(rows_.rows * state_pitch_);
  if (kHasCell) dc_ = Buffer<S>(rows_.rows * hidden_pitch_);
  if (s_.projected) {
    dm_ = Buffer<S>(rows_.rows * hidden_pitch_);
    dm_.zero();  // see `padded`
  }
  if (p.dy.data && element_bytes(p.dtype) != sizeof(S)) dy_ = Buffer<S>(rows_.rows * state_pitch_);
  if (kByRow && extended->zone_h) dh_stayed_ = Buffer<S>(rows_.rows * state_pitch_);
}

template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::begin_step(i64 t, i64 first) {
  t_ = t;
  n_ = rows_.active(t);
  first_ = first;
  for (; entered_ < n_; ++entered_) load_state(entered_);
  if (!s_.projected) return;  // then gate_grads adds dy
  for (i64 i = 0; i < n_; ++i) {
    S* dh = &dh_[i * state_pitch_];
    if (const S* dy = output_grad(i))
      for (i64 k = 0; k < s_.P; ++k) dh[k] += dy[k];
    if (kByRow) zone_hidden(i, nullptr);
    std::memcpy(chunk_.dhidden_row(row(i)), dh, size_t(s_.P) * sizeof(S));
  }
}

// The gradient of y of row i at this step; null for zeros.
template <class S, Cell kCell>
inline const S* BackwardLane<S, kCell>::output_grad(i64 i) const {
  if (!p_.dy.data) return nullptr;
  const i64 offset = rows_.offset(p_.dy, t_, rows_.batch(i));
  if (!dy_) return element<S>(p_.dy.data, offset);
  S* copy = &dy_[i * state_pitch_];
  convert_in(copy, p_.dy.data, p_.dtype, offset, s_.P);
  return copy;
}

// dm = dh w_hr for a range of panels of H.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::unproject(i64 panel_begin, i64 panel_end) {
  if (!packed_) {
    const i64 begin = panel_begin * kPanel<S>, end = smaller(panel_end * kPanel<S>, s_.H);
    if (n_ == 0 || begin >= end) return;
    const RowSums<S> sums(p_.dtype, n_, end - begin);
    return sums.sum(
        n_, {dh_.get(), state_pitch_}, s_.P, {w_.w_hr, p_.dtype, s_.H, begin, end}, [](i64 q) { return q; },
        {&dm_[begin], hidden_pitch_}, kProjectionChain);
  }
  for (i64 panel = panel_begin; panel < panel_end; ++panel)
    multiply_panel<S>(n_, {dh_.get(), state_pitch_}, s_.P, packed_ + at_.w_hr + panel * s_.P * kPanel<S>,
                      {&dm_[panel * kPanel<S>], hidden_pitch_}, smaller(kPanel<S>, s_.H - panel * kPanel<S>),
                      packed_ + at_.w_hr + (panel + 1) * s_.P * kPanel<S>, kProjectionChain);
}

// Gradients of the gate sums of a range of rows.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::gate_grads(i64 row_begin, i64 row_end) {
  row_end = smaller(row_end, n_);
  if constexpr (kByRow)
    extended_gate_grads(row_begin, row_end);
  else if constexpr (!kHasCell)
    rnn_gate_grads(row_begin, row_end);
  else
    plain_gate_grads(row_begin, row_end);
  if constexpr (sizeof(S) == sizeof(float))
    for (i64 i = row_begin; chunk_.pairs && i < row_end; ++i) chunk_.pairs.put(row(i), chunk_.dgates_row(row(i)));
}

template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::plain_gate_grads(i64 row_begin, i64 row_end) {
  const S* dm = (s_.projected ? dm_ : dh_).get();
  const i64 dm_pitch = s_.projected ? hidden_pitch_ : state_pitch_;
  for (i64 i = row_begin; i < row_end; ++i) {
    const i64 b = rows_.batch(i);
    const S* gates = gates_at(i, b);
    const S* cell = element<S>(p_.c_all.data, rows_.offset(p_.c_all, t_, b));
    const S* dc_out = p_.dc_all.data ? element<S>(p_.dc_all.data, rows_.offset(p_.dc_all, t_, b)) : nullptr;
    const S* dy = s_.projected ? nullptr : output_grad(i);
    const S* previous = previous_cell(p_, rows_, chunk_.c0, t_, i, b);
    S* dgates = chunk_.dgates_row(row(i));
    S* dc = &dc_[i * hidden_pitch_];
    for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
      const Gates<S> gate = load_gates(gates + 4 * unit, n);
      const Vec<S> tanh_c = tanh(load_n(cell + unit, n));
      Vec<S> dh = load(dm + i * dm_pitch + unit);
      if (dy) dh += load_n(dy + unit, n);
      Vec<S> dcell = cell_grad(dh, gate.o, tanh_c, load(dc + unit));
      if (dc_out) dcell += load_n(dc_out + unit, n);
      const Vec<S> c_previous = previous ? load_n(previous + unit, n) : Vec<S>{};
      store_gates(dgates + 4 * unit,
                  Gates<S>{grad_of_i(dcell, gate.i, gate.g), grad_of_f(dcell, gate.f, c_previous),
                           grad_of_g(dcell, gate.i, gate.g), grad_of_o(dh, gate.o, tanh_c)},
                  n);
      store(dc + unit, dcell * gate.f);
    });
  }
}

template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::rnn_gate_grads(i64 row_begin, i64 row_end) const {
  for (i64 i = row_begin; i < row_end; ++i) {
    const i64 b = rows_.batch(i), y = rows_.offset(p_.y, t_, b);
    const S* dy = output_grad(i);
    for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
      alignas(64) S values[kLanes<S>] = {};
      convert_in(values, p_.y.data, p_.dtype, y + unit, n);
      const Vec<S> h = load(values);
      Vec<S> dh = load_n(&dh_[i * state_pitch_ + unit], n);
      if (dy) dh += load_n(dy + unit, n);
      store_n(chunk_.dgates_row(row(i)) + unit, rnn_grad(dh, h, p_.cell.relu), n);
    });
  }
}

// dh of the step before = dgates w_hh, for a range of panels of P.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::recur(i64 panel_begin, i64 panel_end) {
  if (n_ == 0 || (!p_.dh0.data && rows_.starts(0, t_))) return;  // all rows begin at this step, and dh0 is not wanted
  if (!packed_) return recur_direct(panel_begin, panel_end);
  const auto w_hh = [&](i64 panel) { return packed_ + at_.w_hh + panel * s_.gate_units() * kPanel<S>; };
  const i64 direction = reads_backwards() ? -1 : 1;
  i64 panel = reads_backwards() ? panel_end - 1 : panel_begin;
  for (i64 left = panel_end - panel_begin; left > 0; --left, panel += direction) {
    const i64 begin = panel * kPanel<S>, width = smaller(kPanel<S>, s_.P - begin);
    if (chunk_.pairs)
      recur_pairs(w_hh(panel), w_hh(left > 1 ? panel + direction : panel), begin, width);
    else
      multiply_panel<S>(n_, {chunk_.drecurrent_row(row(0)), rows_.stride * chunk_.gate_pitch}, s_.gate_units(),
                        w_hh(panel), {&dh_[begin], state_pitch_}, width, w_hh(left > 1 ? panel + direction : panel),
                        gradient_chain(s_));
    if (kByRow) finish_hidden(begin, width);
  }
}

// The same of one panel, by pairs.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::recur_pairs(const S* panel, const S* next, i64 begin, i64 width) {
  alignas(64) S sums[kPanelRows][kPanel<S>];
  const S* rows[kPanelRows];
  for (i64 first = 0; first < n_; first += kPanelRows) {
    const i64 n = smaller(kPanelRows, n_ - first);
    for (i64 i = 0; i < n; ++i) rows[i] = chunk_.dgates_row(row(first + i));
    multiply_rounded<S>(pairs_, n, rows, chunk_.pairs.from(row(first), rows_.stride), s_.gate_units(), panel, width,
                        sums, false, first + n < n_ ? panel : next, kNeverLarge);
    for (i64 i = 0; i < n; ++i)
      std::memcpy(&dh_[(first + i) * state_pitch_ + begin], sums[i], size_t(width) * sizeof(S));
  }
}

// The same from stored weights.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::recur_direct(i64 panel_begin, i64 panel_end) {
  const i64 begin = panel_begin * kPanel<S>, end = smaller(panel_end * kPanel<S>, s_.P);
  if (begin >= end) return;
  const RowSums<S> sums(p_.dtype, n_, end - begin);
  sums.sum(
      n_, {chunk_.drecurrent_row(row(0)), rows_.stride * chunk_.gate_pitch}, s_.gate_units(),
      {w_.w_hh, p_.dtype, s_.P, begin, end}, [this](i64 q) { return gate_row<S>(s_, q); }, {&dh_[begin], state_pitch_},
      gradient_chain(s_));
  if (kByRow) finish_hidden(begin, end - begin);
}

template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::end_step() {
  if (p_.reset)
    for (i64 i = 0; i < n_; ++i)
      if (resets(p_, t_, rows_.batch(i))) {
        std::memset(&dh_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
        if (kHasCell) std::memset(&dc_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(S));
      }
  for (i64 i = n_; i-- > 0 && rows_.starts(i, t_);) store_state(i);
}

// Sequences without any step hand the gradients of their states through; dx of padding is zero.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::end_sequence() {
  for (; entered_ < rows_.rows; ++entered_) {
    load_state(entered_);
    store_state(entered_);
  }
  if (!p_.dx.data || rows_.direction || !p_.ragged.active || p_.ragged.row_offset) return;
  for (i64 i = 0; i < rows_.rows; ++i)
    for (i64 t = rows_.length(i); t < s_.T; ++t)
      std::memset(element<S>(p_.dx.data, rows_.offset(p_.dx, t, rows_.batch(i))), 0, size_t(s_.I) * sizeof(S));
}

template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::run(i64 t, i64 first) {
  begin_step(t, first);
  if (s_.projected) unproject(0, at_.hidden_panels);
  gate_grads(0, rows_.rows);
  recur(0, at_.state_panels);
  end_step();
}

// Gradients of the final state of row i, where there are any.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::load_state(i64 i) {
  const i64 b = rows_.batch(i);
  S* dh = &dh_[i * state_pitch_];
  std::memset(dh, 0, size_t(state_pitch_) * sizeof(S));
  if (p_.dh_n.data) std::memcpy(dh, element<S>(p_.dh_n.data, rows_.offset(p_.dh_n, b)), size_t(s_.P) * sizeof(S));
  if (!kHasCell) return;
  S* dc = &dc_[i * hidden_pitch_];
  std::memset(dc, 0, size_t(hidden_pitch_) * sizeof(S));
  if (p_.dc_n.data) std::memcpy(dc, element<S>(p_.dc_n.data, rows_.offset(p_.dc_n, b)), size_t(s_.H) * sizeof(S));
}

// Gradients of the initial state of row i, where they are wanted.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::store_state(i64 i) const {
  const i64 b = rows_.batch(i);
  if (p_.dh0.data)
    std::memcpy(element<S>(p_.dh0.data, rows_.offset(p_.dh0, b)), &dh_[i * state_pitch_], size_t(s_.P) * sizeof(S));
  if (p_.dc0.data)
    std::memcpy(element<S>(p_.dc0.data, rows_.offset(p_.dc0, b)), &dc_[i * hidden_pitch_], size_t(s_.H) * sizeof(S));
}

}  // namespace
}  // namespace fastlstm
