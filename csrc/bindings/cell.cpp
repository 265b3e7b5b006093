// One step of a cell in training, each pass one operator that makes its outputs; and the weight gradients of many
// steps.
#include "bindings/operators.h"
#include "bindings/passes.h"

namespace fastlstm {
namespace {

// What a step keeps for its backward pass, in one tensor [B, 5H]: the activated gates, then c.
struct Kept {
  Rows gates, c;

  Kept(const Array& t, const Call& call) {
    const i64 H = call.sizes.H;
    t.check_dtype("what a step has kept", call.compute_type);
    t.check_shape("what a step has kept", {call.sizes.B, 5 * H});
    FASTLSTM_CHECK(t.contiguous(), "fastlstm: what a step has kept must be contiguous");
    gates = {t.data, 0, 0, 5 * H};
    c = {static_cast<char*>(t.data) + 4 * H * i64(aoti_torch_dtype_element_size(t.dtype)), 0, 0, 5 * H};
  }
};

Call cell_call(const Array& x, const std::vector<Array>& weights) {
  FASTLSTM_CHECK(x.dim == 2, "fastlstm: expected input [B, I], got ", x.shape_text());
  FASTLSTM_CHECK(weights.size() % 2 == 0, "fastlstm: a cell has no projection");
  return Call(x, weights, 1, Array(), Array(), 4);
}

Array wanted(bool is_wanted, i64 B, i64 n, int32_t dtype) { return is_wanted ? Array::empty({B, n}, dtype) : Array(); }

// The tensor, or an empty one for one that is absent.
Output given(Array&& t, int32_t dtype) { return t ? t.release() : Array::empty({0}, dtype).release(); }

}  // namespace

std::tuple<Output, Output, Output> lstm_cell_fwd_cpu(Handle x_, const HandleList& weights_, Handle h0_, Handle c0_,
                                                     OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), cache(cache_);
  Call call = cell_call(x, weights);
  const Sizes s = call.sizes;
  Array h = Array::empty({s.B, s.P}, x.dtype), c = Array::empty({s.B, s.H}, x.dtype);
  Array kept = Array::empty({s.B, 5 * s.H}, call.compute_type);
  Forward pass(std::move(call), x, h0, c0, h, h, c);
  const Kept rows(kept, pass.call);
  pass.p.gates = rows.gates;
  pass.p.c_all = rows.c;
  pass.run(cache);
  return {h.release(), c.release(), kept.release()};
}

std::tuple<Output, Output, Output, Output> lstm_cell_bwd_cpu(Handle x_, const HandleList& weights_, Handle h0_,
                                                             Handle c0_, Handle kept_, OptionalHandle dh_,
                                                             OptionalHandle dc_, bool wants_dx, bool wants_dh0,
                                                             bool wants_dc0, OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), kept(kept_), dh(dh_), dc(dc_), cache(cache_);
  Call call = cell_call(x, weights);
  const Sizes s = call.sizes;
  const int32_t grad = call.compute_type;
  const Kept rows(kept, call);
  Array dx = wanted(wants_dx, s.B, s.I, grad), dh0 = wanted(wants_dh0, s.B, s.P, grad);
  Array dc0 = wanted(wants_dc0, s.B, s.H, grad), dsums = Array::empty({s.B, s.gate_units()}, grad);
  Backward pass(std::move(call), x, h0, Array(), Array(), Array(), dh, dx, dh0, {});
  pass.set_cells(c0, dc, dc0);
  pass.p.gates = rows.gates;
  pass.p.c_all = rows.c;
  pass.p.dsums = {dsums.data, 0, 0, s.gate_units()};
  PassThreads threads(s, true);
  together(threads, [&] { pass.run(PackedWeights(pass.call, pass.orders(), cache, threads), threads); });
  return {given(std::move(dx), grad), given(std::move(dh0), grad), given(std::move(dc0), grad), dsums.release()};
}

void lstm_cell_weight_grads_cpu(const HandleList& x_, const HandleList& h_, const HandleList& dsums_,
                                const HandleList& dweights_, bool add) {
  const std::vector<Array> x = to_arrays(x_), h = to_arrays(h_), dsums = to_arrays(dsums_),
                           dweights = to_arrays(dweights_);
  FASTLSTM_CHECK(
      !x.empty() && x.size() == h.size() && x.size() == dsums.size() && dweights.size() >= 2 && dweights.size() <= 3,
      "fastlstm: expected x, h and gradients of some steps, and 2 or 3 weight gradients");
  WeightGradParams p{};
  Sizes& s = p.sizes;
  s.G = 4;
  s.D = 1;
  s.I = x[0].dim == 2 ? x[0].last() : 0;
  s.H = s.P = h[0].dim == 2 ? h[0].last() : 0;
  const int32_t type = x[0].dtype, grad = dsums[0].dtype;
  p.dtype = dtype_of(x[0]);
  FASTLSTM_CHECK(grad == compute_type_of(p.dtype), "fastlstm: expected gradients of the compute type");
  std::vector<StepRows> steps;
  steps.reserve(x.size());
  const auto rows_of = [](const Array& t, const char* name, i64 B, i64 n, int32_t dtype) {
    t.check_dtype(name, dtype);
    t.check_shape(name, {B, n});
    FASTLSTM_CHECK(t.last_dense(), "fastlstm: the last dimension of ", name, " must be dense");
    return Rows{t.data, 0, 0, t.strides[0]};
  };
  for (size_t k = 0; k < x.size(); ++k) {
    const i64 B = x[k].dim == 2 ? x[k].sizes[0] : 0;
    steps.push_back({B, rows_of(x[k], "x", B, s.I, type), rows_of(h[k], "h", B, s.P, type),
                     rows_of(dsums[k], "gradients of gate sums", B, s.gate_units(), grad)});
    s.B += B;
  }
  s.T = 1;
  for (const Array& t : dweights) {
    t.check_dtype("a weight gradient", grad);
    FASTLSTM_CHECK(t.contiguous(), "fastlstm: weight gradients must be contiguous");
  }
  dweights[0].check_shape("gradient of weight_ih", {s.gate_units(), s.I});
  dweights[1].check_shape("gradient of weight_hh", {s.gate_units(), s.P});
  p.dw.w_ih = dweights[0].data;
  p.dw.w_hh = dweights[1].data;
  if (dweights.size() > 2) {
    dweights[2].check_shape("gradient of the bias", {s.gate_units()});
    p.dw.b = dweights[2].data;
  }
  p.steps = steps.data();
  p.count = i64(steps.size());
  p.add = add;
  PassThreads threads(s, true);
  p.threads = &threads;
  together(threads, [&] { cpu_kernels().weight_grads(p); });
}

}  // namespace fastlstm
