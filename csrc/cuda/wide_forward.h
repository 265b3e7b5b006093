// Forward in the regime "wide". The warps of a tile of units share its terms: a part of them is the state that a
// quarter of the blocks sends, so a warp begins when that quarter has arrived. The sums of the parts are added up in
// shared memory, a cell by each thread. Then the block gathers its state and sends it to all.
#pragma once

#include "wide.h"

namespace fastlstm::cuda {

#if defined(FASTLSTM_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Sums of four parts for the gates of four cells a lane, of which each part gets one.
struct WideSums {
  float4* sums;  // [tile][cell][part][lane]
  unsigned part;

  MEMBER WideSums(char* memory, unsigned tile, unsigned part, unsigned lane)
      : sums(reinterpret_cast<float4*>(memory) + tile * (kWideParts * kWideParts * kLanes) + lane), part(part) {}
  MEMBER float4& at(unsigned cell, unsigned from) const { return sums[(cell * kWideParts + from) * kLanes]; }
  // Number of gate k of a cell: see Narrow::weight.
  MEMBER static float of(const float (&total)[4][4], unsigned cell, int k) {
    return total[cell / 2 * 2 + k / 2][k % 2 * 2 + cell % 2];
  }
  MEMBER void put(const float (&total)[4][4]) const {
#pragma unroll
    for (unsigned cell = 0; cell < kWideParts; ++cell)
      if (cell != part)
        at(cell, part) = {of(total, cell, 0), of(total, cell, 1), of(total, cell, 2), of(total, cell, 3)};
  }
  // (0 + 1) + (2 + 3), whichever of them is this one.
  MEMBER void get(const float (&total)[4][4], float (&gates)[kGates]) const {
    const float4 beside = at(part, part ^ 1), first = at(part, part ^ 2), second = at(part, part ^ 3);
    const float others[] = {first.x + second.x, first.y + second.y, first.z + second.z, first.w + second.w};
    const float besides[] = {beside.x, beside.y, beside.z, beside.w};
#pragma unroll
    for (int k = 0; k < kGates; ++k) {
      const float low = part % 2 ? of(total, 1, k) : of(total, 0, k);
      const float high = part % 2 ? of(total, 3, k) : of(total, 2, k);
      gates[k] = ((part < 2 ? low : high) + besides[k]) + others[k];
    }
  }
};

// Which tile of units a warp multiplies, and which part of its terms. The warps of a scheduler, a fourth of all, have
// different parts: these do not come at the same time.
struct WarpTask {
  unsigned tile, part;
  MEMBER static WarpTask of(unsigned warp) { return {warp / kWideParts, (warp + warp / kWideParts) % kWideParts}; }
};

// The cell of a thread, once the sums of its tile are added up.
template <class W>
struct ForwardCell {
  unsigned octet, q, n;
  int unit, column;

  MEMBER ForwardCell(const WidePlace<W>& at, unsigned thread) {
    const auto [tile, part] = WarpTask::of(thread / kLanes);
    octet = (at.rank * W::kTiles + tile) * 2 + part / 2;
    q = thread % kLanes / 4;
    n = thread % 4 * 2 + part % 2;
    unit = int(octet * 8 + q);
    column = at.sequence + int(n);
  }
};

template <class E, class W>
DEVICE void wide_forward(const Forward& p) {
  using Storage = typename E::Storage;
  constexpr int kTerms = W::kAll / W::kParts;  // of a warp
  constexpr int kBufferPieces = W::kAll;
  const WidePlace<W> before(p, thread_index());
  const int d = before.direction;
  const int H = p.H;

  // Rows of the weights as Narrow::weight has them, so that the gates of a unit end up in one thread.
  const auto* w = static_cast<const Storage*>(p.w_hh[d]);
  const TileWeights<E, 4, kTerms / kUnits, W::kResident> weights(
      shared_memory() + p.shared.rest, before.warp, before.lane, [&](unsigned m, unsigned row, unsigned term) {
        const auto [tile, part] = WarpTask::of(before.warp);
        const int unit = int((before.rank * W::kTiles + tile) * kUnits + m / 2 * 8 + row % 8);
        const int gate = int(2 * (m % 2) + row / 8), k = int(part * kTerms + term);
        return unit < H && k < H ? E::widen(w[(int64_t(gate) * H + unit) * H + k]) : 0.0f;
      });
  const WidePlace<W> at(p, opaque(thread_index()));
  const auto [tile, part] = WarpTask::of(at.warp);
  auto* factor = reinterpret_cast<uint4*>(shared_memory() + p.shared.operand);
  auto* own = reinterpret_cast<uint4*>(shared_memory() + p.shared.own);
  const WideBarriers<W::kParts> barriers(p, 16 * kBufferPieces / W::kParts);
  const WideSums sums(shared_memory() + p.shared.partial, tile, part, at.lane);

  // The cell of this thread. Where it is is worked out anew at each step, to have registers for weights.
  using Cell = ForwardCell<W>;
  const Cell first(at, at.thread);
  const auto is_there = [&](const Cell& cell) { return cell.unit < H && cell.column < p.B; };
  const auto state_at = [&](const Cell& cell) { return (int64_t(d) * p.B + cell.column) * H + cell.unit; };
  const auto initial = [&](const Cell& cell, const void* states) {
    return states && is_there(cell) ? E::widen(static_cast<const Storage*>(states)[state_at(cell)]) : 0.0f;
  };
  const auto finish = [&](const Cell& cell, void* states, float value) {
    static_cast<Storage*>(states)[state_at(cell)] = E::narrow(value);
  };
  const auto bias_of = [&](int k) {
    if (!p.b_ih[d] || first.unit >= H) return 0.0f;
    const int64_t row = int64_t(k) * H + first.unit;
    return E::widen(static_cast<const Storage*>(p.b_ih[d])[row]) +
           E::widen(static_cast<const Storage*>(p.b_hh[d])[row]);
  };
  auto* bias = reinterpret_cast<float4*>(shared_memory() + p.shared.bias);
  bias[at.thread] = {bias_of(0), bias_of(1), bias_of(2), bias_of(3)};

  const int steps = at.steps(p), length = is_there(first) ? at.steps_of(p, first.column) : 0;
  const auto time = [&](int s) { return d == 0 ? s : steps - 1 - s; };
  const auto begins_at = [&](int t) { return t == (d == 0 ? 0 : length - 1); };
  const auto restarts_at = [&](const Cell& cell, int s) {
    return !W::kDense && p.reset && s < steps && time(s) < length && p.reset[int64_t(time(s)) * p.B + cell.column];
  };
  const auto send = [&](const Cell& cell, unsigned thread, float h, int s) {
    const unsigned place = piece_of(cell.octet, cell.n) - at.rank * W::kOwn, k = thread % W::kOwn;
    reinterpret_cast<Storage*>(own + place)[cell.q] = E::narrow(h);
    sync_block();
    const uint4 piece = own[k];
#pragma unroll
    for (int i = 0; i < W::kBlocks; i += kSequences)
      store_remote(factor + s % 2 * kBufferPieces + at.rank * W::kOwn + k, piece,
                   barriers.at(s, at.rank / (W::kBlocks / W::kParts)),
                   int((at.rank + thread / W::kOwn + i) % W::kBlocks));
  };
  // Numbers of this thread alone, on their way from the input product: [stage][gate][thread].
  auto* ring = reinterpret_cast<float*>(shared_memory() + p.shared.ring);
  const auto fetch = [&](const Cell& cell, unsigned thread, int s) {
    if (s < steps && time(s) < length) {
      const int row = at.row(p, time(s), cell.column);
      const float* from =
          p.input_product + int64_t(d) * p.rows * (kGates * H) + int64_t(row) * (kGates * H) + cell.unit;
#pragma unroll
      for (int k = 0; k < kGates; ++k)
        copy_async<4>(ring + (s % kStages * kGates + k) * W::kThreads + thread, from + k * H, true);
    }
    commit_copies();
  };

  float c = initial(first, p.c0);
  bool restart = restarts_at(first, 0), restarts_next = restarts_at(first, 1);
  if (steps > 0) send(first, at.thread, begins_at(time(0)) && !restart ? initial(first, p.h0) : 0.0f, 0);
  if (is_there(first) && length == 0) finish(first, p.h_n, initial(first, p.h0));
  for (int s = 0; s < kStages - 1; ++s) fetch(first, at.thread, s);

  for (int s = 0; s < steps; ++s) {
    const int t = time(s);
    const bool last = s + 1 == steps, active = t < length;
    float total[4][4] = {}, gate[kGates], h = 0.0f;
    const auto early = weights.early();
    barriers.wait(s, part, tile == 0 && at.lane == 0);
    weights.multiply(total, early, factor + s % 2 * kBufferPieces + part * kTerms, at.lane);
    sums.put(total);
    const unsigned thread = unsigned(opaque(int(at.thread)));
    const Cell cell(at, thread);
    wait_copies<kStages - 2>();
    sync_block();
    sums.get(total, gate);
    // Where a sequence begins at the next step it is its initial state that this one multiplies. Units and sequences
    // that there are not stay 0.
    if (active) {
      const float4 by = bias[thread];
      const float* x = ring + s % kStages * (kGates * W::kThreads) + thread;
      gate[0] = E::sigmoid(x[0] + by.x + gate[0]);
      gate[1] = E::sigmoid(x[W::kThreads] + by.y + gate[1]);
      gate[2] = E::tanh(x[2 * W::kThreads] + by.z + gate[2]);
      gate[3] = E::sigmoid(x[3 * W::kThreads] + by.w + gate[3]);
      c = multiply_add(gate[1], restart ? 0.0f : c, gate[0] * gate[2]);
      h = gate[3] * E::tanh(c);
    } else if (!W::kDense && !last && begins_at(time(s + 1))) {
      h = initial(cell, p.h0);
    }
    if (!last) send(cell, thread, restarts_next ? 0.0f : h, s + 1);
    fetch(cell, thread, s + kStages - 1);
    restart = restarts_next;
    restarts_next = restarts_at(cell, s + 2);
    if (active) {
      const int row = at.row(p, t, cell.column);
      const int64_t out = int64_t(row) * (p.D * H) + (d * H + cell.unit);
      static_cast<Storage*>(p.y)[out] = E::narrow(h);
      if (p.c_all) p.c_all[out] = c;
      if (p.gates)
        E::keep(static_cast<Storage*>(p.gates) + int64_t(d) * p.rows * (kGates * H) + int64_t(row) * (kGates * H) +
                    cell.unit * kGates,
                gate[0], gate[1], gate[2], gate[3]);
      if (t == (d == 0 ? length - 1 : 0)) finish(cell, p.h_n, h);
    }
  }
  if (is_there(first)) finish(first, p.c_n, c);
  sync_cluster();  // no block leaves while another may store into its memory
}

#endif

}  // namespace fastlstm::cuda
