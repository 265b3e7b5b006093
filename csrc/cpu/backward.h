// Backward pass of one layer. Time is walked in chunks: within a chunk the gate gradients of every step are
// computed (dgates), then dx and the weight gradients take the whole chunk as one product each while it is still
// in cache. Working memory is a chunk, however long the sequence.
#pragma once

#include <new>

#include "cell.h"
#include "lane.h"
#include "plan.h"
#include "sums.h"
#include "weight_grad.h"

namespace fastlstm {
namespace {

// Gradients of one direction in a chunk: row start[k] + slot for step k of the chunk, active rows only.
template <class S>
struct Chunk {
  Buffer<S> gates;    // [rows][gate_pitch] as forward would have kept them; only if it has not
  Buffer<S> dgates;   // [rows][gate_pitch], units in tile order
  Buffer<S> dhidden;  // [rows][state_pitch] gradient of the projected h; only with projection
  Buffer<S> m;        // [rows][hidden_pitch] h before its projection; only of regularised cells
  Buffer<S> c0;       // [B][H] by slot: c0 as S, for 16-bit states
  Buffer<i64> start;  // [steps + 1]
  // The rest only with layer normalisation.
  struct Normalised {
    S input_scale, recurrent_scale;  // 1 / sqrt(variance)
    S input_mean, input_slope;       // see normalise_grad
  };
  Buffer<Normalised> normalised;  // [rows]
  Buffer<S> inputs, recurrent;    // [rows][gate_pitch] x w_ih^T and h w_hh^T, normalised
  Buffer<S> drecurrent;           // [rows][gate_pitch] gradient of h w_hh^T; that of x w_ih^T replaces `inputs`
  Buffer<S> cell, dcell;          // [rows][hidden_pitch] c, normalised, and its gradient after gain and bias
  i64 gate_pitch, hidden_pitch, state_pitch;
  S* gates_row(i64 row) const { return &gates[row * gate_pitch]; }
  S* dgates_row(i64 row) const { return &dgates[row * gate_pitch]; }
  S* dhidden_row(i64 row) const { return &dhidden[row * state_pitch]; }
  // Gradients of the two products that make the gate sums: those of the sums, unless they are normalised between.
  S* dinputs_row(i64 row) const { return &(inputs ? inputs : dgates)[row * gate_pitch]; }
  S* recurrent_row(i64 row) const { return &recurrent[row * gate_pitch]; }
  S* drecurrent_row(i64 row) const { return &(drecurrent ? drecurrent : dgates)[row * gate_pitch]; }
};

inline bool resets(const BackwardParams& p, i64 t, i64 b) {
  return p.reset && p.reset[t * p.reset_step + b * p.reset_batch];
}
// c before step t of row i; null stands for zero. c0: see Chunk.
template <class S>
inline const S* previous_cell(const BackwardParams& p, const LaneRows& rows, const Buffer<S>& c0, i64 t, i64 i, i64 b) {
  if (resets(p, t, b)) return nullptr;
  if (!rows.starts(i, t)) return element<S>(p.c_all.data, rows.offset(p.c_all, rows.previous(t), b));
  if (!p.c0.data) return nullptr;
  return c0 ? &c0[rows.slot(i) * p.sizes.H] : element<S>(p.c0.data, rows.offset(p.c0, b));
}

template <class S, Cell kCell>
class BackwardLane {
  static constexpr bool kByRow = kCell == Cell::regularised;
  static constexpr bool kHasCell = kCell != Cell::rnn;

 public:
  // regularised: null for a plain cell.
  BackwardLane(const BackwardParams& p, const Plan& plan, const Regularised<S>* regularised, i64 direction, i64 lane,
               const Chunk<S>& chunk)
      : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), at_(p.sizes),
        packed_(static_cast<const S*>(p.packed) + direction * at_.size), chunk_(chunk), hidden_pitch_(pitch<S>(s_.H)),
        state_pitch_(pitch<S>(s_.P)), regularised_(regularised) {
    dh_ = Buffer<S>(rows_.rows * state_pitch_);
    if (kHasCell) dc_ = Buffer<S>(rows_.rows * hidden_pitch_);
    if (s_.projected) {
      dm_ = Buffer<S>(rows_.rows * hidden_pitch_);
      dm_.zero();  // as for dgates
    }
    if (kByRow && regularised->zone_h) dh_stayed_ = Buffer<S>(rows_.rows * state_pitch_);
  }

  i64 rows() const { return rows_.rows; }
  i64 state_panels() const { return at_.state_panels; }
  i64 hidden_panels() const { return at_.hidden_panels; }

  // t: time of this step, `first`: its first row in the chunk.
  void begin_step(i64 t, i64 first) {
    t_ = t;
    n_ = rows_.active(t);
    first_ = first;
    for (; entered_ < n_; ++entered_) load_state(entered_);
    if (!s_.projected) return;  // else pointwise() adds dy
    for (i64 i = 0; i < n_; ++i) {
      S* dh = &dh_[i * state_pitch_];
      if (p_.dy.data) {
        const S* dy = element<S>(p_.dy.data, rows_.offset(p_.dy, t_, rows_.batch(i)));
        for (i64 k = 0; k < s_.P; ++k) dh[k] += dy[k];
      }
      if (kByRow) zone_hidden(i, nullptr);
      std::memcpy(chunk_.dhidden_row(row(i)), dh, size_t(s_.P) * sizeof(S));
    }
  }

  // dm = dh w_hr for a range of panels of H.
  void unproject(i64 panel_begin, i64 panel_end) {
    for (i64 panel = panel_begin; panel < panel_end; ++panel)
      multiply_panel<S>(n_, {dh_.get(), state_pitch_}, s_.P, packed_ + at_.w_hr + panel * s_.P * kPanel<S>,
                        {&dm_[panel * kPanel<S>], hidden_pitch_}, smaller(kPanel<S>, s_.H - panel * kPanel<S>));
  }

  // Gate gradients of a range of rows.
  void pointwise(i64 row_begin, i64 row_end) {
    if constexpr (kByRow) return regularised_pointwise(row_begin, smaller(row_end, n_));
    if constexpr (!kHasCell) return rnn_pointwise(row_begin, smaller(row_end, n_));
    const S* dm = (s_.projected ? dm_ : dh_).get();
    const i64 dm_pitch = s_.projected ? hidden_pitch_ : state_pitch_;
    for (i64 i = row_begin; i < smaller(row_end, n_); ++i) {
      const i64 b = rows_.batch(i);
      const S* gates = gates_at(i, b);
      const S* cell = element<S>(p_.c_all.data, rows_.offset(p_.c_all, t_, b));
      const S* dc_out = p_.dc_all.data ? element<S>(p_.dc_all.data, rows_.offset(p_.dc_all, t_, b)) : nullptr;
      const S* dy = p_.dy.data && !s_.projected ? element<S>(p_.dy.data, rows_.offset(p_.dy, t_, b)) : nullptr;
      const S* previous = previous_cell(p_, rows_, chunk_.c0, t_, i, b);
      S* dgates = chunk_.dgates_row(row(i));
      S* dc = &dc_[i * hidden_pitch_];
      for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
        const S* saved = gates + 4 * unit;
        const Vec<S> in = load_n(saved, n), forget = load_n(saved + n, n), candidate = load_n(saved + 2 * n, n),
                     out = load_n(saved + 3 * n, n);
        const Vec<S> tanh_c = tanh(load_n(cell + unit, n));
        Vec<S> dh = load(dm + i * dm_pitch + unit);
        if (dy) dh += load_n(dy + unit, n);
        const Vec<S> dh_out = dh * out;
        Vec<S> dcell = fma(dh_out, 1 - tanh_c * tanh_c, load(dc + unit));
        if (dc_out) dcell += load_n(dc_out + unit, n);
        const Vec<S> c_previous = previous ? load_n(previous + unit, n) : Vec<S>{};
        S* d = dgates + 4 * unit;
        store_n(d, dcell * candidate * (in * (1 - in)), n);
        store_n(d + n, dcell * c_previous * (forget * (1 - forget)), n);
        store_n(d + 2 * n, dcell * in * (1 - candidate * candidate), n);
        store_n(d + 3 * n, dh * tanh_c * (out * (1 - out)), n);
        store(dc + unit, dcell * forget);
      });
    }
  }

  // dh of the step before = dgates w_hh, for a range of panels of P.
  void recur(i64 panel_begin, i64 panel_end) {
    if (n_ == 0 || (!p_.dh0.data && rows_.starts(0, t_))) return;  // nobody asks: all rows start at this step
    for (i64 panel = panel_begin; panel < panel_end; ++panel) {
      const i64 begin = panel * kPanel<S>, width = smaller(kPanel<S>, s_.P - begin);
      multiply_panel<S>(n_, {chunk_.drecurrent_row(row(0)), rows_.stride * chunk_.gate_pitch}, s_.gate_units(),
                        packed_ + at_.w_hh + panel * s_.gate_units() * kPanel<S>, {&dh_[begin], state_pitch_}, width);
      if (kByRow) finish_hidden(begin, width);
    }
  }

  void end_step() {
    if (p_.reset)
      for (i64 i = 0; i < n_; ++i)
        if (resets(p_, t_, rows_.batch(i))) {
          std::memset(&dh_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
          if (kHasCell) std::memset(&dc_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(S));
        }
    for (i64 i = n_; i-- > 0 && rows_.starts(i, t_);) store_state(i);
  }

  void end_sequence() {
    for (; entered_ < rows_.rows; ++entered_) {  // sequences without any step
      load_state(entered_);
      store_state(entered_);
    }
    if (!p_.dx.data || rows_.direction || !p_.ragged.active || p_.ragged.row_offset) return;
    for (i64 i = 0; i < rows_.rows; ++i)
      for (i64 t = rows_.length(i); t < s_.T; ++t)
        std::memset(element<S>(p_.dx.data, rows_.offset(p_.dx, t, rows_.batch(i))), 0, size_t(s_.I) * sizeof(S));
  }

  void run(i64 t, i64 first) {
    begin_step(t, first);
    if (s_.projected) unproject(0, at_.hidden_panels);
    pointwise(0, rows_.rows);
    recur(0, at_.state_panels);
    end_step();
  }

 private:
  i64 row(i64 i) const { return first_ + rows_.slot(i); }
  const S* gates_at(i64 i, i64 b) const {
    return chunk_.gates ? chunk_.gates_row(row(i)) : element<S>(p_.gates.data, rows_.offset(p_.gates, t_, b));
  }

  // pointwise() of an RNN: the derivative of its activation follows from h.
  void rnn_pointwise(i64 row_begin, i64 row_end) const {
    for (i64 i = row_begin; i < row_end; ++i) {
      const i64 b = rows_.batch(i), y = rows_.offset(p_.y, t_, b);
      const S* dy = p_.dy.data ? element<S>(p_.dy.data, rows_.offset(p_.dy, t_, b)) : nullptr;
      for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
        alignas(64) S values[kLanes<S>] = {};
        convert_in(values, p_.y.data, p_.dtype, y + unit, n);
        const Vec<S> h = load(values);
        Vec<S> dh = load_n(&dh_[i * state_pitch_ + unit], n);
        if (dy) dh += load_n(dy + unit, n);
        // Where h is NaN the gradient passes relu, as in PyTorch.
        store_n(chunk_.dgates_row(row(i)) + unit, p_.cell.relu ? (h <= 0 ? Vec<S>{} : dh) : dh * (1 - h * h), n);
      });
    }
  }

  // pointwise() of regularised cells, by stages of a few rows as in ForwardLane::update_rows.
  void regularised_pointwise(i64 row_begin, i64 row_end) {
    const Regularised<S>& r = *regularised_;
    for (i64 first = row_begin; first < row_end; first += kRowGroup) {
      const i64 last = smaller(first + kRowGroup, row_end);
      for (i64 i = first; i < last && !s_.projected; ++i)
        zone_hidden(i, p_.dy.data ? element<S>(p_.dy.data, rows_.offset(p_.dy, t_, rows_.batch(i))) : nullptr);
      if (!s_.layer_norm) {
        for (i64 i = first; i < last; ++i) {
          const RowGrad row(*this, i);
          gate_grads(
              row, [&](i64 unit, i64 n, Vec<S> c) FASTLSTM_INLINE_LAMBDA { return hidden_grad(row, unit, n, c); },
              [](i64, i64, Vec<S>) {});
        }
        continue;
      }
      const i64 n_rows = last - first;
      RowGrad rows[kRowGroup];
      for (i64 k = 0; k < n_rows; ++k) {
        const RowGrad row = rows[k] = RowGrad(*this, first + k);
        for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
          const S* gates = row.gates + 4 * unit;
          store(row.cell + unit,
                fma(load_n(gates + n, n), row.c_previous(unit, n), load_n(gates, n) * load_n(gates + 2 * n, n)));
        });
      }
      const Moments<S> of_c(n_rows, s_.H, [&](i64 k) { return rows[k].cell; });
      S means[kRowGroup][2] = {};  // see normalise_grad
      for (i64 k = 0; k < n_rows; ++k) {
        const RowGrad row = rows[k];
        sum_vectors<S>(s_.H, means[k], [&](i64 unit, i64 n, Vec<S>(&terms)[2]) FASTLSTM_INLINE_LAMBDA {
          const Vec<S> cell = of_c.normalise(k, load_n(row.cell + unit, n)), gain = load_n(&r.ln_c[unit], n);
          const Vec<S> dcell = hidden_grad(row, unit, n, fma(cell, gain, load_n(&r.b_ln_c[unit], n)));
          store_n(row.cell + unit, cell, n);
          store_n(row.dcell + unit, dcell, n);
          terms[0] = dcell * gain;
          terms[1] = terms[0] * cell;
        });
      }
      for (auto& of_row : means)
        for (S& mean : of_row) mean /= S(s_.H);
      S gate_means[kRowGroup][4] = {};
      for (i64 k = 0; k < n_rows; ++k) {
        const RowGrad row = rows[k];
        const S *recurrent = chunk_.recurrent_row(this->row(first + k)),
                *inputs = chunk_.dinputs_row(this->row(first + k));
        Vec<S> sums[4] = {};
        gate_grads(
            row,
            [&](i64 unit, i64 n, Vec<S>) FASTLSTM_INLINE_LAMBDA {
              return normalise_grad<S>(load_n(row.dcell + unit, n), load_n(&r.ln_c[unit], n),
                                       load_n(row.cell + unit, n), of_c.scale[k], means[k][0], means[k][1]);
            },
            [&](i64 at, i64 n, Vec<S> dz) FASTLSTM_INLINE_LAMBDA {
              const Vec<S> of_inputs = dz * load_n(&r.ln_ih[at], n), of_recurrent = dz * load_n(&r.ln_hh[at], n);
              sums[0] += of_inputs;
              sums[1] = fma(of_inputs, load_n(inputs + at, n), sums[1]);
              sums[2] += of_recurrent;
              sums[3] = fma(of_recurrent, load_n(recurrent + at, n), sums[3]);
            });
        for (int j = 0; j < 4; ++j) gate_means[k][j] = horizontal_sum<S>(sums[j]);
      }
      for (auto& of_row : gate_means)
        for (S& mean : of_row) mean /= S(4 * s_.H);
      for (i64 k = 0; k < n_rows; ++k) {
        const i64 row = this->row(first + k);
        const S *d = chunk_.dgates_row(row), *recurrent = chunk_.recurrent_row(row);
        typename Chunk<S>::Normalised& of_row = chunk_.normalised[row];
        of_row.input_mean = gate_means[k][0];
        of_row.input_slope = gate_means[k][1];
        for_vectors<S>(4 * s_.H, [&](i64 at, i64 n) FASTLSTM_INLINE_LAMBDA {
          store_n(chunk_.drecurrent_row(row) + at,
                  normalise_grad<S>(load_n(d + at, n), load_n(&r.ln_hh[at], n), load_n(recurrent + at, n),
                                    of_row.recurrent_scale, gate_means[k][2], gate_means[k][3]),
                  n);
        });
      }
    }
  }

  // What the gradients of a regularised row are made of.
  struct RowGrad {
    const S *gates, *previous, *dc_out, *dm;
    S *dgates, *dc, *m, *cell, *dcell;
    uint32_t key;
    RowGrad() = default;
    RowGrad(const BackwardLane& lane, i64 i) {
      const BackwardParams& p = lane.p_;
      const Chunk<S>& chunk = lane.chunk_;
      const i64 b = lane.rows_.batch(i), row = lane.row(i);
      gates = lane.gates_at(i, b);
      previous = previous_cell(p, lane.rows_, chunk.c0, lane.t_, i, b);
      dc_out = p.dc_all.data ? element<S>(p.dc_all.data, lane.rows_.offset(p.dc_all, lane.t_, b)) : nullptr;
      dm = p.sizes.projected ? &lane.dm_[i * lane.hidden_pitch_] : &lane.dh_[i * lane.state_pitch_];
      dgates = chunk.dgates_row(row);
      dc = &lane.dc_[i * lane.hidden_pitch_];
      m = chunk.m ? &chunk.m[row * lane.hidden_pitch_] : nullptr;
      cell = chunk.cell ? &chunk.cell[row * lane.hidden_pitch_] : nullptr;
      dcell = chunk.dcell ? &chunk.dcell[row * lane.hidden_pitch_] : nullptr;
      key = lane.regularised_->zone_c ? lane.regularised_->row_key(lane.t_, b) : 0;
    }
    FASTLSTM_INLINE Vec<S> c_previous(i64 unit, i64 n) const {
      return previous ? load_n(previous + unit, n) : Vec<S>{};
    }
  };

  // Gradient of c as the hidden state sees it; that of gate o goes to its place.
  FASTLSTM_INLINE Vec<S> hidden_grad(const RowGrad& row, i64 unit, i64 n, Vec<S> seen) const {
    const Vec<S> o = load_n(row.gates + 4 * unit + 3 * n, n), tanh_c = tanh(seen), dm = load_n(row.dm + unit, n);
    if (row.m) store_n(row.m + unit, o * tanh_c, n);
    store_n(row.dgates + 4 * unit + 3 * n, dm * tanh_c * (o * (1 - o)), n);
    return dm * o * (1 - tanh_c * tanh_c);
  }

  // from_hidden(unit, n, c): gradient that c before zoneout has from the hidden state, with gate o's in its place.
  // Calls seen(place, n, gradient) for every gate.
  template <class F, class Seen>
  FASTLSTM_INLINE void gate_grads(const RowGrad& row, const F& from_hidden, const Seen& seen) const {
    const Regularised<S>& r = *regularised_;
    for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
      const S* gates = row.gates + 4 * unit;
      S* d = row.dgates + 4 * unit;
      const Vec<S> i = load_n(gates, n), f = load_n(gates + n, n), g = load_n(gates + 2 * n, n);
      const Vec<S> c = row.c_previous(unit, n);
      Vec<S> dcell = from_hidden(unit, n, fma(f, c, i * g)), dc = load(row.dc + unit), dc_stayed = {};
      if (row.dc_out) dc += load_n(row.dc_out + unit, n);
      if (r.zone_c) r.zone_c.divide(dc, row.key, unit, dc_stayed, dc);
      dcell += dc;
      const Vec<S> d_out = load_n(d + 3 * n, n);
      if (r.w_ch) dcell = fma(load(&r.w_ch[2 * r.pitch_ + unit]), d_out, dcell);
      const Vec<S> di = dcell * g * (i * (1 - i)), df = dcell * c * (f * (1 - f)), dg = dcell * i * (1 - g * g);
      store_n(d, di, n);
      store_n(d + n, df, n);
      store_n(d + 2 * n, dg, n);
      seen(4 * unit, n, di);
      seen(4 * unit + n, n, df);
      seen(4 * unit + 2 * n, n, dg);
      seen(4 * unit + 3 * n, n, d_out);
      dc = fma(dcell, f, dc_stayed);
      if (r.w_ch) dc = fma(load(&r.w_ch[unit]), di, fma(load(&r.w_ch[r.pitch_ + unit]), df, dc));
      store(row.dc + unit, dc);
    });
  }

  // Divides the gradient dh + dy of a row's h between h before this step and what the step made.
  FASTLSTM_INLINE void zone_hidden(i64 i, const S* dy) const {
    const Regularised<S>& r = *regularised_;
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
  // dh of the step before from that of the h that went into the product, for `width` units.
  void finish_hidden(i64 begin, i64 width) const {
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
  void load_state(i64 i) {
    const i64 b = rows_.batch(i);
    S* dh = &dh_[i * state_pitch_];
    std::memset(dh, 0, size_t(state_pitch_) * sizeof(S));
    if (p_.dh_n.data) std::memcpy(dh, element<S>(p_.dh_n.data, rows_.offset(p_.dh_n, b)), size_t(s_.P) * sizeof(S));
    if (!kHasCell) return;
    S* dc = &dc_[i * hidden_pitch_];
    std::memset(dc, 0, size_t(hidden_pitch_) * sizeof(S));
    if (p_.dc_n.data) std::memcpy(dc, element<S>(p_.dc_n.data, rows_.offset(p_.dc_n, b)), size_t(s_.H) * sizeof(S));
  }
  void store_state(i64 i) const {
    const i64 b = rows_.batch(i);
    if (p_.dh0.data)
      std::memcpy(element<S>(p_.dh0.data, rows_.offset(p_.dh0, b)), &dh_[i * state_pitch_], size_t(s_.P) * sizeof(S));
    if (p_.dc0.data)
      std::memcpy(element<S>(p_.dc0.data, rows_.offset(p_.dc0, b)), &dc_[i * hidden_pitch_], size_t(s_.H) * sizeof(S));
  }

  const BackwardParams& p_;
  const Sizes& s_;
  const LaneRows rows_;
  const BackwardPack<S> at_;
  const S* packed_;
  const Chunk<S>& chunk_;
  const i64 hidden_pitch_, state_pitch_;
  const Regularised<S>* const regularised_;
  Buffer<S> dh_, dc_, dm_;  // gradients flowing back in time; dm_: of the hidden state before projection
  Buffer<S> dh_stayed_;     // the part of dh that zoneout leads past this step
  i64 entered_ = 0;
  i64 t_ = 0, n_ = 0, first_ = 0;
};

// One direction of a backward pass: its chunk, its weight gradients, and the products over a chunk.
template <class S>
class BackwardDirection {
 public:
  BackwardDirection(const BackwardParams& p, const Regularised<S>* regularised, i64 direction, i64 capacity)
      : p_(p), s_(p.sizes), all_(p.sizes, p.ragged, direction, 0, 1), at_(p.sizes),
        packed_(static_cast<const S*>(p.packed) + direction * at_.size), dw_(p.dw[direction]),
        regularised_(regularised), capacity_(capacity) {
    const i64 rows = capacity * s_.B;
    chunk.gate_pitch = pitch<S>(s_.gate_units());
    chunk.hidden_pitch = pitch<S>(s_.H);
    chunk.state_pitch = pitch<S>(s_.P);
    chunk.dgates = zeros(rows * chunk.gate_pitch);
    if (s_.projected) chunk.dhidden = zeros(rows * chunk.state_pitch);
    if (s_.G > 1 && !p.gates.data) chunk.gates = Buffer<S>(rows * chunk.gate_pitch);
    if (regularised && dw_.w_hr) chunk.m = Buffer<S>(rows * chunk.hidden_pitch);
    if (s_.layer_norm) {
      chunk.inputs = zeros(rows * chunk.gate_pitch);
      chunk.recurrent = Buffer<S>(rows * chunk.gate_pitch);
      chunk.drecurrent = zeros(rows * chunk.gate_pitch);
      chunk.normalised = Buffer<typename Chunk<S>::Normalised>(rows);
      chunk.cell = Buffer<S>(rows * chunk.hidden_pitch);
      chunk.dcell = Buffer<S>(rows * chunk.hidden_pitch);
    }
    if (p.c0.data && element_bytes(p.dtype) != sizeof(S)) {
      chunk.c0 = Buffer<S>(s_.B * s_.H);
      for (i64 i = 0; i < s_.B; ++i)
        convert_in(&chunk.c0[i * s_.H], p.c0.data, p.dtype, all_.offset(p.c0, all_.batch(i)), s_.H);
    }
    chunk.start = Buffer<i64>(capacity + 1);
    if (dw_.w_ih) {
      gates_ = WeightGrad<S>(s_.layer_norm ? s_.I : s_.I + s_.P + 1, s_.gate_units());
      if (s_.layer_norm) recurrent_ = WeightGrad<S>(s_.P, 4 * s_.H);
      vectors_ = zeros(tiles() * vectors() * kLanes<S>);
    }
    if (dw_.w_hr) projection_ = WeightGrad<S>(s_.H, s_.P);
  }

  // Time of step k when walking back through this direction.
  i64 time(i64 step) const { return all_.direction == 0 ? s_.T - 1 - step : step; }

  void begin_chunk(i64 first_step, i64 steps) {
    first_step_ = first_step;
    steps_ = steps;
    chunk.start[0] = 0;
    for (i64 k = 0; k < steps; ++k) chunk.start[k + 1] = chunk.start[k] + all_.active(time(first_step + k));
  }
  i64 chunk_rows() const { return chunk.start[steps_]; }

  // Gates of rows [row_begin, row_end) of this chunk, at most kProjectRows of them, from x, y and the weights.
  void recompute(i64 row_begin, i64 row_end) const {
    const i64 n = row_end - row_begin;
    const bool narrow = element_bytes(p_.dtype) != sizeof(S);
    const ForwardPack<S> at(s_);
    const GateSums<S> sums{s_, at, static_cast<const S*>(p_.packed_forward) + all_.direction * at.size};
    const Buffer<S> x_copy(narrow ? n * s_.I : 0), h(n * s_.P);
    const S *x_row[kProjectRows], *h_row[kProjectRows], *c_row[kProjectRows];
    for (i64 i = 0; i < n; ++i) {
      i64 t, slot;
      locate(row_begin + i, t, slot);
      const i64 b = all_.batch(slot), x = all_.offset(p_.x, t, b);
      x_row[i] = narrow ? &x_copy[i * s_.I] : element<const S>(p_.x.data, x);
      if (narrow) convert_in(&x_copy[i * s_.I], p_.x.data, p_.dtype, x, s_.I);
      h_row[i] = &h[i * s_.P];
      previous_hidden(&h[i * s_.P], t, slot, b, 0, s_.P);
      c_row[i] = previous_cell(p_, all_, chunk.c0, t, slot, b);
    }
    for (i64 tile = 0; tile < at.tiles; ++tile) {
      const i64 unit = tile * kLanes<S>, width = smaller(kLanes<S>, s_.H - unit);
      for_row_tiles<kPanelVectors>(n, [&](i64 first, auto height) {
        constexpr int R = decltype(height)::value;
        Vec<S> acc[R][kPanelVectors];
        const S *x[R], *h[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          x[r] = x_row[first + r];
          h[r] = h_row[first + r];
        }
        const auto put = [&](const Buffer<S>& rows) {  // see ForwardLane::gate_step
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kPanelVectors; ++v) {
              store(&rows[(row_begin + first + r) * chunk.gate_pitch + 4 * unit + v * width], acc[r][v]);
              if (s_.layer_norm) acc[r][v] = Vec<S>{};
            }
        };
        sums.template start<R, 1>(acc, x, tile);
        if (s_.layer_norm) put(chunk.inputs);
        sums.template add_hidden<R, 1>(acc, h, tile);
        put(s_.layer_norm ? chunk.recurrent : chunk.gates);
      });
    }
    for (i64 first = row_begin; first < row_end && s_.layer_norm; first += kRowGroup) {
      const i64 rows = smaller(kRowGroup, row_end - first);
      const auto x = [&](i64 k) { return chunk.dinputs_row(first + k); };
      const auto h = [&](i64 k) { return chunk.recurrent_row(first + k); };
      const Moments<S> of_x(rows, 4 * s_.H, x), of_h(rows, 4 * s_.H, h);
      for (i64 k = 0; k < rows; ++k) {
        chunk.normalised[first + k].input_scale = of_x.scale[k];
        chunk.normalised[first + k].recurrent_scale = of_h.scale[k];
        regularised_->template activate_normalised<true>(x(k), of_x, h(k), of_h, k, chunk.gates_row(first + k),
                                                         c_row[first + k - row_begin], nullptr);
      }
    }
    for (i64 i = 0; i < n && !s_.layer_norm; ++i) {
      S* gates = chunk.gates_row(row_begin + i);
      if (regularised_)
        regularised_->activate_row([&](i64 k, i64 width) FASTLSTM_INLINE_LAMBDA { return load_n(gates + k, width); },
                                   gates, c_row[i], nullptr);
      else
        for_vectors<S>(s_.H, [&](i64 unit, i64 width) FASTLSTM_INLINE_LAMBDA { activate(gates + 4 * unit, width); });
    }
  }

  // Gradient of x w_ih^T, in place of its normalised values, which nobody needs after the vectors' gradients.
  void normalised_input_grad(i64 row_begin, i64 row_end) const {
    for (i64 row = row_begin; row < row_end; ++row) {
      const S* d = chunk.dgates_row(row);
      S* x = chunk.dinputs_row(row);
      const typename Chunk<S>::Normalised of_row = chunk.normalised[row];
      for_vectors<S>(4 * s_.H, [&](i64 at, i64 n) FASTLSTM_INLINE_LAMBDA {
        store_n(x + at,
                normalise_grad<S>(load_n(d + at, n), load_n(&regularised_->ln_ih[at], n), load_n(x + at, n),
                                  of_row.input_scale, of_row.input_mean, of_row.input_slope),
                n);
      });
    }
  }

  // Adds the gradients of this chunk of what is multiplied unit by unit (peepholes, gains and biases of layer
  // normalisation) for a range of unit tiles. As in WeightGrad, short runs of rows are summed on their own.
  void vector_grads(i64 tile_begin, i64 tile_end) const {
    constexpr i64 kRows = 128;
    for (i64 first = 0; first < chunk_rows(); first += kRows) {
      const i64 rows = smaller(kRows, chunk_rows() - first);
      const S *gates[kRows], *previous[kRows];
      for (i64 i = 0; i < rows && s_.peephole; ++i) {
        i64 t, slot;
        locate(first + i, t, slot);
        const i64 b = all_.batch(slot);
        gates[i] = gates_at(first + i, t, b);
        previous[i] = previous_cell(p_, all_, chunk.c0, t, slot, b);
      }
      for (i64 tile = tile_begin; tile < tile_end; ++tile) {
        const i64 unit = tile * kLanes<S>, n = smaller(kLanes<S>, s_.H - unit);
        S* total = &vectors_[tile * vectors() * kLanes<S>];
        const auto add = [&](Vec<S> sum) {
          store(total, load(total) + sum);
          total += kLanes<S>;
        };
        if (s_.peephole) {
          Vec<S> sums[3] = {};
          for (i64 i = 0; i < rows; ++i) {
            const S *gate = gates[i] + 4 * unit, *d = chunk.dgates_row(first + i) + 4 * unit;
            const Vec<S> c = previous[i] ? load_n(previous[i] + unit, n) : Vec<S>{};
            const Vec<S> c_new = fma(load_n(gate + n, n), c, load_n(gate, n) * load_n(gate + 2 * n, n));
            sums[0] = fma(load_n(d, n), c, sums[0]);
            sums[1] = fma(load_n(d + n, n), c, sums[1]);
            sums[2] = fma(load_n(d + 3 * n, n), c_new, sums[2]);
          }
          for (const Vec<S>& sum : sums) add(sum);
        }
        if (!s_.layer_norm) continue;
        for (i64 v = 0; v < kPanelVectors; ++v) {
          Vec<S> sums[3] = {};
          for (i64 row = first; row < first + rows; ++row) {
            const i64 at = 4 * unit + v * n;
            const Vec<S> d = load_n(chunk.dgates_row(row) + at, n);
            sums[0] += d;
            sums[1] = fma(d, load_n(chunk.dinputs_row(row) + at, n), sums[1]);
            sums[2] = fma(d, load_n(chunk.recurrent_row(row) + at, n), sums[2]);
          }
          for (const Vec<S>& sum : sums) add(sum);
        }
        Vec<S> sums[2] = {};
        for (i64 row = first; row < first + rows; ++row) {
          const Vec<S> d = load_n(&chunk.dcell[row * chunk.hidden_pitch + unit], n);
          sums[0] += d;
          sums[1] = fma(d, load_n(&chunk.cell[row * chunk.hidden_pitch + unit], n), sums[1]);
        }
        for (const Vec<S>& sum : sums) add(sum);
      }
    }
  }
  void write_vector_grads() const {
    for (i64 tile = 0; tile < tiles(); ++tile) {
      const i64 unit = tile * kLanes<S>, n = smaller(kLanes<S>, s_.H - unit);
      const S* sum = &vectors_[tile * vectors() * kLanes<S>];
      const auto write = [&](void* out, i64 first) {
        if (out) std::memcpy(static_cast<S*>(out) + first + unit, sum, size_t(n) * sizeof(S));
        sum += kLanes<S>;
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
  bool has_vectors() const { return bool(vectors_) && vectors() > 0; }
  i64 tiles() const { return ceil_div(s_.H, kLanes<S>); }

  void end_chunk() { first_rows_ = first_rows_ && chunk_rows() == 0; }
  i64 in_panels() const { return at_.in_panels; }
  const WeightGrad<S>& gate_weights() const { return gates_; }
  const WeightGrad<S>& recurrent_weights() const { return recurrent_; }
  const WeightGrad<S>& projection_weights() const { return projection_; }

  // dx of rows [row_begin, row_end) of this chunk, added where the other direction has been already.
  void input_grad(i64 row_begin, i64 row_end, i64 panel) {
    const i64 begin = panel * kPanel<S>, width = smaller(kPanel<S>, s_.I - begin);
    alignas(64) S sum[kTileRows * 8][kPanel<S>];
    constexpr i64 kGroup = kTileRows * 8;
    for (i64 first = row_begin; first < row_end; first += kGroup) {
      const i64 n = smaller(kGroup, row_end - first);
      multiply_panel<S>(n, {chunk.dinputs_row(first), chunk.gate_pitch}, s_.gate_units(),
                        packed_ + at_.w_ih + panel * s_.gate_units() * kPanel<S>, {sum[0], kPanel<S>}, width);
      for (i64 i = 0; i < n; ++i) {
        i64 t, slot;
        locate(first + i, t, slot);
        S* dx = element<S>(p_.dx.data, all_.offset(p_.dx, t, all_.batch(slot)) + begin);
        if (second_at(t))
          for (i64 k = 0; k < width; ++k) dx[k] += sum[i][k];
        else
          std::memcpy(dx, sum[i], size_t(width) * sizeof(S));
      }
    }
  }

  // Adds this chunk's [x | h_previous | 1]^T dgates for a block of it; with layer normalisation x^T dinputs.
  void gate_weight_grad(i64 part, i64 parts) {
    gates_.add(part, parts, chunk_rows(), first_rows_, chunk.dinputs_row(0), chunk.gate_pitch,
               [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, k_begin, k_end, out); });
  }
  // Adds h_previous^T drecurrent, with layer normalisation.
  void recurrent_weight_grad(i64 part, i64 parts) {
    recurrent_.add(
        part, parts, chunk_rows(), first_rows_, chunk.drecurrent_row(0), chunk.gate_pitch,
        [&](i64 row, i64 k_begin, i64 k_end, S* out) { product_input(row, s_.I + k_begin, s_.I + k_end, out); });
  }

  // Adds this chunk's m^T dh for a block of it, m = o * tanh(c) being the hidden state before projection.
  void projection_weight_grad(i64 part, i64 parts) {
    projection_.add(part, parts, chunk_rows(), first_rows_, chunk.dhidden.get(), chunk.state_pitch,
                    [&](i64 row, i64 k_begin, i64 k_end, S* out) {
                      if (chunk.m) {
                        const S* m = &chunk.m[row * chunk.hidden_pitch];
                        std::memcpy(out, m + k_begin, size_t(k_end - k_begin) * sizeof(S));
                        return;
                      }
                      i64 t, slot;
                      locate(row, t, slot);
                      const i64 b = all_.batch(slot);
                      const S* gates = gates_at(row, t, b);
                      const S* cell = element<S>(p_.c_all.data, all_.offset(p_.c_all, t, b));
                      for (i64 unit = k_begin / kLanes<S> * kLanes<S>; unit < k_end; unit += kLanes<S>) {
                        const i64 n = smaller(kLanes<S>, s_.H - unit);
                        const Vec<S> m = load_n(gates + 4 * unit + 3 * n, n) * tanh(load_n(cell + unit, n));
                        for (i64 lane = larger(0, k_begin - unit); lane < n && unit + lane < k_end; ++lane)
                          out[unit + lane - k_begin] = m[lane];
                      }
                    });
  }

  // Copies the gradients of a panel of gate units, or of projected units, to where they are wanted.
  void write_gate_grads(i64 panel) const {
    const auto write = [&](const WeightGrad<S>& grad, void* out, i64 k_begin, i64 count) {
      if (out)
        grad.copy_panel(panel, k_begin, count,
                        [&](i64 q) { return static_cast<S*>(out) + gate_row<S>(s_, q) * count; });
    };
    write(gates_, dw_.w_ih, 0, s_.I);
    if (s_.layer_norm) return write(recurrent_, dw_.w_hh, 0, s_.P);  // the bias is one of the vectors
    write(gates_, dw_.w_hh, s_.I, s_.P);
    write(gates_, dw_.b, s_.I + s_.P, 1);
  }
  void write_projection_grads(i64 panel) const {
    projection_.copy_panel(panel, 0, s_.H, [&](i64 q) { return static_cast<S*>(dw_.w_hr) + q * s_.H; });
  }
  // Without a single row there are no sums to copy.
  bool has_rows() const { return !first_rows_; }
  void zero_weight_grads() const {
    const auto zero = [](void* out, i64 n) {
      if (out) std::memset(out, 0, size_t(n) * sizeof(S));
    };
    zero(dw_.w_ih, s_.gate_units() * s_.I);
    zero(dw_.w_hh, s_.gate_units() * s_.P);
    zero(dw_.b, s_.gate_units());
    zero(dw_.w_hr, s_.P * s_.H);
  }

  Chunk<S> chunk;

 private:
  static Buffer<S> zeros(i64 n) {
    Buffer<S> buffer(n);
    buffer.zero();  // the padding of rows is read (never used): keep it free of slow denormals
    return buffer;
  }
  // Of each unit, gradients that vector_grads() sums.
  i64 vectors() const { return (s_.peephole ? 3 : 0) + (s_.layer_norm ? 3 * kPanelVectors + 2 : 0); }

  const S* gates_at(i64 row, i64 t, i64 b) const {
    return chunk.gates ? chunk.gates_row(row) : element<S>(p_.gates.data, all_.offset(p_.gates, t, b));
  }
  // Columns [k_begin, k_end) of [x | h_previous | 1] of a row of the chunk.
  void product_input(i64 row, i64 k_begin, i64 k_end, S* out) const {
    i64 t, slot;
    locate(row, t, slot);
    const i64 b = all_.batch(slot);
    if (k_begin < s_.I)
      convert_in(out, p_.x.data, p_.dtype, all_.offset(p_.x, t, b) + k_begin, smaller(k_end, s_.I) - k_begin);
    const i64 h_begin = larger(k_begin, s_.I) - s_.I, h_end = smaller(k_end, s_.I + s_.P) - s_.I;
    if (h_begin < h_end) previous_hidden(out + s_.I + h_begin - k_begin, t, slot, b, h_begin, h_end - h_begin);
    if (k_end == s_.I + s_.P + 1) out[k_end - 1 - k_begin] = 1;  // the bias
  }
  void locate(i64 row, i64& t, i64& slot) const {
    i64 low = 0, high = steps_ - 1;  // the last step that starts at or before this row
    while (low < high) {
      const i64 middle = (low + high + 1) / 2;
      if (chunk.start[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    t = time(first_step_ + low);
    slot = row - chunk.start[low];
  }
  // Whether the other direction has written dx of time t in an earlier chunk, or, in the same chunk, before us.
  bool second_at(i64 t) const {
    if (s_.D == 1) return false;
    const i64 descending = (s_.T - 1 - t) / capacity_, ascending = t / capacity_;
    return all_.direction == 0 ? descending > ascending : ascending >= descending;
  }
  // What went into the product with w_hh, of a step.
  void previous_hidden(S* out, i64 t, i64 slot, i64 b, i64 begin, i64 count) const {
    const bool start = all_.starts(slot, t);
    if (resets(p_, t, b) || (start && !p_.h0.data))
      std::memset(static_cast<void*>(out), 0, size_t(count) * sizeof(S));
    else if (start)
      convert_in(out, p_.h0.data, p_.dtype, all_.offset(p_.h0, b) + begin, count);
    else
      convert_in(out, p_.y.data, p_.dtype, all_.offset(p_.y, all_.previous(t), b) + begin, count);
    if (!p_.cell.h_mask.data) return;
    const S* mask = element<S>(p_.cell.h_mask.data, all_.offset(p_.cell.h_mask, b) + begin);
    for (i64 k = 0; k < count; ++k) out[k] *= mask[k];
  }

  const BackwardParams& p_;
  const Sizes& s_;
  const LaneRows all_;
  const BackwardPack<S> at_;
  const S* packed_;
  const BackwardParams::Gradients& dw_;
  const Regularised<S>* const regularised_;  // null for a plain cell
  WeightGrad<S> gates_, recurrent_, projection_;
  Buffer<S> vectors_;   // [tiles][vectors()][kLanes], see vector_grads
  const i64 capacity_;  // steps of a full chunk
  i64 first_step_ = 0, steps_ = 0;
  bool first_rows_ = true;  // nothing has been added to the weight gradients yet
};

constexpr i64 kChunkBytes = 1 << 20;  // gate gradients of a chunk: stay in L2/L3 until they are used
// Normalised cells keep several times as much of a row: less of it at once, in memory that need not be paged in anew.
constexpr i64 kNormalisedShare = 8;
constexpr i64 kChunkRows = 512;  // rows that amortise one pass over the weight gradients

template <class S, Cell kCell>
void backward_layer(const BackwardParams& p) {
  using Lane = BackwardLane<S, kCell>;
  using Direction = BackwardDirection<S>;
  const Sizes& s = p.sizes;
  const Plan plan = make_plan<S>(s, p.threads.count);
  const i64 batch = larger(s.B, 1), step_bytes = batch * s.gate_units() * i64(sizeof(S));
  // Layer normalisation keeps several times as much of a row.
  const i64 share_of = s.layer_norm ? kNormalisedShare : 1;
  const i64 capacity =
      smaller(larger(s.T, 1), larger(kChunkBytes / share_of / step_bytes, ceil_div(kChunkRows / share_of, batch)));

  const i64 lane_count = s.D * plan.lanes;
  const RegularisedDirections<S> regularised(kCell == Cell::regularised, s, p.dtype, p.cell, p.weights);
  Direction* directions[2];
  Buffer<Lane*> lanes(lane_count);
  for (i64 d = 0; d < s.D; ++d) directions[d] = new Direction(p, regularised[d], d, capacity);
  for (i64 k = 0; k < lane_count; ++k) {
    const i64 d = k / plan.lanes;
    lanes[k] = new Lane(p, plan, regularised[d], d, k % plan.lanes, directions[d]->chunk);
  }
  const Lane& any = *lanes[0];

  const i64 shares = ceil_div(p.threads.count, s.D);
  const auto share = [&](i64 count, const auto& work) {  // see forward_layer
    parallel(p.threads, s.D * shares, [&](i64 item) {
      const i64 k = item % shares;
      work(*lanes[item / shares], k * count / shares, (k + 1) * count / shares);
    });
  };

  // work(direction, begin, end) over the rows of a chunk of each direction, at most kProjectRows at once.
  const auto by_rows = [&](const auto& work) {
    for (i64 d = 0; d < s.D; ++d) {
      const i64 rows = directions[d]->chunk_rows(), groups = ceil_div(rows, kProjectRows);
      parallel(p.threads, groups,
               [&](i64 group) { work(*directions[d], group * rows / groups, (group + 1) * rows / groups); });
    }
  };

  for (i64 first = 0; first < s.T; first += capacity) {
    const i64 steps = smaller(capacity, s.T - first);
    for (i64 d = 0; d < s.D; ++d) directions[d]->begin_chunk(first, steps);
    if (kCell != Cell::rnn && !p.gates.data)
      by_rows([](const Direction& direction, i64 a, i64 b) { direction.recompute(a, b); });
    if (!plan.split_units) {
      parallel(p.threads, lane_count, [&](i64 k) {
        const Direction& direction = *directions[k / plan.lanes];
        for (i64 step = 0; step < steps; ++step)
          lanes[k]->run(direction.time(first + step), direction.chunk.start[step]);
      });
    } else {
      for (i64 step = 0; step < steps; ++step) {
        for (i64 d = 0; d < s.D; ++d)
          lanes[d]->begin_step(directions[d]->time(first + step), directions[d]->chunk.start[step]);
        if (s.projected) share(any.hidden_panels(), [](Lane& lane, i64 a, i64 b) { lane.unproject(a, b); });
        share(any.rows(), [](Lane& lane, i64 a, i64 b) { lane.pointwise(a, b); });
        share(any.state_panels(), [](Lane& lane, i64 a, i64 b) { lane.recur(a, b); });
        for (i64 d = 0; d < s.D; ++d) lanes[d]->end_step();
      }
    }

    if (directions[0]->has_vectors()) {
      const i64 tiles = directions[0]->tiles();
      parallel(p.threads, s.D * shares, [&](i64 item) {
        const i64 k = item % shares;
        directions[item / shares]->vector_grads(k * tiles / shares, (k + 1) * tiles / shares);
      });
    }
    if (s.layer_norm) by_rows([](const Direction& direction, i64 a, i64 b) { direction.normalised_input_grad(a, b); });
    if (p.dx.data)
      for (i64 d = 0; d < s.D; ++d) {  // one after the other: they may share rows of dx
        const i64 rows = directions[d]->chunk_rows(), groups = ceil_div(rows, kProjectRows);
        parallel(p.threads, groups * directions[d]->in_panels(), [&](i64 item) {
          const i64 group = item % groups;
          directions[d]->input_grad(group * rows / groups, (group + 1) * rows / groups, item / groups);
        });
      }
    const auto add = [&](const WeightGrad<S>& grad, void (Direction::*block)(i64, i64)) {
      if (!grad.allocated()) return;
      const i64 parts = grad.parts(ceil_div(p.threads.count, s.D));
      parallel(p.threads, s.D * parts, [&](i64 item) { (directions[item / parts]->*block)(item % parts, parts); });
    };
    add(directions[0]->gate_weights(), &Direction::gate_weight_grad);
    add(directions[0]->recurrent_weights(), &Direction::recurrent_weight_grad);
    add(directions[0]->projection_weights(), &Direction::projection_weight_grad);
    for (i64 d = 0; d < s.D; ++d) directions[d]->end_chunk();
  }

  for (i64 k = 0; k < lane_count; ++k) {
    lanes[k]->end_sequence();
    delete lanes[k];
  }
  const auto write = [&](const WeightGrad<S>& grad, void (Direction::*panel)(i64) const) {
    if (grad.allocated())
      parallel(p.threads, s.D * grad.panels(),
               [&](i64 item) { (directions[item / grad.panels()]->*panel)(item % grad.panels()); });
  };
  if (directions[0]->has_rows()) {
    write(directions[0]->gate_weights(), &Direction::write_gate_grads);
    write(directions[0]->projection_weights(), &Direction::write_projection_grads);
  }
  for (i64 d = 0; d < s.D; ++d) {
    if (!directions[d]->has_rows()) directions[d]->zero_weight_grads();
    if (directions[d]->has_vectors()) directions[d]->write_vector_grads();
    delete directions[d];
  }
}

}  // namespace
}  // namespace fastlstm
