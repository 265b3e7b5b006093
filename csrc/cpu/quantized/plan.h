// How a call with quantised weights is spread over threads, by the model of cpu/plan.h with the numbers of these
// kernels. The results do not depend on it.
#pragma once

#include "cpu/plan.h"
#include "cpu/quantized/bfloat16.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {
namespace {

struct QuantizedPlan {
  i64 lanes;              // per direction
  bool split_units;       // all threads share every step (one lane a direction)
  i64 input_steps;        // whose input products are computed together
  bool prepares = false;  // whether panels of bfloat16 weights are prepared: see bfloat16.h
};

constexpr i64 kAheadRows = 48;           // rows of input products that are computed together
constexpr double kInt8Rate = 100;        // products a cycle, what follows a panel included; kBfloat16Rate likewise
constexpr double kUnitCycles = 7;        // from the gate sums of a unit to its state
constexpr double kMeetingCycles = 3000;  // of the threads that share a step

inline double weight_bytes(const Sizes& s, bool int8, i64 K) { return double(s.gate_units() * K) * (int8 ? 1 : 2); }

inline double step_cycles(const Sizes& s, bool int8, i64 rows, i64 shares, i64 steps, const Machine& machine,
                          bool prepared = false) {
  const auto product = [&](i64 K, i64 together) {
    const double numbers = double(s.gate_units()) * double(K) / double(shares);
    const double reading = read_cycles(double(prepared ? kPreparing.bytes : int8 ? 1 : 2) * numbers, machine);
    const double rate = int8 ? kInt8Rate : prepared ? kPreparing.rate : kBfloat16Rate;
    return Cost{double(rows) * numbers / rate, reading / double(together)}.cycles();
  };
  return product(s.P, 1) + product(s.I, steps) + double(rows * s.H) * kUnitCycles / double(shares);
}

// How many of `threads` threads are worth having.
int quantized_worthwhile(const Sizes& s, bool int8, int threads) {
  const double bytes = weight_bytes(s, int8, s.I + s.P);
  if (s.T == 1) {
    const double by_arithmetic = bytes * double(s.B) / (int8 ? kInt8Rate : kBfloat16Rate) / (8 * kMeetingCycles);
    return int(larger(1, smaller(threads, i64(larger(i64(bytes / double(kWakeBytes)), i64(by_arithmetic))))));
  }
  const double work = double(s.B * s.T) * bytes / (int8 ? kInt8Rate : kBfloat16Rate);
  return int(larger(1, smaller(threads, i64(work / (4 * kMeetingCycles)))));
}

// Whether all rows of a plan should take prepared panels.
inline bool prepares(const Sizes& s, i64 rows, i64 shares, i64 steps, const Machine& machine) {
  if (kPreparing.rate == 0 || rows < kPreparing.least) return false;
  const double narrow = step_cycles(s, false, rows, shares, steps, machine);
  const double saved = narrow - step_cycles(s, false, rows, shares, steps, machine, true);
  const double touched = double(s.gate_units() * (s.I + s.P)) * double(2 + kPreparing.bytes) / double(shares);
  return double(s.T) * saved > touched / kPreparing.speed;
}

inline QuantizedPlan spread(const Sizes& s, bool int8, int threads, const Machine& machine) {
  const i64 batch = larger(s.B, 1);
  const auto ahead = [&](i64 rows) { return larger(1, smaller(s.T, kAheadRows / larger(rows, 1))); };
  i64 lanes = smaller(larger(1, ceil_div(threads, s.D)), batch);
  lanes = larger(lanes, ceil_div(batch, kLaneRows));
  if (lanes * s.D > threads) lanes = smaller(round_up(lanes * s.D, threads) / s.D, batch);
  const i64 rows = ceil_div(batch, lanes), shares = ceil_div(threads, s.D);
  const QuantizedPlan alone{lanes, false, ahead(rows)}, shared{1, true, ahead(batch)};
  if (threads == 1) return alone;
  const double turns = double(ceil_div(lanes * s.D, threads));
  const double apart = turns * step_cycles(s, int8, rows, 1, alone.input_steps, machine);
  const double together = double(s.D) / double(threads) * double(shares) *
                              step_cycles(s, int8, batch, shares, shared.input_steps, machine) +
                          kMeetingCycles;
  return together < apart ? shared : alone;
}

inline QuantizedPlan make_quantized_plan(const Sizes& s, bool int8, int threads, const Machine& machine) {
  QuantizedPlan plan = spread(s, int8, threads, machine);
  const i64 rows = ceil_div(larger(s.B, 1), plan.lanes), shares = plan.split_units ? ceil_div(threads, s.D) : 1;
  plan.prepares = !int8 && prepares(s, rows, shares, plan.input_steps, machine);
  return plan;
}

}  // namespace
}  // namespace fastlstm
