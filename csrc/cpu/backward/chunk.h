// A chunk: some consecutive steps of one direction of the backward pass, and the gradients of all their rows. First the
// gradients of every step are computed, then dx and the weight gradients take the whole chunk as one product each,
// while it is still in cache. Working memory is one chunk, however long the sequences are.
#pragma once

#include "cpu/lane.h"
#include "cpu/pair_rows.h"

namespace fastlstm {
namespace {

// Row start[k] + slot belongs to step k of the chunk; only active rows are kept.
template <class S>
struct Chunk {
  Buffer<S> gates;    // [rows][gate_pitch] what the forward pass would have kept; only if it has not
  Buffer<S> dgates;   // [rows][gate_pitch] gradients of the gate sums, in tile order
  PairRows pairs;     // dgates, if products are those of pairs
  Buffer<S> dhidden;  // [rows][state_pitch] gradient of the projected h; only with a projection
  Buffer<S> m;        // [rows][hidden_pitch] h before its projection; only of extended cells
  Buffer<S> c0;       // [B][H] by slot: c0 as S, for 16-bit states
  Buffer<i64> start;  // [steps + 1]
  // What went into the products, as S: only where weight gradients are written directly (direct.h).
  Buffer<S> x, h, hidden;  // [rows][pitch of I], of P, of H: hidden is h before its projection
  // Only with layer normalisation:
  struct Normalised {
    S input_scale, recurrent_scale;  // 1 / sqrt(variance + 1e-5)
    S input_mean, input_slope;       // see normalise_grad
  };
  Buffer<Normalised> normalised;  // [rows]
  Buffer<S> inputs;               // [rows][gate_pitch] x w_ih^T, normalised; later its gradient
  Buffer<S> recurrent;            // [rows][gate_pitch] h w_hh^T, normalised
  Buffer<S> drecurrent;           // [rows][gate_pitch] gradient of h w_hh^T
  Buffer<S> cell, dcell;          // [rows][hidden_pitch] c, normalised, and its gradient after gain and bias
  i64 gate_pitch, hidden_pitch, state_pitch;
  S* gates_row(i64 row) const { return &gates[row * gate_pitch]; }
  S* dgates_row(i64 row) const { return &dgates[row * gate_pitch]; }
  S* dhidden_row(i64 row) const { return &dhidden[row * state_pitch]; }
  // Gradients of the two products in the gate sums. Without layer normalisation they are those of the sums.
  S* dinputs_row(i64 row) const { return &(inputs ? inputs : dgates)[row * gate_pitch]; }
  S* recurrent_row(i64 row) const { return &recurrent[row * gate_pitch]; }
  S* drecurrent_row(i64 row) const { return &(drecurrent ? drecurrent : dgates)[row * gate_pitch]; }
};

// Whether sequence b is reset at time t.
inline bool resets(const BackwardParams& p, i64 t, i64 b) {
  return p.reset && p.reset[t * p.reset_step + b * p.reset_batch];
}

// c before step t of row i, which is sequence b; null stands for zero. c0: see Chunk.
template <class S>
inline const S* previous_cell(const BackwardParams& p, const LaneRows& rows, const Buffer<S>& c0, i64 t, i64 i, i64 b) {
  if (resets(p, t, b)) return nullptr;
  if (!rows.starts(i, t)) return element<S>(p.c_all.data, rows.offset(p.c_all, rows.previous(t), b));
  if (!p.c0.data) return nullptr;
  return c0 ? &c0[rows.slot(i) * p.sizes.H] : element<S>(p.c0.data, rows.offset(p.c0, b));
}

}  // namespace
}  // namespace fastlstm
