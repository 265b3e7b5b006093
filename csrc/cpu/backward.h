// Backward pass of one layer. Time is walked in chunks: within a chunk the gate gradients of every step are
// computed (dgates), then dx and the weight gradients take the whole chunk as one product each while it is still
// in cache. Working memory is a chunk, however long the sequence.
#pragma once

#include <new>

#include "activations.h"
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
  Buffer<i64> start;  // [steps + 1]
  i64 gate_pitch, state_pitch;
  S* gates_row(i64 row) const { return &gates[row * gate_pitch]; }
  S* dgates_row(i64 row) const { return &dgates[row * gate_pitch]; }
  S* dhidden_row(i64 row) const { return &dhidden[row * state_pitch]; }
};

template <class S>
class BackwardLane {
 public:
  BackwardLane(const BackwardParams& p, const Plan& plan, i64 direction, i64 lane, const Chunk<S>& chunk)
      : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), at_(p.sizes),
        packed_(static_cast<const S*>(p.packed) + direction * at_.size), chunk_(chunk), hidden_pitch_(pitch<S>(s_.H)),
        state_pitch_(pitch<S>(s_.P)) {
    dh_ = Buffer<S>(rows_.rows * state_pitch_);
    dc_ = Buffer<S>(rows_.rows * hidden_pitch_);
    if (s_.projected) {
      dm_ = Buffer<S>(rows_.rows * hidden_pitch_);
      dm_.zero();  // as for dgates
    }
    if (p.c0.data && element_bytes(p.dtype) != sizeof(S)) {
      c0_ = Buffer<S>(rows_.rows * s_.H);
      for (i64 i = 0; i < rows_.rows; ++i)
        convert_in(&c0_[i * s_.H], p.c0.data, p.dtype, rows_.offset(p.c0, rows_.batch(i)), s_.H);
    }
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
    const S* dm = (s_.projected ? dm_ : dh_).get();
    const i64 dm_pitch = s_.projected ? hidden_pitch_ : state_pitch_;
    for (i64 i = row_begin; i < smaller(row_end, n_); ++i) {
      const i64 b = rows_.batch(i);
      const S* gates =
          chunk_.gates ? chunk_.gates_row(row(i)) : element<S>(p_.gates.data, rows_.offset(p_.gates, t_, b));
      const S* cell = cell_at(t_, b);
      const S* dc_out = p_.dc_all.data ? element<S>(p_.dc_all.data, rows_.offset(p_.dc_all, t_, b)) : nullptr;
      const S* dy = p_.dy.data && !s_.projected ? element<S>(p_.dy.data, rows_.offset(p_.dy, t_, b)) : nullptr;
      const S* previous = previous_cell(i, b);
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
    for (i64 panel = panel_begin; panel < panel_end; ++panel)
      multiply_panel<S>(n_, {chunk_.dgates_row(row(0)), rows_.stride * chunk_.gate_pitch}, 4 * s_.H,
                        packed_ + at_.w_hh + panel * 4 * s_.H * kPanel<S>, {&dh_[panel * kPanel<S>], state_pitch_},
                        smaller(kPanel<S>, s_.P - panel * kPanel<S>));
  }

  void end_step() {
    if (p_.reset)
      for (i64 i = 0; i < n_; ++i)
        if (resets(t_, rows_.batch(i))) {
          std::memset(&dh_[i * state_pitch_], 0, size_t(state_pitch_) * sizeof(S));
          std::memset(&dc_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(S));
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
  bool resets(i64 t, i64 b) const { return p_.reset && p_.reset[t * p_.reset_step + b * p_.reset_batch]; }
  const S* cell_at(i64 t, i64 b) const { return element<S>(p_.c_all.data, rows_.offset(p_.c_all, t, b)); }
  // c before this step; null stands for zero.
  const S* previous_cell(i64 i, i64 b) const {
    if (resets(t_, b)) return nullptr;
    if (!rows_.starts(i, t_)) return cell_at(rows_.previous(t_), b);
    if (!p_.c0.data) return nullptr;
    return c0_ ? &c0_[i * s_.H] : element<S>(p_.c0.data, rows_.offset(p_.c0, b));
  }
  void load_state(i64 i) {
    const i64 b = rows_.batch(i);
    S *dh = &dh_[i * state_pitch_], *dc = &dc_[i * hidden_pitch_];
    std::memset(dh, 0, size_t(state_pitch_) * sizeof(S));
    std::memset(dc, 0, size_t(hidden_pitch_) * sizeof(S));
    if (p_.dh_n.data) std::memcpy(dh, element<S>(p_.dh_n.data, rows_.offset(p_.dh_n, b)), size_t(s_.P) * sizeof(S));
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
  Buffer<S> dh_, dc_, dm_;  // gradients flowing back in time; dm_: of the hidden state before projection
  Buffer<S> c0_;            // c0 as S, for 16-bit states
  i64 entered_ = 0;
  i64 t_ = 0, n_ = 0, first_ = 0;
};

// One direction of a backward pass: its chunk, its weight gradients, and the products over a chunk.
template <class S>
class BackwardDirection {
 public:
  BackwardDirection(const BackwardParams& p, i64 direction, i64 capacity)
      : p_(p), s_(p.sizes), all_(p.sizes, p.ragged, direction, 0, 1), at_(p.sizes),
        packed_(static_cast<const S*>(p.packed) + direction * at_.size), dw_(p.dw[direction]), capacity_(capacity) {
    chunk.gate_pitch = pitch<S>(4 * s_.H);
    chunk.state_pitch = pitch<S>(s_.P);
    chunk.dgates = Buffer<S>(capacity * s_.B * chunk.gate_pitch);
    chunk.dgates.zero();  // the padding of a row is read (never used): keep it free of slow denormals
    if (s_.projected) chunk.dhidden = Buffer<S>(capacity * s_.B * chunk.state_pitch);
    if (s_.projected) chunk.dhidden.zero();
    if (!p.gates.data) chunk.gates = Buffer<S>(capacity * s_.B * chunk.gate_pitch);
    chunk.start = Buffer<i64>(capacity + 1);
    if (dw_.w_ih || dw_.w_hh || dw_.b) gates_ = WeightGrad<S>(s_.I + s_.P + 1, 4 * s_.H);
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
    const S *x_row[kProjectRows], *h_row[kProjectRows];
    for (i64 i = 0; i < n; ++i) {
      i64 t, slot;
      locate(row_begin + i, t, slot);
      const i64 b = all_.batch(slot), x = all_.offset(p_.x, t, b);
      x_row[i] = narrow ? &x_copy[i * s_.I] : element<const S>(p_.x.data, x);
      if (narrow) convert_in(&x_copy[i * s_.I], p_.x.data, p_.dtype, x, s_.I);
      h_row[i] = &h[i * s_.P];
      previous_hidden(&h[i * s_.P], t, slot, b, 0, s_.P);
    }
    for (i64 tile = 0; tile < at.tiles; ++tile) {
      const i64 unit = tile * kLanes<S>, width = smaller(kLanes<S>, s_.H - unit);
      for_row_tiles(n, [&](i64 first, auto height) {
        constexpr int R = decltype(height)::value;
        Vec<S> acc[R][kPanelVectors];
        const S *x[R], *h[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          x[r] = x_row[first + r];
          h[r] = h_row[first + r];
        }
        sums.template start<R, 1>(acc, x, tile);
        sums.template add_hidden<R, 1>(acc, h, tile);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          // A narrow last tile: each gate overwrites the padding of the one before, the last ends in the row's own.
          S* row = chunk.gates_row(row_begin + first + r) + 4 * unit;
#pragma GCC unroll 8
          for (int v = 0; v < kPanelVectors; ++v) store(row + v * width, acc[r][v]);
        }
      });
    }
    for (i64 i = 0; i < n; ++i)
      for_vectors<S>(s_.H, [&](i64 unit, i64 width)
                               FASTLSTM_INLINE_LAMBDA { activate(chunk.gates_row(row_begin + i) + 4 * unit, width); });
  }

  void end_chunk() { first_rows_ = first_rows_ && chunk_rows() == 0; }
  i64 in_panels() const { return at_.in_panels; }
  const WeightGrad<S>& gate_weights() const { return gates_; }
  const WeightGrad<S>& projection_weights() const { return projection_; }

  // dx of rows [row_begin, row_end) of this chunk, added where the other direction has been already.
  void input_grad(i64 row_begin, i64 row_end, i64 panel) {
    const i64 begin = panel * kPanel<S>, width = smaller(kPanel<S>, s_.I - begin);
    alignas(64) S sum[kTileRows * 8][kPanel<S>];
    constexpr i64 kGroup = kTileRows * 8;
    for (i64 first = row_begin; first < row_end; first += kGroup) {
      const i64 n = smaller(kGroup, row_end - first);
      multiply_panel<S>(n, {chunk.dgates_row(first), chunk.gate_pitch}, 4 * s_.H,
                        packed_ + at_.w_ih + panel * 4 * s_.H * kPanel<S>, {sum[0], kPanel<S>}, width);
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

  // Adds this chunk's [x | h_previous | 1]^T dgates for a block of it.
  void gate_weight_grad(i64 part, i64 parts) {
    gates_.add(part, parts, chunk_rows(), first_rows_, chunk.dgates.get(), chunk.gate_pitch,
               [&](i64 row, i64 k_begin, i64 k_end, S* out) {
                 i64 t, slot;
                 locate(row, t, slot);
                 const i64 b = all_.batch(slot);
                 if (k_begin < s_.I)
                   convert_in(out, p_.x.data, p_.dtype, all_.offset(p_.x, t, b) + k_begin,
                              smaller(k_end, s_.I) - k_begin);
                 const i64 h_begin = larger(k_begin, s_.I) - s_.I, h_end = smaller(k_end, s_.I + s_.P) - s_.I;
                 if (h_begin < h_end)
                   previous_hidden(out + s_.I + h_begin - k_begin, t, slot, b, h_begin, h_end - h_begin);
                 if (k_end == s_.I + s_.P + 1) out[k_end - 1 - k_begin] = 1;  // the bias
               });
  }

  // Adds this chunk's m^T dh for a block of it, m = o * tanh(c) being the hidden state before projection.
  void projection_weight_grad(i64 part, i64 parts) {
    projection_.add(part, parts, chunk_rows(), first_rows_, chunk.dhidden.get(), chunk.state_pitch,
                    [&](i64 row, i64 k_begin, i64 k_end, S* out) {
                      i64 t, slot;
                      locate(row, t, slot);
                      const i64 b = all_.batch(slot);
                      const S* gates =
                          chunk.gates ? chunk.gates_row(row) : element<S>(p_.gates.data, all_.offset(p_.gates, t, b));
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
    const auto write = [&](void* out, i64 k_begin, i64 count) {
      if (out)
        gates_.copy_panel(panel, k_begin, count,
                          [&](i64 q) { return static_cast<S*>(out) + gate_row<S>(s_.H, q) * count; });
    };
    write(dw_.w_ih, 0, s_.I);
    write(dw_.w_hh, s_.I, s_.P);
    write(dw_.b, s_.I + s_.P, 1);
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
    zero(dw_.w_ih, 4 * s_.H * s_.I);
    zero(dw_.w_hh, 4 * s_.H * s_.P);
    zero(dw_.b, 4 * s_.H);
    zero(dw_.w_hr, s_.P * s_.H);
  }

  Chunk<S> chunk;

 private:
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
  void previous_hidden(S* out, i64 t, i64 slot, i64 b, i64 begin, i64 count) const {
    const bool reset = p_.reset && p_.reset[t * p_.reset_step + b * p_.reset_batch];
    const bool start = all_.starts(slot, t);
    if (reset || (start && !p_.h0.data))
      std::memset(static_cast<void*>(out), 0, size_t(count) * sizeof(S));
    else if (start)
      convert_in(out, p_.h0.data, p_.dtype, all_.offset(p_.h0, b) + begin, count);
    else
      convert_in(out, p_.y.data, p_.dtype, all_.offset(p_.y, all_.previous(t), b) + begin, count);
  }

  const BackwardParams& p_;
  const Sizes& s_;
  const LaneRows all_;
  const BackwardPack<S> at_;
  const S* packed_;
  const BackwardParams::Gradients& dw_;
  WeightGrad<S> gates_, projection_;
  const i64 capacity_;  // steps of a full chunk
  i64 first_step_ = 0, steps_ = 0;
  bool first_rows_ = true;  // nothing has been added to the weight gradients yet
};

constexpr i64 kChunkBytes = 1 << 20;  // gate gradients of a chunk: stay in L2/L3 until they are used
constexpr i64 kChunkRows = 512;       // rows that amortise one pass over the weight gradients

template <class S>
void backward_layer(const BackwardParams& p) {
  const Sizes& s = p.sizes;
  const Plan plan = make_plan<S>(s, p.threads.count);
  const i64 batch = larger(s.B, 1), step_bytes = batch * 4 * s.H * i64(sizeof(S));
  const i64 capacity = smaller(larger(s.T, 1), larger(kChunkBytes / step_bytes, ceil_div(kChunkRows, batch)));

  const i64 lane_count = s.D * plan.lanes;
  BackwardDirection<S>* directions[2];
  Buffer<BackwardLane<S>*> lanes(lane_count);
  for (i64 d = 0; d < s.D; ++d) directions[d] = new BackwardDirection<S>(p, d, capacity);
  for (i64 k = 0; k < lane_count; ++k)
    lanes[k] = new BackwardLane<S>(p, plan, k / plan.lanes, k % plan.lanes, directions[k / plan.lanes]->chunk);
  const BackwardLane<S>& any = *lanes[0];

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
    if (!p.gates.data) by_rows([](const BackwardDirection<S>& direction, i64 a, i64 b) { direction.recompute(a, b); });
    if (!plan.split_units) {
      parallel(p.threads, lane_count, [&](i64 k) {
        const BackwardDirection<S>& direction = *directions[k / plan.lanes];
        for (i64 step = 0; step < steps; ++step)
          lanes[k]->run(direction.time(first + step), direction.chunk.start[step]);
      });
    } else {
      for (i64 step = 0; step < steps; ++step) {
        for (i64 d = 0; d < s.D; ++d)
          lanes[d]->begin_step(directions[d]->time(first + step), directions[d]->chunk.start[step]);
        if (s.projected) share(any.hidden_panels(), [](BackwardLane<S>& lane, i64 a, i64 b) { lane.unproject(a, b); });
        share(any.rows(), [](BackwardLane<S>& lane, i64 a, i64 b) { lane.pointwise(a, b); });
        share(any.state_panels(), [](BackwardLane<S>& lane, i64 a, i64 b) { lane.recur(a, b); });
        for (i64 d = 0; d < s.D; ++d) lanes[d]->end_step();
      }
    }

    if (p.dx.data)
      for (i64 d = 0; d < s.D; ++d) {  // one after the other: they may share rows of dx
        const i64 rows = directions[d]->chunk_rows(), groups = ceil_div(rows, kProjectRows);
        parallel(p.threads, groups * directions[d]->in_panels(), [&](i64 item) {
          const i64 group = item % groups;
          directions[d]->input_grad(group * rows / groups, (group + 1) * rows / groups, item / groups);
        });
      }
    if (directions[0]->gate_weights().allocated()) {
      const i64 parts = directions[0]->gate_weights().parts(ceil_div(p.threads.count, s.D));
      parallel(p.threads, s.D * parts,
               [&](i64 item) { directions[item / parts]->gate_weight_grad(item % parts, parts); });
    }
    if (directions[0]->projection_weights().allocated()) {
      const i64 parts = directions[0]->projection_weights().parts(ceil_div(p.threads.count, s.D));
      parallel(p.threads, s.D * parts,
               [&](i64 item) { directions[item / parts]->projection_weight_grad(item % parts, parts); });
    }
    for (i64 d = 0; d < s.D; ++d) directions[d]->end_chunk();
  }

  for (i64 k = 0; k < lane_count; ++k) {
    lanes[k]->end_sequence();
    delete lanes[k];
  }
  const auto write = [&](const WeightGrad<S>& grad, void (BackwardDirection<S>::*panel)(i64) const) {
    if (grad.allocated())
      parallel(p.threads, s.D * grad.panels(),
               [&](i64 item) { (directions[item / grad.panels()]->*panel)(item % grad.panels()); });
  };
  if (directions[0]->has_rows()) {
    write(directions[0]->gate_weights(), &BackwardDirection<S>::write_gate_grads);
    write(directions[0]->projection_weights(), &BackwardDirection<S>::write_projection_grads);
  }
  for (i64 d = 0; d < s.D; ++d) {
    if (!directions[d]->has_rows()) directions[d]->zero_weight_grads();
    delete directions[d];
  }
}

}  // namespace
}  // namespace fastlstm
