// A lane of sequences whose weights are quantised (cpu/lane.h says what a lane is). A step has these parts:
//
//   begin_chunk, inputs   once for some steps: their input products and the bias, z = x w_ih^T + b
//   begin_step            states of sequences that begin; resets
//   gates                 z += h w_hh^T for a range of panels, then the new states of their units; of a step that is a
//                         chunk by itself also the input products
//   begin_projection, project   with a projection: h = m w_hr^T for a range of panels
//   end_step              y; h as the next product takes it; states of sequences that end
//
// States and gates are float32. A range (begin, end) is the share of a thread where several share a step.
#pragma once

#include "cpu/lane.h"
#include "cpu/quantized/cell.h"
#include "cpu/quantized/plan.h"
#include "cpu/quantized/products.h"

namespace fastlstm {
namespace {

// The matrices of a direction.
template <class W>
struct Matrices {
  Panels ih, hh, hr;

  Matrices(const QuantizedDirection& w, const Sizes& s)
      : ih{w.w_ih, w.rows, W::kNumbers * kColumns, s.I, nullptr},
        hh{w.w_hh, w.rows + W::kInHidden * kColumns, W::kNumbers * kColumns, s.P, nullptr},
        hr{w.w_hr, w.rows_hr, W::kNumbersOfProjection * kColumns, s.H, nullptr} {}
};

template <class W, bool has_cell>
class QuantizedLane {
  static constexpr i64 kUnits = has_cell ? kBlock : kColumns;  // of a panel
  static constexpr i64 kAtOnce = 8;                            // panels, times rows, whose states follow together

 public:
  QuantizedLane(const QuantizedParams& p, const QuantizedPlan& plan, const Matrices<W>& w, i64 direction, i64 lane);

  static i64 panels_of(const Sizes& s) { return ceil_div(s.H, kUnits); }
  static i64 out_panels_of(const Sizes& s) { return s.projected ? ceil_div(s.P, kColumns) : 0; }
  i64 panels() const { return panels_; }
  i64 out_panels() const { return out_panels_; }
  bool at_chunk_start(i64 step) const { return step % steps_ == 0; }
  bool inputs_ahead() const { return steps_ > 1; }

  void begin_chunk(i64 step);
  void inputs(i64 begin, i64 end);
  void begin_step(i64 step);
  void gates(i64 begin, i64 end);
  void begin_projection();
  void project(i64 begin, i64 end);
  void end_step();
  void end_sequence();

 private:
  i64 time(i64 step) const { return rows_.direction == 0 ? step : s_.T - 1 - step; }
  Columns* z(i64 panel, i64 row) const { return &z_[panel * chunk_rows_ + row]; }
  // The state before the projection, and what a projection or the next step takes.
  float* state(i64 row) const { return &m_[row * hidden_pitch_]; }
  float* output(i64 row) const { return s_.projected ? &h_[row * output_pitch_] : state(row); }

  void update(i64 panel);
  void load_state(i64 i);
  void store_state(i64 i);

  const QuantizedParams& p_;
  const Sizes& s_;
  const LaneRows rows_;
  const bool backwards_;  // see call_order
  const i64 panels_, out_panels_, hidden_pitch_, output_pitch_, steps_;
  const Matrices<W> w_;
  const float* bias_;   // of panel k at k * w_.ih.pitch
  Buffer<char> block_;  // of a step of a small layer, to allocate each by itself would be a noticeable part
  Buffer<float> c_, m_, h_, copy_;
  Buffer<Columns> z_;                                  // [panel][row of the chunk]
  typename W::Rows x_of_, h_of_, m_of_;                // as products take them
  i64 chunk_rows_ = 0, next_row_ = 0, first_row_ = 0;  // of the chunk: rows; first row of the next step, of this step
  i64 entered_ = 0;                                    // rows whose initial state is loaded
  i64 t_ = 0, n_ = 0;                                  // this step: time and number of active rows
};

inline i64 padded(i64 n) { return round_up(n, kColumns) + kBlock; }

template <class W, bool has_cell>
inline QuantizedLane<W, has_cell>::QuantizedLane(const QuantizedParams& p, const QuantizedPlan& plan,
                                                 const Matrices<W>& w, i64 direction, i64 lane)
    : p_(p), s_(p.sizes), rows_(p.sizes, p.ragged, direction, lane, plan.lanes), backwards_(call_order()),
      panels_(panels_of(s_)), out_panels_(out_panels_of(s_)), hidden_pitch_(padded(s_.H)), output_pitch_(padded(s_.P)),
      steps_(plan.input_steps), w_(w), bias_(p.weights[direction].rows + W::kInBias * kColumns) {
  using Floats = Buffer<float>;
  const i64 n = rows_.rows, states = n * hidden_pitch_, cells = has_cell ? states : 0, sums = panels_ * n * steps_;
  const i64 outputs = s_.projected ? n * output_pitch_ : 0, copied = p.dtype == Dtype::f32 ? 0 : s_.I;
  block_ = Buffer<char>(Floats::bytes(cells) + Floats::bytes(states) + Floats::bytes(outputs) + Floats::bytes(copied) +
                        Buffer<Columns>::bytes(sums));
  char* at = block_.get();
  c_ = Floats(at, cells);
  m_ = Floats(at, states);
  h_ = Floats(at, outputs);
  if (copied) copy_ = Floats(at, copied);
  z_ = Buffer<Columns>(at, sums);
  x_of_ = typename W::Rows(n * steps_, s_.I);
  h_of_ = typename W::Rows(n, s_.P);
  if (s_.projected) m_of_ = typename W::Rows(n, s_.H);
}

// Takes the input rows of the next steps_ steps.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::begin_chunk(i64 step) {
  chunk_rows_ = next_row_ = 0;
  for (i64 k = step; k < smaller(step + steps_, s_.T); ++k)
    for (i64 i = 0; i < rows_.active(time(k)); ++i) {
      const i64 offset = rows_.offset(p_.x, time(k), rows_.batch(i));
      if (copy_) convert_in(copy_.get(), p_.x.data, p_.dtype, offset, s_.I);
      x_of_.put(chunk_rows_++, copy_ ? copy_.get() : element<const float>(p_.x.data, offset));
    }
}

// Input products of all rows of the chunk.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::inputs(i64 begin, i64 end) {
  for (i64 panel = begin; panel < end; ++panel) {
    for (i64 row = 0; row < chunk_rows_; ++row)
      std::memcpy(z(panel, row), bias_ + panel * w_.ih.pitch, sizeof(Columns));
    W::multiply(w_.ih, panel, x_of_, 0, chunk_rows_, z(panel, 0));
  }
}

template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::begin_step(i64 step) {
  t_ = time(step);
  n_ = rows_.active(t_);
  first_row_ = next_row_;
  next_row_ += n_;
  for (; entered_ < n_; ++entered_) load_state(entered_);
  for (i64 i = 0; p_.reset && i < n_; ++i)
    if (p_.reset[t_ * p_.reset_step + rows_.batch(i) * p_.reset_batch]) {
      std::memset(output(i), 0, size_t(s_.P) * sizeof(float));
      if (has_cell) std::memset(&c_[i * hidden_pitch_], 0, size_t(hidden_pitch_) * sizeof(float));
      h_of_.put(i, output(i));
    }
}

// One step reads the panels forwards, the next one backwards: what was read last is still in cache. Of few rows the
// states of several panels follow together, because a single one would be a long chain of instructions.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::gates(i64 begin, i64 end) {
  if (n_ == 0) return;
  const bool backwards = backwards_ != (t_ % 2 != 0);
  const i64 at_once = ceil_div(kAtOnce, n_), blocks = ceil_div(end - begin, at_once);
  for (i64 k = 0; k < blocks; ++k) {
    const i64 first = begin + (backwards ? blocks - 1 - k : k) * at_once, last = smaller(first + at_once, end);
    for (i64 panel = first; panel < last; ++panel) {
      if (!inputs_ahead()) inputs(panel, panel + 1);
      W::multiply(w_.hh, panel, h_of_, 0, n_, z(panel, first_row_));
    }
    for (i64 panel = first; panel < last; ++panel) update(panel);
  }
}

// The new states of the units of a panel.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::update(i64 panel) {
#pragma GCC unroll 1
  for (i64 i = 0; i < n_; ++i) {
    const float* sums = *z(panel, first_row_ + i);
    float *c = has_cell ? &c_[i * hidden_pitch_ + panel * kUnits] : nullptr, *h = state(i) + panel * kUnits;
#pragma GCC unroll 1
    for (i64 k = 0; k < kUnits; k += kLanes<float>) {
      const auto gate = [&](i64 g) FASTLSTM_INLINE_LAMBDA { return load(sums + g * kBlock + k); };
      if constexpr (has_cell) {
        Vec<float> state = load(c + k);
        store(h + k, next_state<typename W::Arithmetic>(gate(0), gate(1), gate(2), gate(3), state));
        store(c + k, state);
      } else {
        store(h + k, next_state<typename W::Arithmetic>(gate(0), p_.relu));
      }
    }
  }
}

template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::begin_projection() {
  for (i64 i = 0; i < n_; ++i) m_of_.put(i, state(i));
}

template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::project(i64 begin, i64 end) {
  alignas(64) Columns sums[kBlock];
  for (i64 panel = begin; panel < end; ++panel)
    for (i64 first = 0; first < n_; first += kBlock) {
      const i64 n = smaller(kBlock, n_ - first);
      std::memset(sums, 0, sizeof sums);
      W::multiply(w_.hr, panel, m_of_, first, n, sums);
      for (i64 i = 0; i < n; ++i) std::memcpy(output(first + i) + panel * kColumns, sums[i], sizeof sums[i]);
    }
}

template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::end_step() {
  for (i64 i = 0; i < n_; ++i) {
    convert_out(p_.y.data, p_.dtype, rows_.offset(p_.y, t_, rows_.batch(i)), output(i), s_.P);
    if (s_.T > 1) h_of_.put(i, output(i));
  }
  for (i64 i = n_; i-- > 0 && rows_.ends(i, t_);) store_state(i);  // ending rows are the last ones, or all
}

// Sequences without any step keep their initial state; padding reads as zero.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::end_sequence() {
  for (; entered_ < rows_.rows; ++entered_) {
    load_state(entered_);
    store_state(entered_);
  }
  if (!p_.ragged.active || p_.ragged.row_offset) return;
  const size_t bytes = element_bytes(p_.dtype);
  for (i64 i = 0; i < rows_.rows; ++i)
    for (i64 t = rows_.length(i); t < s_.T; ++t)
      std::memset(static_cast<char*>(p_.y.data) + size_t(rows_.offset(p_.y, t, rows_.batch(i))) * bytes, 0,
                  size_t(s_.P) * bytes);
}

// The initial state of row i.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::load_state(i64 i) {
  const i64 b = rows_.batch(i);
  std::memset(output(i), 0, size_t(s_.P) * sizeof(float));
  if (p_.h0.data) convert_in(output(i), p_.h0.data, p_.dtype, rows_.offset(p_.h0, b), s_.P);
  h_of_.put(i, output(i));
  if (!has_cell) return;
  float* c = &c_[i * hidden_pitch_];
  std::memset(c, 0, size_t(hidden_pitch_) * sizeof(float));
  if (p_.c0.data) convert_in(c, p_.c0.data, p_.dtype, rows_.offset(p_.c0, b), s_.H);
}

// The final state of row i.
template <class W, bool has_cell>
inline void QuantizedLane<W, has_cell>::store_state(i64 i) {
  const i64 b = rows_.batch(i);
  convert_out(p_.h_n.data, p_.dtype, rows_.offset(p_.h_n, b), output(i), s_.P);
  if (has_cell) convert_out(p_.c_n.data, p_.dtype, rows_.offset(p_.c_n, b), &c_[i * hidden_pitch_], s_.H);
}

}  // namespace
}  // namespace fastlstm
