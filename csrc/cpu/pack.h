// Packed weights: copies of a layer's weights in the order in which the kernels read them.
//
// Gate units are in tile order: for every tile of kLanes hidden units gate i of these units, then f, g and o.
//
//   w_ih [4H, I] of PyTorch      i i i i i i | f f f f f f | g g g g g g | o o o o o o      (H = 6)
//   tile order, kLanes = 4       i i i i f f f f g g g g o o o o | i i f f g g o o
//   a panel of forward           i i f f g g o o with each gate padded to kLanes by zeros
//
// A forward panel holds one tile. Its padding is zero, so units that do not exist stay exactly zero. In backward a row
// of 4H gate gradients is in tile order without padding. An RNN has one gate: a tile is a panel of hidden units, and
// tile order is PyTorch's order.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/pair_rows.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace fastlstm {
namespace {

// Terms of a chain in the products with a projection, and in the gradients of what went into a projected layer. PyTorch
// adds these in shorter chains than other products: of terms that are nearly equal, ours have to be as short.
constexpr i64 kProjectionChain = 16, kShortChain = smaller(kChain, 32);
inline i64 gradient_chain(const Sizes& s) { return s.projected ? kShortChain : kChain; }

// A short call, of up to kShortCall steps, is better off without packed weights: looking for edits of the weights takes
// as long as a step of few rows. Its products are dot products with the stored weights (dots.h), if the I + P numbers
// of each are so many vectors that the sums over lanes at its end are a small part of it. Longer calls have packed
// weights, which are up to a fifth faster for many rows.
constexpr i64 kShortCall = 4;
constexpr i64 kDotVectors = 8;

// Whether the forward pass reads the weights as they are stored. Its products then have other bits, so that this must
// not depend on the batch or on threads.
template <class S>
bool forward_reads_stored(const Sizes& s) {
  return s.T <= kShortCall && (s.I + s.P) / kLanes<S> >= kDotVectors;
}

// What computes products of bfloat16 tensors by pairs (pairs.h); null: they are those of gemm.h. Bits depend on it, so
// it must depend neither on the batch nor on threads. Errors are small beside bfloat16's own. Beside those of float16
// tensors they would not be, so these have products in float32. Layer normalisation has other products.
template <class S>
const PairKernels* pair_kernels_for(const Sizes& s, Dtype dtype) {
  if (kPanel<S> != 64 || dtype != Dtype::bf16 || s.I < 2 || s.P < 2 || s.layer_norm) return nullptr;
  const PairKernels* const kernels = pair_kernels();
  return kernels && s.I + s.P >= kernels->least_terms ? kernels : nullptr;
}
// Of packed weights with x and h.
template <class S>
const PairKernels* pairs_in_forward(const Sizes& s, Dtype dtype) {
  return forward_reads_stored<S>(s) ? nullptr : pair_kernels_for<S>(s, dtype);
}
// Of the gradients of gates. A short call of few rows reads stored weights.
template <class S>
const PairKernels* pairs_in_backward(const Sizes& s, Dtype dtype) {
  return s.T <= kShortCall ? nullptr : pair_kernels_for<S>(s, dtype);
}

// `least` of gradients: what follows from them is linear.
constexpr float kNeverLarge = __builtin_inff();

// sums[r] = (add ? sums[r] : 0) + product of rows with a packed panel, for up to kPanelRows of them: of `pairs`, which
// are the same rows, if there are kernels for them. width, least: see PairKernels::multiply; next: see multiply_panel.
template <class S>
inline void multiply_rounded(const PairKernels* kernels, i64 n, const S* const* rows, const PairMatrix& pairs, i64 K,
                             const S* panel, i64 width, S (*sums)[kPanel<S>], bool add, const S* next, float least) {
  if constexpr (sizeof(S) == sizeof(float) && kPanel<S> == 64)
    if (kernels) return kernels->multiply(n, pairs, rows, K, panel, width, sums, add, next, least);
  multiply_panel<S>(n, rows, K, panel, sums, add, next);
}

// Where each matrix of one direction starts, in elements.
template <class S>
struct ForwardPack {
  i64 tiles, out_panels, bias = 0, w_ih, w_hh, w_hr, of_zero, size;
  explicit ForwardPack(const Sizes& s) {
    tiles = ceil_div(s.H, s.G == 1 ? kPanel<S> : kLanes<S>);
    out_panels = s.projected ? ceil_div(s.P, kPanel<S>) : 0;
    w_ih = bias + tiles * kPanel<S>;                // bias [tiles][kPanel]
    w_hh = w_ih + tiles * s.I * kPanel<S>;          // w_ih [tiles][I][kPanel]
    w_hr = w_hh + tiles * s.P * kPanel<S>;          // w_hh [tiles][P][kPanel]
    of_zero = w_hr + out_panels * s.H * kPanel<S>;  // w_hr [panels of P][H][kPanel]
    size = of_zero + tiles * kPanel<S>;             // w_hh times a state of zeros [tiles][kPanel]
  }
};
template <class S>
struct BackwardPack {
  i64 in_panels, state_panels, hidden_panels, w_ih = 0, w_hh, w_hr, size;
  explicit BackwardPack(const Sizes& s) {
    in_panels = ceil_div(s.I, kPanel<S>);
    state_panels = ceil_div(s.P, kPanel<S>);
    hidden_panels = s.projected ? ceil_div(s.H, kPanel<S>) : 0;
    w_hh = w_ih + in_panels * s.gate_units() * kPanel<S>;     // w_ih [panels of I][4H][kPanel]
    w_hr = w_hh + state_panels * s.gate_units() * kPanel<S>;  // w_hh [panels of P][4H][kPanel]
    size = w_hr + hidden_panels * s.P * kPanel<S>;            // w_hr [panels of H][P][kPanel]
  }
};

// The row of gate unit q (its place in tile order) in PyTorch's [4H, ...] weights.
template <class S>
inline i64 gate_row(const Sizes& s, i64 q) {
  if (s.G == 1) return q;
  const i64 H = s.H, first = q / kPanel<S> * kLanes<S>, width = smaller(kLanes<S>, H - first), k = q % kPanel<S>;
  return k / width * H + first + k % width;
}

// dst[k * pitch + lane] = src[lane * K + k] for `lanes` rows of K, zero up to kLanes: a transpose of vectors.
template <class S>
inline void transpose_lanes(S* dst, i64 dst_pitch, const S* src, i64 K, i64 lanes) {
  i64 k = 0;
  if constexpr (kLanes<S> % 4 == 0)
    if (lanes == kLanes<S>) {
      for (; k + kLine<S> <= K; k += kLine<S>) {
        const auto row = [&](i64 j) FASTLSTM_INLINE_LAMBDA {
          S* const at = dst + (k + j) * dst_pitch;
          __builtin_prefetch(at + kLine<S> * dst_pitch, 0, 2);  // not to write: other threads may have read it
          return at;
        };
        transpose_block<S, kLine<S>, kLanes<S>>(src + k, K, 2 * kLine<S>, row);
      }
      for (; k + 4 <= K; k += 4)
        for (int lane = 0; lane < kLanes<S>; lane += 4)
          transpose_quad(dst + k * dst_pitch + lane, dst_pitch, src + lane * K + k, K);
    }
  for (; k < K; ++k)
    for (i64 lane = 0; lane < kLanes<S>; ++lane) dst[k * dst_pitch + lane] = lane < lanes ? src[lane * K + k] : S(0);
}

// A matrix [rows, K] of gate units on its way into forward panels. Two neighbours of a row of bfloat16 that stay
// a pair are moved as one float, so nothing is widened; an odd K is.
template <class S>
class GateMatrix {
 public:
  GateMatrix(const PairKernels* pairs, const void* data, Dtype dtype, i64 rows, i64 K)
      : pairs_(pairs), in_pairs_(pairs && K % 2 == 0), K_(K), stored_(static_cast<const float*>(data)),
        wide_(in_pairs_ ? nullptr : data, dtype, rows * K) {}

  // Puts rows [row, row + lanes) into a vector of columns of a panel.
  void put(i64 row, i64 lanes, S* column) const {
    if constexpr (sizeof(S) == sizeof(float))
      if (in_pairs_) return transpose_lanes(column, kPanel<S>, stored_ + row * (K_ / 2), K_ / 2, lanes);
    transpose_lanes(column, kPanel<S>, wide_.get() + row * K_, K_, lanes);
  }
  // After all vectors.
  void end_panel(S* panel) const {
    if constexpr (sizeof(S) == sizeof(float))
      if (pairs_) in_pairs_ ? pairs_->pack_pairs(panel, K_) : pairs_->pack(panel, K_);
  }
  // The product of a panel with zeros: zero, but NaN where a weight is not finite.
  void product_of_zero(const S* panel, S* out) const {
    Vec<S> sum[kPanelVectors] = {};
    const i64 first = pairs_ ? ceil_div(K_, 2) : 0, last = pairs_ ? first + 1 : K_;  // scales, or rows
    for (i64 k = first; k < last; ++k)
      for (int v = 0; v < kPanelVectors; ++v)
        sum[v] = add_product(sum[v], load(panel + k * kPanel<S> + v * kLanes<S>), Vec<S>{});
    for (int v = 0; v < kPanelVectors; ++v) store(out + v * kLanes<S>, sum[v]);
  }

 private:
  const PairKernels* const pairs_;
  const bool in_pairs_;
  const i64 K_;
  const float* const stored_;
  const AsCompute<S> wide_;
};

// Calls f(k) for every k of [0, n) on any of the threads, each of which takes long runs.
template <class F>
inline void share_packing(Threads& threads, i64 n, const F& f) {
  const i64 pieces = smaller(n, threads.count() == 1 ? 1 : 4 * threads.count());
  parallel(threads, pieces, [&](i64 piece) {
    for (i64 k = piece * n / pieces; k < (piece + 1) * n / pieces; ++k) f(k);
  });
}

template <class S>
inline void pack_forward_one(const Sizes& s, Dtype dtype, const DirectionWeights& w, S* packed, Threads& threads) {
  const ForwardPack<S> at(s);
  const PairKernels* const pairs = pairs_in_forward<S>(s, dtype);
  const GateMatrix<S> w_ih(pairs, w.w_ih, dtype, s.gate_units(), s.I), w_hh(pairs, w.w_hh, dtype, s.gate_units(), s.P);
  const AsCompute<S> b_ih(w.b_ih, dtype, s.gate_units()), b_hh(w.b_hh, dtype, s.gate_units());
  const AsCompute<S> w_hr(w.w_hr, dtype, s.P * s.H);
  const bool add_bias = s.bias && !s.layer_norm;  // layer normalisation needs the products without the bias
  share_packing(threads, at.tiles, [&](i64 tile) {
    for (i64 v = 0; v < kPanelVectors; ++v) {
      const i64 first = (s.G == 1 ? tile * kPanelVectors + v : tile) * kLanes<S>, column = v * kLanes<S>;
      const i64 lanes = larger(0, smaller(kLanes<S>, s.H - first));
      const i64 row = lanes == 0 ? 0 : s.G == 1 ? first : v * s.H + first;
      w_ih.put(row, lanes, packed + at.w_ih + tile * s.I * kPanel<S> + column);
      w_hh.put(row, lanes, packed + at.w_hh + tile * s.P * kPanel<S> + column);
      S* bias = packed + at.bias + tile * kPanel<S> + column;
      for (i64 lane = 0; lane < kLanes<S>; ++lane)
        bias[lane] = add_bias && lane < lanes ? b_ih.get()[row + lane] + b_hh.get()[row + lane] : S(0);
    }
    w_ih.end_panel(packed + at.w_ih + tile * s.I * kPanel<S>);
    w_hh.end_panel(packed + at.w_hh + tile * s.P * kPanel<S>);
    w_hh.product_of_zero(packed + at.w_hh + tile * s.P * kPanel<S>, packed + at.of_zero + tile * kPanel<S>);
  });
  share_packing(threads, at.out_panels, [&](i64 panel) {
    for (i64 first = panel * kPanel<S>, v = 0; v < kPanelVectors; ++v, first += kLanes<S>) {
      const i64 lanes = larger(0, smaller(kLanes<S>, s.P - first));
      transpose_lanes(packed + at.w_hr + panel * s.H * kPanel<S> + v * kLanes<S>, kPanel<S>,
                      w_hr.get() + (lanes ? first : 0) * s.H, s.H, lanes);
    }
  });
}

// panels[p][k][..] = row source(k) of a [.., n] matrix, columns p * kPanel onwards, zero past n.
template <class S>
inline void pack_row(S* panels, i64 K, i64 k, const S* row, i64 n) {
  for (i64 first = 0; first < n; first += kPanel<S>, panels += K * kPanel<S>) {
    const i64 width = smaller(kPanel<S>, n - first);
    std::memcpy(panels + k * kPanel<S>, row + first, size_t(width) * sizeof(S));
    std::memset(static_cast<void*>(panels + k * kPanel<S> + width), 0, size_t(kPanel<S> - width) * sizeof(S));
  }
}

// Of bfloat16 weights.
template <class S>
inline void pack_backward_pairs(const PairKernels& pairs, const Sizes& s, const BackwardPack<S>& at,
                                const DirectionWeights& w, S* packed, Threads& threads) {
  if constexpr (sizeof(S) == sizeof(float)) {
    const i64 K = s.gate_units();
    const auto row = [&](const void* data, i64 q, i64 n) {
      return q < K ? static_cast<const uint16_t*>(data) + gate_row<S>(s, q) * n : nullptr;
    };
    share_packing(threads, ceil_div(K, 2), [&](i64 pair) {
      const i64 q = 2 * pair;
      pairs.put_pair(row(w.w_ih, q, s.I), row(w.w_ih, q + 1, s.I), s.I, pair, K, packed + at.w_ih);
      pairs.put_pair(row(w.w_hh, q, s.P), row(w.w_hh, q + 1, s.P), s.P, pair, K, packed + at.w_hh);
    });
    share_packing(threads, at.in_panels + at.state_panels,  // w_hh follows w_ih
                  [&](i64 panel) { pairs.pack_pairs(packed + panel * K * kPanel<S>, K); });
  }
}

template <class S>
inline void pack_backward_one(const Sizes& s, Dtype dtype, const DirectionWeights& w, S* packed, Threads& threads) {
  const BackwardPack<S> at(s);
  const AsCompute<S> w_hr(w.w_hr, dtype, s.P * s.H);
  const PairKernels* const pairs = pairs_in_backward<S>(s, dtype);
  if (pairs) {
    pack_backward_pairs(*pairs, s, at, w, packed, threads);
  } else {
    const AsCompute<S> w_ih(w.w_ih, dtype, s.gate_units() * s.I), w_hh(w.w_hh, dtype, s.gate_units() * s.P);
    share_packing(threads, s.gate_units(), [&](i64 q) {
      const i64 row = gate_row<S>(s, q);
      pack_row(packed + at.w_ih, s.gate_units(), q, w_ih.get() + row * s.I, s.I);
      pack_row(packed + at.w_hh, s.gate_units(), q, w_hh.get() + row * s.P, s.P);
    });
  }
  if (s.projected)
    share_packing(threads, s.P, [&](i64 p) { pack_row(packed + at.w_hr, s.P, p, w_hr.get() + p * s.H, s.H); });
}

}  // namespace
}  // namespace fastlstm
