// Forward pass of one layer: fused input projection, recurrence, gates and state update.
#pragma once

#include <new>

#include "activations.h"
#include "lane.h"
#include "plan.h"
#include "sums.h"

namespace fastlstm {
namespace {

template <class S>
class ForwardLane {
 public:
  ForwardLane(const ForwardParams& p, const Plan& plan, i64 direction, i64 lane)
      : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), at_(p.sizes),
        packed_(static_cast<const S*>(p.packed) + direction * at_.size), sums_{s_, at_, packed_},
        hidden_pitch_(pitch<S>(s_.H)), state_pitch_(pitch<S>(s_.P)), project_ahead_(plan.input_steps > 0),
        stores_y_(!s_.projected && element_bytes(p.dtype) == sizeof(S)), steps_(larger(1, plan.input_steps)),
        out_pitch_(s_.projected ? hidden_pitch_ : state_pitch_) {
    const i64 n = rows_.rows;
    h_ = Buffer<S>(n * state_pitch_);
    h_next_ = Buffer<S>(n * state_pitch_);
    c_ = Buffer<S>(n * hidden_pitch_);
    if (s_.projected) m_ = Buffer<S>(n * hidden_pitch_);
    x_row_ = Buffer<const S*>(n * steps_);
    rows_out_ = Buffer<S*>(3 * n);
    y_row_ = rows_out_.get();
    cell_row_ = y_row_ + n;
    gates_row_ = cell_row_ + n;
    if (element_bytes(p.dtype) != sizeof(S)) x_copy_ = Buffer<S>(n * steps_ * s_.I);
    if (project_ahead_) projected_ = Buffer<S>(n * steps_ * at_.tiles * kPanel<S>);
  }

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

  // projected_[tile][row of the chunk][kPanel] = bias + x w_ih^T
  void project_inputs(i64 tile_begin, i64 tile_end) {
    for (i64 tile = tile_begin; tile < tile_end; ++tile)
      for_row_tiles(chunk_rows_, [&](i64 first, auto height) { project_block<decltype(height)::value>(first, tile); });
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
          std::memset(&c_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(S));
        }
  }

  // Gates, cell and hidden state of this step for a range of unit tiles.
  void gates(i64 tile_begin, i64 tile_end) {
    if (n_ <= kTileRows) {  // few rows: several unit tiles at once keep the multipliers busy
      with_rows(n_, [&](auto height) {
        constexpr int R = decltype(height)::value, P = R == 1 ? 2 : kTileRows / R;
        if (n_ != R) return;  // no rows at all
        // Back and forth over the weights: what was read last is still in L1 when the next step begins.
        const i64 blocks = ceil_div(tile_end - tile_begin, P);
        for (i64 k = 0; k < blocks; ++k) {
          const i64 tile = tile_begin + P * (t_ % 2 ? blocks - 1 - k : k);
          if (tile + P <= tile_end)
            gates_block<R, P>(0, tile);
          else
            for (i64 single = tile; single < tile_end; ++single) gates_block<R, 1>(0, single);
        }
      });
    } else {
      for (i64 tile = tile_begin; tile < tile_end; ++tile)
        for_row_tiles(n_, [&](i64 first, auto height) { gates_block<decltype(height)::value, 1>(first, tile); });
    }
    if (!s_.projected && !stores_y_)
      emit_hidden(tile_begin * kLanes<S>, smaller(tile_end * kLanes<S>, s_.H) - tile_begin * kLanes<S>);
  }

  // h = m w_hr^T for a range of panels of P.
  void project_hidden(i64 panel_begin, i64 panel_end) {
    for (i64 panel = panel_begin; panel < panel_end; ++panel) {
      const i64 begin = panel * kPanel<S>, count = smaller(kPanel<S>, s_.P - begin);
      multiply_panel<S>(n_, {m_.get(), hidden_pitch_}, s_.H, packed_ + at_.w_hr + panel * s_.H * kPanel<S>,
                        {&h_next_[begin], state_pitch_}, count);
      emit_hidden(begin, count);
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
      if (s_.projected) project_hidden(0, at_.out_panels);
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
  S* ahead(i64 tile, i64 row) const { return &projected_[(tile * chunk_rows_ + row) * kPanel<S>]; }

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
      for (int v = 0; v < kPanelVectors; ++v) store(ahead(tile, first + r) + v * kLanes<S>, acc[r][v]);
  }

  template <int R, int P>
  void gates_block(i64 first, i64 tile) {
    Vec<S> acc[R][P * kPanelVectors];
    if (project_ahead_) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
          for (int v = 0; v < kPanelVectors; ++v)
            acc[r][p * kPanelVectors + v] = load(ahead(tile + p, first_row_ + first + r) + v * kLanes<S>);
    } else {
      add_inputs<R, P>(acc, first_row_ + first, tile);
    }
    const S* h[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) h[r] = &h_[(first + r) * state_pitch_];
    sums_.template add_hidden<R, P>(acc, h, tile);
    // Through the stack and in two loops over rows: constants stay in registers, and each loop is a short chain
    // of dependent instructions with many rows in flight, where one long chain a row would leave the core waiting.
    alignas(64) S gates[R * P][kPanel<S>];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v)
        store(&gates[r * P + v / kPanelVectors][v % kPanelVectors * kLanes<S>], acc[r][v]);
#pragma GCC unroll 1
    for (int k = 0; k < R * P; ++k) activate(gates[k], kLanes<S>);
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 1
      for (int p = 0; p < P; ++p) update_units(gates[r * P + p], first + r, (tile + p) * kLanes<S>);
  }

  // Cell and hidden state of kLanes units of one row, from its activated gates.
  FASTLSTM_INLINE void update_units(const S* gates, i64 row, i64 unit) {
    const Vec<S> i = load(gates), f = load(gates + kLanes<S>), g = load(gates + 2 * kLanes<S>),
                 o = load(gates + 3 * kLanes<S>);
    S* c = &c_[row * hidden_pitch_ + unit];
    const Vec<S> cell = fma(f, load(c), i * g), hidden = o * tanh(cell);
    store(c, cell);
    store(out_ + row * out_pitch_ + unit, hidden);
    const i64 width = smaller(kLanes<S>, s_.H - unit);
    if (stores_y_) store_n(y_row_[row] + unit, hidden, width);
    if (p_.c_all.data) store_n(cell_row_[row] + unit, cell, width);
    if (p_.gates.data) {
      S* saved = gates_row_[row] + 4 * unit;
      store_n(saved, i, width);
      store_n(saved + width, f, width);
      store_n(saved + 2 * width, g, width);
      store_n(saved + 3 * width, o, width);
    }
  }

  void load_state(i64 i) {
    const i64 b = rows_.batch(i);
    S *h = &h_[i * state_pitch_], *c = &c_[i * hidden_pitch_];
    std::memset(h, 0, size_t(state_pitch_) * sizeof(S));
    std::memset(c, 0, size_t(hidden_pitch_) * sizeof(S));
    if (p_.h0.data) convert_in(h, p_.h0.data, p_.dtype, rows_.offset(p_.h0, b), s_.P);
    if (p_.c0.data) convert_in(c, p_.c0.data, p_.dtype, rows_.offset(p_.c0, b), s_.H);
  }
  void store_state(i64 i) {
    const i64 b = rows_.batch(i);
    convert_out(p_.h_n.data, p_.dtype, rows_.offset(p_.h_n, b), &h_[i * state_pitch_], s_.P);
    convert_out(p_.c_n.data, p_.dtype, rows_.offset(p_.c_n, b), &c_[i * hidden_pitch_], s_.H);
  }

  const ForwardParams& p_;
  const Sizes& s_;
  const LaneRows rows_;
  const ForwardPack<S> at_;
  const S* packed_;
  const GateSums<S> sums_;
  const i64 hidden_pitch_, state_pitch_;
  const bool project_ahead_;
  const bool stores_y_;  // h goes to y as it is: neither projected nor rounded
  const i64 steps_;      // of a chunk
  const i64 out_pitch_;
  Buffer<S> h_, h_next_, c_, m_;  // states, padded to whole vectors; m_: hidden before projection
  S* out_ = nullptr;              // where the gates put the hidden state: m_ or h_next_
  Buffer<const S*> x_row_;        // input rows of the chunk, active ones only, step by step
  Buffer<S*> rows_out_;           // where each active row of this step goes:
  S **y_row_, **cell_row_, **gates_row_;
  Buffer<S> x_copy_;     // these rows converted to S, for 16-bit input
  Buffer<S> projected_;  // see project_inputs
  i64 chunk_rows_ = 0, next_row_ = 0, first_row_ = 0;
  i64 entered_ = 0;    // rows whose initial state is loaded
  i64 t_ = 0, n_ = 0;  // this step: time and number of active rows
};

template <class S>
void forward_layer(const ForwardParams& p) {
  const Sizes& s = p.sizes;
  const Plan plan = make_plan<S>(s, p.threads.count);
  if (!plan.split_units) {
    parallel(p.threads, s.D * plan.lanes,
             [&](i64 item) { ForwardLane<S>(p, plan, item / plan.lanes, item % plan.lanes).run(); });
    return;
  }
  // Directions are independent: both are in flight, each step is shared by all threads.
  alignas(ForwardLane<S>) char memory[2][sizeof(ForwardLane<S>)];
  ForwardLane<S>* lanes[2];
  for (i64 d = 0; d < s.D; ++d) lanes[d] = new (memory[d]) ForwardLane<S>(p, plan, d, 0);
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
        share(lanes[0]->tiles(), [](ForwardLane<S>& lane, i64 a, i64 b) { lane.project_inputs(a, b); });
    }
    for (i64 d = 0; d < s.D; ++d) lanes[d]->begin_step(step);
    share(lanes[0]->tiles(), [](ForwardLane<S>& lane, i64 a, i64 b) { lane.gates(a, b); });
    if (s.projected)
      share(lanes[0]->out_panels(), [](ForwardLane<S>& lane, i64 a, i64 b) { lane.project_hidden(a, b); });
    for (i64 d = 0; d < s.D; ++d) lanes[d]->end_step();
  }
  for (i64 d = 0; d < s.D; ++d) {
    lanes[d]->end_sequence();
    lanes[d]->~ForwardLane<S>();
  }
}

}  // namespace
}  // namespace fastlstm
