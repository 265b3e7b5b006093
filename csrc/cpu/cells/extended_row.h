// One step of one row of an extended cell: forward, and its derivative. In formulas, where p are peepholes, LN is layer
// normalisation with gain and bias, and ~ means "after zoneout":
//
//   z      = x w_ih^T + bias + h w_hh^T      or  LN(x w_ih^T) + bias + LN(h w_hh^T)
//   i, f   = sigmoid(z_i + p_i c), sigmoid(z_f + p_f c)        g = tanh(z_g)
//   c_new  = f * c + i * g                                     o = sigmoid(z_o + p_o c_new)
//   h_new  = o * tanh(c_new)                 or  o * tanh(LN(c_new))
//   next step: c = ~c_new, h = ~h_new; the product with w_hh takes h * h_mask
#pragma once

#include "cpu/cells/extended.h"
#include "cpu/cells/plain.h"

namespace fastlstm {
namespace {

// ---- forward ------------------------------------------------------------------------------------------------

// Gates of a row, [4H] in tile order. sum(k, n): the n gate sums from place k on. c_before: c before the step, null for
// zero. c_after: where c goes before zoneout, padded to whole vectors; or null.
template <class S, class Sum>
FASTLSTM_INLINE void activate_row(const Extended<S>& cell, const Sum& sum, S* gates, const S* c_before, S* c_after) {
  for_vectors<S>(cell.s.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
    const i64 k = 4 * unit;
    const Vec<S> c = c_before ? load_n(c_before + unit, n) : Vec<S>{};
    Vec<S> i = sum(k, n), f = sum(k + n, n), g = sum(k + 2 * n, n), o = sum(k + 3 * n, n);
    if (cell.w_ch) {
      i = fma(load(&cell.w_ch[unit]), c, i);
      f = fma(load(&cell.w_ch[cell.unit_pitch + unit]), c, f);
    }
    i = sigmoid(i);
    f = sigmoid(f);
    g = tanh(g);
    const Vec<S> c_new = next_cell(i, f, g, c);
    if (cell.w_ch) o = fma(load(&cell.w_ch[2 * cell.unit_pitch + unit]), c_new, o);
    store_gates(gates + k, Gates<S>{i, f, g, sigmoid(o)}, n);
    if (c_after) store(c_after + unit, c_new);
  });
}

// Gates of a row with layer normalisation, from its products x = x w_ih^T and h = h w_hh^T, [4H] each, which are row i
// of a group with the moments of_x and of_h. With `keep` their normalised values replace x and h.
template <bool keep, class S>
FASTLSTM_INLINE void activate_normalised(const Extended<S>& cell, S* x, const Moments<S>& of_x, S* h,
                                         const Moments<S>& of_h, i64 i, S* gates, const S* c_before, S* c_after) {
  const auto sum = [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
    const Vec<S> normal_x = of_x.normalise(i, load_n(x + k, n)), normal_h = of_h.normalise(i, load_n(h + k, n));
    if (keep) {
      store_n(x + k, normal_x, n);
      store_n(h + k, normal_h, n);
    }
    return fma(normal_h, load_n(&cell.ln_hh[k], n), fma(normal_x, load_n(&cell.ln_ih[k], n), load_n(&cell.bias[k], n)));
  };
  activate_row(cell, sum, gates, c_before, c_after);
}

// ---- backward -----------------------------------------------------------------------------------------------

// Where the numbers of a row are that its gradients are made of. H numbers each, gates and dgates 4H in tile order.
template <class S>
struct ExtendedRow {
  const S *gates, *c_before;  // c_before: c before the step, null for zero
  const S* dc_out;            // gradient of c_all at this step, or null
  const S* dm;                // gradient of h before its projection
  S *dgates, *dc;             // dc: gradient of c from later steps, then that for earlier ones
  S* m;                       // h before its projection, or null: not wanted
  S *normal_c, *dnormal_c;    // layer normalisation: c normalised, and its gradient after gain and bias; else null
  uint32_t key;               // of zoneout

  FASTLSTM_INLINE Vec<S> c_previous(i64 unit, i64 n) const { return c_before ? load_n(c_before + unit, n) : Vec<S>{}; }
};

// Gradient of c as the hidden state sees it, which is `seen`: c_new, or LN(c_new). The gradient of gate o goes to its
// place in row.dgates.
template <class S>
FASTLSTM_INLINE Vec<S> hidden_grad(const ExtendedRow<S>& row, i64 unit, i64 n, Vec<S> seen) {
  const Vec<S> o = load_n(row.gates + 4 * unit + 3 * n, n), tanh_c = tanh(seen), dm = load_n(row.dm + unit, n);
  if (row.m) store_n(row.m + unit, next_hidden(o, tanh_c), n);
  store_n(row.dgates + 4 * unit + 3 * n, grad_of_o(dm, o, tanh_c), n);
  return dm * o * (1 - tanh_c * tanh_c);
}

// Gradients of the gate sums of a row, and of c for earlier steps. from_hidden(unit, n, c_new): the gradient that c_new
// has from the hidden state; it has stored the gradient of gate o. Calls seen(place, n, gradient) for every gate.
template <class S, class F, class Seen>
FASTLSTM_INLINE void row_gate_grads(const Extended<S>& cell, const ExtendedRow<S>& row, const F& from_hidden,
                                    const Seen& seen) {
  for_vectors<S>(cell.s.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
    const S* gates = row.gates + 4 * unit;
    S* d = row.dgates + 4 * unit;
    const Vec<S> i = load_n(gates, n), f = load_n(gates + n, n), g = load_n(gates + 2 * n, n);
    const Vec<S> c = row.c_previous(unit, n);
    Vec<S> dcell = from_hidden(unit, n, next_cell(i, f, g, c)), dc = load(row.dc + unit), dc_stayed = {};
    if (row.dc_out) dc += load_n(row.dc_out + unit, n);
    if (cell.zone_c) cell.zone_c.divide(dc, row.key, unit, dc_stayed, dc);
    dcell += dc;
    const Vec<S> d_out = load_n(d + 3 * n, n);
    if (cell.w_ch) dcell = fma(load(&cell.w_ch[2 * cell.unit_pitch + unit]), d_out, dcell);
    const Vec<S> di = grad_of_i(dcell, i, g), df = grad_of_f(dcell, f, c), dg = grad_of_g(dcell, i, g);
    store_n(d, di, n);
    store_n(d + n, df, n);
    store_n(d + 2 * n, dg, n);
    seen(4 * unit, n, di);
    seen(4 * unit + n, n, df);
    seen(4 * unit + 2 * n, n, dg);
    seen(4 * unit + 3 * n, n, d_out);
    dc = fma(dcell, f, dc_stayed);
    if (cell.w_ch) dc = fma(load(&cell.w_ch[unit]), di, fma(load(&cell.w_ch[cell.unit_pitch + unit]), df, dc));
    store(row.dc + unit, dc);
  });
}

}  // namespace
}  // namespace fastlstm
