// A step of a lane of the backward pass for an extended cell: forward/extended.h, mirrored.
#pragma once

#include "cpu/backward/lane.h"

namespace fastlstm {
namespace {

// A group of rows that goes through the stages of layer normalisation together.
template <class S, Cell kCell>
struct BackwardLane<S, kCell>::Group {
  i64 first, count;
  ExtendedRow<S> rows[kRowGroup];
  S cell_means[kRowGroup][2] = {};  // mean and slope of c, see normalise_grad
  S gate_means[kRowGroup][4] = {};  // those of x w_ih^T and of h w_hh^T
};

template <class S, Cell kCell>
inline ExtendedRow<S> BackwardLane<S, kCell>::extended_row(i64 i) const {
  const i64 b = rows_.batch(i), at = row(i);
  ExtendedRow<S> found;
  found.gates = gates_at(i, b);
  found.c_before = previous_cell(p_, rows_, chunk_.c0, t_, i, b);
  found.dc_out = p_.dc_all.data ? element<S>(p_.dc_all.data, rows_.offset(p_.dc_all, t_, b)) : nullptr;
  found.dm = s_.projected ? &dm_[i * hidden_pitch_] : &dh_[i * state_pitch_];
  found.dgates = chunk_.dgates_row(at);
  found.dc = &dc_[i * hidden_pitch_];
  found.m = chunk_.m ? &chunk_.m[at * hidden_pitch_] : nullptr;
  found.normal_c = chunk_.cell ? &chunk_.cell[at * hidden_pitch_] : nullptr;
  found.dnormal_c = chunk_.dcell ? &chunk_.dcell[at * hidden_pitch_] : nullptr;
  found.key = extended_->zone_c ? extended_->row_key(t_, b) : 0;
  return found;
}

// Gradients of the gate sums of a range of rows, in groups as in ForwardLane::update_rows.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::extended_gate_grads(i64 row_begin, i64 row_end) {
  for (i64 first = row_begin; first < row_end; first += kRowGroup) {
    const i64 last = smaller(first + kRowGroup, row_end);
    for (i64 i = first; i < last && !s_.projected; ++i) zone_hidden(i, output_grad(i));
    if (s_.layer_norm) {
      normalised_gate_grads(first, last - first);
      continue;
    }
    for (i64 i = first; i < last; ++i) {
      const ExtendedRow<S> row = extended_row(i);
      row_gate_grads(
          *extended_, row,
          [&](i64 unit, i64 n, Vec<S> c) FASTLSTM_INLINE_LAMBDA { return hidden_grad<S>(row, unit, n, c); },
          [](i64, i64, Vec<S>) {});
    }
  }
}

// The stages of layer normalisation, each for all rows of a group.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::normalised_gate_grads(i64 first, i64 rows) {
  Group group;
  group.first = first;
  group.count = rows;
  new_cells(group);
  const Moments<S> of_c(rows, s_.H, [&](i64 k) { return group.rows[k].normal_c; });
  cell_grads(group, of_c);
  sum_grads(group, of_c);
  recurrent_grads(group);
}

// c of this step before its normalisation, from the gates.
template <class S, Cell kCell>
FASTLSTM_INLINE void BackwardLane<S, kCell>::new_cells(Group& group) const {
  for (i64 k = 0; k < group.count; ++k) {
    const ExtendedRow<S> row = group.rows[k] = extended_row(group.first + k);
    for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
      const S* gates = row.gates + 4 * unit;
      store(row.normal_c + unit,
            next_cell(load_n(gates, n), load_n(gates + n, n), load_n(gates + 2 * n, n), row.c_previous(unit, n)));
    });
  }
}

// Normalises c, and computes its gradient after gain and bias with the means that normalise_grad needs.
template <class S, Cell kCell>
FASTLSTM_INLINE void BackwardLane<S, kCell>::cell_grads(Group& group, const Moments<S>& of_c) const {
  const Extended<S>& r = *extended_;
  for (i64 k = 0; k < group.count; ++k) {
    const ExtendedRow<S> row = group.rows[k];
    sum_vectors<S>(s_.H, group.cell_means[k], [&](i64 unit, i64 n, Vec<S>(&terms)[2]) FASTLSTM_INLINE_LAMBDA {
      const Vec<S> cell = of_c.normalise(k, load_n(row.normal_c + unit, n)), gain = load_n(&r.ln_c[unit], n);
      const Vec<S> dcell = hidden_grad<S>(row, unit, n, fma(cell, gain, load_n(&r.b_ln_c[unit], n)));
      store_n(row.normal_c + unit, cell, n);
      store_n(row.dnormal_c + unit, dcell, n);
      terms[0] = dcell * gain;
      terms[1] = terms[0] * cell;
    });
  }
  for (auto& of_row : group.cell_means)
    for (S& mean : of_row) mean /= S(s_.H);
}

// Gradients of the gate sums, and the means that normalise_grad needs for both products in them.
template <class S, Cell kCell>
FASTLSTM_INLINE void BackwardLane<S, kCell>::sum_grads(Group& group, const Moments<S>& of_c) const {
  const Extended<S>& r = *extended_;
  for (i64 k = 0; k < group.count; ++k) {
    const ExtendedRow<S> row = group.rows[k];
    const i64 at_row = this->row(group.first + k);
    const S *recurrent = chunk_.recurrent_row(at_row), *inputs = chunk_.dinputs_row(at_row);
    Vec<S> sums[4] = {};
    row_gate_grads(
        r, row,
        [&](i64 unit, i64 n, Vec<S>) FASTLSTM_INLINE_LAMBDA {
          return normalise_grad<S>(load_n(row.dnormal_c + unit, n), load_n(&r.ln_c[unit], n),
                                   load_n(row.normal_c + unit, n), of_c.scale[k], group.cell_means[k][0],
                                   group.cell_means[k][1]);
        },
        [&](i64 at, i64 n, Vec<S> dz) FASTLSTM_INLINE_LAMBDA {
          const Vec<S> of_inputs = dz * load_n(&r.ln_ih[at], n), of_recurrent = dz * load_n(&r.ln_hh[at], n);
          sums[0] += of_inputs;
          sums[1] = fma(of_inputs, load_n(inputs + at, n), sums[1]);
          sums[2] += of_recurrent;
          sums[3] = fma(of_recurrent, load_n(recurrent + at, n), sums[3]);
        });
    for (int j = 0; j < 4; ++j) group.gate_means[k][j] = horizontal_sum<S>(sums[j]);
  }
  for (auto& of_row : group.gate_means)
    for (S& mean : of_row) mean /= S(4 * s_.H);
}

// Gradients of h w_hh^T. Those of x w_ih^T follow once the chunk is complete: BackwardDirection::normalised_input_grad.
template <class S, Cell kCell>
FASTLSTM_INLINE void BackwardLane<S, kCell>::recurrent_grads(const Group& group) const {
  const Extended<S>& r = *extended_;
  for (i64 k = 0; k < group.count; ++k) {
    const i64 row = this->row(group.first + k);
    const S *d = chunk_.dgates_row(row), *recurrent = chunk_.recurrent_row(row);
    typename Chunk<S>::Normalised& of_row = chunk_.normalised[row];
    of_row.input_mean = group.gate_means[k][0];
    of_row.input_slope = group.gate_means[k][1];
    for_vectors<S>(4 * s_.H, [&](i64 at, i64 n) FASTLSTM_INLINE_LAMBDA {
      store_n(chunk_.drecurrent_row(row) + at,
              normalise_grad<S>(load_n(d + at, n), load_n(&r.ln_hh[at], n), load_n(recurrent + at, n),
                                of_row.recurrent_scale, group.gate_means[k][2], group.gate_means[k][3]),
              n);
    });
  }
}

// Adds dy to the gradient of h of row i, and divides it between h before this step and the h that the step made.
template <class S, Cell kCell>
FASTLSTM_INLINE void BackwardLane<S, kCell>::zone_hidden(i64 i, const S* dy) const {
  const Extended<S>& r = *extended_;
  if (!dy && !r.zone_h) return;
  const uint32_t key = r.zone_h ? r.row_key(t_, rows_.batch(i)) : 0;
  for_vectors<S>(s_.P, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
    Vec<S> dh = load_n(&dh_[i * state_pitch_ + k], n), stayed;
    if (dy) dh += load_n(dy + k, n);
    if (r.zone_h) {
      r.zone_h.divide(dh, key, k, stayed, dh);
      store_n(&dh_stayed_[i * state_pitch_ + k], stayed, n);
    }
    store_n(&dh_[i * state_pitch_ + k], dh, n);
  });
}

// Gradient of h of the step before, for `width` units. dh_ has that of h * h_mask, which went into the product.
template <class S, Cell kCell>
inline void BackwardLane<S, kCell>::finish_hidden(i64 begin, i64 width) const {
  const States& h_mask = p_.cell.h_mask;
  if (!h_mask.data && !dh_stayed_) return;
  for (i64 i = 0; i < n_; ++i) {
    const S* mask = h_mask.data ? element<S>(h_mask.data, rows_.offset(h_mask, rows_.batch(i)) + begin) : nullptr;
    S* dh = &dh_[i * state_pitch_ + begin];
    for_vectors<S>(width, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      Vec<S> d = load_n(dh + k, n);
      if (mask) d *= load_n(mask + k, n);
      if (dh_stayed_) d += load_n(&dh_stayed_[i * state_pitch_ + begin + k], n);
      store_n(dh + k, d, n);
    });
  }
}

}  // namespace
}  // namespace fastlstm
