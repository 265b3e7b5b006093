// Sums of the gates before their activation, shared by the forward pass and by a backward pass that computes the
// gates again: the same terms in the same order, hence the same bits.
#pragma once

#include "pack.h"

namespace fastlstm {
namespace {

template <class S>
struct GateSums {
  const Sizes& s;
  const ForwardPack<S>& at;
  const S* packed;

  // acc[r][p * kPanelVectors + v]: vector v of row r and tile + p = bias + x w_ih^T
  template <int R, int P>
  FASTLSTM_INLINE void start(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&x)[R], i64 tile) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] = load(packed + at.bias + tile * kPanel<S> + v * kLanes<S>);
    accumulate<S, R, P, kPanelVectors>(acc, x, 1, packed + at.w_ih + tile * s.I * kPanel<S>, s.I * kPanel<S>, kPanel<S>,
                                       s.I);
  }
  // acc += h w_hh^T
  template <int R, int P>
  FASTLSTM_INLINE void add_hidden(Vec<S> (&acc)[R][P * kPanelVectors], const S* const (&h)[R], i64 tile) const {
    accumulate<S, R, P, kPanelVectors>(acc, h, 1, packed + at.w_hh + tile * s.P * kPanel<S>, s.P * kPanel<S>, kPanel<S>,
                                       s.P);
  }
};

}  // namespace
}  // namespace fastlstm
