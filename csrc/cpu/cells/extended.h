// The extended cell, which is every LSTM cell beyond the plain one: peepholes, layer normalisation, recurrent dropout
// and zoneout, in any combination. This file has its weights and options; extended_row.h has the arithmetic of a step.
//
// A step of an extended cell goes row by row: first the gate sums of all units, in tile order without padding, then
// everything else. (Layer normalisation needs all sums of a row before any gate.)
#pragma once

#include <memory>

#include "cpu/cells/layer_norm.h"
#include "cpu/cells/zoneout.h"
#include "cpu/pack.h"

namespace fastlstm {
namespace {

// One direction of an extended cell: its weights as S, and its zoneout. All threads of a call read it.
template <class S>
struct Extended {
  const Sizes& s;
  const i64 unit_pitch;  // of a row of hidden units
  Buffer<S> w_ch;        // [3][unit_pitch] peepholes of i, f, o; or absent
  // Only with layer normalisation:
  Buffer<S> bias;          // [4H] in tile order
  Buffer<S> ln_ih, ln_hh;  // [4H] in tile order
  Buffer<S> ln_c, b_ln_c;  // [H]
  Zoneout<S> zone_h, zone_c;
  uint32_t row_base = 0;

  Extended(const Sizes& s, Dtype dtype, const CellOptions& cell, const DirectionWeights& w, i64 direction)
      : s(s), unit_pitch(pitch<S>(s.H)) {
    if (s.peephole) {
      w_ch = Buffer<S>(3 * unit_pitch);
      w_ch.zero();
      for (i64 k = 0; k < 3; ++k) convert_in(&w_ch[k * unit_pitch], w.w_ch, dtype, k * s.H, s.H);
    }
    if (s.layer_norm) read_layer_norm(dtype, w);
    const uint32_t base = mix(mix(uint32_t(cell.seed) + uint32_t(direction)) + uint32_t(cell.seed >> 32));
    row_base = base ^ 0x9e3779b9u;
    zone_h = Zoneout<S>(cell.zoneout_h, cell.random, base, 0, s.P);
    zone_c = Zoneout<S>(cell.zoneout_c, cell.random, base, 1, s.H);
  }

  // The key of sequence b at time t, for both kinds of zoneout.
  uint32_t row_key(i64 t, i64 b) const { return mix(mix(row_base + uint32_t(t)) + uint32_t(b)); }

 private:
  void read_layer_norm(Dtype dtype, const DirectionWeights& w) {
    const AsCompute<S> b_ih(w.b_ih, dtype, 4 * s.H), b_hh(w.b_hh, dtype, 4 * s.H);
    const AsCompute<S> of_ih(w.ln_ih, dtype, 4 * s.H), of_hh(w.ln_hh, dtype, 4 * s.H);
    bias = Buffer<S>(4 * s.H);
    ln_ih = Buffer<S>(4 * s.H);
    ln_hh = Buffer<S>(4 * s.H);
    for (i64 q = 0; q < 4 * s.H; ++q) {
      const i64 row = gate_row<S>(s, q);
      bias[q] = s.bias ? b_ih.get()[row] + b_hh.get()[row] : S(0);
      ln_ih[q] = of_ih.get()[row];
      ln_hh[q] = of_hh.get()[row];
    }
    ln_c = Buffer<S>(s.H);
    b_ln_c = Buffer<S>(s.H);
    convert_in(ln_c.get(), w.ln_c, dtype, 0, s.H);
    convert_in(b_ln_c.get(), w.b_ln_c, dtype, 0, s.H);
  }
};

// The directions of a call: null for each one if the cell is not extended.
template <class S>
class ExtendedDirections {
 public:
  ExtendedDirections(bool extended, const Sizes& s, Dtype dtype, const CellOptions& cell, const DirectionWeights* w) {
    if (extended)
      for (i64 d = 0; d < s.D; ++d) each_[d].reset(new Extended<S>(s, dtype, cell, w[d], d));
  }
  const Extended<S>* operator[](i64 d) const { return each_[d].get(); }

 private:
  std::unique_ptr<const Extended<S>> each_[2];
};

}  // namespace
}  // namespace fastlstm
