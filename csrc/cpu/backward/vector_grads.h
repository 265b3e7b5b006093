// Gradients of an extended cell that go over the rows of a chunk without a matrix product: those of weights that are
// multiplied unit by unit (peepholes, gains and biases of layer normalisation), and that of x w_ih^T.
#pragma once

#include "cpu/backward/direction.h"

namespace fastlstm {
namespace {

// Gradient of x w_ih^T, in place of its normalised values: after vector_grads nobody needs these.
template <class S>
inline void BackwardDirection<S>::normalised_input_grad(i64 row_begin, i64 row_end) const {
  for (i64 row = row_begin; row < row_end; ++row) {
    const S* d = chunk.dgates_row(row);
    S* x = chunk.dinputs_row(row);
    const typename Chunk<S>::Normalised of_row = chunk.normalised[row];
    for_vectors<S>(4 * s_.H, [&](i64 at, i64 n) FASTLSTM_INLINE_LAMBDA {
      store_n(x + at,
              normalise_grad<S>(load_n(d + at, n), load_n(&extended_->ln_ih[at], n), load_n(x + at, n),
                                of_row.input_scale, of_row.input_mean, of_row.input_slope),
              n);
    });
  }
}

// Rows whose sums are computed on their own and then added to the total: short chains are accurate.
template <class S>
struct BackwardDirection<S>::Run {
  static constexpr i64 kRows = 32;
  i64 first, rows;
  const S *gates[kRows], *c_before[kRows];  // only with peepholes
};

template <class S>
inline void BackwardDirection<S>::find_cells(Run& run) const {
  for (i64 i = 0; i < run.rows; ++i) {
    i64 t, slot;
    locate(run.first + i, t, slot);
    const i64 b = all_.batch(slot);
    run.gates[i] = gates_at(run.first + i, t, b);
    run.c_before[i] = previous_cell(p_, all_, chunk.c0, t, slot, b);
  }
}

// Adds the gradients of this chunk to the sums vectors_, for a range of tiles of units.
template <class S>
inline void BackwardDirection<S>::vector_grads(i64 tile_begin, i64 tile_end) const {
  for (i64 first = 0; first < chunk_rows(); first += Run::kRows) {
    Run run;
    run.first = first;
    run.rows = smaller(Run::kRows, chunk_rows() - first);
    if (s_.peephole) find_cells(run);
    for (i64 tile = tile_begin; tile < tile_end; ++tile) {
      LongSum<S>* total = &vectors_[tile * vectors()];
      const auto add = [&](Vec<S> sum) { total++->add(sum); };
      if (s_.peephole) peephole_grads(run, tile, add);
      if (s_.layer_norm) normalisation_grads(run, tile, add);
    }
  }
}

// Peepholes of i, f and o: gradient of the gate sum times the c that the gate saw.
template <class S>
template <class Add>
FASTLSTM_INLINE void BackwardDirection<S>::peephole_grads(const Run& run, i64 tile, const Add& add) const {
  const i64 unit = tile * kLanes<S>, n = smaller(kLanes<S>, s_.H - unit);
  Vec<S> sums[3] = {};
  for (i64 i = 0; i < run.rows; ++i) {
    const S *gate = run.gates[i] + 4 * unit, *d = chunk.dgates_row(run.first + i) + 4 * unit;
    const Vec<S> c = run.c_before[i] ? load_n(run.c_before[i] + unit, n) : Vec<S>{};
    const Vec<S> c_new = next_cell(load_n(gate, n), load_n(gate + n, n), load_n(gate + 2 * n, n), c);
    sums[0] = fma(load_n(d, n), c, sums[0]);
    sums[1] = fma(load_n(d + n, n), c, sums[1]);
    sums[2] = fma(load_n(d + 3 * n, n), c_new, sums[2]);
  }
  for (const Vec<S>& sum : sums) add(sum);
}

// For each gate bias, gain of x w_ih^T and gain of h w_hh^T; then bias and gain of c.
template <class S>
template <class Add>
FASTLSTM_INLINE void BackwardDirection<S>::normalisation_grads(const Run& run, i64 tile, const Add& add) const {
  const i64 unit = tile * kLanes<S>, n = smaller(kLanes<S>, s_.H - unit);
  for (i64 v = 0; v < kPanelVectors; ++v) {
    Vec<S> sums[3] = {};
    for (i64 row = run.first; row < run.first + run.rows; ++row) {
      const i64 at = 4 * unit + v * n;
      const Vec<S> d = load_n(chunk.dgates_row(row) + at, n);
      sums[0] += d;
      sums[1] = fma(d, load_n(chunk.dinputs_row(row) + at, n), sums[1]);
      sums[2] = fma(d, load_n(chunk.recurrent_row(row) + at, n), sums[2]);
    }
    for (const Vec<S>& sum : sums) add(sum);
  }
  Vec<S> sums[2] = {};
  for (i64 row = run.first; row < run.first + run.rows; ++row) {
    const Vec<S> d = load_n(&chunk.dcell[row * chunk.hidden_pitch + unit], n);
    sums[0] += d;
    sums[1] = fma(d, load_n(&chunk.cell[row * chunk.hidden_pitch + unit], n), sums[1]);
  }
  for (const Vec<S>& sum : sums) add(sum);
}

// Copies the sums, in the order in which vector_grads adds them, to the tensors that are wanted.
template <class S>
inline void BackwardDirection<S>::write_vector_grads() const {
  for (i64 tile = 0; tile < tiles(); ++tile) {
    const i64 unit = tile * kLanes<S>, n = smaller(kLanes<S>, s_.H - unit);
    const LongSum<S>* sum = &vectors_[tile * vectors()];
    const auto write = [&](void* out, i64 first) {
      if (out) put_vector(out, first + unit, sum->total(), n);
      ++sum;
    };
    for (i64 k = 0; k < 3 && s_.peephole; ++k) write(dw_.w_ch, k * s_.H);
    if (!s_.layer_norm) continue;
    for (i64 v = 0; v < kPanelVectors; ++v) {
      write(dw_.b, v * s_.H);
      write(dw_.ln_ih, v * s_.H);
      write(dw_.ln_hh, v * s_.H);
    }
    write(dw_.b_ln_c, 0);
    write(dw_.ln_c, 0);
  }
}

}  // namespace
}  // namespace fastlstm
