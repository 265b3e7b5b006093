// Parameters of one layer with quantised weights, shared by the bindings and the kernels. Nothing here belongs to an
// instruction set.
//
// Weights lie in panels, in the same order on every machine: a state dict can travel, and no copy is kept.
//
//   panel     kColumns rows of the weights. Of an LSTM gates i, f, g, o of 16 units, 16 rows each; of an RNN and of a
//             projection 64 rows that follow each other. Rows past the last one are zero
//   int8      [panel][K / 4][64 rows][4]: four neighbours of a row lie together, as dot product instructions take them
//   bfloat16  [panel][K / 2][64 rows][2]
//
// K is rounded up, with zeros. `rows` has float32 numbers of each row of the weights, [panel][numbers][64]:
//
//   int8      scale and sum of w_ih, scale and sum of w_hh, bias; of a projection scale and sum
//   bfloat16  power of w_ih, power of w_hh, bias; of a projection power
//
// A weight is scale * its integer; the sum is that of a row's integers, which float32 holds exactly; the power is the
// power of two of a row's largest number, at least 2^-100; bias is the sum of both biases.
#pragma once

#include "lstm.h"

namespace fastlstm {

constexpr int kColumns = 64;  // rows of the weights in a panel: columns of a product
constexpr int kBlock = 16;    // of them that belong to one gate of an LSTM

struct QuantizedDirection {
  const void *w_ih, *w_hh;  // panels
  const float* rows;
  const void* w_hr;  // or null, as the next one
  const float* rows_hr;
};

struct QuantizedParams {
  Sizes sizes;
  Dtype dtype;  // of x, y and all states: float32, bfloat16 or float16
  bool int8;    // else bfloat16
  Ragged ragged;
  Rows x, y;
  States h0, c0, h_n, c_n;
  const bool* reset;  // [T, B] or null
  i64 reset_step, reset_batch;
  bool relu;
  const QuantizedDirection* weights;  // one for each direction
  Threads* threads;
};

// The kernels of one instruction set; dispatch.cpp chooses among them.
struct QuantizedKernels {
  const char* name;
  void (*forward)(const QuantizedParams&);
  int (*worthwhile)(const Sizes&, bool int8, int threads);
};

const QuantizedKernels& quantized_kernels();

}  // namespace fastlstm
