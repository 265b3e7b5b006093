// Products of a lane of the forward pass, and what a plain LSTM or an RNN does with the gate sums.
#pragma once

#include "cpu/forward/lane.h"

namespace fastlstm {
namespace {

// Input products x w_ih^T + bias of all rows of the chunk, for a range of tiles of units.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::input_products(i64 tile_begin, i64 tile_end) {
  if (!packed_) return direct_input_products(tile_begin, tile_end);
  alignas(64) S sums[kPanelRows][kPanel<S>];
  const i64 groups = ceil_div(chunk_rows_, kPanelRows);
  for (i64 tile = tile_begin; tile < tile_end; ++tile)
    for (i64 group = 0; group < groups; ++group) {
      const i64 first = group * chunk_rows_ / groups, last = (group + 1) * chunk_rows_ / groups;
      sums_.start(last - first, &x_row_[first], x_pairs_.from(first), tile, sums,
                  sums_.input_panel(group + 1 < groups ? tile : smaller(tile + 1, tile_end - 1)));
      for (i64 row = first; row < last; ++row) put_panel(input_product(tile, row), tile, sums[row - first]);
    }
}

// Whole vectors from the first gate to the last: see gate_step.
template <class S, Cell cell>
FASTLSTM_INLINE void ForwardLane<S, cell>::put_panel(S* row, i64 tile, const S* sums) const {
#pragma GCC unroll 8
  for (int v = 0; v < kPanelVectors; ++v) store(row + v * gate_step(tile), load(sums + v * kLanes<S>));
}

// Gate sums of this step for a range of tiles of units; of a plain LSTM and an RNN also the new states.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::gates(i64 tile_begin, i64 tile_end) {
  alignas(64) S sums[kPanelRows][kPanel<S>];
  if (!packed_) {
    direct_gates(tile_begin, tile_end);
  } else if (n_ <= kTallestTile && !sums_.pairs) {  // few rows: several tiles at once keep the multipliers busy
    with_rows<kTallestTile>(n_, [&](auto height) {
      constexpr int R = decltype(height)::value, P = R == 1 ? 2 : larger(1, kTileRows / R);
      if (n_ != R) return;  // no rows at all
      const i64 blocks = ceil_div(tile_end - tile_begin, P);
      for (i64 k = 0; k < blocks; ++k) {
        const i64 tile = tile_begin + P * (reads_backwards_ ? blocks - 1 - k : k);
        if (tile + P <= tile_end) {
          sum_gates<R, P>(0, tile, sums);
          update<P>(0, R, tile, sums);
        } else {
          for (i64 single = tile; single < tile_end; ++single) {
            sum_gates<R, 1>(0, single, sums);
            update<1>(0, R, single, sums);
          }
        }
      }
    });
  } else {
    const i64 groups = ceil_div(n_, kPanelRows);
    for (i64 k = 0; k < tile_end - tile_begin; ++k)
      for (i64 group = 0; group < groups; ++group) {
        const i64 tile = reads_backwards_ ? tile_end - 1 - k : tile_begin + k, first = group * n_ / groups;
        const i64 after =
            group + 1 < groups ? tile : larger(tile_begin, smaller(tile + (reads_backwards_ ? -1 : 1), tile_end - 1));
        const i64 rows = (group + 1) * n_ / groups - first;
        sum_gates(first, rows, tile, sums, after);
        update<1>(first, rows, tile, sums);
      }
  }
  if (!s_.projected && !stores_y_ && !kByRow)
    emit_hidden(tile_begin * kTileUnits, smaller(tile_end * kTileUnits, s_.H) - tile_begin * kTileUnits);
}

template <class S, Cell cell>
template <int R, int P>
FASTLSTM_INLINE void ForwardLane<S, cell>::add_inputs(Vec<S> (&acc)[R][P * kPanelVectors], i64 row, i64 tile) const {
  const S* x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) x[r] = x_row_[row + r];
  sums_.template start<R, P>(acc, x, tile);
}

// Asks for the lines of memory that `update` will write for a tile of these rows. They were last touched a step or a
// call ago, so they come from far; a store that waits for its line holds up everything behind it.
template <class S, Cell cell>
FASTLSTM_INLINE void ForwardLane<S, cell>::fetch_outputs(i64 first, i64 rows, i64 tile) const {
  const i64 unit = tile * kTileUnits, units = smaller(kTileUnits, s_.H - unit);
  const auto fetch = [&](S* const* row, i64 begin, i64 count) FASTLSTM_INLINE_LAMBDA {
    for (i64 r = first; r < first + rows; ++r)
      for (i64 k = 0; k < count; k += kLanes<S>) __builtin_prefetch(row[r] + begin + k, 1);
  };
  if (stores_y_) fetch(y_row_, unit, units);
  if (p_.c_all.data) fetch(cell_row_, unit, units);
  if (p_.gates.data) fetch(gates_row_, s_.G * unit, s_.G * units);
}

// Gate sums of one tile for up to kPanelRows rows. next: the tile that follows.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::sum_gates(i64 first, i64 rows, i64 tile, S (*sums)[kPanel<S>], i64 next) {
  if (!kByRow) fetch_outputs(first, rows, tile);
  const S* h[kPanelRows];
  for (i64 r = 0; r < rows; ++r) h[r] = product_state(first + r);
  if (kByRow && s_.layer_norm)  // which adds the input products later
    std::memset(sums, 0, size_t(rows) * sizeof sums[0]);
  else if (!inputs_ahead_)
    sums_.start(rows, &x_row_[first_row_ + first], x_pairs_.from(first_row_ + first), tile, sums,
                sums_.hidden_panel(tile));
  else
    for (i64 r = 0; r < rows; ++r) {
      const S* product = input_product(tile, first_row_ + first + r);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) store(&sums[r][v * kLanes<S>], load(product + v * gate_step(tile)));
    }
  if (from_zero_)
    sums_.add_zero_hidden(rows, tile, sums);
  else
    sums_.add_hidden(rows, h, h_pairs_.from(first), tile, sums,
                     inputs_ahead_ ? sums_.hidden_panel(next) : sums_.input_panel(next));
  if constexpr (kByRow)
    for (i64 r = 0; r < rows; ++r) put_panel(z_row(first + r) + tile * kPanel<S>, tile, sums[r]);
}

// The same for few rows R and P tiles, in registers.
template <class S, Cell cell>
template <int R, int P>
inline void ForwardLane<S, cell>::sum_gates(i64 first, i64 tile, S (*sums)[kPanel<S>]) {
  Vec<S> acc[R][P * kPanelVectors];
  if (kByRow && s_.layer_norm) {  // which adds the input products later
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] = Vec<S>{};
  } else if (inputs_ahead_) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v)
          acc[r][p * kPanelVectors + v] =
              load(input_product(tile + p, first_row_ + first + r) + v * gate_step(tile + p));
  } else {
    add_inputs<R, P>(acc, first_row_ + first, tile);
  }
  if (from_zero_) {
    sums_.template add_zero_hidden<R, P>(acc, tile);
  } else {
    const S* h[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) h[r] = product_state(first + r);
    sums_.template add_hidden<R, P>(acc, h, tile);
  }
  if constexpr (kByRow) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v)
          store(z_row(first + r) + (tile + p) * kPanel<S> + v * gate_step(tile + p), acc[r][p * kPanelVectors + v]);
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int v = 0; v < P * kPanelVectors; ++v)
      store(&sums[r * P + v / kPanelVectors][v % kPanelVectors * kLanes<S>], acc[r][v]);
}

// States of `rows` rows from the gate sums of P tiles of units, sums [rows * P]. There are two loops over the rows
// instead of one: constants stay in registers, and the chain of dependent instructions of a row is short in each loop,
// so that many rows are in flight and the core does not wait.
template <class S, Cell cell>
template <int P>
inline void ForwardLane<S, cell>::update(i64 first, i64 rows, i64 tile, S (*sums)[kPanel<S>]) {
  if constexpr (kByRow) return;
  if constexpr (!kHasCell) {
#pragma GCC unroll 1
    for (i64 k = 0; k < rows * P; ++k) update_rnn(sums[k], first + k / P, (tile + k % P) * kPanel<S>);
    return;
  }
#pragma GCC unroll 1
  for (i64 k = 0; k < rows * P; ++k) activate(sums[k], kLanes<S>);
#pragma GCC unroll 1
  for (i64 r = 0; r < rows; ++r)
#pragma GCC unroll 1
    for (int p = 0; p < P; ++p) update_plain(sums[r * P + p], first + r, (tile + p) * kLanes<S>);
}

// Hidden state of kPanel units of one row of an RNN, from their sums.
template <class S, Cell cell>
FASTLSTM_INLINE void ForwardLane<S, cell>::update_rnn(const S* sums, i64 row, i64 unit) const {
#pragma GCC unroll 4
  for (i64 v = 0; v < kPanelVectors; ++v, unit += kLanes<S>) {
    if (unit >= s_.H) return;
    const Vec<S> z = load(sums + v * kLanes<S>);
    const Vec<S> hidden = rnn_hidden(z, p_.cell.relu);
    store(out_ + row * out_pitch_ + unit, hidden);
    if (stores_y_) store_n(y_row_[row] + unit, hidden, smaller(kLanes<S>, s_.H - unit));
  }
}

// Cell and hidden state of kLanes units of one row, from its activated gates.
template <class S, Cell cell>
FASTLSTM_INLINE void ForwardLane<S, cell>::update_plain(const S* gates, i64 row, i64 unit) {
  const Gates<S> gate = load_gates(gates, kLanes<S>);
  S* c = &c_[row * hidden_pitch_ + unit];
  const Vec<S> c_new = next_cell(gate.i, gate.f, gate.g, load(c)), hidden = next_hidden(gate.o, tanh(c_new));
  store(c, c_new);
  store(out_ + row * out_pitch_ + unit, hidden);
  const i64 width = smaller(kLanes<S>, s_.H - unit);
  if (stores_y_) store_n(y_row_[row] + unit, hidden, width);
  if (p_.c_all.data) store_n(cell_row_[row] + unit, c_new, width);
  if (p_.gates.data) store_gates(gates_row_[row] + 4 * unit, gate, width);
}

// h = m w_hr^T for a range of panels of P.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::project_hidden(i64 panel_begin, i64 panel_end) {
  for (i64 panel = panel_begin; panel < panel_end; ++panel) {
    const i64 begin = panel * kPanel<S>, count = smaller(kPanel<S>, s_.P - begin);
    if (packed_)
      multiply_panel<S>(n_, {m_.get(), hidden_pitch_}, s_.H, packed_ + at_.w_hr + panel * s_.H * kPanel<S>,
                        {&h_next_[begin], state_pitch_}, count, packed_ + at_.w_hr + (panel + 1) * s_.H * kPanel<S>,
                        kProjectionChain);
    else
      direct_projection(begin, count);
    if (!kByRow) emit_hidden(begin, count);
  }
}

}  // namespace
}  // namespace fastlstm
