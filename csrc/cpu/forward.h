// Forward pass of one layer: fused input projection, recurrence, gates and state update.
#pragma once

#include <new>

#include "cell.h"
#include "lane.h"
#include "plan.h"
#include "sums.h"

namespace fastlstm {
namespace {

template <class S, Cell cell>
class ForwardLane {
  static constexpr bool kByRow = cell == Cell::regularised;
  static constexpr bool kHasCell = cell != Cell::rnn;
  static constexpr i64 kTileUnits = kHasCell ? kLanes<S> : kPanel<S>;

 public:
  // regularised: null for a plain cell.
  ForwardLane(const ForwardParams& p, const Plan& plan, const Regularised<S>* regularised, i64 direction, i64 lane)
      : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), at_(p.sizes),
        packed_(static_cast<const S*>(p.packed) + direction * at_.size), sums_{s_, at_, packed_},
        hidden_pitch_(pitch<S>(s_.H)), state_pitch_(pitch<S>(s_.P)), gate_pitch_(pitch<S>(4 * s_.H)),
        project_ahead_(plan.input_steps > 0 || (kByRow && s_.layer_norm)),
        stores_y_(!s_.projected && element_bytes(p.dtype) == sizeof(S) && !kByRow), steps_(larger(1, plan.input_steps)),
        out_pitch_(s_.projected ? hidden_pitch_ : state_pitch_), regularised_(regularised) {
    const i64 n = rows_.rows;
    h_ = Buffer<S>(n * state_pitch_);
    h_next_ = Buffer<S>(n * state_pitch_);
    if (kHasCell) c_ = Buffer<S>(n * hidden_pitch_);
    if (s_.projected) m_ = Buffer<S>(n * hidden_pitch_);
    x_row_ = Buffer<const S*>(n * steps_);
    rows_out_ = Buffer<S*>(3 * n);
    y_row_ = rows_out_.get();
    cell_row_ = y_row_ + n;
    gates_row_ = cell_row_ + n;
    if (element_bytes(p.dtype) != sizeof(S)) x_copy_ = Buffer<S>(n * steps_ * s_.I);
    if (project_ahead_) projected_ = Buffer<S>(n * steps_ * (kByRow ? gate_pitch_ : at_.tiles * kPanel<S>));
    if (kByRow) z_ = Buffer<S>(n * gate_pitch_);
    if (kByRow && p.cell.h_mask.data) h_masked_ = Buffer<S>(n * state_pitch_);
  }

  i64 rows() const { return rows_.rows; }
  i64 tiles() const { return at_.tiles; }
  i64 out_panels() const { return at_.out_panels; }
  bool at_chunk_start(i64 step) const { return step % steps_ == 0; }
  bool projects_ahead() const { return project_ahead_; }

  // Collects the input rows of the next steps_ steps.
  void begin_chunk(i64 step) {
    chunk_rows_ = 0;
    for (i64 k = step; k < smaller(step + steps_, s_.T); ++k) {
      const i64 t = time(k);
      for (i64 i = 0; i < rows_.active(t); ++i) {
        const i64 offset = rows_.offset(p_.x, t, rows_.batch(i));
        if (x_copy_) {
          convert_in(&x_copy_[chunk_rows_ * s_.I], p_.x.data, p_.dtype, offset, s_.I);
          x_row_[chunk_rows_] = &x_copy_[chunk_rows_ * s_.I];
        } else {
          x_row_[chunk_rows_] = element<const S>(p_.x.data, offset);
        }
        ++chunk_rows_;
      }
    }
    next_row_ = 0;
  }

  // projected_[tile][row of the chunk][kPanel] = bias + x w_ih^T; or, where a step goes by rows, [row][gate_pitch_]
  void project_inputs(i64 tile_begin, i64 tile_end) {
    for (i64 tile = tile_begin; tile < tile_end; ++tile)
      for_row_tiles<kPanelVectors>(
          chunk_rows_, [&](i64 first, auto height) { project_block<decltype(height)::value>(first, tile); });
  }

  void begin_step(i64 step) {
    t_ = time(step);
    n_ = rows_.active(t_);
    first_row_ = next_row_;
    next_row_ += n_;
    for (; entered_ < n_; ++entered_) load_state(entered_);
    out_ = (s_.projected ? m_ : h_next_).get();
    for (i64 i = 0; i < n_; ++i) {
      const i64 b = rows_.batch(i);
      if (stores_y_) y_row_[i] = element<S>(p_.y.data, rows_.offset(p_.y, t_, b));
      if (p_.c_all.data) cell_row_[i] = element<S>(p_.c_all.data, rows_.offset(p_.c_all, t_, b));
      if (p_.gates.data) gates_row_[i] = element<S>(p_.gates.data, rows_.offset(p_.gates, t_, b));
    }
    if (p_.reset)
      for (i64 i = 0; i < n_; ++i)
        if (p_.reset[t_ * p_.reset_step + rows_.batch(i) * p_.reset_batch]) {
          std::memset(&h_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
          if (kHasCell) std::memset(&c_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(S));
          if (h_masked_) std::memset(&h_masked_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
        }
  }

  // Gates, cell and hidden state of this step for a range of unit tiles; of cells that go by rows, the gate sums.
  void gates(i64 tile_begin, i64 tile_end) {
    alignas(64) S sums[kRowGroup][kPanel<S>];
    if (n_ <= kTallestTile) {  // few rows: several unit tiles at once keep the multipliers busy
      with_rows<kTallestTile>(n_, [&](auto height) {
        constexpr int R = decltype(height)::value, P = R == 1 ? 2 : larger(1, kTileRows / R);
        if (n_ != R) return;  // no rows at all
        // Back and forth over the weights: what was read last is still in L1 when the next step begins.
        const i64 blocks = ceil_div(tile_end - tile_begin, P);
        for (i64 k = 0; k < blocks; ++k) {
          const i64 tile = tile_begin + P * (t_ % 2 ? blocks - 1 - k : k);
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
      const i64 groups = ceil_div(n_, kRowGroup);
      for (i64 tile = tile_begin; tile < tile_end; ++tile)
        for (i64 group = 0; group < groups; ++group) {
          const i64 first = group * n_ / groups, last = (group + 1) * n_ / groups;
          for_row_tiles<kPanelVectors>(last - first, [&](i64 k, auto height) {
            sum_gates<decltype(height)::value, 1>(first + k, tile, sums + k);
          });
          update<1>(first, last - first, tile, sums);
        }
    }
    if (!s_.projected && !stores_y_ && !kByRow)
      emit_hidden(tile_begin * kTileUnits, smaller(tile_end * kTileUnits, s_.H) - tile_begin * kTileUnits);
  }

  // What follows the gate sums, for a range of rows; with a projection, as far as that.
  void update_rows(i64 row_begin, i64 row_end) {
    row_end = smaller(row_end, n_);
    for (i64 first = row_begin; first < row_end; first += kRowGroup) {
      const i64 last = smaller(first + kRowGroup, row_end);
      const auto out = [&](i64 k) { return out_ + (first + k) * out_pitch_; };
      if (s_.layer_norm) {
        const auto x = [&](i64 k) { return ahead(0, first_row_ + first + k); };
        const auto h = [&](i64 k) { return z_row(first + k); };
        const Moments<S> of_x(last - first, 4 * s_.H, x), of_h(last - first, 4 * s_.H, h);
        for (i64 k = 0; k < last - first; ++k)
          regularised_->template activate_normalised<false>(x(k), of_x, h(k), of_h, k, h(k),
                                                            &c_[(first + k) * hidden_pitch_], out(k));
        const Moments<S> of_c(last - first, s_.H, out);
        for (i64 k = 0; k < last - first; ++k)
          update_cell(first + k, [&](i64 unit, i64 n, Vec<S> c) FASTLSTM_INLINE_LAMBDA {
            return fma(of_c.normalise(k, c), load_n(&regularised_->ln_c[unit], n),
                       load_n(&regularised_->b_ln_c[unit], n));
          });
      } else {
        for (i64 i = first; i < last; ++i)
          regularised_->activate_row([&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA { return load_n(z_row(i) + k, n); },
                                     z_row(i), &c_[i * hidden_pitch_], out(i - first));
        for (i64 i = first; i < last; ++i) update_cell(i, [](i64, i64, Vec<S> c) FASTLSTM_INLINE_LAMBDA { return c; });
      }
      if (!s_.projected) update_hidden(first, last);
    }
  }

  // The state from the new hidden values, and its way out.
  void update_hidden(i64 row_begin, i64 row_end) {
    for (i64 i = row_begin; i < smaller(row_end, n_); ++i) {
      const i64 b = rows_.batch(i);
      S* h_new = &h_next_[i * state_pitch_];
      if (regularised_->zone_h) {
        const S* h = &h_[i * state_pitch_];
        const uint32_t key = regularised_->row_key(t_, b);
        for_vectors<S>(s_.P, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
          store_n(h_new + k, regularised_->zone_h.state(load_n(h + k, n), load_n(h_new + k, n), key, k), n);
        });
      }
      if (h_masked_) mask_hidden(i, h_new);
      convert_out(p_.y.data, p_.dtype, rows_.offset(p_.y, t_, b), h_new, s_.P);
    }
  }

  // h = m w_hr^T for a range of panels of P.
  void project_hidden(i64 panel_begin, i64 panel_end) {
    for (i64 panel = panel_begin; panel < panel_end; ++panel) {
      const i64 begin = panel * kPanel<S>, count = smaller(kPanel<S>, s_.P - begin);
      multiply_panel<S>(n_, {m_.get(), hidden_pitch_}, s_.H, packed_ + at_.w_hr + panel * s_.H * kPanel<S>,
                        {&h_next_[begin], state_pitch_}, count);
      if (!kByRow) emit_hidden(begin, count);
    }
  }

  void end_step() {
    h_.swap(h_next_);
    for (i64 i = n_; i-- > 0 && rows_.ends(i, t_);) store_state(i);  // ending rows are the last ones, or all
  }

  // Sequences without any step keep their initial state; padding reads as zero.
  void end_sequence() {
    for (; entered_ < rows_.rows; ++entered_) {
      load_state(entered_);
      store_state(entered_);
    }
    if (!p_.ragged.active || p_.ragged.row_offset) return;
    const size_t bytes = element_bytes(p_.dtype);
    for (i64 i = 0; i < rows_.rows; ++i)
      for (i64 t = rows_.length(i); t < s_.T; ++t) {
        const i64 b = rows_.batch(i), y = rows_.offset(p_.y, t, b);
        std::memset(static_cast<char*>(p_.y.data) + size_t(y) * bytes, 0, size_t(s_.P) * bytes);
        if (p_.c_all.data)
          std::memset(element<S>(p_.c_all.data, rows_.offset(p_.c_all, t, b)), 0, size_t(s_.H) * sizeof(S));
      }
  }

  void run() {
    for (i64 step = 0; step < s_.T; ++step) {
      if (at_chunk_start(step)) {
        begin_chunk(step);
        if (project_ahead_) project_inputs(0, at_.tiles);
      }
      begin_step(step);
      gates(0, at_.tiles);
      if (kByRow) update_rows(0, n_);
      if (s_.projected) project_hidden(0, at_.out_panels);
      if (s_.projected && kByRow) update_hidden(0, n_);
      end_step();
    }
    end_sequence();
  }

 private:
  void emit_hidden(i64 begin, i64 count) const {
    for (i64 i = 0; i < n_; ++i)
      convert_out(p_.y.data, p_.dtype, rows_.offset(p_.y, t_, rows_.batch(i)) + begin,
                  &h_next_[i * state_pitch_ + begin], count);
  }
  i64 time(i64 step) const { return rows_.direction == 0 ? step : s_.T - 1 - step; }
  S* ahead(i64 tile, i64 row) const {
    return &projected_[kByRow ? row * gate_pitch_ + tile * kPanel<S> : (tile * chunk_rows_ + row) * kPanel<S>];
  }
  // Elements between the gates of a tile: rows have no padding between them. Writing whole vectors from the first gate
  // to the last, each overwrites the padding of the one before; that of the last ends in the padding of the row.
  i64 gate_step(i64 tile) const { return kByRow ? smaller(kLanes<S>, s_.H - tile * kLanes<S>) : kLanes<S>; }
  S* z_row(i64 i) const { return &z_[i * gate_pitch_]; }

  template <int R, int P>
  FASTLSTM_INLINE void add_inputs(Vec<S> (&acc)[R][P * kPanelVectors], i64 row, i64 tile) const {
    const S* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = x_row_[row + r];
    sums_.template start<R, P>(acc, x, tile);
  }

  template <int R>
  void project_block(i64 first, i64 tile) {
    Vec<S> acc[R][kPanelVectors];
    add_inputs<R, 1>(acc, first, tile);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) store(ahead(tile, first + r) + v * gate_step(tile), acc[r][v]);
  }

  template <int R, int P>
  void sum_gates(i64 first, i64 tile, S (*sums)[kPanel<S>]) {
    Vec<S> acc[R][P * kPanelVectors];
    if (kByRow && s_.layer_norm) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] = Vec<S>{};
    } else if (project_ahead_) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
          for (int v = 0; v < kPanelVectors; ++v)
            acc[r][p * kPanelVectors + v] = load(ahead(tile + p, first_row_ + first + r) + v * gate_step(tile + p));
    } else {
      add_inputs<R, P>(acc, first_row_ + first, tile);
    }
    const S* h[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) h[r] = &(kByRow && h_masked_ ? h_masked_ : h_)[(first + r) * state_pitch_];
    sums_.template add_hidden<R, P>(acc, h, tile);
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

  // What follows the sums of P tiles of units, [rows * P], for `rows` rows. In two loops over rows: constants stay in
  // registers, and each loop is a short chain of dependent instructions with many rows in flight, where one long chain
  // a row would leave the core waiting.
  template <int P>
  void update(i64 first, i64 rows, i64 tile, S (*sums)[kPanel<S>]) {
    if constexpr (kByRow) return;
    if constexpr (!kHasCell) {
#pragma GCC unroll 1
      for (i64 k = 0; k < rows * P; ++k) activate_hidden(sums[k], first + k / P, (tile + k % P) * kPanel<S>);
      return;
    }
#pragma GCC unroll 1
    for (i64 k = 0; k < rows * P; ++k) activate(sums[k], kLanes<S>);
#pragma GCC unroll 1
    for (i64 r = 0; r < rows; ++r)
#pragma GCC unroll 1
      for (int p = 0; p < P; ++p) update_units(sums[r * P + p], first + r, (tile + p) * kLanes<S>);
  }

  // Hidden state of kPanel units of one row of an RNN, from their sums.
  FASTLSTM_INLINE void activate_hidden(const S* sums, i64 row, i64 unit) const {
#pragma GCC unroll 4
    for (i64 v = 0; v < kPanelVectors; ++v, unit += kLanes<S>) {
      if (unit >= s_.H) return;
      const Vec<S> z = load(sums + v * kLanes<S>);
      const Vec<S> hidden = p_.cell.relu ? (z < 0 ? Vec<S>{} : z) : tanh(z);  // NaN stays NaN
      store(out_ + row * out_pitch_ + unit, hidden);
      if (stores_y_) store_n(y_row_[row] + unit, hidden, smaller(kLanes<S>, s_.H - unit));
    }
  }

  // Cell and hidden state of kLanes units of one row, from its activated gates.
  FASTLSTM_INLINE void update_units(const S* gates, i64 row, i64 unit) {
    const Vec<S> i = load(gates), f = load(gates + kLanes<S>), g = load(gates + 2 * kLanes<S>),
                 o = load(gates + 3 * kLanes<S>);
    S* c = &c_[row * hidden_pitch_ + unit];
    const Vec<S> c_new = fma(f, load(c), i * g), hidden = o * tanh(c_new);
    store(c, c_new);
    store(out_ + row * out_pitch_ + unit, hidden);
    const i64 width = smaller(kLanes<S>, s_.H - unit);
    if (stores_y_) store_n(y_row_[row] + unit, hidden, width);
    if (p_.c_all.data) store_n(cell_row_[row] + unit, c_new, width);
    if (p_.gates.data) {
      S* saved = gates_row_[row] + 4 * unit;
      store_n(saved, i, width);
      store_n(saved + width, f, width);
      store_n(saved + 2 * width, g, width);
      store_n(saved + 3 * width, o, width);
    }
  }

  // The same of a whole regularised row: its c before zoneout is where the hidden state will be.
  // seen(unit, n, c): c as the hidden state sees it.
  template <class Seen>
  FASTLSTM_INLINE void update_cell(i64 row, const Seen& seen) {
    const Regularised<S>& r = *regularised_;
    const uint32_t key = r.zone_c ? r.row_key(t_, rows_.batch(row)) : 0;
    S *c = &c_[row * hidden_pitch_], *out = out_ + row * out_pitch_;
    const S* gates = z_row(row);
    for_vectors<S>(s_.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
      Vec<S> c_new = load(out + unit);
      const Vec<S> hidden = load_n(gates + 4 * unit + 3 * n, n) * tanh(seen(unit, n, c_new));
      if (r.zone_c) c_new = r.zone_c.state(load(c + unit), c_new, key, unit);
      store(c + unit, c_new);
      if (p_.c_all.data) store_n(cell_row_[row] + unit, c_new, n);
      store(out + unit, hidden);
    });
    if (p_.gates.data) std::memcpy(gates_row_[row], gates, size_t(4 * s_.H) * sizeof(S));
  }

  void mask_hidden(i64 i, const S* h) const {
    const S* mask = element<S>(p_.cell.h_mask.data, rows_.offset(p_.cell.h_mask, rows_.batch(i)));
    for_vectors<S>(s_.P, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      store_n(&h_masked_[i * state_pitch_ + k], load_n(h + k, n) * load_n(mask + k, n), n);
    });
  }

  void load_state(i64 i) {
    const i64 b = rows_.batch(i);
    S* h = &h_[i * state_pitch_];
    std::memset(h, 0, size_t(state_pitch_) * sizeof(S));
    if (p_.h0.data) convert_in(h, p_.h0.data, p_.dtype, rows_.offset(p_.h0, b), s_.P);
    if (h_masked_) mask_hidden(i, h);
    if (!kHasCell) return;
    S* c = &c_[i * hidden_pitch_];
    std::memset(c, 0, size_t(hidden_pitch_) * sizeof(S));
    if (p_.c0.data) convert_in(c, p_.c0.data, p_.dtype, rows_.offset(p_.c0, b), s_.H);
  }
  void store_state(i64 i) {
    const i64 b = rows_.batch(i);
    convert_out(p_.h_n.data, p_.dtype, rows_.offset(p_.h_n, b), &h_[i * state_pitch_], s_.P);
    if (kHasCell) convert_out(p_.c_n.data, p_.dtype, rows_.offset(p_.c_n, b), &c_[i * hidden_pitch_], s_.H);
  }

  const ForwardParams& p_;
  const Sizes& s_;
  const LaneRows rows_;
  const ForwardPack<S> at_;
  const S* packed_;
  const GateSums<S> sums_;
  const i64 hidden_pitch_, state_pitch_, gate_pitch_;
  const bool project_ahead_;
  const bool stores_y_;  // h goes to y as it is: neither projected nor rounded
  const i64 steps_;      // of a chunk
  const i64 out_pitch_;
  const Regularised<S>* const regularised_;
  Buffer<S> h_, h_next_, c_, m_;  // states, padded to whole vectors; m_: hidden before projection
  S* out_ = nullptr;              // where the gates put the hidden state: m_ or h_next_
  Buffer<const S*> x_row_;        // input rows of the chunk, active ones only, step by step
  Buffer<S*> rows_out_;           // where each active row of this step goes:
  S **y_row_, **cell_row_, **gates_row_;
  Buffer<S> x_copy_;     // these rows converted to S, for 16-bit input
  Buffer<S> projected_;  // see project_inputs
  Buffer<S> z_;          // [rows][gate_pitch_] gate sums, then gates, of cells that go by rows
  Buffer<S> h_masked_;   // h * h_mask
  i64 chunk_rows_ = 0, next_row_ = 0, first_row_ = 0;
  i64 entered_ = 0;    // rows whose initial state is loaded
  i64 t_ = 0, n_ = 0;  // this step: time and number of active rows
};

template <class S, Cell cell>
void forward_layer(const ForwardParams& p) {
  using Lane = ForwardLane<S, cell>;
  const Sizes& s = p.sizes;
  const Plan plan = make_plan<S>(s, p.threads.count);
  const RegularisedDirections<S> regularised(cell == Cell::regularised, s, p.dtype, p.cell, p.weights);
  if (!plan.split_units) {
    parallel(p.threads, s.D * plan.lanes, [&](i64 item) {
      const i64 d = item / plan.lanes;
      Lane(p, plan, regularised[d], d, item % plan.lanes).run();
    });
    return;
  }
  // Directions are independent: both are in flight, each step is shared by all threads.
  alignas(Lane) char memory[2][sizeof(Lane)];
  Lane* lanes[2];
  for (i64 d = 0; d < s.D; ++d) lanes[d] = new (memory[d]) Lane(p, plan, regularised[d], d, 0);
  const i64 shares = ceil_div(p.threads.count, s.D);
  const auto share = [&](i64 count, const auto& work) {  // work(lane, begin, end) over [0, count) of each lane
    parallel(p.threads, s.D * shares, [&](i64 item) {
      const i64 k = item % shares;
      work(*lanes[item / shares], k * count / shares, (k + 1) * count / shares);
    });
  };
  for (i64 step = 0; step < s.T; ++step) {
    if (lanes[0]->at_chunk_start(step)) {
      for (i64 d = 0; d < s.D; ++d) lanes[d]->begin_chunk(step);
      if (lanes[0]->projects_ahead())
        share(lanes[0]->tiles(), [](Lane& lane, i64 a, i64 b) { lane.project_inputs(a, b); });
    }
    for (i64 d = 0; d < s.D; ++d) lanes[d]->begin_step(step);
    share(lanes[0]->tiles(), [](Lane& lane, i64 a, i64 b) { lane.gates(a, b); });
    if (cell == Cell::regularised) share(lanes[0]->rows(), [](Lane& lane, i64 a, i64 b) { lane.update_rows(a, b); });
    if (s.projected) share(lanes[0]->out_panels(), [](Lane& lane, i64 a, i64 b) { lane.project_hidden(a, b); });
    if (s.projected && cell == Cell::regularised)
      share(lanes[0]->rows(), [](Lane& lane, i64 a, i64 b) { lane.update_hidden(a, b); });
    for (i64 d = 0; d < s.D; ++d) lanes[d]->end_step();
  }
  for (i64 d = 0; d < s.D; ++d) {
    lanes[d]->end_sequence();
    lanes[d]->~Lane();
  }
}

}  // namespace
}  // namespace fastlstm
