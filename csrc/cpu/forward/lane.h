// A lane of the forward pass: some sequences of one direction, which walk through time together.
//
// A step has these parts; a caller does them in this order:
//
//   begin_chunk, input_products   once for some steps: x w_ih^T for all of them, where the plan computes it ahead
//   begin_step                    which rows there are; states of sequences that begin; resets
//   gates                         gate sums (x w_ih^T + bias) + h w_hh^T for a range of tiles of units; of a plain LSTM
//                                 and an RNN also the new states, tile by tile
//   update_rows                   of an extended cell: everything that follows the gate sums, row by row
//   project_hidden, update_hidden h = m w_hr^T with a projection; what an extended cell does to h after it
//   end_step                      states of sequences that end
//
// A range (begin, end) is the share of one thread where several threads share a step. Rows of states are [n][pitch],
// padded to whole vectors. Files: rows.h (which rows, states), gates.h (products with
// packed weights), direct.h (with stored ones), extended.h, layer.h (the loop).
#pragma once

#include "cpu/cells/extended_row.h"
#include "cpu/cells/plain.h"
#include "cpu/cells/rnn.h"
#include "cpu/direct_sums.h"
#include "cpu/gate_sums.h"
#include "cpu/lane.h"
#include "cpu/plan.h"

namespace fastlstm {
namespace {

template <class S, Cell cell>
class ForwardLane {
  static constexpr bool kByRow = cell == Cell::extended;
  static constexpr bool kHasCell = cell != Cell::rnn;
  static constexpr i64 kTileUnits = kHasCell ? kLanes<S> : kPanel<S>;

 public:
  // extended: null if the cell is not extended.
  ForwardLane(const ForwardParams& p, const Plan& plan, const Extended<S>* extended, i64 direction, i64 lane);

  i64 rows() const { return rows_.rows; }
  i64 tiles() const { return at_.tiles; }
  i64 out_panels() const { return at_.out_panels; }
  bool at_chunk_start(i64 step) const { return step % steps_ == 0; }
  bool inputs_ahead() const { return inputs_ahead_; }
  // One step reads the weights forwards, the next one backwards: what was read last is still near.
  bool reads_backwards() const { return reads_backwards_; }

  void begin_chunk(i64 step);
  void input_products(i64 tile_begin, i64 tile_end);
  void begin_step(i64 step);
  void gates(i64 tile_begin, i64 tile_end);
  void update_rows(i64 row_begin, i64 row_end);
  void project_hidden(i64 panel_begin, i64 panel_end);
  void update_hidden(i64 row_begin, i64 row_end);
  void end_step();
  void end_sequence();

  // All of it, by one thread.
  void run();

 private:
  i64 time(i64 step) const { return rows_.direction == 0 ? step : s_.T - 1 - step; }

  // rows.h
  void reset_states();
  void load_state(i64 i);
  void store_state(i64 i);
  void emit_hidden(i64 begin, i64 count) const;

  // What the product with w_hh takes of a row.
  S* product_state(i64 i) const { return &(kByRow && h_masked_ ? h_masked_ : h_)[i * state_pitch_]; }
  bool starts_from_zero() const;

  // gates.h
  // Input product of one row of the chunk for one tile.
  S* input_product(i64 tile, i64 row) const {
    return &input_products_[kByRow ? row * gate_pitch_ + tile * kPanel<S> : (tile * chunk_rows_ + row) * kPanel<S>];
  }
  // Elements between the gates of a tile. Rows of an extended cell have no padding between gates. Whole vectors are
  // written from the first gate to the last: each one overwrites the padding of the one before, and the padding of the
  // last one falls into that of the row.
  i64 gate_step(i64 tile) const { return kByRow ? smaller(kLanes<S>, s_.H - tile * kLanes<S>) : kLanes<S>; }
  template <int R, int P>
  void add_inputs(Vec<S> (&acc)[R][P * kPanelVectors], i64 row, i64 tile) const;
  void put_panel(S* row, i64 tile, const S* sums) const;
  void fetch_outputs(i64 first, i64 rows, i64 tile) const;
  void sum_gates(i64 first, i64 rows, i64 tile, S (*sums)[kPanel<S>], i64 next);
  template <int R, int P>
  void sum_gates(i64 first, i64 tile, S (*sums)[kPanel<S>]);
  template <int P>
  void update(i64 first, i64 rows, i64 tile, S (*sums)[kPanel<S>]);
  void update_plain(const S* gates, i64 row, i64 unit);
  void update_rnn(const S* sums, i64 row, i64 unit) const;

  // direct.h
  void direct_input_products(i64 tile_begin, i64 tile_end);
  void direct_gates(i64 tile_begin, i64 tile_end);
  void direct_tiles(const Dots<S>& dots, i64 first, i64 last, Range tiles);
  void direct_projection(i64 begin, i64 count);

  // extended.h
  S* z_row(i64 i) const { return &z_[i * gate_pitch_]; }
  template <class Seen>
  void update_cell(i64 row, const Seen& seen);
  void mask_hidden(i64 i, const S* h) const;

  const ForwardParams& p_;
  const Sizes& s_;
  const LaneRows rows_;
  const ForwardPack<S> at_;
  const DirectionWeights& w_;
  const S* packed_;             // null: the weights are read as they are stored
  const GateSums<S> sums_;      // packed
  const DirectSums<S> direct_;  // not packed
  const bool backwards_;        // the first step: see call_order
  bool reads_backwards_ = false;
  const i64 hidden_pitch_, state_pitch_, gate_pitch_;
  const bool inputs_ahead_;
  const bool stores_y_;  // a cell stores h in y itself, where h is neither projected nor rounded
  const i64 steps_;      // of a chunk
  const i64 out_pitch_;
  const Extended<S>* const extended_;
  Buffer<char> block_;            // of what every lane has: one allocation is a tenth of a small step
  Buffer<S> h_, h_next_, c_, m_;  // states; m_: hidden state before its projection
  S* out_ = nullptr;              // where the gates put the hidden state: m_ or h_next_
  Buffer<const S*> x_row_;        // input rows of the chunk, active ones only, step by step
  Buffer<S*> rows_out_;           // where each active row of this step goes:
  S **y_row_, **cell_row_, **gates_row_;
  Buffer<S> x_copy_;            // the input rows of the chunk converted to S, for 16-bit input
  PairRows x_pairs_, h_pairs_;  // rows of the chunk and of this step, if products are those of pairs
  Buffer<S> input_products_;    // [tile][row of the chunk][kPanel]; of an extended cell [row of the chunk][gate_pitch_]
  Buffer<S> z_;                 // [rows][gate_pitch_] of an extended cell: gate sums, then gates
  Buffer<S> h_masked_;          // h * h_mask
  i64 chunk_rows_ = 0, next_row_ = 0, first_row_ = 0;  // of the chunk: rows; first row of the next step, of this step
  i64 entered_ = 0;                                    // rows whose initial state is loaded
  i64 t_ = 0, n_ = 0;                                  // this step: time and number of active rows
  bool from_zero_ = false;                             // this step: all states are zero
};

}  // namespace
}  // namespace fastlstm
