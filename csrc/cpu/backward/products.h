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
    if (pairs_) {
      for (i64 i = 0; i < n; ++i) rows[i] = chunk.dgates_row(first + i);
      multiply_rounded<S>(pairs_, n, rows, chunk.pairs.from(first), s_.gate_units(), w, width, sum, false,
                          w + s_.gate_units() * kPanel<S>, kNeverLarge);
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

// Rounds a slice of [x | h_previous] of this chunk for products of pairs, before they are added.
template <class S>
inline void BackwardDirection<S>::round_inputs(i64 slice) const {
  gates_.round(slice, chunk_rows(),
               [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, k_begin, k_end, out); });
}

// Adds part `part` of [x | h_previous]^T dgates of this chunk, and of the sum of dgates; with layer normalisation of
// x^T dinputs alone, as vector_grads has the bias.
template <class S>
inline void BackwardDirection<S>::gate_weight_grad(i64 part, i64 parts) const {
  const auto row_of = [this](i64 q) { return gate_row<S>(s_, q); };
  gates_.add(
      part, parts, chunk_rows(), chunk.dinputs_row(0), chunk.gate_pitch,
      [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, k_begin, k_end, out); },
      chunk.pairs.from(0).scales, last_chunk(),
      [&](i64 panel, i64 k_begin, i64 k_end, const S* sums) {
        write_panel(gates_, panel, k_begin, smaller(k_end, s_.I), sums, dw_.w_ih, s_.I, row_of);
        if (s_.layer_norm) return;
        const i64 h_begin = larger(k_begin, s_.I);
        write_panel(gates_, panel, h_begin - s_.I, k_end - s_.I, sums + (h_begin - k_begin) * kPanel<S>, dw_.w_hh, s_.P,
                    row_of);
        if (dw_.b && k_begin == 0)
          gates_.copy_bias(panel, [&](i64 q, S sum) { convert_out(dw_.b, p_.dtype, row_of(q), &sum, 1); });
      });
}

// With layer normalisation: adds h_previous^T drecurrent.
template <class S>
inline void BackwardDirection<S>::recurrent_weight_grad(i64 part, i64 parts) const {
  recurrent_.add(
      part, parts, chunk_rows(), chunk.drecurrent_row(0), chunk.gate_pitch,
      [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, s_.I + k_begin, s_.I + k_end, out); }, nullptr,
      last_chunk(),
      [&](i64 panel, i64 k_begin, i64 k_end, const S* sums) {
        write_panel(recurrent_, panel, k_begin, k_end, sums, dw_.w_hh, s_.P,
                    [this](i64 q) { return gate_row<S>(s_, q); });
      });
}

// Adds m^T dh of this chunk.
template <class S>
inline void BackwardDirection<S>::projection_weight_grad(i64 part, i64 parts) const {
  projection_.add(
      part, parts, chunk_rows(), chunk.dhidden.get(), chunk.state_pitch,
      [&](i64 row, i64 k_begin, i64 k_end, S* out) { hidden_before_projection(row, k_begin, k_end, out); }, nullptr,
      last_chunk(),
      [&](i64 panel, i64 k_begin, i64 k_end, const S* sums) {
        write_panel(projection_, panel, k_begin, k_end, sums, dw_.w_hr, s_.H, [](i64 q) { return q; });
      });
}

// Copies sums [end - begin][kPanel] to columns [begin, end) of rows row_of(n) of `out` [.., count], which may be
// absent; rounded where it has 16 bits.
template <class S>
template <class RowOf>
inline void BackwardDirection<S>::write_panel(const WeightGrad<S>& grad, i64 panel, i64 begin, i64 end, const S* sums,
                                              void* out, i64 count, const RowOf& row_of) const {
  if (!out || begin >= end) return;
  if (!narrow_) {
    grad.copy_panel(panel, sums, end - begin, [&](i64 n) { return static_cast<S*>(out) + row_of(n) * count + begin; });
    return;
  }
  alignas(64) S block[kPanel<S>][kPanel<S>];
  for (i64 k = begin; k < end; k += kPanel<S>, sums += kPanel<S> * kPanel<S>) {
    const i64 columns = smaller(kPanel<S>, end - k), first = panel * kPanel<S>;
    const i64 width = grad.copy_panel(panel, sums, columns, [&](i64 n) { return block[n - first]; });
    for (i64 lane = 0; lane < width; ++lane)
      convert_out(out, p_.dtype, row_of(first + lane) * count + k, block[lane], columns);
  }
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

template <class S>
inline void BackwardDirection<S>::zero_weight_grads() const {
  const auto zero = [this](void* out, i64 n) {
    if (out) std::memset(out, 0, size_t(n) * element_bytes(p_.dtype));
  };
  zero(dw_.w_ih, s_.gate_units() * s_.I);
  zero(dw_.w_hh, s_.gate_units() * s_.P);
  zero(dw_.b, s_.gate_units());
  zero(dw_.w_hr, s_.P * s_.H);
}

}  // namespace
}  // namespace fastlstm
