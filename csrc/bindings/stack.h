// A stack of plain LSTM layers, or one step of a cell, in inference: what the operators and the direct call share.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "bindings/passes.h"
#include "bindings/scratch.h"
#include "bindings/slice.h"

namespace fastlstm {

struct StackArguments {
  const Array& x;
  const std::vector<Array>& weights;
  i64 layers, directions;
  const Array &h0, &c0;
  const std::vector<Array>& caches;  // of each layer, or none
};

// Computes them into what make(shape of y, of h_n, of c_n) returns, pointers to three tensors. Without caches, and
// unless it may pack weights for this call alone, it does nothing where a layer wants packed ones, and returns false.
template <class Make>
bool infer_stack(const StackArguments& a, bool may_pack, const Make& make) {
  const auto& [x, weights, layers, directions, h0, c0, caches] = a;
  const i64 each = layers > 0 ? i64(weights.size()) / layers : 0;
  FASTLSTM_CHECK(layers > 0 && each * layers == i64(weights.size()) && (caches.empty() || i64(caches.size()) == layers),
                 "fastlstm: expected weights of ", layers, " layers, got ", weights.size());
  FASTLSTM_CHECK(x.dim == 3 && x.sizes[0] > 0, "fastlstm: expected input [T, B, I] with T > 0, got ", x.shape_text());
  const Array none;
  Scratch before, between;
  const Array *y = nullptr, *h_n = nullptr, *c_n = nullptr;
  i64 all_weights = 0;
  for (i64 k = 0; k < layers; ++k) {
    const Array& input = k ? before.array : x;
    Call call(input, {weights.data() + k * each, each}, directions, none, none, 4);
    const Sizes s = call.sizes;
    if (!k) {
      Sizes deeper = s;
      deeper.I = s.D * s.P;
      all_weights = s.product_weights() + (layers - 1) * deeper.product_weights();
      const auto packs = [&](const Sizes& of) {
        return !cpu_kernels().forward_reads_stored(of, call.dtype == Dtype::f64);
      };
      if (!may_pack && caches.empty() && (packs(s) || (layers > 1 && packs(deeper)))) return false;
      const i64 rows = layers * s.D;
      for (const auto& [name, state, units] : {std::tie("h0", h0, s.P), std::tie("c0", c0, s.H)}) {
        if (!state) continue;
        state.check_shape(name, {rows, s.B, units});
        state.check_dtype(name, x.dtype);
      }
      std::tie(y, h_n, c_n) = make({s.T, s.B, s.D * s.P}, {rows, s.B, s.P}, {rows, s.B, s.H});
    }
    const bool last = k + 1 == layers;
    if (!last) between = Scratch({s.T, s.B, s.D * s.P}, x.dtype);
    const Slice h0_k(h0, k * s.D, s.D), c0_k(c0, k * s.D, s.D), h_k(*h_n, k * s.D, s.D), c_k(*c_n, k * s.D, s.D);
    Forward forward(std::move(call), input, h0_k.array, c0_k.array, last ? *y : between.array, h_k.array, c_k.array);
    forward.p.other_weights = all_weights - s.product_weights();
    forward.run(caches.empty() ? none : caches[size_t(k)]);
    before = std::move(between);
  }
  return true;
}

// One step of a cell, into what make(shape of h, of c) returns; its output is its hidden state.
template <class Make>
bool infer_cell(const StackArguments& a, bool may_pack, const Make& make) {
  FASTLSTM_CHECK(a.x.dim == 2, "fastlstm: expected input [B, I], got ", a.x.shape_text());
  Call call(a.x, a.weights, 1, Array(), Array(), 4);
  const Sizes s = call.sizes;
  if (!may_pack && a.caches.empty() && !cpu_kernels().forward_reads_stored(s, call.dtype == Dtype::f64)) return false;
  const Array none;
  const auto [h, c] = make({s.B, s.P}, {s.B, s.H});
  Forward(std::move(call), a.x, a.h0, a.c0, *h, *h, *c).run(a.caches.empty() ? none : a.caches[0]);
  return true;
}

}  // namespace fastlstm
