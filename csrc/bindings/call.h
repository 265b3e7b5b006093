// What an operator reads from its arguments: sizes, weights, lengths and the places of rows, checked. Everything that
// both passes have in common is here.
#pragma once

#include <vector>

#include "bindings/array.h"
#include "lstm.h"

namespace fastlstm {

// The weights of a layer, among those of others.
struct Weights {
  const Array* first;
  i64 count;

  Weights(const Array* first, i64 count) : first(first), count(count) {}
  Weights(const std::vector<Array>& all) : first(all.data()), count(i64(all.size())) {}
  const Array& operator[](i64 k) const { return first[k]; }
};

Dtype dtype_of(const Array& t);
// Torch's number of the dtype of what is computed in between.
int32_t compute_type_of(Dtype dtype);

// Raises std::runtime_error, with what was expected and what was given, wherever an argument does not fit.
struct Call {
  Sizes sizes{};
  Dtype dtype;                 // of the input
  int32_t type, compute_type;  // torch's numbers: the dtype of the input, and that of what is computed in between
  bool packed_rows;            // input [N, I] instead of [T, B, I]; also the input [B, I] of one step
  bool one_step = false;       // input [B, I]: its states are [B, n]
  i64 rows = 0;                // N of packed input
  DirectionWeights weights[2] = {};
  std::vector<i64> row_offset, active, order, length;  // what `ragged` points to
  Ragged ragged{};

  // x: [T, B, I]; packed rows [N, I] with batch_sizes [T]; or [B, I], one step. w: the weights of all directions, as
  // in the operators' schemas. lengths: [B], or absent. gates: of a unit, 4 or 1.
  Call(const Array& x, Weights w, i64 directions, const Array& batch_sizes, const Array& lengths, i64 gates,
       bool peephole = false, bool layer_norm = false);

  // Of a layer whose weights are no plain tensors: `layer` has its sizes, all but T and B.
  Call(const Array& x, const Sizes& layer, const Array& batch_sizes, const Array& lengths);

  // An absent tensor stays absent in all of these. n: size of the last dimension; name: for messages.
  // Rows [T, B, D*n] or packed [N, D*n]: each direction has n columns of its own.
  Rows rows_of(const Array& t, const char* name, i64 n, int32_t expected) const;
  // Rows [T, B, n] or packed [N, n] that both directions share.
  Rows shared_rows_of(const Array& t, const char* name, i64 n, int32_t expected) const;
  // Gates [D, T, B, 4H] or packed [D, N, 4H], contiguous: a direction walks through its own memory.
  Rows gates_of(const Array& t) const;
  // States [D, B, n], or those [B, n] of one step.
  States states_of(const Array& t, const char* name, i64 n, int32_t expected) const;
  // h_mask [D, B, P], seed [1], or absent.
  CellOptions cell_of(const Array& h_mask, double zoneout_c, double zoneout_h, const Array& seed) const;

  // Sets the reset mask [T, B] of ForwardParams or BackwardParams.
  template <class Params>
  void set_reset(const Array& reset, Params& p) const {
    if (!reset) return;
    FASTLSTM_CHECK(!packed_rows, "fastlstm: reset needs padded input");
    reset.check_dtype("reset", aoti_torch_dtype_bool());
    reset.check_shape("reset", {sizes.T, sizes.B});
    p.reset = static_cast<const bool*>(reset.data);
    p.reset_step = reset.strides[0];
    p.reset_batch = reset.strides[1];
  }

 private:
  void check_input(const Array& x) const;
  void read_sizes(const Array& x, Weights w, i64 gates, i64 plain);
  void read_rows(const Array& x, const Array& batch_sizes);
  void read_weights(const Array* w, i64 each, i64 plain, DirectionWeights& of) const;
  void read_batch_sizes(const Array& batch_sizes);
  void read_lengths(const Array& lengths);
};

}  // namespace fastlstm
