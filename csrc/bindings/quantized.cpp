// The operator of quantised weights: a stack of layers in inference, or one step of a cell. Every argument takes time,
// so a direction has no more than three tensors, five with a projection. direct.cpp computes the same without an
// operator.
#include "bindings/quantized.h"

#include "bindings/heap.h"
#include "bindings/operators.h"
#include "bindings/passes.h"
#include "bindings/slice.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {
namespace {

// Reads the weights of a direction: w_ih, w_hh, rows, (w_hr, rows_hr); see quantized.h.
QuantizedDirection read_direction(const Array* w, const Sizes& s, bool int8) {
  const i64 pack = int8 ? 4 : 2, panels = (s.H + (s.G == 4 ? kBlock : kColumns) - 1) / (s.G == 4 ? kBlock : kColumns);
  const auto check = [&](const Array& t, const char* name, i64 count, i64 K) {
    const i64 groups = (K + pack - 1) / pack;
    t.check_dtype(name, int8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_bfloat16());
    t.check_shape(name, {count, groups, kColumns, pack});
    FASTLSTM_CHECK(t.contiguous(), "fastlstm: quantised weights must be contiguous");
    return t.data;
  };
  const auto numbers = [&](const Array& t, const char* name, i64 count, i64 each) {
    t.check_dtype(name, aoti_torch_dtype_float32());
    t.check_shape(name, {count, each, kColumns});
    FASTLSTM_CHECK(t.contiguous(), "fastlstm: ", name, " must be contiguous");
    return static_cast<const float*>(t.data);
  };
  QuantizedDirection of{};
  of.w_ih = check(w[0], "weight_ih", panels, s.I);
  of.w_hh = check(w[1], "weight_hh", panels, s.P);
  of.rows = numbers(w[2], "rows", panels, int8 ? 5 : 3);
  if (s.projected) {
    const i64 outputs = (s.P + kColumns - 1) / kColumns;
    of.w_hr = check(w[3], "weight_hr", outputs, s.H);
    of.rows_hr = numbers(w[4], "rows_hr", outputs, int8 ? 2 : 1);
  }
  return of;
}

// One layer: x -> y, h_n, c_n.
void run_layer(const Call& call, const QuantizedDirection* weights, bool int8, bool relu, const Array& x,
               const Array& h0, const Array& c0, const Array& reset, const Array& y, const Array& h_n,
               const Array& c_n) {
  const Sizes& s = call.sizes;
  QuantizedParams p{};
  p.sizes = s;
  p.dtype = call.dtype;
  p.int8 = int8;
  p.ragged = call.ragged;
  p.x = call.shared_rows_of(x, "input", s.I, call.type);
  p.y = call.rows_of(y, "y", s.P, call.type);
  p.h0 = call.states_of(h0, "h0", s.P, call.type);
  p.h_n = call.states_of(h_n, "h_n", s.P, call.type);
  if (s.G == 4) {
    p.c0 = call.states_of(c0, "c0", s.H, call.type);
    p.c_n = call.states_of(c_n, "c_n", s.H, call.type);
  }
  call.set_reset(reset, p);
  p.relu = relu;
  p.weights = weights;
  const i64 rows = call.packed_rows ? call.rows : s.T * s.B;
  const i64 prepared = int8 || s.T == 1 ? 0 : s.D * s.gate_units() * (s.I + s.P);  // weights, at most
  expect_again(size_t(prepared + rows * (s.I + s.D * s.P)) * sizeof(float));
  PassThreads threads(s, quantized_kernels().worthwhile, int8);
  p.threads = &threads;
  together(threads, [&] { quantized_kernels().forward(p); });
}

}  // namespace

void QuantizedArguments::check() const {
  const i64 each = projected ? 5 : 3;
  FASTLSTM_CHECK((gates == 1 || gates == 4) && (directions == 1 || directions == 2) && layers > 0 && hidden > 0 &&
                     projected >= 0 && each * layers * directions == i64(weights.size()),
                 "fastlstm: expected ", each, " quantised weights for each of ", layers, " layers x ", directions,
                 " directions, got ", weights.size());
  FASTLSTM_CHECK(x.dtype != aoti_torch_dtype_float64(),
                 "fastlstm: quantised weights take float32, bfloat16 or float16 "
                 "input, got torch.float64");
  FASTLSTM_CHECK(x.dim == 2 || x.dim == 3, "fastlstm: expected input [T, B, I], got ", x.shape_text());
  FASTLSTM_CHECK(x.sizes[0] > 0 || x.dim == 2, "fastlstm: expected at least one time step, got input ", x.shape_text());
}

Sizes QuantizedArguments::sizes_of(i64 k) const {
  Sizes s{};
  s.I = k ? directions * state() : inputs;
  s.H = hidden;
  s.P = state();
  s.D = directions;
  s.G = gates;
  s.projected = projected > 0;
  return s;
}

void QuantizedArguments::run(i64 k, const Call& call, const Array& input, const Array& y, const Array& h_n,
                             const Array& c_n) const {
  const Sizes& s = call.sizes;
  const bool int8 = weights[0].dtype == aoti_torch_dtype_int8();
  const i64 each = projected ? 5 : 3;
  QuantizedDirection of[2];
  for (i64 d = 0; d < s.D; ++d) of[d] = read_direction(&weights[size_t((k * s.D + d) * each)], s, int8);
  if (call.one_step) return run_layer(call, of, int8, relu, input, h0, c0, reset, y, h_n, c_n);
  const i64 of_cell = cells();
  for (const auto& [name, state, units] : {std::tie("h0", h0, s.P), std::tie("c0", c0, of_cell)}) {
    if (k || !state) continue;
    state.check_shape(name, {layers * s.D, s.B, units});
    state.check_dtype(name, call.type);
  }
  const Slice h0_k(h0, k * s.D, s.D), c0_k(c0, k * s.D, s.D), h_k(h_n, k * s.D, s.D), c_k(c_n, k * s.D, s.D);
  run_layer(call, of, int8, relu, input, h0_k.array, c0_k.array, reset, y, h_k.array, c_k.array);
}

std::tuple<Output, Output, Output> quantized_infer_cpu(Handle x_, const HandleList& weights_, i64 gates, bool relu,
                                                       i64 inputs, i64 hidden, i64 projected, i64 layers,
                                                       i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                                                       OptionalHandle batch_sizes_, OptionalHandle lengths_,
                                                       OptionalHandle reset_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_);
  const QuantizedArguments a{x,      weights,    gates, relu, inputs,      hidden,  projected,
                             layers, directions, h0,    c0,   batch_sizes, lengths, reset};
  Array y, h_n, c_n;
  infer_quantized(a, [&](const Call& call) {
    const i64 B = call.sizes.B, rows = layers * directions;
    const i64 width = directions * a.state();
    y = call.packed_rows ? Array::empty({call.rows, width}, x.dtype) : Array::empty({call.sizes.T, B, width}, x.dtype);
    h_n = call.one_step ? Array::empty({B, a.state()}, x.dtype) : Array::empty({rows, B, a.state()}, x.dtype);
    c_n = call.one_step ? Array::empty({B, a.cells()}, x.dtype) : Array::empty({rows, B, a.cells()}, x.dtype);
    return std::make_tuple(&y, &h_n, &c_n);
  });
  return {y.release(), h_n.release(), c_n.release()};
}

std::string quantized_isa() { return quantized_kernels().name; }

}  // namespace fastlstm
