// A lane of the backward pass: some sequences of one direction, which walk back through time together. It computes the
// gradients of the gate sums of every step (dgates) into a chunk, and the gradients of h and c that go from step to
// step.
//
// It mirrors the lane of the forward pass. A step has these parts; a caller does them in this order:
//
//   begin_step   final states of sequences that end here; with a projection, dh of this step
//   unproject    dm = dh w_hr, with a projection (forward: project_hidden)
//   gate_grads   dgates from dh and dc, row by row (forward: gates, update_rows)
//   recur        dh of the step before = dgates w_hh (forward: the product in gates)
//   end_step     resets; initial states of sequences that begin here
//
// A range (begin, end) is the share of one thread where several threads share a step. Rows of gradients are [n][pitch],
// padded to whole vectors. Files: steps.h (plain LSTM, RNN and what all cells share), extended.h, layer.h (the loop).
#pragma once

#include "cpu/backward/chunk.h"
#include "cpu/cells/extended_row.h"
#include "cpu/cells/plain.h"
#include "cpu/cells/rnn.h"
#include "cpu/plan.h"
#include "cpu/row_sums.h"

namespace fastlstm {
namespace {

template <class S, Cell kCell>
class BackwardLane {
  static constexpr bool kByRow = kCell == Cell::extended;
  static constexpr bool kHasCell = kCell != Cell::rnn;

 public:
  // extended: null if the cell is not extended. chunk: that of the lane's direction.
  BackwardLane(const BackwardParams& p, const Plan& plan, const Extended<S>* extended, i64 direction, i64 lane,
               const Chunk<S>& chunk);

  i64 rows() const { return rows_.rows; }
  // One step reads the weights forwards, the next one backwards: what was read last is still near.
  bool reads_backwards() const { return t_ % 2 != 0; }
  i64 state_panels() const { return at_.state_panels; }
  i64 hidden_panels() const { return at_.hidden_panels; }

  // t: time of this step; first: its first row in the chunk.
  void begin_step(i64 t, i64 first);
  void unproject(i64 panel_begin, i64 panel_end);
  void gate_grads(i64 row_begin, i64 row_end);
  void recur(i64 panel_begin, i64 panel_end);
  void end_step();
  void end_sequence();

  // One step, by one thread.
  void run(i64 t, i64 first);

 private:
  i64 row(i64 i) const { return first_ + rows_.slot(i); }
  const S* gates_at(i64 i, i64 b) const {
    return chunk_.gates ? chunk_.gates_row(row(i)) : element<S>(p_.gates.data, rows_.offset(p_.gates, t_, b));
  }

  // steps.h
  const S* output_grad(i64 i) const;
  void plain_gate_grads(i64 row_begin, i64 row_end);
  void rnn_gate_grads(i64 row_begin, i64 row_end) const;
  void recur_direct(i64 panel_begin, i64 panel_end);
  void recur_pairs(const S* panel, const S* next, i64 begin, i64 width);
  void load_state(i64 i);
  void store_state(i64 i) const;

  // extended.h
  struct Group;
  void extended_gate_grads(i64 row_begin, i64 row_end);
  void normalised_gate_grads(i64 first, i64 rows);
  void new_cells(Group& group) const;
  void cell_grads(Group& group, const Moments<S>& of_c) const;
  void sum_grads(Group& group, const Moments<S>& of_c) const;
  void recurrent_grads(const Group& group) const;
  ExtendedRow<S> extended_row(i64 i) const;
  void zone_hidden(i64 i, const S* dy) const;
  void finish_hidden(i64 begin, i64 width) const;

  const BackwardParams& p_;
  const Sizes& s_;
  const LaneRows rows_;
  const BackwardPack<S> at_;
  const DirectionWeights& w_;
  const S* packed_;  // null: the weights are read as they are stored
  const Chunk<S>& chunk_;
  const i64 hidden_pitch_, state_pitch_;
  const PairKernels* const pairs_;
  const Extended<S>* const extended_;
  Buffer<S> dh_, dc_, dm_;  // gradients that go back in time; dm_: gradient of the hidden state before its projection
  Buffer<S> dy_;            // [n][state_pitch_] of this step, as S: only of 16-bit layers
  Buffer<S> dh_stayed_;     // the part of dh that zoneout leads past this step
  i64 entered_ = 0;         // rows whose final gradient is loaded
  i64 t_ = 0, n_ = 0, first_ = 0;  // this step: time, number of active rows, first row in the chunk
};

}  // namespace
}  // namespace fastlstm
