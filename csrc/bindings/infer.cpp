// The operators for latency: a plain LSTM or one step of a cell, in inference. Every argument takes time, so they have
// none that a plain call does not need; and a tensor that Python makes and passes in costs several times one made here.
#include "bindings/operators.h"
#include "bindings/passes.h"

namespace fastlstm {

std::tuple<Output, Output, Output> lstm_infer_cpu(Handle x_, const HandleList& weights_, i64 directions,
                                                  OptionalHandle h0_, OptionalHandle c0_, OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), cache(cache_);
  Call call(x, weights, directions, Array(), Array(), 4);
  const Sizes s = call.sizes;
  FASTLSTM_CHECK(x.dim == 3 && s.T > 0, "fastlstm: expected input [T, B, I] with T > 0, got ", x.shape_text());
  Array y = Array::empty({s.T, s.B, s.D * s.P}, x.dtype), h_n = Array::empty({s.D, s.B, s.P}, x.dtype),
        c_n = Array::empty({s.D, s.B, s.H}, x.dtype);
  Forward(std::move(call), x, h0, c0, y, h_n, c_n).run(cache);
  return {y.release(), h_n.release(), c_n.release()};
}

// One step of a cell: its output is its hidden state.
std::tuple<Output, Output> lstm_cell_infer_cpu(Handle x_, const HandleList& weights_, OptionalHandle h0_,
                                               OptionalHandle c0_, OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), cache(cache_);
  FASTLSTM_CHECK(x.dim == 2, "fastlstm: expected input [B, I], got ", x.shape_text());
  Call call(x, weights, 1, Array(), Array(), 4);
  const Sizes s = call.sizes;
  Array h = Array::empty({s.B, s.P}, x.dtype), c = Array::empty({s.B, s.H}, x.dtype);
  Forward(std::move(call), x, h0, c0, h, h, c).run(cache);
  return {h.release(), c.release()};
}

}  // namespace fastlstm
