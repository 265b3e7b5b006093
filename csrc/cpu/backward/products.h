// Products over a chunk of one direction: dx and the weight gradients.
#pragma once

#include "cpu/backward/direction.h"

namespace fastlstm {
namespace {

// dx of rows [row_begin, row_end) of this chunk for one panel of I. It is added where the other direction has written.
template <class S>
inline void BackwardDirection<S>::input_grad(i64 row_begin, i64 row_end, i64 panel) {
  const i64 begin = panel * kPanel<S>, width = smaller(kPanel<S>, s_.I - begin);
  alignas(64) S sum[kTileRows * 8][kPanel<S>];
  constexpr i64 kGroup = kTileRows * 8;
  for (i64 first = row_begin; first < row_end; first += kGroup) {
    const i64 n = smaller(kGroup, row_end - first);
    const S *const w = packed_ + at_.w_ih + panel * s_.gate_units() * kPanel<S>, *rows[kGroup];
    if (half_) {
      for (i64 i = 0; i < n; ++i) rows[i] = chunk.dgates_row(first + i);
      multiply_rounded<S>(half_, n, rows, chunk.half.from(first), s_.gate_units(), w, sum, false, w, kNeverLarge);
    } else {
      multiply_panel<S>(n, {chunk.dinputs_row(first), chunk.gate_pitch}, s_.gate_units(), w, {sum[0], kPanel<S>}, width,
                        w + s_.gate_units() * kPanel<S>, gradient_chain(s_));
    }
    for (i64 i = 0; i < n; ++i) put_input_grad(first + i, begin, width, sum[i]);
  }
}

// dx of a row of the chunk, columns [begin, begin + count). It is added where the other direction has written.
template <class S>
inline void BackwardDirection<S>::put_input_grad(i64 row, i64 begin, i64 count, const S* from) const {
  i64 t, slot;
  locate(row, t, slot);
  S* dx = element<S>(p_.dx.data, all_.offset(p_.dx, t, all_.batch(slot)) + begin);
  if (second_at(t))
    for (i64 k = 0; k < count; ++k) dx[k] += from[k];
  else
    std::memcpy(dx, from, size_t(count) * sizeof(S));
}

// Adds part `part` of [x | h_previous]^T dgates of this chunk, and of the sum of dgates; with layer normalisation of
// x^T dinputs alone.
template <class S>
inline void BackwardDirection<S>::gate_weight_grad(i64 part, i64 parts) {
  gates_.add(
      part, parts, chunk_rows(), chunk.dinputs_row(0), chunk.gate_pitch,
      [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, k_begin, k_end, out); },
      chunk.half.from(0).scales);
}

// With layer normalisation: adds h_previous^T drecurrent.
template <class S>
inline void BackwardDirection<S>::recurrent_weight_grad(i64 part, i64 parts) {
  recurrent_.add(
      part, parts, chunk_rows(), chunk.drecurrent_row(0), chunk.gate_pitch,
      [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, s_.I + k_begin, s_.I + k_end, out); });
}

// Copies the gradients of the gate sums to their tensor, where they are in the order of the weights.
template <class S>
inline void BackwardDirection<S>::put_sum_grads() const {
  for (i64 row = 0; row < chunk_rows(); ++row) {
    i64 t, slot;
    locate(row, t, slot);
    const S* from = chunk.dgates_row(row);
    S* to = element<S>(p_.dsums.data, all_.offset(p_.dsums, t, all_.batch(slot)));
    for (i64 unit = 0; unit < s_.H; unit += kLanes<S>) {
      const i64 n = smaller(kLanes<S>, s_.H - unit);
      for (i64 gate = 0; gate < s_.G; ++gate, from += n)
        std::memcpy(to + gate * s_.H + unit, from, size_t(n) * sizeof(S));
    }
  }
}

// Adds m^T dh of this chunk.
template <class S>
inline void BackwardDirection<S>::projection_weight_grad(i64 part, i64 parts) {
  projection_.add(part, parts, chunk_rows(), chunk.dhidden.get(), chunk.state_pitch,
                  [&](i64 row, i64 k_begin, i64 k_end, S* out) { hidden_before_projection(row, k_begin, k_end, out); });
}

// Units [begin, end) of m = o * tanh(c), the hidden state of a row of the chunk before its projection.
template <class S>
inline void BackwardDirection<S>::hidden_before_projection(i64 row, i64 begin, i64 end, S* out) const {
  if (chunk.m) {
    std::memcpy(out, &chunk.m[row * chunk.hidden_pitch + begin], size_t(end - begin) * sizeof(S));
    return;
  }
  i64 t, slot;
  locate(row, t, slot);
  const i64 b = all_.batch(slot);
  const S* gates = gates_at(row, t, b);
  const S* cell = element<S>(p_.c_all.data, all_.offset(p_.c_all, t, b));
  for (i64 unit = begin / kLanes<S> * kLanes<S>; unit < end; unit += kLanes<S>) {
    const i64 n = smaller(kLanes<S>, s_.H - unit);
    const Vec<S> m = next_hidden(load_n(gates + 4 * unit + 3 * n, n), tanh(load_n(cell + unit, n)));
    for (i64 lane = larger(0, begin - unit); lane < n && unit + lane < end; ++lane) out[unit + lane - begin] = m[lane];
  }
}

// Copies the gradients of a panel of gate units, or of projected units, to the tensors that are wanted.
template <class S>
inline void BackwardDirection<S>::write_gate_grads(i64 panel) const {
  const auto write = [&](const WeightGrad<S>& grad, void* out, i64 k_begin, i64 count) {
    if (out)
      grad.copy_panel(panel, k_begin, count, [&](i64 q) { return static_cast<S*>(out) + gate_row<S>(s_, q) * count; });
  };
  gates_.end_panel(panel);
  write(gates_, dw_.w_ih, 0, s_.I);
  if (s_.layer_norm) {  // vector_grads has the bias
    recurrent_.end_panel(panel);
    return write(recurrent_, dw_.w_hh, 0, s_.P);
  }
  write(gates_, dw_.w_hh, s_.I, s_.P);
  if (dw_.b) gates_.copy_bias(panel, [&](i64 q) -> S& { return static_cast<S*>(dw_.b)[gate_row<S>(s_, q)]; });
}

template <class S>
inline void BackwardDirection<S>::write_projection_grads(i64 panel) const {
  projection_.end_panel(panel);
  projection_.copy_panel(panel, 0, s_.H, [&](i64 q) { return static_cast<S*>(dw_.w_hr) + q * s_.H; });
}

template <class S>
inline void BackwardDirection<S>::zero_weight_grads() const {
  const auto zero = [](void* out, i64 n) {
    if (out) std::memset(out, 0, size_t(n) * sizeof(S));
  };
  zero(dw_.w_ih, s_.gate_units() * s_.I);
  zero(dw_.w_hh, s_.gate_units() * s_.P);
  zero(dw_.b, s_.gate_units());
  zero(dw_.w_hr, s_.P * s_.H);
}

}  // namespace
}  // namespace fastlstm
