// A stack of layers with quantised weights, or one step of a cell: what the operator and the direct call share.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "bindings/call.h"
#include "bindings/scratch.h"

namespace fastlstm {

struct QuantizedArguments {
  const Array& x;
  const std::vector<Array>& weights;  // for each layer and direction: see quantized.cpp
  i64 gates;
  bool relu;
  i64 inputs, hidden, projected, layers, directions;
  const Array &h0, &c0, &batch_sizes, &lengths, &reset;

  i64 state() const { return projected ? projected : hidden; }
  i64 cells() const { return gates == 4 ? hidden : 0; }

  void check() const;
  // The sizes of layer k, all but T and B.
  Sizes sizes_of(i64 k) const;
  // Checks what layer k reads, and computes it. h_n and c_n are those of all layers.
  void run(i64 k, const Call& call, const Array& input, const Array& y, const Array& h_n, const Array& c_n) const;
};

// Computes them into what make(call of the first layer) returns: pointers to y, h_n and c_n. They have the shapes of
// the operator's results; of one step y may be h_n.
template <class Make>
void infer_quantized(const QuantizedArguments& a, const Make& make) {
  a.check();
  Scratch before, between;
  const Array *y = nullptr, *h_n = nullptr, *c_n = nullptr;
  for (i64 k = 0; k < a.layers; ++k) {
    const Array& input = k ? before.array : a.x;
    const Call call(input, a.sizes_of(k), a.batch_sizes, a.lengths);
    if (!k) std::tie(y, h_n, c_n) = make(call);
    const bool last = k + 1 == a.layers;
    const i64 width = a.directions * a.state();
    if (!last)
      between = a.x.dim == 2 ? Scratch({call.rows, width}, call.type)
                             : Scratch({call.sizes.T, call.sizes.B, width}, call.type);
    a.run(k, call, input, last ? *y : between.array, *h_n, *c_n);
    before = std::move(between);
  }
}

}  // namespace fastlstm
