// The forward pass of a layer with quantised weights, and the table of the kernels of one instruction set. Each source
// of this folder includes this file once; setup.py has the flags.
#pragma once

#include <memory>

#include "cpu/parallel.h"
#include "cpu/quantized/lane.h"

namespace fastlstm {
namespace {

// Takes lanes through all steps together. share(n, work) calls work(lane, begin, end) over [0, n) of each of them.
template <class Lane, class Share>
void run_lanes(Lane* const* lanes, i64 count, i64 steps, bool projected, const Share& share) {
  const auto each = [&](const auto& work) {
    for (i64 k = 0; k < count; ++k) work(*lanes[k]);
  };
  for (i64 step = 0; step < steps; ++step) {
    const bool first = lanes[0]->at_chunk_start(step);
    each([&](Lane& lane) {
      if (first) lane.begin_chunk(step);
      lane.begin_step(step);
    });
    share(lanes[0]->panels(), [&](Lane& lane, i64 begin, i64 end) {
      if (first && lane.inputs_ahead()) lane.inputs(begin, end);
      lane.gates(begin, end);
    });
    if (projected) {
      each([](Lane& lane) { lane.begin_projection(); });
      share(lanes[0]->out_panels(), [](Lane& lane, i64 begin, i64 end) { lane.project(begin, end); });
    }
    each([](Lane& lane) { lane.end_step(); });
  }
  each([](Lane& lane) { lane.end_sequence(); });
}

// Has products take prepared panels of a matrix, which are returned.
template <class W>
Buffer<char> prepare(Threads& threads, Panels& w, i64 panels) {
  const i64 bytes = W::prepared_bytes(w);
  Buffer<char> prepared(panels * bytes);
  parallel(threads, panels, [&](i64 k) { W::prepare(w, k, &prepared[k * bytes]); });
  w.prepared = prepared.get();
  return prepared;
}

template <class W, bool has_cell>
void quantized_layer(const QuantizedParams& p) {
  using Lane = QuantizedLane<W, has_cell>;
  const Sizes& s = p.sizes;
  const QuantizedPlan plan = make_quantized_plan(s, p.int8, p.threads->count(), this_machine());
  Matrices<W> matrices[2] = {{p.weights[0], s}, {p.weights[s.D - 1], s}};
  Buffer<char> prepared[6];
  if constexpr (W::kPrepares)
    for (i64 d = 0; plan.prepares && d < s.D; ++d) {
      prepared[3 * d] = prepare<W>(*p.threads, matrices[d].ih, Lane::panels_of(s));
      prepared[3 * d + 1] = prepare<W>(*p.threads, matrices[d].hh, Lane::panels_of(s));
      prepared[3 * d + 2] = prepare<W>(*p.threads, matrices[d].hr, Lane::out_panels_of(s));
    }
  if (!plan.split_units) {  // a thread takes a lane from its first step to its last
    parallel(*p.threads, s.D * plan.lanes, [&](i64 item) {
      Lane lane(p, plan, matrices[item / plan.lanes], item / plan.lanes, item % plan.lanes), *const only = &lane;
      run_lanes(&only, 1, s.T, s.projected, [&](i64 panels, const auto& work) { work(lane, 0, panels); });
    });
    return;
  }
  std::unique_ptr<Lane> owners[2];
  Lane* lanes[2] = {};
  for (i64 d = 0; d < s.D; ++d) {
    owners[d].reset(new Lane(p, plan, matrices[d], d, 0));
    lanes[d] = owners[d].get();
  }
  const i64 shares = ceil_div(p.threads->count(), s.D);
  run_lanes(lanes, s.D, s.T, s.projected, [&](i64 panels, const auto& work) {
    parallel(*p.threads, s.D * shares, [&](i64 item) {
      const i64 k = item % shares;
      work(*lanes[item / shares], k * panels / shares, (k + 1) * panels / shares);
    });
  });
}

template <class W>
void quantized_forward(const QuantizedParams& p) {
  const FlushDenormals flush;
  p.sizes.G == 4 ? quantized_layer<W, true>(p) : quantized_layer<W, false>(p);
}

template <void int8(const QuantizedParams&)>
void with_weights(const QuantizedParams& p) {
  p.int8 ? int8(p) : quantized_forward<Bfloat16>(p);
}

}  // namespace
}  // namespace fastlstm

#define FASTLSTM_QUANTIZED_TABLE(isa, int8)                                                  \
  namespace fastlstm {                                                                       \
  extern const QuantizedKernels isa##_quantized;                                             \
  const QuantizedKernels isa##_quantized = {#isa, with_weights<int8>, quantized_worthwhile}; \
  }

#define FASTLSTM_QUANTIZED(isa) FASTLSTM_QUANTIZED_TABLE(isa, quantized_forward<Int8>)

// Of bfloat16 weights only; the kernels of 8-bit weights are those of another instruction set.
#define FASTLSTM_QUANTIZED_BFLOAT16(isa, other)                                       \
  namespace fastlstm {                                                                \
  extern const QuantizedKernels other##_quantized;                                    \
  namespace {                                                                         \
  void forward_of_##other(const QuantizedParams& p) { other##_quantized.forward(p); } \
  }                                                                                   \
  }                                                                                   \
  FASTLSTM_QUANTIZED_TABLE(isa, forward_of_##other)
