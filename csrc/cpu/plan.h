// How a call is spread over threads: a pure function of the sizes and the number of threads. It decides only which
// thread computes what, and when; the numbers do not depend on it.
#pragma once

#include "cpu/pack.h"

namespace fastlstm {
namespace {

// A lane is a set of sequences of one direction that walks through time together.
struct Plan {
  i64 lanes;         // per direction
  bool split_units;  // true: all threads share every step (one lane a direction), splitting hidden units
                     // false: a thread owns a lane for the whole sequence, no barrier anywhere
  i64 input_steps;   // forward: steps whose input products x W_ih^T are computed ahead, together; 0 = fused
};

constexpr i64 kSecondLevelBytes = 1 << 20;  // L2 of current server cores: 1 to 2 MB
constexpr i64 kThirdLevelBytes = 16 << 20;  // what a process can hope for of a shared L3
constexpr i64 kForkBytes = 512 << 10;       // weights that several threads should read: ~10 us for one core
constexpr double kForkFlops = 1e6;          // arithmetic that is worth a thread of its own: ~10 us
constexpr i64 kLaneRows = 128;              // a lane's state then stays in L2
constexpr i64 kProductRows = 96;            // rows of x that are worth one reading of w_ih

// A short call, of up to kShortCall steps, is better off without packed weights: looking for edits of the weights takes
// as long as a step of few rows. Its products are dot products with the stored weights (dots.h), if the I + P numbers
// of each are so many vectors that the sums over lanes at its end are a small part of it. Longer calls have packed
// weights, which are up to a fifth faster for many rows.
constexpr i64 kShortCall = 4;
constexpr i64 kDotVectors = 12;

// Whether the forward pass reads the weights as they are stored. Its products then have other bits, so that this must
// not depend on the batch or on threads.
template <class S>
bool forward_reads_stored(const Sizes& s) {
  return s.T <= kShortCall && (s.I + s.P) / kLanes<S> >= kDotVectors;
}

// Rows of a backward pass up to which it reads the weights as they are stored: with so few, packing them would take
// longer than what it makes faster. The bits are the same.
constexpr i64 kFewRowsInAll = 64;

inline bool backward_reads_stored(const Sizes& s) { return s.T * s.B <= kFewRowsInAll; }

template <class S>
Plan make_plan(const Sizes& s, int threads) {
  const double flops = 2.0 * double(s.gate_units()) * double(s.I + s.P);  // one row, one step
  const i64 weight_bytes = s.gate_units() * (s.I + s.P) * i64(sizeof(S));
  const i64 batch = larger(s.B, 1);

  const i64 worthwhile = larger(1, i64(flops * double(batch * s.T) / kForkFlops));
  i64 lanes = smaller(smaller(ceil_div(threads, s.D), worthwhile), batch);
  lanes = larger(lanes, ceil_div(batch, kLaneRows));
  if (lanes * s.D > threads) lanes = smaller(round_up(lanes * s.D, threads) / s.D, batch);

  Plan plan{lanes, false, 0};
  const bool idle_threads = lanes * s.D < threads;
  const bool worth_splitting = weight_bytes * larger(1, batch / 4) >= kForkBytes;
  const bool weights_read_twice = lanes > 1 && weight_bytes > kSecondLevelBytes;
  if (threads > 1 && worth_splitting && (idle_threads || weights_read_twice)) {
    plan.split_units = true;
    plan.lanes = 1;
  }
  const i64 rows = ceil_div(batch, plan.lanes);
  // Input products are fused into the step where its rows take longer to compute than w_ih takes to read.
  const bool slow_reads = weight_bytes > kThirdLevelBytes || (plan.split_units && kVectorBytes >= 64);
  if (s.T > 1 && rows < (slow_reads ? kProductRows / 2 : kTallestTile + 1))
    plan.input_steps = smaller(s.T, ceil_div(kProductRows, rows));
  return plan;
}

}  // namespace
}  // namespace fastlstm
