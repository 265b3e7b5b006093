// Gate sums: bias + x w_ih^T + h w_hh^T, before their activation. The forward pass and a backward pass that computes
// the gates again share this file: the terms are added in one order, so both get the same bits.
#pragma once

#include "cpu/pack.h"

namespace fastlstm {
namespace {

template <class S>
struct GateSums {
  const Sizes& s;
  const ForwardPack<S>& at;
  const S* packed;

  // acc = bias + x w_ih^T, where acc[r][p * kPanelVectors + v] is vector v of tile + p, for row r. x: [R] rows of I.
  template <int R, int P>
  FASTLSTM_INLINE void start(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&x)[R], i64 tile) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] = load(packed + at.bias + tile * kPanel<S> + v * kLanes<S>);
    accumulate<S, R, P, kPanelVectors>(acc, x, 1, packed + at.w_ih + tile * s.I * kPanel<S>, s.I * kPanel<S>, kPanel<S>,
                                       s.I);
  }
  // acc += h w_hh^T. h: [R] rows of P.
  template <int R, int P>
  FASTLSTM_INLINE void add_hidden(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&h)[R], i64 tile) const {
    accumulate<S, R, P, kPanelVectors>(acc, h, 1, packed + at.w_hh + tile * s.P * kPanel<S>, s.P * kPanel<S>, kPanel<S>,
                                       s.P);
  }
};

}  // namespace
}  // namespace fastlstm
