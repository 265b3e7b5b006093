// Parameters of one LSTM or RNN layer, shared by the bindings and the CPU kernels. It includes no header of torch and
// nothing of an instruction set.
//
// Letters: T time steps, B batch, I input size, H hidden size, P projected size (H without projection), D directions.
// Gate order is i, f, g, o. Strides count elements, not bytes. "Compute type" is float for float32, bfloat16 and
// float16 tensors, double for float64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm {

using i64 = int64_t;

enum class Dtype { f32, f64, bf16, f16 };

struct Sizes {
  i64 T, B, I, H, P, D;
  i64 G;           // gates of a unit: 4, or 1 for an RNN
  bool bias;       // there are b_ih and b_hh
  bool projected;  // there is a w_hr (proj_size)
  bool peephole, layer_norm;

  i64 gate_units() const { return G * H; }
  i64 product_weights() const { return D * gate_units() * (I + P); }  // numbers of w_ih and w_hh
};

// Which rows exist when sequences have different lengths. Sequences are put into slots, the longest first, so that the
// active slots of every step are the first ones. Every pointer is null for dense input: each of the B sequences then
// has T steps.
//
// Three sequences a, b, c of 2, 4 and 1 steps, T = 4. Capital letters are rows that exist, dots are padding:
//
//   padded [T, B, n]              packed [N, n], N = 7 rows
//            a  b  c              row  0  1  2 | 3  4 | 5 | 6
//   t = 0    A  B  C                   B  A  C | B  A | B | B
//   t = 1    A  B  .              t    0         1      2   3
//   t = 2    .  B  .
//   t = 3    .  B  .              row_offset  [0, 3, 5, 6]
//
//   active    [3, 2, 1, 1]        the same for both
//   length    [4, 2, 1]           of slot 0 (b), slot 1 (a), slot 2 (c)
//   order     [1, 0, 2]           padded: slot 0 is sequence 1. Packed rows are sorted already: null
struct Ragged {
  const i64* row_offset;  // [T] first row of a step in packed rows; null for padded input
  const i64* active;      // [T] number of sequences that have this step
  const i64* order;       // [B] batch index of a slot; null where slot and batch index are equal
  const i64* length;      // [B] number of steps of the sequence in a slot
};

// Rows that are found by direction, step and sequence. The last dimension is dense.
struct Rows {
  void* data;     // null: absent
  i64 direction;  // elements between directions; 0 where both directions share the rows
  i64 step;       // elements between steps (unused for packed rows)
  i64 batch;      // elements between the rows of one step
};

// States [D, B, n]. The last dimension is dense.
struct States {
  void* data;  // null: absent
  i64 direction, batch;
};

// The weights of one direction, of the tensors' dtype. Shapes are those of an LSTM; an RNN has H instead of 4H.
struct DirectionWeights {
  const void* w_ih;                           // [4H, I]
  const void* w_hh;                           // [4H, P]
  const void *b_ih, *b_hh;                    // [4H] or null
  const void* w_hr;                           // [P, H] or null
  const void* w_ch;                           // [3H] in the order i, f, o, or null without peepholes
  const void *ln_ih, *ln_hh, *ln_c, *b_ln_c;  // [4H], [4H], [H], [H] or null without layer normalisation
};

// Options of a cell that are not weights: fastlstm/reference.py defines what they do. The cell of nn.LSTM is called
// plain; with peepholes, layer normalisation, recurrent dropout (h_mask) or zoneout a cell is called extended.
struct CellOptions {
  bool relu;                    // an RNN's activation is relu instead of tanh
  States h_mask;                // [D, B, P], compute type: factors of h in the product with w_hh; or absent
  double zoneout_c, zoneout_h;  // probabilities that a unit of c or h keeps its value
  bool random;                  // draw from `seed` which units do (training); otherwise take the expectation
  uint64_t seed;
};

class Threads;  // cpu/pool.h

struct ForwardParams {
  Sizes sizes;
  Dtype dtype;  // of x, y, h0, c0, h_n, c_n
  Ragged ragged;
  Rows x;             // [T, B, I]
  Rows y;             // [T, B, D*P]
  Rows c_all;         // [T, B, D*H], compute type, or absent
  Rows gates;         // [D, T, B, 4H] after activation, compute type, in tile order (cpu/pack.h), or absent
  States h0, c0;      // [D, B, P], [D, B, H] or absent (zeros)
  States h_n, c_n;    // [D, B, P], [D, B, H]
  const bool* reset;  // [T, B] or null
  i64 reset_step, reset_batch;
  const DirectionWeights* weights;  // one for each direction
  i64 other_weights;                // how many numbers w_ih and w_hh of the call's other layers have
  CellOptions cell;
  const void* packed;  // from Kernels::pack_forward; null: the weights are read as they are stored
  Threads* threads;
};

struct BackwardParams {
  Sizes sizes;
  Dtype dtype;  // of x, y, dy, h0, c0, the weights and their gradients; everything else has the compute type
  Ragged ragged;
  Rows x, y, c_all, gates;  // from the forward pass; gates may be absent
  States h0, c0;
  const bool* reset;
  i64 reset_step, reset_batch;
  Rows dy;            // [T, B, D*P] or absent
  Rows dc_all;        // [T, B, D*H] or absent
  States dh_n, dc_n;  // or absent
  const DirectionWeights* weights;
  CellOptions cell;
  const void* packed;          // from Kernels::pack_backward; null: the weights are read as they are stored
  const void* packed_forward;  // as ForwardParams::packed; only without `gates`, which are then computed again
  Rows dx;                     // [T, B, I], or absent when not wanted
  States dh0, dc0;             // [D, B, P], [D, B, H], or absent when not wanted
  struct Gradients {
    // The shapes of DirectionWeights, and b [4H], the gradient of b_ih and of b_hh; null: not wanted.
    void *w_ih, *w_hh, *b, *w_hr, *w_ch, *ln_ih, *ln_hh, *ln_c, *b_ln_c;
  } dw[2];
  Rows dsums;  // [T, B, D*4H] gradients of the gate sums, in the order of the weights, or absent when not wanted
  Threads* threads;
};

// Rows of one step of a cell: what went into its products, and the gradients of its gate sums.
struct StepRows {
  i64 B;
  Rows x, h;   // [B, I], [B, P]
  Rows dsums;  // [B, 4H], compute type
};

// Weight gradients of many steps, each a call of its own: one product over the rows of all of them.
struct WeightGradParams {
  Sizes sizes;  // T and B mean nothing here
  Dtype dtype;  // of x and h
  const StepRows* steps;
  i64 count;                     // of steps
  bool add;                      // to what the gradients hold already
  BackwardParams::Gradients dw;  // w_ih, w_hh and b
  Threads* threads;
};

// The kernels of one instruction set; cpu/isa/dispatch.cpp chooses among them.
struct Kernels {
  const char* name;
  size_t (*forward_bytes)(const Sizes&, bool is_double);
  size_t (*backward_bytes)(const Sizes&, bool is_double);
  uint64_t (*hash)(const void* data, size_t bytes, uint64_t seed);
  void (*pack_forward)(const Sizes&, Dtype, const DirectionWeights*, void* packed, Threads&);
  void (*pack_backward)(const Sizes&, Dtype, const DirectionWeights*, void* packed, Threads&);
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
  void (*weight_grads)(const WeightGradParams&);
  // Whether a pass needs no packed weights (cpu/plan.h).
  bool (*forward_reads_stored)(const Sizes&, bool is_double);
  bool (*backward_reads_stored)(const Sizes&, Dtype);
  // Whether products of the forward pass (1) and of backward (2) are those of pairs, which have panels of their own.
  int (*pair_passes)(const Sizes&, Dtype);
  int (*worthwhile)(const Sizes&, i64 members, int threads);
  void (*describe)(const Sizes&, int threads, const i64* machine, char* text, size_t size);
};

const Kernels& cpu_kernels();

}  // namespace fastlstm
