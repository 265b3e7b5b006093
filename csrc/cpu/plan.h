// How a call is spread over threads: a pure function of the sizes and the thread count.
// It decides only who computes what and when; the numbers do not depend on it.
#pragma once

#include "pack.h"

namespace fastlstm {
namespace {

// A lane is a set of sequences of one direction that walks through time together.
struct Plan {
  i64 lanes;         // per direction
  bool split_units;  // true: all threads share every step (one lane a direction), splitting hidden units
                     // false: a thread owns a lane for the whole sequence, no barrier anywhere
  i64 input_steps;   // forward: steps whose input projection is computed ahead in one product; 0 = fused
};

constexpr i64 kSecondLevelBytes = 1 << 20;  // L2 of current server cores: 1 to 2 MB
constexpr i64 kThirdLevelBytes = 16 << 20;  // what a process can hope for of a shared L3
constexpr i64 kForkBytes = 512 << 10;       // weights worth reading on several threads: ~10 us for one core
constexpr double kForkFlops = 1e6;          // arithmetic worth a thread of its own: ~10 us
constexpr i64 kLaneRows = 128;              // keeps a lane's state in L2
constexpr i64 kProjectRows = 96;            // rows that amortise one pass over w_ih

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
  // Rows of a step are enough for the fused projection where they outlast the reading of w_ih.
  const bool slow_reads = weight_bytes > kThirdLevelBytes || (plan.split_units && kVectorBytes >= 64);
  if (s.T > 1 && rows < (slow_reads ? kProjectRows / 2 : kTallestTile + 1))
    plan.input_steps = smaller(s.T, ceil_div(kProjectRows, rows));
  return plan;
}

}  // namespace
}  // namespace fastlstm
