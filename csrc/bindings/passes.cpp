#include "bindings/passes.h"

#include <torch/csrc/stable/ops.h>

#include "bindings/heap.h"

namespace fastlstm {
namespace {

// kernels: 0 forward, 1 backward, 2 and 3 with quantised weights.
uint64_t kind_of(const Sizes& s, int kernels) {
  i64 steps = 0;  // log2 T
  while (s.T >> steps > 1) ++steps;
  uint64_t mixed = uint64_t(kernels);
  for (i64 number : {steps, s.B, s.I, s.gate_units(), s.P, s.D}) mixed = mixed * 0x100000001b3 + uint64_t(number);
  return mixed;
}

// dweights: none, or for each direction w_ih, w_hh, (b), (w_hr), (w_ch), (ln_ih, ln_hh, ln_c, b_ln_c)
void set_weight_gradients(const Call& call, const std::vector<Array>& dweights, BackwardParams& p) {
  const Sizes& s = call.sizes;
  const i64 each = 2 + s.bias + s.projected + s.peephole + 4 * s.layer_norm;
  FASTLSTM_CHECK(dweights.empty() || i64(dweights.size()) == each * s.D, "fastlstm: expected ", each,
                 " weight gradients for each direction, got ", dweights.size());
  for (i64 d = 0; d < s.D && !dweights.empty(); ++d) {
    const Array* t = dweights.data() + d * each;
    for (i64 k = 0; k < each; ++k) {
      t[k].check_dtype("a weight gradient", call.type);
      FASTLSTM_CHECK(t[k].contiguous(), "fastlstm: weight gradients must be contiguous");
    }
    t[0].check_shape("gradient of weight_ih", {s.gate_units(), s.I});
    t[1].check_shape("gradient of weight_hh", {s.gate_units(), s.P});
    BackwardParams::Gradients& dw = p.dw[d];
    dw.w_ih = t[0].data;
    dw.w_hh = t[1].data;
    t += 2;
    const auto take = [&](void*& data, bool there, const char* name, std::initializer_list<i64> shape) {
      if (!there) return;
      t->check_shape(name, shape);
      data = t++->data;
    };
    take(dw.b, s.bias, "gradient of the bias", {s.gate_units()});
    take(dw.w_hr, s.projected, "gradient of weight_hr", {s.P, s.H});
    take(dw.w_ch, s.peephole, "gradient of weight_ch", {3 * s.H});
    take(dw.ln_ih, s.layer_norm, "gradient of ln_ih", {4 * s.H});
    take(dw.ln_hh, s.layer_norm, "gradient of ln_hh", {4 * s.H});
    take(dw.ln_c, s.layer_norm, "gradient of ln_c", {s.H});
    take(dw.b_ln_c, s.layer_norm, "gradient of bias_ln_c", {s.H});
  }
}

int threads_of_torch() { return int(torch::stable::get_num_threads()); }

}  // namespace

PassThreads::PassThreads(int wanted, const Sizes& sizes, int kernels)
    : Threads(wanted, kind_of(sizes, kernels),
              {[](i64 n, void (*body)(i64, i64, void*), void* context) {
                 TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
               },
               threads_of_torch()}) {}

PassThreads::PassThreads(const Sizes& sizes, bool backward, i64 members)
    : PassThreads(cpu_kernels().worthwhile(sizes, members, threads_of_torch()), sizes, int(backward)) {}

PassThreads::PassThreads(const Sizes& sizes, int (*worthwhile)(const Sizes&, bool int8, int threads), bool int8)
    : PassThreads(worthwhile(sizes, int8, threads_of_torch()), sizes, 2 + int8) {}

// ---- forward ------------------------------------------------------------------------------------------------

Forward::Forward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& c0,
                 const Array& batch_sizes, const Array& lengths, const Array& reset, const Array& y, const Array& h_n,
                 const Array& c_n, const Array& c_all, const Array& gates, bool peephole, bool layer_norm,
                 const Array& h_mask, double zoneout_c, double zoneout_h, const Array& seed)
    : Forward(Call(x, weights, directions, batch_sizes, lengths, 4, peephole, layer_norm), x, h0, c0, y, h_n, c_n) {
  FASTLSTM_CHECK(!layer_norm || !gates, "fastlstm: layer normalisation keeps no gates");
  call.set_reset(reset, p);
  p.c_all = call.rows_of(c_all, "c_all", call.sizes.H, call.compute_type);
  p.gates = call.gates_of(gates);
  p.cell = call.cell_of(h_mask, zoneout_c, zoneout_h, seed);
}

Forward::Forward(Call&& call_, const Array& x, const Array& h0, const Array& c0, const Array& y, const Array& h_n,
                 const Array& c_n)
    : Forward(std::move(call_), x, h0, y, h_n) {
  p.c0 = call.states_of(c0, "c0", call.sizes.H, call.type);
  p.c_n = call.states_of(c_n, "c_n", call.sizes.H, call.type);
}

Forward::Forward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0,
                 const Array& batch_sizes, const Array& lengths, const Array& reset, bool relu, const Array& y,
                 const Array& h_n)
    : Forward(Call(x, weights, directions, batch_sizes, lengths, 1), x, h0, y, h_n) {
  call.set_reset(reset, p);
  p.cell.relu = relu;
}

Forward::Forward(Call&& call_, const Array& x, const Array& h0, const Array& y, const Array& h_n)
    : call(std::move(call_)) {
  const Sizes& s = call.sizes;
  p.sizes = s;
  p.dtype = call.dtype;
  p.ragged = call.ragged;
  p.x = call.shared_rows_of(x, "input", s.I, call.type);
  p.y = call.rows_of(y, "y", s.P, call.type);
  p.h0 = call.states_of(h0, "h0", s.P, call.type);
  p.h_n = call.states_of(h_n, "h_n", s.P, call.type);
  p.weights = call.weights;
}

PackedWeights::Orders Forward::orders() const {
  return {!cpu_kernels().forward_reads_stored(call.sizes, call.dtype == Dtype::f64), false, p.c_all.data != nullptr};
}

void Forward::run(const PackedWeights& packed, Threads& threads) {
  p.packed = packed.forward();
  p.threads = &threads;
  cpu_kernels().forward(p);
}

// ---- backward -----------------------------------------------------------------------------------------------

Backward::Backward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& c0,
                   const Array& batch_sizes, const Array& lengths, const Array& reset, const Array& y,
                   const Array& c_all, const Array& gates, const Array& dy, const Array& dh_n, const Array& dc_n,
                   const Array& dc_all, const Array& dx, const Array& dh0, const Array& dc0,
                   const std::vector<Array>& dweights, bool peephole, bool layer_norm, const Array& h_mask,
                   double zoneout_c, double zoneout_h, const Array& seed)
    : Backward(Call(x, weights, directions, batch_sizes, lengths, 4, peephole, layer_norm), x, h0, reset, y, dy, dh_n,
               dx, dh0, dweights) {
  FASTLSTM_CHECK(!layer_norm || !gates, "fastlstm: layer normalisation keeps no gates");
  const i64 H = call.sizes.H;
  const int32_t grad = call.compute_type;
  p.c_all = call.rows_of(c_all, "c_all", H, grad);
  p.gates = call.gates_of(gates);
  p.dc_all = call.rows_of(dc_all, "dc_all", H, grad);
  set_cells(c0, dc_n, dc0);
  p.cell = call.cell_of(h_mask, zoneout_c, zoneout_h, seed);
}

Backward::Backward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0,
                   const Array& batch_sizes, const Array& lengths, const Array& reset, bool relu, const Array& y,
                   const Array& dy, const Array& dh_n, const Array& dx, const Array& dh0,
                   const std::vector<Array>& dweights)
    : Backward(Call(x, weights, directions, batch_sizes, lengths, 1), x, h0, reset, y, dy, dh_n, dx, dh0, dweights) {
  p.cell.relu = relu;
}

Backward::Backward(Call&& call_, const Array& x, const Array& h0, const Array& reset, const Array& y, const Array& dy,
                   const Array& dh_n, const Array& dx, const Array& dh0, const std::vector<Array>& dweights)
    : call(std::move(call_)) {
  const Sizes& s = call.sizes;
  const int32_t grad = call.compute_type;
  p.sizes = s;
  p.dtype = call.dtype;
  p.ragged = call.ragged;
  p.x = call.shared_rows_of(x, "input", s.I, call.type);
  p.y = call.rows_of(y, "y", s.P, call.type);
  p.h0 = call.states_of(h0, "h0", s.P, call.type);
  call.set_reset(reset, p);
  p.dy = call.rows_of(dy, "dy", s.P, call.type);
  p.dh_n = call.states_of(dh_n, "dh_n", s.P, grad);
  p.dx = call.shared_rows_of(dx, "dx", s.I, grad);
  p.dh0 = call.states_of(dh0, "dh0", s.P, grad);
  p.weights = call.weights;
  set_weight_gradients(call, dweights, p);
}

void Backward::set_cells(const Array& c0, const Array& dc_n, const Array& dc0) {
  p.c0 = call.states_of(c0, "c0", call.sizes.H, call.type);
  p.dc_n = call.states_of(dc_n, "dc_n", call.sizes.H, call.compute_type);
  p.dc0 = call.states_of(dc0, "dc0", call.sizes.H, call.compute_type);
}

// The forward order too where the gates have to be computed again; an RNN has none.
PackedWeights::Orders Backward::orders() const {
  const bool computes_gates = !p.gates.data && call.sizes.G > 1;
  const Kernels& kernels = cpu_kernels();
  return {computes_gates && !kernels.forward_reads_stored(call.sizes, call.dtype == Dtype::f64),
          !kernels.backward_reads_stored(call.sizes, call.dtype), true};
}

void Backward::run(const PackedWeights& packed, Threads& threads) {
  const Sizes& s = call.sizes;
  const i64 rows = call.packed_rows ? call.rows : s.T * s.B;
  const i64 kept = s.D * (s.gate_units() + s.H + s.P) + s.I;  // numbers of a row: gates, c, y, dx
  expect_again(2 * size_t(rows * kept) * sizeof(float));      // and the gradients of the gates, and of y
  p.packed = packed.backward();
  p.packed_forward = packed.forward();
  p.threads = &threads;
  cpu_kernels().backward(p);
}

}  // namespace fastlstm
