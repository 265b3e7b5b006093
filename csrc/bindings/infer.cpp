// The operators for latency: a stack of plain LSTM layers, or one step of a cell, in inference. Every argument takes
// time, so they have none that a plain call does not need; and a tensor that Python makes and passes in costs several
// times one made here. direct.cpp computes the same without an operator.
#include "bindings/operators.h"
#include "bindings/stack.h"

namespace fastlstm {
namespace {

using Shape = std::initializer_list<i64>;

}  // namespace

std::tuple<Output, Output, Output> lstm_infer_cpu(Handle x_, const HandleList& weights_, i64 layers, i64 directions,
                                                  OptionalHandle h0_, OptionalHandle c0_, const HandleList& caches_) {
  const std::vector<Array> weights = to_arrays(weights_), caches = to_arrays(caches_);
  const Array x(x_), h0(h0_), c0(c0_);
  Array y, h_n, c_n;
  infer_stack({x, weights, layers, directions, h0, c0, caches}, true, [&](Shape of_y, Shape of_h, Shape of_c) {
    y = Array::empty(of_y, x.dtype);
    h_n = Array::empty(of_h, x.dtype);
    c_n = Array::empty(of_c, x.dtype);
    return std::make_tuple(&y, &h_n, &c_n);
  });
  return {y.release(), h_n.release(), c_n.release()};
}

std::tuple<Output, Output> lstm_cell_infer_cpu(Handle x_, const HandleList& weights_, OptionalHandle h0_,
                                               OptionalHandle c0_, OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_);
  std::vector<Array> caches;
  if (cache_) caches.emplace_back(cache_);
  Array h, c;
  infer_cell({x, weights, 0, 1, h0, c0, caches}, true, [&](Shape of_h, Shape of_c) {
    h = Array::empty(of_h, x.dtype);
    c = Array::empty(of_c, x.dtype);
    return std::make_pair(&h, &c);
  });
  return {h.release(), c.release()};
}

}  // namespace fastlstm
