// The gates of a chunk, computed again from x, y, c and the weights: for `recompute`, and for layer normalisation,
// which keeps no gates. The same sums in the same order give the same bits as the forward pass.
#pragma once

#include "cpu/backward/direction.h"

namespace fastlstm {
namespace {

// Gates of rows [row_begin, row_end) of this chunk, at most kProductRows of them.
template <class S>
inline void BackwardDirection<S>::recompute(i64 row_begin, i64 row_end) const {
  const i64 n = row_end - row_begin;
  Sources from;
  find_sources(from, row_begin, n);
  p_.packed_forward ? recompute_sums(from, row_begin, n) : recompute_direct_sums(from, row_begin, n);
  if (s_.layer_norm)
    activate_normalised_sums(from, row_begin, row_end);
  else if (extended_)
    activate_sums(from, row_begin, n);
}

template <class S>
inline void BackwardDirection<S>::find_sources(Sources& from, i64 row_begin, i64 n) const {
  const bool narrow = element_bytes(p_.dtype) != sizeof(S);
  from.x_copy = Buffer<S>(narrow ? n * s_.I : 0);
  from.h_copy = Buffer<S>(n * s_.P);
  if (const PairKernels* pairs = pairs_in_forward<S>(s_, p_.dtype)) {
    from.x_pairs = PairRows(pairs, n, s_.I);
    from.h_pairs = PairRows(pairs, n, s_.P);
  }
  for (i64 i = 0; i < n; ++i) {
    i64 t, slot;
    locate(row_begin + i, t, slot);
    const i64 b = all_.batch(slot), x = all_.offset(p_.x, t, b);
    from.x[i] = narrow ? &from.x_copy[i * s_.I] : element<const S>(p_.x.data, x);
    if (narrow) convert_in(&from.x_copy[i * s_.I], p_.x.data, p_.dtype, x, s_.I);
    from.h[i] = &from.h_copy[i * s_.P];
    previous_hidden(&from.h_copy[i * s_.P], t, slot, b, 0, s_.P);
    from.c[i] = previous_cell(p_, all_, chunk.c0, t, slot, b);
    if constexpr (sizeof(S) == sizeof(float))
      if (from.x_pairs) {
        from.x_pairs.put(i, from.x[i]);
        from.h_pairs.put(i, from.h[i]);
      }
  }
}

// Gate sums into chunk.gates, those of a plain LSTM activated while they are in L1; with layer normalisation its two
// products into chunk.inputs and chunk.recurrent.
template <class S>
inline void BackwardDirection<S>::recompute_sums(const Sources& from, i64 row_begin, i64 n) const {
  const ForwardPack<S> at(s_);
  const GateSums<S> of{s_, at, static_cast<const S*>(p_.packed_forward) + all_.direction * at.size,
                       pairs_in_forward<S>(s_, p_.dtype)};
  alignas(64) S sums[kPanelRows][kPanel<S>];
  const i64 groups = ceil_div(n, kPanelRows);
  for (i64 tile = 0; tile < at.tiles; ++tile)
    for (i64 group = 0; group < groups; ++group) {
      const i64 first = group * n / groups, rows = (group + 1) * n / groups - first;
      const S* after = of.input_panel(group + 1 < groups ? tile : smaller(tile + 1, at.tiles - 1));
      of.start(rows, &from.x[first], from.x_pairs.from(first), tile, sums, of.hidden_panel(tile));
      if (s_.layer_norm) {
        put_sums(chunk.inputs, row_begin + first, rows, tile, sums);
        std::memset(sums, 0, size_t(rows) * sizeof sums[0]);
      }
      of.add_hidden(rows, &from.h[first], from.h_pairs.from(first), tile, sums, after);
      for (i64 r = 0; r < rows && !extended_; ++r) activate(sums[r], kLanes<S>);
      put_sums(s_.layer_norm ? chunk.recurrent : chunk.gates, row_begin + first, rows, tile, sums);
    }
}

// Stores the sums of a tile; whole vectors in this order: see ForwardLane::gate_step.
template <class S>
inline void BackwardDirection<S>::put_sums(const Buffer<S>& to, i64 first, i64 rows, i64 tile,
                                           const S (*sums)[kPanel<S>]) const {
  const i64 unit = tile * kLanes<S>, width = smaller(kLanes<S>, s_.H - unit);
  for (i64 r = 0; r < rows; ++r)
    for (i64 v = 0; v < kPanelVectors; ++v)
      store(&to[(first + r) * chunk.gate_pitch + 4 * unit + v * width], load(&sums[r][v * kLanes<S>]));
}

// The same from stored weights.
template <class S>
inline void BackwardDirection<S>::recompute_direct_sums(const Sources& from, i64 row_begin, i64 n) const {
  const DirectSums<S> direct(s_, p_.dtype, p_.weights[all_.direction], false);
  const Dots<S> dots = direct.dots();
  const i64 tiles = ForwardPack<S>(s_).tiles;
  alignas(64) S sums[kRowGroup][kPanel<S>];
  for (i64 first = 0; first < n; first += kRowGroup) {
    const i64 count = smaller(kRowGroup, n - first);
    for (i64 tile = 0; tile < tiles; ++tile) {
      const auto put = [&](const Buffer<S>& to) { put_sums(to, row_begin + first, count, tile, sums); };
      if (s_.layer_norm) {
        direct.inputs(dots, {tile, tile + 1}, &from.x[first], count, sums, false);
        put(chunk.inputs);
        direct.hidden(dots, {tile, tile + 1}, &from.h[first], count, sums, false);
      } else {
        direct.gates(dots, {tile, tile + 1}, &from.x[first], &from.h[first], count, sums);
      }
      direct.add_bias({tile, tile + 1}, count, sums);
      for (i64 r = 0; r < count && !extended_; ++r) activate(sums[r], kLanes<S>);
      put(s_.layer_norm ? chunk.recurrent : chunk.gates);
    }
  }
}

template <class S>
inline void BackwardDirection<S>::activate_sums(const Sources& from, i64 row_begin, i64 n) const {
  for (i64 i = 0; i < n; ++i) {
    S* gates = chunk.gates_row(row_begin + i);
    activate_row(
        *extended_, [&](i64 k, i64 width) FASTLSTM_INLINE_LAMBDA { return load_n(gates + k, width); }, gates, from.c[i],
        static_cast<S*>(nullptr));
  }
}

template <class S>
inline void BackwardDirection<S>::activate_normalised_sums(const Sources& from, i64 row_begin, i64 row_end) const {
  for (i64 first = row_begin; first < row_end; first += kRowGroup) {
    const i64 rows = smaller(kRowGroup, row_end - first);
    const auto x = [&](i64 k) { return chunk.dinputs_row(first + k); };
    const auto h = [&](i64 k) { return chunk.recurrent_row(first + k); };
    const Moments<S> of_x(rows, 4 * s_.H, x), of_h(rows, 4 * s_.H, h);
    for (i64 k = 0; k < rows; ++k) {
      chunk.normalised[first + k].input_scale = of_x.scale[k];
      chunk.normalised[first + k].recurrent_scale = of_h.scale[k];
      activate_normalised<true>(*extended_, x(k), of_x, h(k), of_h, k, chunk.gates_row(first + k),
                                from.c[first + k - row_begin], static_cast<S*>(nullptr));
    }
  }
}

}  // namespace
}  // namespace fastlstm
