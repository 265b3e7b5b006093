// What follows the gate sums of an extended cell, row by row: gates, cell, zoneout, hidden state.
#pragma once

#include "cpu/forward/lane.h"

namespace fastlstm {
namespace {

// Everything that follows the gate sums, for a range of rows. With a projection it ends with m, before the projection.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::update_rows(i64 row_begin, i64 row_end) {
  row_end = smaller(row_end, n_);
  for (i64 first = row_begin; first < row_end; first += kRowGroup) {
    const i64 last = smaller(first + kRowGroup, row_end);
    const auto out = [&](i64 k) { return out_ + (first + k) * out_pitch_; };
    if (s_.layer_norm) {
      const auto x = [&](i64 k) { return input_product(0, first_row_ + first + k); };
      const auto h = [&](i64 k) { return z_row(first + k); };
      const Moments<S> of_x(last - first, 4 * s_.H, x), of_h(last - first, 4 * s_.H, h);
      for (i64 k = 0; k < last - first; ++k)
        activate_normalised<false>(*extended_, x(k), of_x, h(k), of_h, k, h(k), &c_[(first + k) * hidden_pitch_],
                                   out(k));
      const Moments<S> of_c(last - first, s_.H, out);
      for (i64 k = 0; k < last - first; ++k)
        update_cell(first + k, [&](i64 unit, i64 n, Vec<S> c) FASTLSTM_INLINE_LAMBDA {
          return fma(of_c.normalise(k, c), load_n(&extended_->ln_c[unit], n), load_n(&extended_->b_ln_c[unit], n));
        });
    } else {
      for (i64 i = first; i < last; ++i)
        activate_row(
            *extended_, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA { return load_n(z_row(i) + k, n); }, z_row(i),
            &c_[i * hidden_pitch_], out(i - first));
      for (i64 i = first; i < last; ++i) update_cell(i, [](i64, i64, Vec<S> c) FASTLSTM_INLINE_LAMBDA { return c; });
    }
    if (!s_.projected) update_hidden(first, last);
  }
}

// Cell and hidden state of a row. Before, its c without zoneout lies where the hidden state will be.
// seen(unit, n, c): c as the hidden state sees it, which is c itself or its normalised value.
template <class S, Cell cell>
template <class Seen>
FASTLSTM_INLINE void ForwardLane<S, cell>::update_cell(i64 row, const Seen& seen) {
  const Extended<S>& r = *extended_;
  const uint32_t key = r.zone_c ? r.row_key(t_, rows_.batch(row)) : 0;
  S *c = &c_[row * hidden_pitch_], *out = out_ + row * out_pitch_;
  const S* gates = z_row(row);
  for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
    Vec<S> c_new = load(out + unit);
    const Vec<S> hidden = next_hidden(load_n(gates + 4 * unit + 3 * n, n), tanh(seen(unit, n, c_new)));
    if (r.zone_c) c_new = r.zone_c.state(load(c + unit), c_new, key, unit);
    store(c + unit, c_new);
    if (p_.c_all.data) store_n(cell_row_[row] + unit, c_new, n);
    store(out + unit, hidden);
  });
  if (p_.gates.data) std::memcpy(gates_row_[row], gates, size_t(4 * s_.H) * sizeof(S));
}

// The state h of a range of rows from its new values: zoneout, the mask of recurrent dropout, and y.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::update_hidden(i64 row_begin, i64 row_end) {
  for (i64 i = row_begin; i < smaller(row_end, n_); ++i) {
    const i64 b = rows_.batch(i);
    S* h_new = &h_next_[i * state_pitch_];
    if (extended_->zone_h) {
      const S* h = &h_[i * state_pitch_];
      const uint32_t key = extended_->row_key(t_, b);
      for_vectors<S>(s_.P, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
        store_n(h_new + k, extended_->zone_h.state(load_n(h + k, n), load_n(h_new + k, n), key, k), n);
      });
    }
    if (h_masked_) mask_hidden(i, h_new);
    convert_out(p_.y.data, p_.dtype, rows_.offset(p_.y, t_, b), h_new, s_.P);
  }
}

// What the next product with w_hh takes for row i: h * h_mask.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::mask_hidden(i64 i, const S* h) const {
  const S* mask = element<S>(p_.cell.h_mask.data, rows_.offset(p_.cell.h_mask, rows_.batch(i)));
  for_vectors<S>(s_.P, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
    store_n(&h_masked_[i * state_pitch_ + k], load_n(h + k, n) * load_n(mask + k, n), n);
  });
}

}  // namespace
}  // namespace fastlstm
