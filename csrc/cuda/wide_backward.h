// Backward in the regime "wide". A block multiplies the gradients of its own gates with its rows of the weights: a part
// of the gradients of all units' h at the step before. Each part goes to the block whose units these are, in float32,
// and that adds them up in the order of blocks. All gates' gradients instead would be twice as many bytes.
#pragma once

#include "wide.h"

namespace fastlstm::cuda {

#if defined(FASTLSTM_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The cell of a thread: those of a sequence follow each other.
template <class W>
struct BackwardCell {
  unsigned n, own;  // unit counted from the block's first one
  int unit, column;

  MEMBER BackwardCell(const WidePlace<W>& at, unsigned thread)
      : n(thread / W::kOwn), own(thread % W::kOwn), unit(at.rank * W::kOwn + int(own)), column(at.sequence + int(n)) {}
};

template <class E, class W>
DEVICE void wide_backward(const Backward& p) {
  using Storage = typename E::Storage;
  constexpr int kTerms = kGates * W::kOwn, kTiles = W::kBlocks / W::kParts;  // of terms, of units of a warp
  constexpr int kPart = W::kOwn * kSequences;                                // what a block sends to another one
  const WidePlace<W> before(p, thread_index());
  const int d = before.direction;
  const int H = p.H;

  // Blocks begin with different units. A thread has four units that follow each other, of two tiles.
  const auto* w = static_cast<const Storage*>(p.w_hh[d]);
  const auto first_out = [](const WidePlace<W>& at) { return (at.warp + at.rank) % W::kWarps * (kTiles * kUnits); };
  const TileWeights<E, kTiles, kTerms / kUnits, W::kResident> weights(
      shared_memory() + p.shared.rest, before.warp, before.lane, [&](unsigned m, unsigned row, unsigned term) {
        const int out = int(first_out(before) + m / 2 * 32 + row % 8 * 4 + m % 2 * 2 + row / 8);
        const int unit = before.rank * W::kOwn + int(term / kGates);
        return unit < H && out < H ? E::widen(w[(int64_t(term % kGates) * H + unit) * H + out]) : 0.0f;
      });
  const WidePlace<W> at(p, opaque(thread_index()));
  auto* own = reinterpret_cast<uint4*>(shared_memory() + p.shared.operand);
  auto* parts = reinterpret_cast<float*>(shared_memory() + p.shared.partial);
  const WideBarriers<1> barriers(p, 4 * W::kBlocks * kPart);

  // The cell of this thread. Where it is is worked out anew at each step, to have registers for weights.
  using Cell = BackwardCell<W>;
  const Cell first(at, at.thread);
  const auto is_there = [&](const Cell& cell) { return cell.unit < H && cell.column < p.B; };
  const auto state_at = [&](const Cell& cell) { return (int64_t(d) * p.B + cell.column) * H + cell.unit; };
  const auto final = [&](const Cell& cell, const void* states) {
    return states && is_there(cell) ? E::widen(static_cast<const Storage*>(states)[state_at(cell)]) : 0.0f;
  };
  const auto finish = [&](const Cell& cell, void* states, float value) {
    static_cast<Storage*>(states)[state_at(cell)] = E::narrow(value);
  };
  const int steps = at.steps(p), length = is_there(first) ? at.steps_of(p, first.column) : 0;
  const auto time = [&](int s) { return d == 1 ? s : steps - 1 - s; };
  const auto begins_at = [&](int t) { return t == (d == 0 ? 0 : length - 1); };  // where the forward pass does

  // Numbers of the next step, on their way.
  uint2 gates = {};
  Storage dy = 0, dc_y = 0;
  float c = 0.0f, c_before = 0.0f;
  bool restart = false;
  const auto fetch = [&](const Cell& cell, int s) {
    const int t = s < steps ? time(s) : p.T;
    if (t >= length) return;
    const int row = at.row(p, t, cell.column), width = p.D * H, place = d * H + cell.unit;
    gates = *reinterpret_cast<const uint2*>(static_cast<const Storage*>(p.gates) + int64_t(d) * p.rows * (kGates * H) +
                                            int64_t(row) * (kGates * H) + cell.unit * kGates);
    restart = !W::kDense && p.reset && p.reset[int64_t(t) * p.B + cell.column];
    c = p.c_all[int64_t(row) * width + place];
    if (restart) {
      c_before = 0.0f;
    } else if (!begins_at(t)) {
      c_before = p.c_all[int64_t(at.row(p, d == 0 ? t - 1 : t + 1, cell.column)) * width + place];
    } else {
      c_before = p.c0 ? p.c0[state_at(cell)] : 0.0f;
    }
    const int64_t step = !W::kDense && p.offsets ? row - cell.column : t;
    if (p.dy) dy = static_cast<const Storage*>(p.dy)[step * p.dy_t + cell.column * p.dy_b + place];
    if (p.dc_all) dc_y = static_cast<const Storage*>(p.dc_all)[step * p.dc_t + cell.column * p.dc_b + place];
  };
  float dc = final(first, p.dc_n);
  if (p.dh0 && is_there(first) && length == 0) finish(first, p.dh0, final(first, p.dh_n));
  fetch(first, 0);

  // Step s adds the gradients that come from step s - 1; after the last one, those of the initial state are left.
  for (int s = 0; s <= steps; ++s) {
    const int t = time(s);
    const bool last = s == steps, active = !last && t < length, follows = s > 0 && time(s - 1) < length;
    const unsigned thread = unsigned(opaque(int(at.thread)));
    const Cell cell(at, thread);
    // What does not depend on other blocks, while their parts travel.
    const float4 gate = E::kept(reinterpret_cast<const Storage*>(&gates));
    const float i = gate.x, f = gate.y, g = gate.z, o = gate.w, tanh_c = E::tanh(c);
    const float by_c = o * (1.0f - tanh_c * tanh_c), by_o = tanh_c * o * (1.0f - o);
    const float by_i = g * i * (1.0f - i), by_g = i * (1.0f - g * g);
    const float by_f = c_before * f * (1.0f - f);
    float dh = active && p.dy ? E::widen(dy) : 0.0f;
    if (active && p.dc_all) dc += E::widen(dc_y);
    if (active && !follows) dh += final(cell, p.dh_n);
    const bool restarts = active && restart;
    fetch(cell, s + 1);
    if (s > 0 && (!last || p.dh0)) {
      barriers.wait(s - 1, 0, thread == 0);
      const float* from = parts + (s - 1) % 2 * (W::kBlocks * kPart) + thread;
      float sum[4] = {};
#pragma unroll
      for (int block = 0; block < W::kBlocks; ++block) sum[block % 4] += from[block * kPart];
      const float found = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      if (follows) dh += found;
      if (follows && p.dh0 && begins_at(time(s - 1))) finish(cell, p.dh0, found);
    }
    uint2 d_gates = {};
    if (active) {
      dc = multiply_add(dh, by_c, dc);
      d_gates = {E::pack(dc * by_i, dc * by_f), E::pack(dc * by_g, dh * by_o)};
      dc = restarts ? 0.0f : dc * f;
    }
    if (s + 1 < steps || (p.dh0 && !last)) {
      // Where the state was reset, nothing goes back to the one before.
      uint4* buffer = own + s % 2 * kTerms;
      reinterpret_cast<uint2*>(buffer + piece_of(cell.own / 2, cell.n))[cell.own % 2] =
          restarts ? uint2{0, 0} : d_gates;
      const auto early = weights.early();
      sync_block();
      float total[kTiles][4] = {};
      weights.multiply(total, early, buffer, at.lane);
      const WidePlace<W> now(p, opaque(int(at.thread)));
#pragma unroll
      for (int m = 0; m < kTiles; m += 2)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const unsigned out = first_out(now) + m * kUnits + 4 * now.q, n = 2 * now.pair + e;
          const uint4 four = {bits_of(total[m][e]), bits_of(total[m][2 + e]), bits_of(total[m + 1][e]),
                              bits_of(total[m + 1][2 + e])};
          float* to = parts + s % 2 * (W::kBlocks * kPart) + (at.rank * kSequences + n) * W::kOwn + out % W::kOwn;
          store_remote(reinterpret_cast<uint4*>(to), four, barriers.at(s, 0), int(out / W::kOwn));
        }
    }
    if (active) {
      Storage* to = static_cast<Storage*>(p.dgates) + int64_t(d) * p.rows * (kGates * H) +
                    int64_t(at.row(p, t, cell.column)) * (kGates * H) + cell.unit;
      to[0] = Storage(d_gates.x);
      to[H] = Storage(d_gates.x >> 16);
      to[2 * H] = Storage(d_gates.y);
      to[3 * H] = Storage(d_gates.y >> 16);
    }
  }
  if (p.dc0 && is_there(first)) finish(first, p.dc0, dc);
  sync_cluster();  // no block leaves while another may store into its memory
}

#endif

}  // namespace fastlstm::cuda
