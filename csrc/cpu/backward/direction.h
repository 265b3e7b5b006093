// One direction of the backward pass: its chunk, its weight gradients, and everything that goes over all rows of a
// chunk at once. Of each chunk:
//
//   begin_chunk             which rows it has
//   recompute               the gates, where the forward pass has not kept them
//   (the lanes compute the gradients of the gate sums into the chunk, step by step)
//   vector_grads            gradients of what is multiplied unit by unit: peepholes, gains and biases of normalisation
//   normalised_input_grad   gradient of x w_ih^T, with layer normalisation
//   input_grad              dx
//   ..._weight_grad         products that are added to the weight gradients
//   end_chunk
//
// Of the last chunk, the products copy the weight gradients to their tensors; write_vector_grads and zero_weight_grads
// follow. Files: rows.h (buffers, where the numbers of a row are), recompute.h, vector_grads.h, products.h, direct.h,
// layer.h (the loop).
#pragma once

#include "cpu/backward/chunk.h"
#include "cpu/cells/extended_row.h"
#include "cpu/direct_sums.h"
#include "cpu/gate_sums.h"
#include "cpu/plan.h"
#include "cpu/row_sums.h"
#include "cpu/weight_grad.h"

namespace fastlstm {
namespace {

template <class S>
class BackwardDirection {
 public:
  // extended: null if the cell is not extended. capacity: steps of a full chunk.
  BackwardDirection(const BackwardParams& p, const Extended<S>* extended, i64 direction, i64 capacity);

  // Time of step k when this direction walks back.
  i64 time(i64 step) const { return all_.direction == 0 ? s_.T - 1 - step : step; }
  void begin_chunk(i64 first_step, i64 steps);
  bool last_chunk() const { return first_step_ + steps_ == s_.T; }
  i64 chunk_rows() const { return chunk.start[steps_]; }
  void end_chunk();

  void recompute(i64 row_begin, i64 row_end) const;

  void vector_grads(i64 tile_begin, i64 tile_end) const;
  void normalised_input_grad(i64 row_begin, i64 row_end) const;
  void write_vector_grads() const;
  bool has_vectors() const { return bool(vectors_) && vectors() > 0; }
  i64 tiles() const { return ceil_div(s_.H, kLanes<S>); }

  i64 in_panels() const { return at_.in_panels; }
  void input_grad(i64 row_begin, i64 row_end, i64 panel);
  void put_sum_grads() const;
  const WeightGrad<S>& gate_weights() const { return gates_; }
  const WeightGrad<S>& recurrent_weights() const { return recurrent_; }
  const WeightGrad<S>& projection_weights() const { return projection_; }
  i64 input_slices() const { return gates_.slices(chunk_rows()); }
  void round_inputs(i64 slice) const;
  void gate_weight_grad(i64 part, i64 parts) const;
  void recurrent_weight_grad(i64 part, i64 parts) const;
  void projection_weight_grad(i64 part, i64 parts) const;
  // Without packed weights there is one chunk, of few rows.
  bool direct() const { return !packed_; }
  void direct_input_grad(i64 column_begin, i64 column_end) const;
  void collect_inputs();
  void direct_weight_grads(i64 panel_begin, i64 panel_end) const;
  i64 out_panels() const { return ceil_div(larger(s_.gate_units(), s_.projected ? s_.P : 0), kPanel<S>); }
  // Whether there is a row up to the end of this chunk. Else there are no sums of weight gradients.
  bool has_rows() const { return has_rows_; }
  void zero_weight_grads() const;

  Chunk<S> chunk;

 private:
  // Rows of n numbers. They are read by vectors that end behind the numbers, though what is there is never used: zeros
  // keep it free of slow denormals.
  static Buffer<S> padded(i64 rows, i64 n) {
    Buffer<S> buffer(rows * pitch<S>(n));
    for (i64 row = 0; row < rows; ++row)
      for (i64 k = n / kLanes<S> * kLanes<S>; k < pitch<S>(n); k += kLanes<S>)
        store(&buffer[row * pitch<S>(n) + k], Vec<S>{});
    return buffer;
  }

  // Numbers [first, first + n) of a gradient.
  void put_vector(void* out, i64 first, Vec<S> v, i64 n) const {
    if (!narrow_) return store_n(static_cast<S*>(out) + first, v, n);
    for (i64 lane = 0; lane < n; ++lane) {
      const S number = v[lane];
      convert_out(out, p_.dtype, first + lane, &number, 1);
    }
  }

  // rows.h
  const S* gates_at(i64 row, i64 t, i64 b) const {
    return chunk.gates ? chunk.gates_row(row) : element<S>(p_.gates.data, all_.offset(p_.gates, t, b));
  }
  void locate(i64 row, i64& t, i64& slot) const;
  void previous_hidden(S* out, i64 t, i64 slot, i64 b, i64 begin, i64 count) const;
  void product_input(i64 row, i64 k_begin, i64 k_end, S* out) const;
  bool second_at(i64 t) const;

  // products.h
  void put_input_grad(i64 row, i64 begin, i64 count, const S* from) const;
  void hidden_before_projection(i64 row, i64 begin, i64 end, S* out) const;
  template <class RowOf>
  void write_panel(const WeightGrad<S>& grad, i64 panel, i64 begin, i64 end, const S* sums, void* out, i64 count,
                   const RowOf& row_of) const;

  // recompute.h
  // At most kProductRows rows: what goes into their gates.
  struct Sources {
    Buffer<S> x_copy, h_copy;
    const S *x[kProductRows], *h[kProductRows], *c[kProductRows];  // c: null for zero
    PairRows x_pairs, h_pairs;
  };
  void find_sources(Sources& from, i64 row_begin, i64 n) const;
  void recompute_sums(const Sources& from, i64 row_begin, i64 n) const;
  void recompute_direct_sums(const Sources& from, i64 row_begin, i64 n) const;
  void put_sums(const Buffer<S>& to, i64 first, i64 rows, i64 tile, const S (*sums)[kPanel<S>]) const;
  void activate_sums(const Sources& from, i64 row_begin, i64 n) const;
  void activate_normalised_sums(const Sources& from, i64 row_begin, i64 row_end) const;

  // vector_grads.h
  i64 vectors() const { return (s_.peephole ? 3 : 0) + (s_.layer_norm ? 3 * kPanelVectors + 2 : 0); }
  struct Run;
  void find_cells(Run& run) const;
  template <class Add>
  void peephole_grads(const Run& run, i64 tile, const Add& add) const;
  template <class Add>
  void normalisation_grads(const Run& run, i64 tile, const Add& add) const;

  const BackwardParams& p_;
  const Sizes& s_;
  const LaneRows all_;  // all sequences of the direction
  const BackwardPack<S> at_;
  const S* packed_;  // null: the weights are read as they are stored
  const PairKernels* const pairs_;
  const BackwardParams::Gradients& dw_;
  const bool narrow_;                  // whether weight gradients have 16 bits
  const Extended<S>* const extended_;  // null if the cell is not extended
  WeightGrad<S> gates_;                // of [w_ih | w_hh] and b; with layer normalisation of w_ih
  WeightGrad<S> recurrent_;            // of w_hh, with layer normalisation
  WeightGrad<S> projection_;           // of w_hr
  Buffer<LongSum<S>> vectors_;         // [tiles][vectors()] sums of vector_grads
  const i64 capacity_;                 // steps of a full chunk
  i64 first_step_ = 0, steps_ = 0;
  bool has_rows_ = false;
};

}  // namespace
}  // namespace fastlstm
