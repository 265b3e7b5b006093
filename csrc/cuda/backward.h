// The mirror of forward.h: from the last step to the first, the gradients of the gates. What goes from step to step is
// these gradients, of all units, which W_hh^T takes to the gradient of h.
#pragma once

#include "exchange.h"

namespace fastlstm::cuda {

template <class E, int NT, int resident, class X>
DEVICE void lstm_backward(const Backward& p) {
  using Storage = typename E::Storage;
  constexpr int kColumns = 2 * NT, kSums = 2 * kColumns, kGateBytes = kGates * int(sizeof(Storage));
  const Place at(p, NT * kSequences);
  const int words = int(Shared::buffer_words(E::kKind, true, p.H, NT * kSequences));
  int H = p.H, d = at.direction;  // see `opaque`
  const int tile_words = at.tile * NT * E::kOperandWords, gate_words = words / kGates;
  const int parts = X::parts(p);
  X exchange(p, at, words);
  if (X::idles(p, at)) return exchange.end();
  const WarpWeights<E, resident, true, X> weights(p, at);
  Partial<kSums> partial(p, at);

  const auto* gates = static_cast<const Storage*>(p.gates);
  const auto* dy = static_cast<const Storage*>(p.dy);
  const auto* dc_all = static_cast<const Storage*>(p.dc_all);
  const auto* dh_n = static_cast<const Storage*>(p.dh_n);
  const auto* dc_n = static_cast<const Storage*>(p.dc_n);
  auto* dgates = static_cast<Storage*>(p.dgates);
  auto* dh0 = static_cast<Storage*>(p.dh0);
  auto* dc0 = static_cast<Storage*>(p.dc0);

  int steps = 0;  // of the longest sequence of the group
  for (int n = 0; n < NT * kSequences; ++n) steps = max(steps, p.steps_of(at.sequence + n));
  const auto time = [&](int s) { return d == 1 ? s : steps - 1 - s; };
  const auto owns = [&](int column) { return at.real && column % parts == at.part; };

  int length[kColumns] = {};
  float dc[kColumns][2];
  const auto state_at = [&](int column, int half) {
    return (int64_t(d) * p.B + at.column(column)) * H + at.unit(half);
  };
  const auto there = [&](int column, int half) { return at.column(column) < p.B && at.unit(half) < H; };
  const auto final = [&](const Storage* states, int column, int half) {
    return states && there(column, half) ? E::widen(states[state_at(column, half)]) : 0.0f;
  };
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    length[column] = p.steps_of(at.column(column));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dc[column][half] = final(dc_n, column, half);
      if (dh0 && length[column] == 0 && owns(column) && there(column, half))
        dh0[state_at(column, half)] = E::narrow(final(dh_n, column, half));
    }
  }

  // Numbers of this thread alone, on their way: the gates of a unit, and c of a step and of the one before it.
  const int threads = block_threads(), own_columns = ceil_div(kColumns, parts);
  char* gate_ring = shared_memory() + p.shared.ring + thread_index() * kGateBytes;
  auto* c_ring = reinterpret_cast<float*>(shared_memory() + p.shared.cells) + thread_index();
  const auto slot = [&](int s, int column, int half) {
    return ((s % kStages * own_columns + column / parts) * 2 + half) * threads;
  };
  const auto prefetch = [&](int s) {
    if (s < steps) {
      const int t = time(s), before = d == 0 ? t - 1 : t + 1;
      const int64_t row = p.row(t), row_before = before < 0 || before >= p.T ? 0 : p.row(before);
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        if (owns(column) && t < length[column])
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (at.unit(half) < H) {
              const int n = at.column(column), unit = d * H + at.unit(half);
              const int64_t width = int64_t(p.D) * H;
              const bool begins = d == 0 ? t == 0 : t + 1 == length[column];
              copy_async<kGateBytes>(gate_ring + slot(s, column, half) * kGateBytes,
                                     gates + ((int64_t(d) * p.rows + row + n) * H + at.unit(half)) * kGates, true);
              float* c = c_ring + 2 * slot(s, column, half);
              copy_async<4>(c, p.c_all + (row + n) * width + unit, true);
              copy_async<4>(c + threads,
                            begins ? p.c0 + state_at(column, half) : p.c_all + (row_before + n) * width + unit,
                            !begins || p.c0);
            }
    }
    commit_copies();
  };
  // What arrives for h at a step, in registers, which 16-bit numbers cannot go around.
  float arriving[kColumns][2];
  const auto fetch = [&](int s) {
    const int t = s < steps ? time(s) : p.T;
    const int64_t step = t == p.T ? 0 : (p.offsets ? p.row(t) : t) * p.dy_t;
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        arriving[column][half] = dy && owns(column) && t < length[column] && at.unit(half) < H
                                     ? E::widen(dy[step + at.column(column) * p.dy_b + d * H + at.unit(half)])
                                     : 0.0f;
  };
  for (int s = 0; s < kStages - 1; ++s) prefetch(s);
  fetch(0);

  // Step s multiplies the gradients of step s - 1; after the last one, those of the initial state are left.
  for (int s = 0; s <= steps; ++s) {
    const int t = time(s);
    const bool last = s == steps;
    H = opaque(H);
    d = opaque(d);
    prefetch(s + kStages - 1);
    bool restart[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      restart[column] = p.reset && !last && t < length[column] && p.reset[int64_t(t) * p.B + at.column(column)];
    }
    float total[4][NT][4] = {};
    if (s > 0 && (!last || dh0)) {
      exchange.wait(s - 1);
      weights.template multiply<NT>(total, p, at, exchange.operand(s - 1));
      // Each gate has sums of its own, which end in one.
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[0][nt][i] = (total[0][nt][i] + total[1][nt][i]) + (total[2][nt][i] + total[3][nt][i]);
          if (parts > 1) partial.put(at.part, nt * 4 + i, total[0][nt][i]);
        }
      if (parts > 1) sync_block();
    }
    wait_copies<kStages - 1>();
    const bool sends = s + 1 < steps || (dh0 && !last);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!owns(column)) continue;
      const int n = at.column(column);
      const bool active = !last && t < length[column];
      // From the step before in this order, if the sequence was in it; it may have been its last.
      const bool follows = s > 0 && time(s - 1) < length[column];
      const bool ends = follows && dh0 && time(s - 1) == (d == 0 ? 0 : length[column] - 1);
      float dh[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int number = column / 2 * 4 + 2 * half + column % 2;
        if (follows) {
          dh[half] = parts > 1 ? partial.total(number) : total[0][column / 2][2 * half + column % 2];
        } else {
          dh[half] = active ? final(dh_n, column, half) : 0.0f;
        }
        if (ends && there(column, half)) dh0[state_at(column, half)] = E::narrow(dh[half]);
      }
      float d_gate[kGates][2] = {};
      if (active) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (at.unit(half) >= H) continue;
          const float4 gate = E::kept(reinterpret_cast<const Storage*>(gate_ring + slot(s, column, half) * kGateBytes));
          const float* cells = c_ring + 2 * slot(s, column, half);
          const float i = gate.x, f = gate.y, g = gate.z, o = gate.w, tanh_c = E::tanh(cells[0]);
          const float before = restart[column] ? 0.0f : cells[threads];
          const float d_h = dh[half] + arriving[column][half];
          float d_c = dc[column][half];
          if (dc_all) d_c += E::widen(dc_all[(p.offsets ? p.row(t) : t) * p.dc_t + n * p.dc_b + d * H + at.unit(half)]);
          d_c = multiply_add(d_h * o, 1.0f - tanh_c * tanh_c, d_c);
          d_gate[0][half] = d_c * g * i * (1.0f - i);
          d_gate[1][half] = d_c * before * f * (1.0f - f);
          d_gate[2][half] = d_c * i * (1.0f - g * g);
          d_gate[3][half] = d_h * tanh_c * o * (1.0f - o);
          dc[column][half] = restart[column] ? 0.0f : d_c * f;
        }
      }
      // First what others wait for. Where the state was reset, nothing goes back to the one before.
      if (sends)
#pragma unroll
        for (int k = 0; k < kGates; ++k)
          E::put(exchange, k * gate_words + tile_words + column / 2 * E::kOperandWords, at.q, 2 * at.pair + column % 2,
                 restart[column] ? 0.0f : d_gate[k][0], restart[column] ? 0.0f : d_gate[k][1], s);
      if (!active) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < kGates; ++k)
          if (at.unit(half) < H)
            dgates[((int64_t(d) * p.rows + p.row(t) + n) * kGates + k) * H + at.unit(half)] =
                E::narrow(d_gate[k][half]);
    }
    if (sends) exchange.sent(s);
    fetch(s + 1);
  }

#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (dc0 && owns(column) && there(column, half)) dc0[state_at(column, half)] = E::narrow(dc[column][half]);
  exchange.end();
}

}  // namespace fastlstm::cuda
