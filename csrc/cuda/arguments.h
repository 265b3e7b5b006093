// The arguments of the kernels, and the kernels that there are. No device code.
#pragma once

#include "plan.h"

namespace fastlstm::cuda {

// Of a launch. "Rows" are those of [T, B, ...], or packed ones.
struct Layer {
  Plan plan;
  Shared shared;
  int T, B, H, D;
  int64_t rows;
  int64_t first_group;     // of this launch; groups count batches of sequences, and directions within them
  const void* w_hh[2];     // [4H, H] of each direction
  const int64_t* offsets;  // [T], the first row of each step, or null: t * B
  const int64_t* lengths;  // [B] or null: T
  const uint8_t* reset;    // [T, B] or null
  uint32_t* exchange;      // regime grid: [groups of the launch][2][words of a buffer]
  int* arrived;            // regime grid: [all groups], zero: blocks that have sent their part of a step
  uint32_t* rest;          // rest global: weights [groups of the launch][warps of a group][...]

  // Whether all sequences have all steps, and none restarts.
  bool is_dense() const { return !offsets && !lengths && !reset; }
  FASTLSTM_BOTH int64_t row(int t) const { return offsets ? offsets[t] : int64_t(t) * B; }
  FASTLSTM_BOTH int steps_of(int64_t sequence) const {
    if (sequence >= B) return 0;
    const int64_t length = lengths ? lengths[sequence] : T;
    return length < 0 ? 0 : length > T ? T : int(length);  // no length reads past the end of memory
  }
};

struct Forward : Layer {
  const float* input_product;     // [D, rows, 4H]: x w_ih^T, without biases
  const void *b_ih[2], *b_hh[2];  // [4H] or null
  const void *h0, *c0;            // [D, B, H] or null: zeros
  void* y;                        // [rows, D*H]
  void *h_n, *c_n;                // [D, B, H]
  float* c_all;                   // [rows, D*H] or null
  void* gates;                    // [D, rows, H, 4] after activation, or null
};

struct Backward : Layer {
  const void* gates;               // as forward left them
  const float* c_all;              // [rows, D*H]
  const float* c0;                 // [D, B, H] or null
  const void *dy, *dc_all;         // [rows, D*H] of these strides, or null
  int64_t dy_t, dy_b, dc_t, dc_b;  // elements from a step (of packed rows, from a row) and from a sequence to the next
  const void *dh_n, *dc_n;         // [D, B, H] or null
  void* dgates;                    // [D, rows, 4H]
  void *dh0, *dc0;                 // [D, B, H] or null
};

// A pair of kernels, for plans of this kind, batch and number of tiles in registers (in the regime wide it stands for
// a shape). Some have another pair for dense rows. Each regime has its own, in a source of its own; their names say the
// same.
struct Kernel {
  Kind kind;
  int batch, resident;
  void (*forward)(Forward);
  void (*backward)(Backward);
  void (*dense_forward)(Forward);  // null: the same as for other rows
  void (*dense_backward)(Backward);
};

struct Kernels {
  const Kernel* begin;
  const Kernel* end;
};
Kernels block_kernels();
Kernels cluster_kernels();
Kernels grid_kernels();
Kernels wide_kernels();

}  // namespace fastlstm::cuda
