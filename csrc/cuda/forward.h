// All steps of one direction of an LSTM layer, for one batch of sequences: see plan.h for who computes what.
#pragma once

#include "exchange.h"

namespace fastlstm::cuda {

template <class E, int NT, int resident, class X>
DEVICE void lstm_forward(const Forward& p) {
  using Storage = typename E::Storage;
  constexpr int kColumns = 2 * NT, kSums = kGates * 2 * kColumns;
  const Place at(p, NT * kSequences);
  const int words = int(Shared::buffer_words(E::kKind, false, p.H, NT * kSequences)), d = at.direction;
  int H = p.H;  // see `opaque`
  const int tile_words = at.tile * NT * E::kOperandWords;
  const int parts = X::parts(p);
  X exchange(p, at, words);
  if (X::idles(p, at)) return exchange.end();
  const WarpWeights<E, resident, false, X> weights(p, at);
  Partial<kSums> partial(p, at);

  const auto* b_ih = static_cast<const Storage*>(p.b_ih[d]);
  const auto* b_hh = static_cast<const Storage*>(p.b_hh[d]);
  const auto* h0 = static_cast<const Storage*>(p.h0);
  const auto* c0 = static_cast<const Storage*>(p.c0);
  auto* y = static_cast<Storage*>(p.y);
  auto* h_n = static_cast<Storage*>(p.h_n);
  auto* c_n = static_cast<Storage*>(p.c_n);
  auto* gates = static_cast<Storage*>(p.gates);
  float bias[2][kGates];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t row = int64_t(gate) * H + at.unit(half);
      bias[half][gate] = b_ih && at.unit(half) < H ? E::widen(b_ih[row]) + E::widen(b_hh[row]) : 0.0f;
    }

  int steps = 0;  // of the longest sequence of the group
  for (int n = 0; n < NT * kSequences; ++n) steps = max(steps, p.steps_of(at.sequence + n));
  const auto time = [&](int s) { return d == 0 ? s : steps - 1 - s; };
  const auto owns = [&](int column) { return at.real && column % parts == at.part; };

  int length[kColumns] = {};
  float c[kColumns][2];
  const auto state_at = [&](int column, int half) {
    return (int64_t(d) * p.B + at.column(column)) * H + at.unit(half);
  };
  const auto there = [&](int column, int half) { return at.column(column) < p.B && at.unit(half) < H; };
  const auto initial = [&](const Storage* states, int column, int half) {
    return states && there(column, half) ? E::widen(states[state_at(column, half)]) : 0.0f;
  };
  const auto begins_at = [&](int column) { return d == 0 ? 0 : length[column] - 1; };
  const auto restarts_at = [&](int t, int column) {
    return p.reset && t < length[column] && p.reset[int64_t(t) * p.B + at.column(column)];
  };
  const auto put = [&](int column, float low, float high, int s) {
    E::put(exchange, tile_words + column / 2 * E::kOperandWords, at.q, 2 * at.pair + column % 2, low, high, s);
  };
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    length[column] = p.steps_of(at.column(column));
#pragma unroll
    for (int half = 0; half < 2; ++half) c[column][half] = initial(c0, column, half);
    if (!owns(column)) continue;
    const float low = initial(h0, column, 0), high = initial(h0, column, 1);
    if (steps > 0) {
      const bool forgets = time(0) != begins_at(column) || restarts_at(time(0), column);
      put(column, forgets ? 0.0f : low, forgets ? 0.0f : high, 0);
    }
    if (length[column] == 0) {
      if (there(column, 0)) h_n[state_at(column, 0)] = E::narrow(low);
      if (there(column, 1)) h_n[state_at(column, 1)] = E::narrow(high);
    }
  }
  if (steps > 0) exchange.sent(0);

  // Numbers of this thread alone, on their way from the input product: [stage][column][unit][gate][thread].
  auto* ring = reinterpret_cast<float*>(shared_memory() + p.shared.ring) + thread_index();
  const int threads = block_threads(), own_columns = ceil_div(kColumns, parts);
  const auto ring_at = [&](int s, int column, int half) {
    return ring + ((s % kStages * own_columns + column / parts) * 2 + half) * kGates * threads;
  };
  const auto prefetch = [&](int s) {
    if (s < steps) {
      const int t = time(s);
      const int64_t row = (int64_t(d) * p.rows + p.row(t)) * (kGates * H);
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        if (owns(column) && t < length[column])
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (at.unit(half) < H)
#pragma unroll
              for (int gate = 0; gate < kGates; ++gate)
                copy_async<4>(
                    ring_at(s, column, half) + gate * threads,
                    p.input_product + row + int64_t(at.column(column)) * (kGates * H) + gate * H + at.unit(half), true);
    }
    commit_copies();
  };
  for (int s = 0; s < kStages - 1; ++s) prefetch(s);

  for (int s = 0; s < steps; ++s) {
    const int t = time(s);
    const bool last = s + 1 == steps;
    H = opaque(H);
    prefetch(s + kStages - 1);
    bool restart[kColumns], restarts_next[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      restart[column] = restarts_at(t, column);
      restarts_next[column] = !last && restarts_at(time(s + 1), column);
    }
    float total[4][NT][4] = {};
    exchange.wait(s);
    weights.template multiply<NT>(total, p, at, exchange.operand(s));
    if (parts > 1) {
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int i = 0; i < 4; ++i) partial.put(at.part, (m * NT + nt) * 4 + i, total[m][nt][i]);
      sync_block();
    }
    wait_copies<kStages - 1>();
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!owns(column)) continue;
      const int nt = column / 2, e = column % 2;
      // Where a sequence begins at the next step it is its initial state that this one multiplies. Units and sequences
      // that there are not stay 0, whatever comes of them.
      const bool active = t < length[column];
      float h[2] = {}, gate[2][kGates];
      if (active) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (at.unit(half) >= H) continue;
#pragma unroll
          for (int k = 0; k < kGates; ++k) {
            const int m = 2 * half + k / 2, i = 2 * (k % 2) + e;
            const float sum = parts > 1 ? partial.total((m * NT + nt) * 4 + i) : total[m][nt][i];
            const float x = ring_at(s, column, half)[k * threads] + bias[half][k] + sum;
            gate[half][k] = k == 2 ? E::tanh(x) : E::sigmoid(x);
          }
          const float before = restart[column] ? 0.0f : c[column][half];
          c[column][half] = multiply_add(gate[half][1], before, gate[half][0] * gate[half][2]);
          h[half] = gate[half][3] * E::tanh(c[column][half]);
        }
      } else if (!last && time(s + 1) == begins_at(column)) {
        h[0] = initial(h0, column, 0);
        h[1] = initial(h0, column, 1);
      }
      // First what others wait for.
      if (!last) put(column, restarts_next[column] ? 0.0f : h[0], restarts_next[column] ? 0.0f : h[1], s + 1);
      if (!active) continue;
      const int64_t row = p.row(t) + at.column(column);
      const bool ends = t == (d == 0 ? length[column] - 1 : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (at.unit(half) >= H) continue;
        const int64_t out = row * (int64_t(p.D) * H) + d * H + at.unit(half);
        y[out] = E::narrow(h[half]);
        if (ends) h_n[state_at(column, half)] = E::narrow(h[half]);
        if (p.c_all) p.c_all[out] = c[column][half];
        if (gates)
          E::keep(gates + ((int64_t(d) * p.rows + row) * H + at.unit(half)) * kGates, gate[half][0], gate[half][1],
                  gate[half][2], gate[half][3]);
      }
    }
    if (!last) exchange.sent(s + 1);
  }

#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (owns(column) && there(column, half)) c_n[state_at(column, half)] = E::narrow(c[column][half]);
  exchange.end();
}

}  // namespace fastlstm::cuda
