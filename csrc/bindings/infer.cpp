// The operators for latency: a stack of plain LSTM layers, or one step of a cell, in inference. Every argument takes
// time, so they have none that a plain call does not need; and a tensor that Python makes and passes in costs several
// times one made here.
#include "bindings/operators.h"
#include "bindings/passes.h"
#include "bindings/slice.h"

namespace fastlstm {
std::tuple<Output, Output, Output> lstm_infer_cpu(Handle x_, const HandleList& weights_, i64 layers, i64 directions,
                                                  OptionalHandle h0_, OptionalHandle c0_, const HandleList& caches_) {
  std::vector<Array> weights = to_arrays(weights_);
  const std::vector<Array> caches = to_arrays(caches_);
  const Array x(x_), h0(h0_), c0(c0_), none;
  const i64 each = layers > 0 ? i64(weights.size()) / layers : 0;
  FASTLSTM_CHECK(layers > 0 && each * layers == i64(weights.size()) && (caches.empty() || i64(caches.size()) == layers),
                 "fastlstm: expected weights of ", layers, " layers, got ", weights.size());
  FASTLSTM_CHECK(x.dim == 3 && x.sizes[0] > 0, "fastlstm: expected input [T, B, I] with T > 0, got ", x.shape_text());
  Array h_n, c_n, before, y;
  for (i64 k = 0; k < layers; ++k) {
    const Array& input = k ? before : x;
    Call call(input, {weights.data() + k * each, each}, directions, none, none, 4);
    const Sizes s = call.sizes;
    if (!k) {
      const i64 rows = layers * s.D;
      h_n = Array::empty({rows, s.B, s.P}, x.dtype);
      c_n = Array::empty({rows, s.B, s.H}, x.dtype);
      if (h0) h0.check_shape("h0", {rows, s.B, s.P});
      if (c0) c0.check_shape("c0", {rows, s.B, s.H});
    }
    y = Array::empty({s.T, s.B, s.D * s.P}, x.dtype);
    const Slice h0_k(h0, k * s.D, s.D), c0_k(c0, k * s.D, s.D), h_k(h_n, k * s.D, s.D), c_k(c_n, k * s.D, s.D);
    Forward(std::move(call), input, h0_k.array, c0_k.array, y, h_k.array, c_k.array)
        .run(caches.empty() ? none : caches[size_t(k)]);
    before = std::move(y);
  }
  return {before.release(), h_n.release(), c_n.release()};
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
