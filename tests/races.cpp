// Runs the kernels' own code in the emulator, for the thread sanitizer: every thread of a GPU is a thread to it, and
// only what orders threads there orders them here. test_races.py builds it, and builds it broken.
//
//   races REGIME BLOCKS PARTS H     exits with 0 if all schedules give the same, finite numbers, 66 after a race
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "backward.h"
#include "forward.h"
#include "wide_backward.h"
#include "wide_forward.h"

using namespace fastlstm::cuda;

namespace {

constexpr int kT = 6, kB = 11, kTiles = 1;  // of sequences
using E = Bf16;

float number(size_t k) { return float(int(k * 2654435761u >> 8 & 0xffff) - 0x8000) / 0x20000; }

std::vector<uint16_t> numbers(size_t count, size_t seed) {
  std::vector<uint16_t> found(count);
  for (size_t k = 0; k < count; ++k) found[k] = to_bf16(number(k + seed));
  return found;
}

bool finite(const std::vector<uint16_t>& v) {
  for (uint16_t x : v)
    if (!std::isfinite(from_bf16(x))) return false;
  return true;
}

template <class X>
struct Passes {
  static constexpr bool kDense = false;
  static void forward(const Forward& p) { lstm_forward<E, kTiles, 1, X>(p); }
  static void backward(const Backward& p) { lstm_backward<E, kTiles, 1, X>(p); }
};
template <bool dense>
struct WidePasses {
  static constexpr bool kDense = dense;
  static constexpr int kResident = kWideShapes[0].resident;
  static void forward(const Forward& p) { wide_forward<E, WideSizes<kResident, dense>>(p); }
  static void backward(const Backward& p) { wide_backward<E, WideSizes<kResident, dense>>(p); }
};

// Forward and backward, ragged and with resets or of dense rows; all results, one after the other.
template <class Both>
std::vector<uint16_t> layer(Plan plan, int H, uint64_t seed) {
  const size_t rows = kT * kB, n = size_t(H);
  const std::vector<uint16_t> w = numbers(4 * n * n, 1), h0 = numbers(kB * n, 2), bias = numbers(4 * n, 3);
  std::vector<float> input_product(rows * 4 * n), c0(kB * n), c_all(rows * n, NAN);
  for (size_t k = 0; k < input_product.size(); ++k) input_product[k] = number(k + 4);
  for (size_t k = 0; k < c0.size(); ++k) c0[k] = from_bf16(h0[k]);
  std::vector<int64_t> lengths(kB);
  for (size_t b = 0; b < kB; ++b) lengths[b] = int64_t(b * 5 % (kT + 1));
  std::vector<uint8_t> reset(rows);
  for (size_t k = 0; k < rows; ++k) reset[k] = k % 7 == 3;
  const std::vector<uint16_t> zero(rows * n);
  std::vector<uint16_t> y = zero, gates(rows * 4 * n), h_n(kB * n, 0x7fff), c_n = h_n, dgates(rows * 4 * n), dh0 = h_n,
                        dc0 = h_n;

  const int64_t groups = ceil_div(kB, plan.batch);
  std::vector<uint32_t> exchange(size_t(groups * 2 * Shared::buffer_words(E::kKind, true, H, plan.batch)));
  std::vector<int> arrived(size_t(2 * groups));
  Layer p{};
  p.plan = plan;
  p.T = kT;
  p.B = kB;
  p.H = H;
  p.D = 1;
  p.rows = int64_t(rows);
  p.w_hh[0] = w.data();
  p.lengths = Both::kDense ? nullptr : lengths.data();
  p.reset = Both::kDense ? nullptr : reset.data();
  p.exchange = exchange.data();
  p.arrived = arrived.data();
  const int threads = plan.tiles * plan.parts * kLanes;

  Forward f{};
  static_cast<Layer&>(f) = p;
  f.shared = Shared::of(plan, E::kKind, false, H);
  f.input_product = input_product.data();
  f.b_ih[0] = f.b_hh[0] = bias.data();
  f.h0 = f.c0 = h0.data();
  f.y = y.data();
  f.h_n = h_n.data();
  f.c_n = c_n.data();
  f.c_all = c_all.data();
  f.gates = gates.data();
  emulator::run([&] { Both::forward(f); }, groups * plan.blocks, plan.blocks, threads, f.shared.total, seed);

  Backward b{};
  static_cast<Layer&>(b) = p;
  b.arrived = arrived.data() + groups;
  b.shared = Shared::of(plan, E::kKind, true, H);
  b.gates = gates.data();
  b.c_all = c_all.data();
  b.c0 = c0.data();
  b.dy = y.data();
  b.dy_t = kB * H;
  b.dy_b = H;
  b.dh_n = b.dc_n = h0.data();
  b.dgates = dgates.data();
  b.dh0 = dh0.data();
  b.dc0 = dc0.data();
  emulator::run([&] { Both::backward(b); }, groups * plan.blocks, plan.blocks, threads, b.shared.total, seed);

  std::vector<uint16_t> all;
  for (const auto* part : {&y, &h_n, &c_n, &dgates, &dh0, &dc0}) all.insert(all.end(), part->begin(), part->end());
  return all;
}

}  // namespace

int main(int, char** arguments) {
  const std::string regime = arguments[1];
  Plan plan{};
  plan.batch = kTiles * kSequences;
  plan.blocks = std::atoi(arguments[2]);
  plan.parts = std::atoi(arguments[3]);
  const int H = std::atoi(arguments[4]);
  plan.tiles = ceil_div(tiles_of(H), plan.blocks);
  plan.resident = 1;
  plan.rest = Rest::shared;
  plan.regime = regime == "block"     ? Regime::block
                : regime == "cluster" ? Regime::cluster
                : regime == "grid"    ? Regime::grid
                                      : Regime::wide;
  if (plan.regime == Regime::wide) {
    plan.tiles = kWideShapes[0].tiles;
    plan.resident = kWideShapes[0].resident;
  }
  const auto run = [&](uint64_t seed) {
    return plan.regime == Regime::block     ? layer<Passes<InBlock>>(plan, H, seed)
           : plan.regime == Regime::cluster ? layer<Passes<InCluster>>(plan, H, seed)
           : plan.regime == Regime::grid    ? layer<Passes<InGrid>>(plan, H, seed)
           : regime == "wide"               ? layer<WidePasses<false>>(plan, H, seed)
                                            : layer<WidePasses<true>>(plan, H, seed);
  };
  const std::vector<uint16_t> want = run(0);
  bool right = finite(want);
  for (uint64_t seed : {1, 2}) right = run(seed) == want && right;
  std::puts(right ? "the same numbers in every order" : "WRONG NUMBERS");
  return right ? 0 : 1;
}
