// Gate sums from the weights as PyTorch stores them: x w_ih^T + h w_hh^T + bias, the counterpart of gate_sums.h, which
// reads packed weights. The forward pass and a backward pass that computes the gates again share this file, so both get
// the same bits.
#pragma once

#include "cpu/dots.h"
#include "cpu/plan.h"

namespace fastlstm {
namespace {

struct Range {
  i64 begin, end;
};

template <class S>
class DirectSums {
 public:
  // The gate sums of one panel, of one row.
  using Panel = S[kPanel<S>];

  DirectSums() = default;
  // far: whether the weights come from memory.
  DirectSums(const Sizes& s, Dtype dtype, const DirectionWeights& w, bool far)
      : s_(&s), w_(&w), dtype_(dtype), far_(far) {
    if (!s.bias || s.layer_norm) return;  // layer normalisation needs the products without the bias
    const i64 tiles = ForwardPack<S>(s).tiles;
    bias_ = Buffer<S>(tiles * kPanel<S>);
    bias_.zero();
    alignas(64) S hidden[kLanes<S>] = {};
    for (i64 tile = 0; tile < tiles; ++tile)
      for (i64 v = 0; v < kPanelVectors; ++v) {
        const i64 n = units(tile, v);
        if (n <= 0) continue;
        S* bias = &bias_[tile * kPanel<S> + v * kLanes<S>];
        if (element_bytes(dtype) == sizeof(S)) {
          const S *ih = static_cast<const S*>(w.b_ih) + row(tile, v),
                  *hh = static_cast<const S*>(w.b_hh) + row(tile, v);
          store_n(bias, load_n(ih, n) + load_n(hh, n), n);
          continue;
        }
        convert_in(bias, w.b_ih, dtype, row(tile, v), n);
        convert_in(hidden, w.b_hh, dtype, row(tile, v), n);
        store_n(bias, load(bias) + load(hidden), n);
      }
  }

  // What `multiply` and the like need for themselves; a thread has one of its own.
  Dots<S> dots() const { return Dots<S>(dtype_, s_->I + s_->P, far_); }

  // sums[tile * N + n] (+)= x w_ih^T or h w_hh^T of a range of tiles, for N rows.
  void inputs(const Dots<S>& dots, Range tiles, const S* const* x, i64 N, Panel* sums, bool add) const {
    products<1>(dots, {{w_->w_ih, dtype_, s_->I, x}}, tiles, N, sums, add);
  }
  void hidden(const Dots<S>& dots, Range tiles, const S* const* h, i64 N, Panel* sums, bool add) const {
    products<1>(dots, {{w_->w_hh, dtype_, s_->P, h}}, tiles, N, sums, add);
  }
  // Both. Where they are joined (plan.h) the lanes of their sum are added once.
  void gates(const Dots<S>& dots, Range tiles, const S* const* x, const S* const* h, i64 N, Panel* sums) const {
    if (joins_products<S>(*s_))
      return products<2>(dots, {{w_->w_ih, dtype_, s_->I, x}, {w_->w_hh, dtype_, s_->P, h}}, tiles, N, sums, false);
    inputs(dots, tiles, x, N, sums, false);
    hidden(dots, tiles, h, N, sums, true);
  }
  void add_bias(Range tiles, i64 N, Panel* sums) const {
    if (!bias_) return;
    for (i64 tile = tiles.begin; tile < tiles.end; ++tile)
      for (i64 n = 0; n < N; ++n, ++sums)
        for (i64 v = 0; v < kPanel<S>; v += kLanes<S>)
          store(*sums + v, load(*sums + v) + load(&bias_[tile * kPanel<S> + v]));
  }

 private:
  // Row of the weights where vector v of a panel begins, and how many of its units exist: none, or a negative number,
  // past the last one.
  i64 row(i64 tile, i64 v) const {
    return s_->G == 1 ? tile * kPanel<S> + v * kLanes<S> : v * s_->H + tile * kLanes<S>;
  }
  i64 units(i64 tile, i64 v) const {
    return smaller(kLanes<S>, s_->H - (s_->G == 1 ? tile * kPanel<S> + v * kLanes<S> : tile * kLanes<S>));
  }

  // Gate after gate: the longer the runs of memory are, the better the core foresees them. Units that do not exist
  // become zero, as in a packed panel.
  template <int count>
  void products(const Dots<S>& dots, const Stored<S> (&of)[count], Range tiles, i64 N, Panel* sums, bool add) const {
    for (i64 v = 0; v < kPanelVectors; ++v)
      for (i64 tile = tiles.begin; tile < tiles.end; ++tile) {
        const i64 n = units(tile, v);
        S* out = sums[(tile - tiles.begin) * N] + v * kLanes<S>;
        if (n > 0) dots.multiply(of, row(tile, v), n, N, out, kPanel<S>, add);
        for (i64 i = 0; i < N && n < kLanes<S>; ++i)
          for (i64 k = larger(0, n); k < kLanes<S>; ++k) out[i * kPanel<S> + k] = 0;
      }
  }

  const Sizes* s_ = nullptr;
  const DirectionWeights* w_ = nullptr;
  Dtype dtype_ = Dtype::f32;
  bool far_ = false;
  Buffer<S> bias_;  // [tiles][kPanel], the sum of both
};

}  // namespace
}  // namespace fastlstm
