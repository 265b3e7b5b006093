// The forward pass of one layer: what its threads do, step by step. lane.h describes the parts of a step.
#pragma once

#include <memory>

#include "cpu/forward/direct.h"
#include "cpu/forward/extended.h"
#include "cpu/forward/gates.h"
#include "cpu/forward/rows.h"
#include "cpu/parallel.h"

namespace fastlstm {
namespace {

template <class S, Cell cell>
inline void ForwardLane<S, cell>::run() {
  for (i64 step = 0; step < s_.T; ++step) {
    if (at_chunk_start(step)) {
      begin_chunk(step);
      if (inputs_ahead_) input_products(0, at_.tiles);
    }
    begin_step(step);
    gates(0, at_.tiles);
    if (kByRow) update_rows(0, n_);
    if (s_.projected) project_hidden(0, at_.out_panels);
    if (s_.projected && kByRow) update_hidden(0, n_);
    end_step();
  }
  end_sequence();
}

// All threads share every step. Directions are independent of each other: both go through time together.
template <class S, Cell cell>
void forward_shared_steps(const ForwardParams& p, const Plan& plan, const ExtendedDirections<S>& extended) {
  using Lane = ForwardLane<S, cell>;
  const Sizes& s = p.sizes;
  std::unique_ptr<Lane> lanes[2];
  for (i64 d = 0; d < s.D; ++d) lanes[d].reset(new Lane(p, plan, extended[d], d, 0));
  const auto share = [&](i64 count, const auto& work) {  // work(lane, begin, end) over [0, count) of each lane
    const i64 pieces = smaller(count, plan.pieces);
    const auto piece = [&](i64 item) {
      const i64 k = item % pieces;
      work(*lanes[item / pieces], k * count / pieces, (k + 1) * count / pieces);
    };
    parallel(*p.threads, s.D * pieces, piece, lanes[0]->reads_backwards());
  };
  for (i64 step = 0; step < s.T; ++step) {
    if (lanes[0]->at_chunk_start(step)) {
      for (i64 d = 0; d < s.D; ++d) lanes[d]->begin_chunk(step);
      if (lanes[0]->inputs_ahead())
        share(lanes[0]->tiles(), [](Lane& lane, i64 a, i64 b) { lane.input_products(a, b); });
    }
    for (i64 d = 0; d < s.D; ++d) lanes[d]->begin_step(step);
    share(lanes[0]->tiles(), [](Lane& lane, i64 a, i64 b) { lane.gates(a, b); });
    if (cell == Cell::extended) share(lanes[0]->rows(), [](Lane& lane, i64 a, i64 b) { lane.update_rows(a, b); });
    if (s.projected) share(lanes[0]->out_panels(), [](Lane& lane, i64 a, i64 b) { lane.project_hidden(a, b); });
    if (s.projected && cell == Cell::extended)
      share(lanes[0]->rows(), [](Lane& lane, i64 a, i64 b) { lane.update_hidden(a, b); });
    for (i64 d = 0; d < s.D; ++d) lanes[d]->end_step();
  }
  for (i64 d = 0; d < s.D; ++d) lanes[d]->end_sequence();
}

template <class S, Cell cell>
void forward_layer(const ForwardParams& p) {
  const Sizes& s = p.sizes;
  const Plan plan = make_plan<S>(s, p.threads->count(), this_machine());
  const ExtendedDirections<S> extended(cell == Cell::extended, s, p.dtype, p.cell, p.weights);
  if (plan.split_units) return forward_shared_steps<S, cell>(p, plan, extended);
  const auto lane = [&](i64 item) {
    const i64 d = item / plan.lanes;
    ForwardLane<S, cell>(p, plan, extended[d], d, item % plan.lanes).run();
  };
  parallel(*p.threads, s.D * plan.lanes, lane, false, part_uncut(s, plan.lanes));
}

}  // namespace
}  // namespace fastlstm
