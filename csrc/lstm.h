// Parameters of one LSTM or RNN layer, shared by the bindings and the kernels. No torch header, no ISA-specific code.
//
// Letters: T time steps, B batch, I input size, H hidden size, P projected size (H without projection),
// D directions. Gate order is i, f, g, o. Strides count elements, not bytes. "Compute type" is float for
// float32, bfloat16 and float16 tensors, double for float64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm {

using i64 = int64_t;

enum class Dtype { f32, f64, bf16, f16 };

struct Sizes {
  i64 T, B, I, H, P, D;
  i64 G;  // gates of a unit: 4, or the 1 of nn.RNN
  bool bias, projected, peephole, layer_norm;

  i64 gate_units() const { return G * H; }
};

// Which rows exist. Sequences are kept in slots, longest first, so that the active slots of every step are a
// prefix. Every pointer is null for dense input, where each of the B sequences has T steps.
struct Ragged {
  const i64* row_offset;  // [T] first row of a step in packed rows; null for padded input
  const i64* active;      // [T] number of sequences that have this step
  const i64* order;       // [B] batch index of a slot; null when slot = batch index
  const i64* length;      // [B] steps of a slot's sequence
};

// Rows addressed by (direction, step, batch). The last dimension is dense.
struct Rows {
  void* data;     // null: absent
  i64 direction;  // elements between directions; 0 for what they share
  i64 step;       // elements between steps (unused for packed rows)
  i64 batch;      // elements between the rows of one step
};

// [D, B, n] with a dense last dimension.
struct States {
  void* data;  // null: absent
  i64 direction, batch;
};

// The shapes are those of an LSTM; an RNN has [H, ...] instead of [4H, ...].
struct DirectionWeights {
  const void* w_ih;                           // [4H, I]
  const void* w_hh;                           // [4H, P]
  const void *b_ih, *b_hh;                    // [4H] or null
  const void* w_hr;                           // [P, H] or null
  const void* w_ch;                           // [3H], of i, f, o, or null without peepholes
  const void *ln_ih, *ln_hh, *ln_c, *b_ln_c;  // [4H], [4H], [H], [H] or null without layer normalisation
};

// What a step has beyond that of a plain LSTM, besides weights: see fastlstm/reference.py.
struct CellOptions {
  bool relu;      // of an RNN, instead of tanh
  States h_mask;  // [D, B, P], compute type, or absent
  double zoneout_c, zoneout_h;
  bool random;  // which units stay is drawn from `seed`; otherwise zoneout is its expectation
  uint64_t seed;
};

// torch's thread pool. `run` calls body(begin, end, context) over a partition of [0, n).
struct Threads {
  int count;
  void (*run)(i64 n, void (*body)(i64 begin, i64 end, void* context), void* context);
};

struct ForwardParams {
  Sizes sizes;
  Dtype dtype;  // of x, y, h0, c0, h_n, c_n
  Ragged ragged;
  Rows x;             // [T, B, I]
  Rows y;             // [T, B, D*P]
  Rows c_all;         // [T, B, D*H], compute type, or absent
  Rows gates;         // [D, T, B, 4H] after activation, compute type, units in the kernel's order, or absent
  States h0, c0;      // [D, B, P], [D, B, H] or absent (zeros)
  States h_n, c_n;    // [D, B, P], [D, B, H]
  const bool* reset;  // [T, B] or null
  i64 reset_step, reset_batch;
  const DirectionWeights* weights;  // one for each direction
  CellOptions cell;
  const void* packed;  // from pack_forward
  Threads threads;
};

struct BackwardParams {
  Sizes sizes;
  Dtype dtype;  // of x, y, h0, c0; everything else is compute type
  Ragged ragged;
  Rows x, y, c_all, gates;  // as saved by the forward pass; gates or absent
  States h0, c0;
  const bool* reset;
  i64 reset_step, reset_batch;
  Rows dy;            // [T, B, D*P] or absent
  Rows dc_all;        // [T, B, D*H] or absent
  States dh_n, dc_n;  // or absent
  const DirectionWeights* weights;
  CellOptions cell;
  const void* packed;          // from pack_backward
  const void* packed_forward;  // from pack_forward; only without gates, which are then computed again
  Rows dx;                     // or absent when not wanted
  States dh0, dc0;             // or absent when not wanted
  struct Gradients {
    void *w_ih, *w_hh, *b, *w_hr, *w_ch, *ln_ih, *ln_hh, *ln_c, *b_ln_c;  // as the weights, b [4H]; null: not wanted
  } dw[2];
  Threads threads;
};

// One set of kernels per instruction set; see cpu/dispatch.cpp.
struct Kernels {
  const char* name;
  size_t (*forward_bytes)(const Sizes&, bool is_double);
  size_t (*backward_bytes)(const Sizes&, bool is_double);
  uint64_t (*hash)(const void* data, size_t bytes, uint64_t seed);
  void (*pack_forward)(const Sizes&, Dtype, const DirectionWeights*, void* packed);
  void (*pack_backward)(const Sizes&, Dtype, const DirectionWeights*, void* packed);
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
  void (*describe)(const Sizes&, int threads, char* text, size_t size);
};

const Kernels& cpu_kernels();

}  // namespace fastlstm
