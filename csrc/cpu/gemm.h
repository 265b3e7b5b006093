// Matrix products: the inner loop of the library, and products of rows with a panel built on it.
//
// A panel [K][kPanel] holds kPanel = 4 vectors of output columns for each k; the loop over k reads it from its
// beginning to its end. Every output is the same sequence of fused multiply-adds and additions over k in every register
// tile. So a result depends neither on how rows and panels are grouped, nor on which thread computes it.
#pragma once

#include "cpu/memory.h"

namespace fastlstm {
namespace {

constexpr int kPanelVectors = 4;
template <class S>
constexpr int kPanel = kPanelVectors * kLanes<S>;

// What a chain fetches from far caches while it is summed: two lines with every term. The hardware alone fetches ahead
// only while a chain reads new lines; it waits while further rows pass over the lines that are near already.
struct Ahead {
  const char* at;
  i64 step;  // bytes between terms
  FASTLSTM_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 64, 0, 2);
    at += step;
  }
};
struct NothingAhead {
  FASTLSTM_INLINE void fetch() {}
};

// acc[r][p*V + v] += sum over k < K of a[r][k * a_stride] * panel p, row k, vector v: one chain for each output.
template <class S, int R, int P, int V, class Next = NothingAhead>
FASTLSTM_INLINE void accumulate_chain(Vec<S> (&acc)[R][P * V], const S* const (&a)[R], i64 a_stride, const S* panel,
                                      i64 panel_stride, i64 row_stride, i64 K, Next next = {}) {
  const auto term = [&](i64 k, const S* row) FASTLSTM_INLINE_LAMBDA {
    next.fetch();
    // The smaller of the two, rows or columns, stays in registers while the other one is read.
    if constexpr (R <= V) {
      Vec<S> s[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) s[r] = splat(a[r][k * a_stride]);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec<S> w = load(row + p * panel_stride + v * kLanes<S>);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[r][p * V + v] = add_product(acc[r][p * V + v], s[r], w);
        }
    } else {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        Vec<S> w[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) w[v] = load(row + p * panel_stride + v * kLanes<S>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<S> s = splat(a[r][k * a_stride]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][p * V + v] = add_product(acc[r][p * V + v], s, w[v]);
        }
      }
    }
  };
  i64 k = 0;
  for (; k + kUnroll <= K; k += kUnroll)
#pragma GCC unroll 2
    for (int u = 0; u < kUnroll; ++u, panel += row_stride) term(k + u, panel);
  if constexpr (kUnroll > 1)
    if (k < K) term(k, panel);
}

// total[r * V + v] is set to one chain of C of V columns, or has it added.
template <class S, int R, int V, int C, class Next = NothingAhead>
FASTLSTM_INLINE void add_chain(S (*total)[kLanes<S>], bool add, const S* const (&a)[R], i64 a_stride, const S* panel,
                               i64 row_stride, i64 K, Next next = {}) {
  Vec<S> sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) sum[r][v] = Vec<S>{};
  accumulate_chain<S, R, 1, C>(sum, a, a_stride, panel, 0, row_stride, K, next);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      if (add) sum[r][v] += load(total[r * V + v]);
      store(total[r * V + v], sum[r][v]);
    }
}

// Whether a tile has too many sums for the registers: then two columns at a time go through a chain.
template <int R, int V>
constexpr bool kTall = (R * V > kTileRows * kPanelVectors) && R > kTileRows;

// acc[r][p*V + v] = sum over k < K, any K: every kChain terms are summed on their own.
template <class S, int R, int P, int V>
FASTLSTM_INLINE void accumulate(Vec<S> (&acc)[R][P * V], const S* const (&a)[R], i64 a_stride, const S* panel,
                                i64 panel_stride, i64 row_stride, i64 K) {
  static_assert(!kTall<R, V> || P == 1, "a tall tile has one panel");
  alignas(64) S total[R * P * V][kLanes<S>];
  const S* at[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) at[r] = a[r];
  const auto put = [&]() FASTLSTM_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * V; ++v) store(total[r * P * V + v], acc[r][v]);
  };
  for (i64 done = 0;;) {
    const i64 length = smaller(kChain, K - done);
    if constexpr (kTall<R, V>) {
#pragma GCC unroll 1
      for (int v = 0; v + 2 <= V; v += 2)
        add_chain<S, R, V, 2>(total + v, done > 0, at, a_stride, panel + v * kLanes<S>, row_stride, length);
      if constexpr (V % 2)
        add_chain<S, R, V, 1>(total + V - 1, done > 0, at, a_stride, panel + (V - 1) * kLanes<S>, row_stride, length);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int v = 0; v < P * V; ++v) acc[r][v] = Vec<S>{};
      accumulate_chain<S, R, P, V>(acc, at, a_stride, panel, panel_stride, row_stride, length);
    }
    const bool last = done + length >= K;
    if (kTall<R, V> ? last : done > 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int v = 0; v < P * V; ++v)
          acc[r][v] = kTall<R, V> ? load(total[r * P * V + v]) : acc[r][v] + load(total[r * P * V + v]);
    }
    if (last) return;
    done += length;
    panel += length * row_stride;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) at[r] += length * a_stride;
    if constexpr (!kTall<R, V>) put();
  }
}

// Calls f(integral_constant) for a register tile of 1..most rows.
template <auto N>
struct Constant {
  static constexpr auto value = N;
};
template <int most, class F>
FASTLSTM_INLINE void with_rows(i64 rows, const F& f) {
  if constexpr (most > 1)
    if (rows < most) return with_rows<most - 1>(rows, f);
  f(Constant<most>{});
}

// Splits n rows of V vectors into register tiles of nearly equal height and calls f(first, Constant<rows>). The
// multipliers wait in low tiles; to avoid these, some tiles are taller than the registers suggest.
template <int V, class F>
FASTLSTM_INLINE void for_row_tiles(i64 n, const F& f) {
  constexpr i64 kRows = smaller(8, kTileRows * kPanelVectors / V), kMost = larger(kRows, kTallestTile);
  const i64 tiles = larger(n / kRows, ceil_div(n, kMost));
  for (i64 tile = 0; tile < tiles; ++tile) {
    const i64 first = tile * n / tiles, last = (tile + 1) * n / tiles;
    with_rows<kMost>(last - first, [&](auto rows) { f(first, rows); });
  }
}

// Rows at a fixed pitch.
template <class E>
struct Matrix {
  E* data;
  i64 pitch;
  FASTLSTM_INLINE E* row(i64 r) const { return data + r * pitch; }
};

// One register tile: out[r][0..n) = (add ? out[r] : 0) + sum over k < K of a[r][k * a_stride] * panel row k, for n
// columns (V vectors) of R rows.
// Not inlined: one copy serves every product in the library.
template <class S, int R, int V>
__attribute__((noinline)) void multiply_tile(const S* a, i64 a_pitch, i64 a_stride, i64 K, const S* panel,
                                             i64 panel_pitch, S* out, i64 out_pitch, i64 n, bool add) {
  const S* ar[R];
  Vec<S> acc[R][V];
  const i64 last = n - (V - 1) * kLanes<S>;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) ar[r] = a + r * a_pitch;
  accumulate<S, R, 1, V>(acc, ar, a_stride, panel, 0, panel_pitch, K);
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        acc[r][v] += load_n(out + r * out_pitch + v * kLanes<S>, v < V - 1 ? kLanes<S> : last);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_n(out + r * out_pitch + v * kLanes<S>, acc[r][v], v < V - 1 ? kLanes<S> : last);
}

// multiply_tile over any number of rows and up to kPanel columns.
template <class S>
inline void multiply_rows(i64 rows, const S* a, i64 a_pitch, i64 a_stride, i64 K, const S* panel, i64 panel_pitch,
                          S* out, i64 out_pitch, i64 n, bool add) {
  const auto with_width = [&](auto width) {
    for_row_tiles<decltype(width)::value>(rows, [&](i64 first, auto height) {
      multiply_tile<S, decltype(height)::value, decltype(width)::value>(
          a + first * a_pitch, a_pitch, a_stride, K, panel, panel_pitch, out + first * out_pitch, out_pitch, n, add);
    });
  };
  switch (ceil_div(n, kLanes<S>)) {
    case 1: return with_width(Constant<1>{});
    case 2: return with_width(Constant<2>{});
    case 3: return with_width(Constant<3>{});
    default: return with_width(Constant<4>{});
  }
}

// One chain of up to kChain terms from term k on, for R rows: sums[r] = (add ? sums[r] : 0) + sum of a[r][k ..] *
// panel. Not inlined: one copy serves every product in the library.
template <class S, int R>
__attribute__((noinline)) void multiply_chain(const S* const* a, i64 k, i64 K, const S* panel, S (*sums)[kPanel<S>],
                                              bool add, Ahead next) {
  constexpr int C = kTall<R, kPanelVectors> ? 2 : kPanelVectors;
  const S* ar[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) ar[r] = a[r] + k;
  const auto total = reinterpret_cast<S(*)[kLanes<S>]>(sums);
#pragma GCC unroll 1
  for (int v = 0; v < kPanelVectors; v += C, next.at += K * next.step)
    add_chain<S, R, kPanelVectors, C>(total + v, add, ar, 1, panel + v * kLanes<S>, kPanel<S>, K, next);
}

// Rows that pass over a part of a panel, one chain of it, while that is in L1. More rows read the panel again.
constexpr i64 kPanelRows = 48;

// sums[r] = (add ? sums[r] : 0) + sum over k < K of a[r][k] * panel[k], for up to kPanelRows rows; the product is
// summed on its own before it is added. next: the panel that will be read after this one; most: terms of a chain.
template <class S>
inline void multiply_panel(i64 rows, const S* const* a, i64 K, const S* panel, S (*sums)[kPanel<S>], bool add,
                           const S* next, i64 most = kChain) {
  alignas(64) S product[kPanelRows][kPanel<S>];
  const bool apart = add && K > most;
  S(*const out)[kPanel<S>] = apart ? product : sums;
  for (i64 k = 0; k < K; k += most) {
    const i64 length = smaller(most, K - k);
    const auto* ahead = reinterpret_cast<const char*>(k + most < K ? panel + most * kPanel<S> : next);
    for_row_tiles<kPanelVectors>(rows, [&](i64 first, auto height) {
      constexpr i64 R = decltype(height)::value;
      // Each tile of rows fetches its share of what follows.
      const i64 step = round_up(ceil_div(i64(kPanel<S> * sizeof(S)) * R, rows), 64);
      multiply_chain<S, R>(a + first, k, length, panel, out + first, apart ? k > 0 : add || k > 0,
                           {ahead + first * length * step / R, step});
    });
    panel += length * kPanel<S>;
  }
  if (apart)
    for (i64 r = 0; r < rows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        store(&sums[r][v * kLanes<S>], load(&sums[r][v * kLanes<S>]) + load(&product[r][v * kLanes<S>]));
}

// out[r][0..n) = sum over k < K of a[r][k] * panel[k], for any number of rows and up to kPanel columns.
template <class S>
inline void multiply_panel(i64 rows, Matrix<const S> a, i64 K, const S* panel, Matrix<S> out, i64 n, const S* next,
                           i64 most = kChain) {
  // A narrow panel, or the end of a wide one: what is beyond n costs nothing.
  if (n <= kPanel<S> - kLanes<S>) {
    const i64 part = most < kChain ? most : larger(1, K);  // which multiply_rows divides into chains of kChain
    for (i64 k = 0; k == 0 || k < K; k += part)
      multiply_rows<S>(rows, a.data + k, a.pitch, 1, smaller(part, K - k), panel + k * kPanel<S>, kPanel<S>, out.data,
                       out.pitch, n, k > 0);
    return;
  }
  alignas(64) S sums[kPanelRows][kPanel<S>];
  const S* at[kPanelRows];
  const i64 groups = ceil_div(rows, kPanelRows);
  for (i64 group = 0; group < groups; ++group) {
    const i64 first = group * rows / groups, count = (group + 1) * rows / groups - first;
    for (i64 r = 0; r < count; ++r) at[r] = a.row(first + r);
    multiply_panel<S>(count, at, K, panel, sums, false, group + 1 < groups ? panel : next, most);
    for (i64 r = 0; r < count; ++r) std::memcpy(out.row(first + r), sums[r], size_t(n) * sizeof(S));
  }
}

}  // namespace
}  // namespace fastlstm
