// The backward pass of one layer: what its threads do, chunk by chunk. See lane.h for the parts of a step, direction.h
// for those of a chunk.
#pragma once

#include <memory>

#include "cpu/backward/direct.h"
#include "cpu/backward/extended.h"
#include "cpu/backward/lane.h"
#include "cpu/backward/products.h"
#include "cpu/backward/recompute.h"
#include "cpu/backward/rows.h"
#include "cpu/backward/steps.h"
#include "cpu/backward/vector_grads.h"
#include "cpu/parallel.h"

namespace fastlstm {
namespace {

constexpr i64 kChunkBytes = 1 << 20;  // gate gradients of a chunk: they stay in L2 or L3 until they are used
constexpr i64 kChunkRows = 512;       // rows that are worth one pass over the weight gradients
// With layer normalisation a row has several times as many numbers. Its chunks have a share of the rows, so that their
// memory is used again instead of being paged in anew.
constexpr i64 kNormalisedShare = 8;
constexpr i64 kLeastRows = 16;  // of a thread's part of a chunk: fewer are not worth a reading of the weights

// Steps of a full chunk.
template <class S>
i64 chunk_capacity(const Sizes& s) {
  const i64 batch = larger(s.B, 1), step_bytes = batch * s.gate_units() * i64(sizeof(S));
  const i64 share_of = s.layer_norm ? kNormalisedShare : 1;
  return smaller(larger(s.T, 1), larger(kChunkBytes / share_of / step_bytes, ceil_div(kChunkRows / share_of, batch)));
}

template <class S, Cell kCell>
class BackwardLayer {
  using Lane = BackwardLane<S, kCell>;
  using Direction = BackwardDirection<S>;

 public:
  explicit BackwardLayer(const BackwardParams& p)
      : p_(p), s_(p.sizes), plan_(make_plan<S>(s_, p.threads->count(), this_machine())),
        capacity_(chunk_capacity<S>(s_)), shares_(ceil_div(p.threads->count(), s_.D)), lane_count_(s_.D * plan_.lanes),
        extended_(kCell == Cell::extended, s_, p.dtype, p.cell, p.weights),
        lanes_(new std::unique_ptr<Lane>[size_t(lane_count_)]) {
    for (i64 d = 0; d < s_.D; ++d) directions_[d].reset(new Direction(p, extended_[d], d, capacity_));
    for (i64 k = 0; k < lane_count_; ++k) {
      const i64 d = k / plan_.lanes;
      lanes_[k].reset(new Lane(p, plan_, extended_[d], d, k % plan_.lanes, directions_[d]->chunk));
    }
  }

  void run() {
    for (i64 first = 0; first < s_.T; first += capacity_) {
      const i64 steps = smaller(capacity_, s_.T - first);
      for (i64 d = 0; d < s_.D; ++d) directions_[d]->begin_chunk(first, steps);
      if (kCell != Cell::rnn && !p_.gates.data)
        by_rows([](const Direction& direction, i64 a, i64 b) { direction.recompute(a, b); });
      plan_.split_units ? shared_steps(first, steps) : lane_steps(first, steps);
      extended_grads();
      for (i64 d = 0; d < s_.D && p_.dsums.data; ++d) directions_[d]->put_sum_grads();
      input_grads();
      weight_grads();
      for (i64 d = 0; d < s_.D; ++d) directions_[d]->end_chunk();
    }
    for (i64 k = 0; k < lane_count_; ++k) lanes_[k]->end_sequence();
    write_other_grads();
  }

 private:
  // work(direction, begin, end) over the rows of a chunk of each direction, at most kProductRows at once, in as many
  // parts as there are threads if there are rows enough.
  template <class Work>
  void by_rows(const Work& work) const {
    for (i64 d = 0; d < s_.D; ++d) {
      const i64 rows = directions_[d]->chunk_rows(), shares = smaller(p_.threads->count(), rows / kLeastRows);
      const i64 groups = larger(ceil_div(rows, kProductRows), shares);
      parallel(*p_.threads, groups,
               [&](i64 group) { work(*directions_[d], group * rows / groups, (group + 1) * rows / groups); });
    }
  }
  // work(lane, begin, end) over [0, count) of the lane of each direction.
  template <class Work>
  void share(i64 count, bool backwards, const Work& work) const {
    const i64 pieces = smaller(count, plan_.pieces);
    const auto piece = [&](i64 item) {
      const i64 k = item % pieces;
      work(*lanes_[item / pieces], k * count / pieces, (k + 1) * count / pieces);
    };
    parallel(*p_.threads, s_.D * pieces, piece, backwards);
  }

  // work(direction, begin, end) over [0, count) of each direction.
  template <class Work>
  void share_directions(i64 count, const Work& work) const {
    parallel(*p_.threads, s_.D * shares_, [&](i64 item) {
      const i64 k = item % shares_;
      work(*directions_[item / shares_], k * count / shares_, (k + 1) * count / shares_);
    });
  }

  // Each thread takes some lanes through all steps of the chunk.
  void lane_steps(i64 first, i64 steps) const {
    const auto lane = [&](i64 k) {
      const Direction& direction = *directions_[k / plan_.lanes];
      for (i64 step = 0; step < steps; ++step)
        lanes_[k]->run(direction.time(first + step), direction.chunk.start[step]);
    };
    parallel(*p_.threads, lane_count_, lane, false, part_uncut(s_, plan_.lanes));
  }
  // All threads share every step; there is one lane in each direction.
  void shared_steps(i64 first, i64 steps) const {
    const Lane& any = *lanes_[0];
    for (i64 step = 0; step < steps; ++step) {
      for (i64 d = 0; d < s_.D; ++d)
        lanes_[d]->begin_step(directions_[d]->time(first + step), directions_[d]->chunk.start[step]);
      const bool backwards = any.reads_backwards();
      if (s_.projected) share(any.hidden_panels(), backwards, [](Lane& lane, i64 a, i64 b) { lane.unproject(a, b); });
      share(any.rows(), backwards, [](Lane& lane, i64 a, i64 b) { lane.gate_grads(a, b); });
      share(any.state_panels(), backwards, [](Lane& lane, i64 a, i64 b) { lane.recur(a, b); });
      for (i64 d = 0; d < s_.D; ++d) lanes_[d]->end_step();
    }
  }

  void extended_grads() const {
    if (directions_[0]->has_vectors())
      share_directions(directions_[0]->tiles(),
                       [](const Direction& direction, i64 a, i64 b) { direction.vector_grads(a, b); });
    if (s_.layer_norm) by_rows([](const Direction& direction, i64 a, i64 b) { direction.normalised_input_grad(a, b); });
  }
  // dx: one direction after the other, because they may share rows of it.
  void input_grads() const {
    if (!p_.dx.data) return;
    for (i64 d = 0; d < s_.D; ++d) {
      if (directions_[d]->direct()) {
        const i64 panels = directions_[d]->in_panels(), shares = smaller(panels, p_.threads->count());
        parallel(*p_.threads, shares, [&](i64 k) {
          directions_[d]->direct_input_grad(k * panels / shares * kPanel<S>,
                                            smaller((k + 1) * panels / shares * kPanel<S>, s_.I));
        });
        continue;
      }
      const i64 rows = directions_[d]->chunk_rows(), groups = ceil_div(rows, kProductRows);
      parallel(*p_.threads, groups * directions_[d]->in_panels(), [&](i64 item) {
        const i64 group = item % groups;
        directions_[d]->input_grad(group * rows / groups, (group + 1) * rows / groups, item / groups);
      });
    }
  }
  void weight_grads() const {
    if (directions_[0]->direct()) return direct_weight_grads();
    const auto add = [&](const WeightGrad<S>& grad, void (Direction::*part)(i64, i64) const) {
      if (!grad.wanted()) return;
      const i64 parts = grad.parts(shares_);
      parallel(*p_.threads, s_.D * parts, [&](i64 item) {
        const Direction& direction = *directions_[item / parts];
        if (direction.has_rows()) (direction.*part)(item % parts, parts);
      });
    };
    i64 slices = 0;
    for (i64 d = 0; d < s_.D; ++d) slices = larger(slices, directions_[d]->input_slices());
    if (slices)
      parallel(*p_.threads, s_.D * slices, [&](i64 item) {
        const Direction& direction = *directions_[item / slices];
        if (item % slices < direction.input_slices()) direction.round_inputs(item % slices);
      });
    add(directions_[0]->gate_weights(), &Direction::gate_weight_grad);
    add(directions_[0]->recurrent_weights(), &Direction::recurrent_weight_grad);
    add(directions_[0]->projection_weights(), &Direction::projection_weight_grad);
  }
  void direct_weight_grads() const {
    const i64 panels = directions_[0]->out_panels();
    for (i64 d = 0; d < s_.D; ++d) directions_[d]->collect_inputs();
    share_directions(panels, [](const Direction& direction, i64 a, i64 b) { direction.direct_weight_grads(a, b); });
  }
  void write_other_grads() const {
    for (i64 d = 0; d < s_.D; ++d) {
      if (!directions_[d]->has_rows()) directions_[d]->zero_weight_grads();
      if (directions_[d]->has_vectors()) directions_[d]->write_vector_grads();
    }
  }

  const BackwardParams& p_;
  const Sizes& s_;
  const Plan plan_;
  const i64 capacity_, shares_, lane_count_;
  const ExtendedDirections<S> extended_;
  std::unique_ptr<Direction> directions_[2];
  const std::unique_ptr<std::unique_ptr<Lane>[]> lanes_;
};

template <class S, Cell kCell>
void backward_layer(const BackwardParams& p) {
  BackwardLayer<S, kCell>(p).run();
}

}  // namespace
}  // namespace fastlstm
