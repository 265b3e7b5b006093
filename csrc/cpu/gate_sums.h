// Gate sums: (x w_ih^T + bias) + h w_hh^T, before their activation. The forward pass and a backward pass that computes
// the gates again share this file: the terms are added in one order, so both get the same bits.
//
// Each product starts from zero. Small terms would be rounded one by one at the size of a large bias, or of the other
// product, if they were added to that.
#pragma once

#include "cpu/pack.h"

namespace fastlstm {
namespace {

template <class S>
struct GateSums {
  const Sizes& s;
  const ForwardPack<S>& at;
  const S* packed;
  const PairKernels* pairs;  // null: products are those of gemm.h

  // acc[r][p * kPanelVectors + v] is vector v of tile + p, for row r.
  // acc = x w_ih^T + bias. x: [R] rows of I.
  template <int R, int P>
  FASTLSTM_INLINE void start(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&x)[R], i64 tile) const {
    product<R, P>(acc, x, packed + at.w_ih, s.I, tile);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v)
        acc[r][v] += load(packed + at.bias + tile * kPanel<S> + v * kLanes<S>);
  }
  // acc += h w_hh^T. h: [R] rows of P.
  template <int R, int P>
  FASTLSTM_INLINE void add_hidden(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&h)[R], i64 tile) const {
    alignas(64) S sum[R * P * kPanelVectors][kLanes<S>];  // the registers are taken
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) store(sum[r * P * kPanelVectors + v], acc[r][v]);
    product<R, P>(acc, h, packed + at.w_hh, s.P, tile);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] += load(sum[r * P * kPanelVectors + v]);
  }

  // The same for one tile and up to kPanelRows rows, through memory, sums [rows][kPanel], and of rows in pairs where
  // there are such products; next: the panel that is read after this one. sums = x w_ih^T + bias.
  void start(i64 rows, const S* const* x, const PairMatrix& x_pairs, i64 tile, S (*sums)[kPanel<S>],
             const S* next) const {
    for (i64 r = 0; r < rows; ++r) std::memcpy(sums[r], packed + at.bias + tile * kPanel<S>, sizeof sums[r]);
    multiply_rounded<S>(pairs, rows, x, x_pairs, s.I, input_panel(tile), kPanel<S>, sums, true, next, 0.0f);
  }
  // sums += h w_hh^T. h: [rows] rows of P.
  void add_hidden(i64 rows, const S* const* h, const PairMatrix& h_pairs, i64 tile, S (*sums)[kPanel<S>],
                  const S* next) const {
    multiply_rounded<S>(pairs, rows, h, h_pairs, s.P, hidden_panel(tile), kPanel<S>, sums, true, next, 1.0f);
  }
  // acc, sums += h w_hh^T for states of zeros: the same bits.
  template <int R, int P>
  FASTLSTM_INLINE void add_zero_hidden(Vec<S> (&acc)[R][P * kPanelVectors], i64 tile) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] += load(of_zero(tile) + v * kLanes<S>);
  }
  void add_zero_hidden(i64 rows, i64 tile, S (*sums)[kPanel<S>]) const {
    for (i64 r = 0; r < rows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        store(&sums[r][v * kLanes<S>], load(&sums[r][v * kLanes<S>]) + load(of_zero(tile) + v * kLanes<S>));
  }
  const S* input_panel(i64 tile) const { return packed + at.w_ih + tile * s.I * kPanel<S>; }
  const S* hidden_panel(i64 tile) const { return packed + at.w_hh + tile * s.P * kPanel<S>; }

 private:
  const S* of_zero(i64 tile) const { return packed + at.of_zero + tile * kPanel<S>; }
  template <int R, int P>
  FASTLSTM_INLINE void product(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&a)[R], const S* w, i64 K,
                               i64 tile) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] = Vec<S>{};
    accumulate<S, R, P, kPanelVectors>(acc, a, 1, w + tile * K * kPanel<S>, K * kPanel<S>, kPanel<S>, K);
  }
};

}  // namespace
}  // namespace fastlstm
