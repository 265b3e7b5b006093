// How a call is spread over threads: a pure function of the sizes, the number of threads and the machine's caches. It
// decides only which thread computes what, and when; the numbers do not depend on it.
#pragma once

#include "cpu/machine.h"
#include "cpu/pack.h"

namespace fastlstm {
namespace {

// A lane is a set of sequences of one direction that walks through time together.
struct Plan {
  i64 threads;       // that are of use
  i64 lanes;         // per direction
  bool split_units;  // true: all threads share every step (one lane a direction), splitting hidden units
                     // false: a thread owns a lane for the whole sequence, no barrier anywhere
  i64 pieces;        // of a shared step of one direction: more than threads, so that whoever is faster takes more
  i64 input_steps;   // forward: steps whose input products x W_ih^T are computed ahead, together; 0 = fused
  double cycles;     // of a step, as estimated
};

// What a step costs, in cycles of a core: its arithmetic or the reading of its weights, whichever takes longer. The
// rates are those of server cores with two multiply-add units; a plan needs no more than their order.
constexpr double kSecondLevelRate = 32;       // bytes of weights a cycle from L2
constexpr double kThirdLevelRate = 10;        // from a shared L3
constexpr double kMemoryRate = 6;             // from memory
constexpr double kExposed = 0.25;             // of the shorter of arithmetic and reading, the part that shows
constexpr double kBarrierCycles = 8500;       // all threads meet, and the first of them sleeps a little
constexpr double kThreadCycles = 750;         // more for each thread that is called and waited for
constexpr double kPieceCycles = 6000;         // of a piece: to take one is nothing beside it
constexpr i64 kPieces = 4;                    // for each thread, at most: then the last one of a slow core is soon done
constexpr i64 kPieceRows = 8;                 // of a lane, at least, where lanes are such pieces
constexpr double kSlowCore = 2;               // times as long as others, or longer, a slow core takes
constexpr double kWorthwhile = 0.95;          // of the cycles; such estimates cannot tell what is closer
constexpr double kForkFlops = 1e6;            // arithmetic that is worth a thread of its own: ~10 us
constexpr i64 kLaneRows = 128;                // a lane's state then stays in L2
constexpr i64 kProductRows = 2 * kPanelRows;  // of a product; another reading of its weights then costs nothing
constexpr double kRowsOfLane = 2;             // a lane takes as much longer as so many rows more

// Where weights lie that a core reads once a step.
enum class Level { second, third, memory };

inline Level level_of(double bytes, const Machine& machine) {
  if (bytes <= 0.75 * double(machine.second_level)) return Level::second;  // states and sums need the rest
  return bytes <= double(machine.third_level) ? Level::third : Level::memory;
}

// Whether the weights of a short call have left L3 since the call before, which read them and as many
// numbers more as `others`.
inline bool come_from_memory(const Sizes& s, Dtype dtype, i64 others, const Machine& machine) {
  return double(s.product_weights() + others) * double(element_bytes(dtype)) > 0.75 * double(machine.third_level);
}

// Every second step reads backwards, so half of L2 still holds what the step before has read last.
inline double read_cycles(double bytes, const Machine& machine) {
  const Level level = level_of(bytes, machine);
  if (level == Level::second) return bytes / kSecondLevelRate;
  const double kept = double(machine.second_level) / 2;
  return kept / kSecondLevelRate + (bytes - kept) / (level == Level::third ? kThirdLevelRate : kMemoryRate);
}

// Cycles of a step's product.
struct Cost {
  double arithmetic, reading;
  // Reading goes on behind arithmetic, but for a part.
  double cycles() const {
    const bool by_arithmetic = arithmetic > reading;
    return (by_arithmetic ? arithmetic : reading) + kExposed * (by_arithmetic ? reading : arithmetic);
  }
};

// A product of rows of K numbers with a thread's share of the gate units; its weights are read once for `steps` steps.
template <class S>
Cost product_cost(const Sizes& s, i64 rows, i64 K, i64 shares, i64 steps, const Machine& machine) {
  const double weights = double(s.gate_units()) / double(shares) * double(K), bytes = weights * double(sizeof(S));
  return {double(rows) * weights / (2 * kLanes<S>), read_cycles(bytes, machine) / double(steps)};
}

// Cycles of a step of one lane; shares: threads that divide its units.
template <class S>
double step_cycles(const Sizes& s, i64 rows, i64 shares, i64 input_steps, const Machine& machine) {
  if (input_steps == 0) return product_cost<S>(s, rows, s.I + s.P, shares, 1, machine).cycles();
  // Input products are stored and loaded again.
  const double passes = 2.0 * double(rows * s.gate_units()) / double(shares) * double(sizeof(S)) / kSecondLevelRate;
  return product_cost<S>(s, rows, s.P, shares, 1, machine).cycles() + passes +
         product_cost<S>(s, rows, s.I, shares, input_steps, machine).cycles();
}

// Steps whose input products are computed together, if they are: as many as leave most of L2 to the weights, and make
// one or two full groups of rows that pass over a part of a panel.
template <class S>
i64 steps_ahead(const Sizes& s, i64 rows, i64 shares, const Machine& machine) {
  const i64 room = machine.second_level / 4 * shares / (s.gate_units() * i64(sizeof(S)));
  return smaller(s.T, ceil_div(room < kProductRows ? kPanelRows : kProductRows, rows));
}

// Whether both products of a gate sum are one sum there: adding up the lanes of each would show beside so few numbers.
// In wider layers long runs of memory are faster, and input products of all steps that read w_ih once. This changes
// bits too, so it does not depend on the batch.
constexpr i64 kJoinedTerms = 512;

template <class S>
bool joins_products(const Sizes& s) {
  return forward_reads_stored<S>(s) && s.I + s.P <= kJoinedTerms;
}

// The better way to compute the input products of a lane: 0, or how many steps ahead.
template <class S>
i64 input_steps(const Sizes& s, i64 rows, i64 shares, const Machine& machine) {
  if (s.T <= 1 || joins_products<S>(s)) return 0;
  const i64 ahead = steps_ahead<S>(s, rows, shares, machine);
  if (rows <= kTallestTile) return ahead;  // they leave multipliers idle, whatever they read
  const double fused = step_cycles<S>(s, rows, shares, 0, machine);
  return step_cycles<S>(s, rows, shares, ahead, machine) < kWorthwhile * fused ? ahead : 0;
}

// Rows of a backward pass up to which it reads the weights as they are stored: with so few, packing them would take
// longer than what it makes faster. The bits are the same; products of pairs, which have others, are those of all
// calls.
constexpr i64 kFewRowsInAll = 64;

inline bool backward_reads_stored(const Sizes& s, Dtype dtype) {
  return s.T * s.B <= kFewRowsInAll && !pairs_in_backward<float>(s, dtype);
}

constexpr i64 kForkBytes = 512 << 10;  // weights that several threads should read: ~10 us for one core
constexpr i64 kWakeBytes = 768 << 10;  // of one step, for each thread: it has to be woken

// Threads of `most` that have enough to do in that many calls of these sizes to be worth waking. Memory and arithmetic
// count; of one step mainly the weights, which one thread reads in ~10 us.
inline i64 employed(const Sizes& s, i64 members, i64 most) {
  const double rows = double(members) * double(larger(s.B * s.T, 1));
  const i64 weights = members * s.gate_units() * (s.I + s.P);
  const double by_arithmetic = 2 * double(s.gate_units()) * double(s.I + s.P) * rows / kForkFlops;
  const i64 by_weights = weights * i64(sizeof(float)) * larger(1, s.B / 4) / (s.T == 1 ? kWakeBytes : kForkBytes / 2);
  const i64 enough = larger(by_weights, s.T == 1 ? 0 : i64(smaller(by_arithmetic, 1e9)));
  return smaller(most, larger(1, enough));
}

// Pieces for each thread, at least, of a shared step. One is enough where all cores are as fast.
inline i64 least_pieces(const Machine& machine) { return machine.uneven ? 2 : 1; }

// The plan in which that many threads, more than one, share every step.
template <class S>
Plan shared_plan(const Sizes& s, i64 threads, const Machine& machine) {
  const i64 batch = larger(s.B, 1), shares = ceil_div(threads, s.D), tiles = ForwardPack<S>(s).tiles;
  const i64 ahead = input_steps<S>(s, batch, shares, machine);
  const double share = step_cycles<S>(s, batch, shares, ahead, machine);
  const i64 pieces = shares * larger(least_pieces(machine), smaller(kPieces, i64(share / kPieceCycles)));
  return {threads, 1, true, smaller(tiles, pieces), ahead, share + kBarrierCycles + kThreadCycles * double(threads)};
}

// The plan of a call that at most so many threads compute.
template <class S>
Plan make_plan(const Sizes& s, i64 most, const Machine& machine) {
  const i64 threads = employed(s, 1, most), batch = larger(s.B, 1);
  i64 lanes = smaller(ceil_div(threads, s.D), batch);
  lanes = larger(lanes, ceil_div(batch, kLaneRows));
  if (lanes * s.D > threads) lanes = smaller(round_up(lanes * s.D, threads) / s.D, batch);
  // Where cores differ, a lane for each thread would wait for the slowest one.
  const bool uneven = machine.uneven && threads > 1;
  if (uneven) lanes = larger(lanes, smaller(kPieces * lanes, batch / kPieceRows));

  const i64 rows = ceil_div(batch, lanes), ahead = input_steps<S>(s, rows, 1, machine);
  const double turns = double(ceil_div(lanes * s.D, threads));  // lanes that a thread takes one after the other
  const double slow = uneven && turns == 1 ? kSlowCore : 1;
  Plan best{
      smaller(threads, lanes * s.D), lanes, false, 1, ahead, slow * turns * step_cycles<S>(s, rows, 1, ahead, machine)};
  // With many threads, the meeting of all may cost more than some of them save.
  const i64 useful = s.D * ForwardPack<S>(s).tiles / least_pieces(machine);
  for (i64 n = smaller(threads, useful); n > 1; n /= 2) {
    const Plan shared = shared_plan<S>(s, n, machine);
    if (shared.cycles < (best.split_units ? kWorthwhile : 1) * best.cycles) best = shared;
  }
  return best;
}

// What a lane of all sequences would take, as a part of what these lanes of a direction take together.
inline double part_uncut(const Sizes& s, i64 lanes) {
  return (double(s.B) + kRowsOfLane) / (double(s.B) + double(lanes) * kRowsOfLane);
}

// How many of `most` threads are worth having for that many calls of these sizes, which either take turns, each with
// all threads, or have a thread each.
inline i64 worthwhile(const Sizes& s, i64 members, i64 most, const Machine& machine) {
  const i64 threads = employed(s, members, most);
  if (2 * members > threads) return threads;
  const Plan plan = make_plan<float>(s, threads, machine);
  return plan.split_units ? larger(plan.threads, 2 * members - 1) : threads;
}

}  // namespace
}  // namespace fastlstm
