// The table of kernels of one instruction set. Each of isa/avx512.cpp, isa/avx2.cpp and isa/portable.cpp includes this
// file once; they are compiled with different flags.
#pragma once

#include <cstdio>
#include <type_traits>

#include "cpu/backward/layer.h"
#include "cpu/backward/step_weights.h"
#include "cpu/cores.h"
#include "cpu/forward/layer.h"
#include "cpu/hash.h"

namespace fastlstm {
namespace {

// Bytes of the packed weights of all directions, in the order of each pass.
size_t forward_bytes(const Sizes& s, bool is_double) {
  return size_t(s.D) * (is_double ? size_t(ForwardPack<double>(s).size) * 8 : size_t(ForwardPack<float>(s).size) * 4);
}
size_t backward_bytes(const Sizes& s, bool is_double) {
  return size_t(s.D) * (is_double ? size_t(BackwardPack<double>(s).size) * 8 : size_t(BackwardPack<float>(s).size) * 4);
}

void pack_forward(const Sizes& s, Dtype dtype, const DirectionWeights* weights, void* packed, Threads& threads) {
  const FlushDenormals flush;
  for (i64 d = 0; d < s.D; ++d)
    if (dtype == Dtype::f64)
      pack_forward_one(s, dtype, weights[d], static_cast<double*>(packed) + d * ForwardPack<double>(s).size, threads);
    else
      pack_forward_one(s, dtype, weights[d], static_cast<float*>(packed) + d * ForwardPack<float>(s).size, threads);
}

void pack_backward(const Sizes& s, Dtype dtype, const DirectionWeights* weights, void* packed, Threads& threads) {
  const FlushDenormals flush;
  for (i64 d = 0; d < s.D; ++d)
    if (dtype == Dtype::f64)
      pack_backward_one(s, dtype, weights[d], static_cast<double*>(packed) + d * BackwardPack<double>(s).size, threads);
    else
      pack_backward_one(s, dtype, weights[d], static_cast<float*>(packed) + d * BackwardPack<float>(s).size, threads);
}

// Calls f(integral_constant<Cell, cell>) with the cell of a call.
template <class F>
void with_cell(const Sizes& s, const CellOptions& cell, const F& f) {
  if (s.G == 1)
    f(std::integral_constant<Cell, Cell::rnn>());
  else if (s.peephole || s.layer_norm || cell.h_mask.data || cell.zoneout_c > 0 || cell.zoneout_h > 0)
    f(std::integral_constant<Cell, Cell::extended>());
  else
    f(std::integral_constant<Cell, Cell::plain>());
}

void forward(const ForwardParams& p) {
  const FlushDenormals flush;
  with_cell(p.sizes, p.cell, [&](auto cell) {
    p.dtype == Dtype::f64 ? forward_layer<double, cell.value>(p) : forward_layer<float, cell.value>(p);
  });
}

void backward(const BackwardParams& p) {
  const FlushDenormals flush;
  with_cell(p.sizes, p.cell, [&](auto cell) {
    p.dtype == Dtype::f64 ? backward_layer<double, cell.value>(p) : backward_layer<float, cell.value>(p);
  });
}

void weight_grads(const WeightGradParams& p) {
  const FlushDenormals flush;
  p.dtype == Dtype::f64 ? step_weight_grads<double>(p) : step_weight_grads<float>(p);
}

bool forward_reads_stored_of(const Sizes& s, bool is_double) {
  return is_double ? forward_reads_stored<double>(s) : forward_reads_stored<float>(s);
}

int pair_passes(const Sizes& s, Dtype dtype) {
  return (pairs_in_forward<float>(s, dtype) ? 1 : 0) + (pairs_in_backward<float>(s, dtype) ? 2 : 0);
}

int worthwhile_here(const Sizes& s, i64 members, int most) { return int(worthwhile(s, members, most, this_machine())); }

// Writes to text [size] how a call is computed, in words. other: bytes of L2 and L3 of a machine, and 1 if some of its
// cores are slower than others; null: this machine, whose free cores bound the threads too.
void describe(const Sizes& s, int most, const i64* other, char* text, size_t size) {
  const Machine machine = other ? Machine{other[0], other[1], other[2] != 0} : this_machine();
  const Plan plan = make_plan<float>(s, other ? most : smaller(most, usable_cores()), machine);
  const long long rows = ceil_div(larger(s.B, 1), plan.lanes), lanes = s.D * plan.lanes;
  const long long threads = plan.threads, pieces = s.D * plan.pieces;
  char who[96], inputs[64];
  if (plan.split_units)
    std::snprintf(who, sizeof who, "each step shared by %lld threads in %lld pieces, all %lld sequences at once",
                  threads, pieces, rows);
  else
    std::snprintf(who, sizeof who, "%lld lane(s) of up to %lld sequences, no barrier between steps", lanes, rows);
  if (plan.input_steps)
    std::snprintf(inputs, sizeof inputs, "input products %lld steps ahead", static_cast<long long>(plan.input_steps));
  else
    std::snprintf(inputs, sizeof inputs, "input product fused into the step");
  const i64 K = s.P + (plan.input_steps ? 0 : s.I), shares = plan.split_units ? ceil_div(threads, s.D) : 1;
  const Cost cost = product_cost<float>(s, rows, K, shares, 1, machine);
  const double bytes = double(s.gate_units() * K) / double(shares) * sizeof(float);
  const char* const levels[] = {"L2", "L3", "memory"};
  std::snprintf(text, size,
                "%s; %s; a step reads %.1f MB of %s weights a thread from %s, in %.1f times its arithmetic; it takes "
                "about %.1f thousand cycles",
                who, inputs, bytes / 1e6, forward_reads_stored<float>(s) ? "stored" : "packed",
                levels[int(level_of(bytes, machine))], cost.reading / cost.arithmetic, plan.cycles / 1e3);
}

}  // namespace
}  // namespace fastlstm

#define FASTLSTM_KERNELS(isa)                             \
  namespace fastlstm {                                    \
  extern const Kernels isa##_kernels;                     \
  const Kernels isa##_kernels = {#isa,                    \
                                 forward_bytes,           \
                                 backward_bytes,          \
                                 hash_bytes,              \
                                 pack_forward,            \
                                 pack_backward,           \
                                 forward,                 \
                                 backward,                \
                                 weight_grads,            \
                                 forward_reads_stored_of, \
                                 backward_reads_stored,   \
                                 pair_passes,             \
                                 worthwhile_here,         \
                                 describe};               \
  }
