// Products of bfloat16 tensors by instructions that take pairs of 16-bit numbers, which the kernels of avx512 use
// instead of those of gemm.h where the CPU has them: twice as many multiply-adds as of float32. Terms and their
// roundings are the same for every number of rows, so a row's bits do not depend on its batch. There are two kinds.
//
// float16, of AVX-512 FP16 (isa/avx512fp16.cpp). It has more bits than bfloat16 but a smaller range. So every row of a
// product, and every column, is divided by the power of two of its largest number: what is smaller than 2^-20 of that
// may be lost. A chain has 64 terms, in two halves, that are summed in float16; chains are summed in float32. That errs
// by some 2^-10 of what sums usually are. Of h and of gradients PyTorch's bfloat16 loses as much, but nothing of x: so
// where sums of a row of x with a panel may be so large that such errors show in open gates, they are made in float32.
// Which ones those are depends on the row and the panel alone.
//
// bfloat16, of AVX512_BF16 (isa/avx512bf16.cpp). Weights and x are what they are; h and gradients are rounded, as
// PyTorch rounds them; sums are float32. Nothing is scaled.
#pragma once

#include "lstm.h"

namespace fastlstm {

// Rows of 16-bit numbers: row r is at data + r * pitch, and stands for its numbers times scales[r * step]. A scale
// below zero, of float16, says that not all numbers are finite, and counts as its absolute value.
struct PairMatrix {
  const uint16_t* data = nullptr;
  i64 pitch = 0;
  const float* scales = nullptr;
  i64 step = 0;
};

struct PairKernels {
  const char* name;  // that of the kernels of avx512 with these products
  i64 least_terms;   // I + P from which on rounding rows pays
  bool scaled;       // whether there are scales; else all are 1, and those of columns are not written
  // Rounds x [K] to a row; returns its scale. `to` has room for whole vectors of float32.
  float (*round_row)(const float* x, i64 K, uint16_t* to);
  // Make a panel of K > 1 rows and 64 columns one of pairs, in place: [ceil(K / 2)][64] pairs of rows, then 64 scales.
  // NaN is the scale of a column whose numbers are not all finite. From float32 [K][64], or from pairs of bfloat16.
  void (*pack)(float* panel, i64 K);
  void (*pack_pairs)(float* panel, i64 K);
  // Puts two rows of n bfloat16 numbers, or one and zeros, into pair `pair` of panels of K rows.
  void (*put_pair)(const uint16_t* first, const uint16_t* second, i64 n, i64 pair, i64 K, float* panels);
  // sums[r] = (add ? sums[r] : 0) + product of row r of `a` and a packed panel, for up to kPanelRows rows. Where
  // there are scales, products in float32, from `exact`, are those of rows that have numbers which are not finite, and
  // sums that may be large, of rows whose scale is above `least`. Of the first `width` columns; what becomes of the
  // others does not matter. next: see multiply_panel.
  void (*multiply)(i64 rows, const PairMatrix& a, const float* const* exact, i64 K, const float* panel, i64 width,
                   float (*sums)[64], bool add, const float* next, float least);
  // Rounds the columns of x [rows][n], each with a scale of its own, to pairs of rows: [rows / 2][to_pitch][2]. Columns
  // from n to `width`, whole vectors, are zero. largest: the power of two that the largest number of a column gets.
  void (*round_columns)(i64 rows, const float* x, i64 pitch, i64 n, i64 width, int largest, uint16_t* to, i64 to_pitch,
                        float* scales);
  // sums [K][64] = (add ? sums : 0) + a^T d, of rounded columns a, up to K, and d, 64 columns.
  void (*multiply_columns)(i64 rows, const uint16_t* a, i64 a_pitch, const float* a_scales, i64 K, const uint16_t* d,
                           const float* d_scales, float* sums, bool add);
};

// Null where the CPU gains nothing by any, or FASTLSTM_ISA names other kernels.
const PairKernels* pair_kernels();

// Of float16: weights are below 2^8, activations below 2, sums of 64 products below 2^15.
constexpr int kLargestWeight = 7;

}  // namespace fastlstm
