// Products of a lane of the forward pass from the weights as PyTorch stores them: gates.h without packed weights.
#pragma once

#include "cpu/forward/lane.h"

namespace fastlstm {
namespace {

// Gate sums that are kept before the states follow from them: of kRowGroup rows for one tile of units, or of few rows
// for more tiles, so that each gate is a long run of memory.
constexpr i64 kDirectPanels = 2 * kRowGroup;

template <class S, Cell cell>
inline void ForwardLane<S, cell>::direct_input_products(i64 tile_begin, i64 tile_end) {
  const Dots<S> dots = direct_.dots();
  alignas(64) S sums[kRowGroup][kPanel<S>];
  for (i64 tile = tile_begin; tile < tile_end; ++tile)
    for (i64 first = 0; first < chunk_rows_; first += kRowGroup) {
      const i64 n = smaller(kRowGroup, chunk_rows_ - first);
      direct_.inputs(dots, {tile, tile + 1}, &x_row_[first], n, sums, false);
      for (i64 r = 0; r < n; ++r) put_panel(input_product(tile, first + r), tile, sums[r]);
    }
}

template <class S, Cell cell>
inline void ForwardLane<S, cell>::direct_gates(i64 tile_begin, i64 tile_end) {
  if (n_ == 0) return;
  const Dots<S> dots = direct_.dots();
  const i64 groups = ceil_div(n_, kRowGroup), most = groups > 1 ? 1 : smaller(4, kDirectPanels / n_);
  const i64 blocks = ceil_div(tile_end - tile_begin, most);
  for (i64 k = 0; k < blocks; ++k) {
    const i64 block = tile_begin + (reads_backwards_ ? blocks - 1 - k : k) * most;
    for (i64 group = 0; group < groups; ++group)
      direct_tiles(dots, group * n_ / groups, (group + 1) * n_ / groups, {block, smaller(block + most, tile_end)});
  }
}

// Gate sums of rows [first, last), at most kRowGroup of them, for a range of tiles; then what follows from them.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::direct_tiles(const Dots<S>& dots, i64 first, i64 last, Range tiles) {
  alignas(64) S sums[kDirectPanels][kPanel<S>];
  const S* h[kRowGroup];
  const i64 n = last - first;
  const bool normalised = kByRow && s_.layer_norm;  // then both products are needed on their own
  for (i64 r = 0; r < n; ++r) h[r] = &(kByRow && h_masked_ ? h_masked_ : h_)[(first + r) * state_pitch_];
  const auto for_panels = [&](const auto& f) FASTLSTM_INLINE_LAMBDA {  // f(tile, row, its sums)
    S(*panel)[kPanel<S>] = sums;
    for (i64 tile = tiles.begin; tile < tiles.end; ++tile)
      for (i64 row = first; row < last; ++row, ++panel) f(tile, row, *panel);
  };
  if (!inputs_ahead_ && !normalised)
    direct_.gates(dots, tiles, &x_row_[first_row_ + first], h, n, sums);
  else if (!normalised)
    for_panels([&](i64 tile, i64 row, S* panel) {
      for (i64 v = 0; v < kPanelVectors; ++v)
        store(panel + v * kLanes<S>, load(input_product(tile, first_row_ + row) + v * gate_step(tile)));
    });
  if (inputs_ahead_ || normalised) direct_.hidden(dots, tiles, h, n, sums, !normalised);
  direct_.add_bias(tiles, n, sums);
  if constexpr (kByRow)
    for_panels([&](i64 tile, i64 row, S* panel) { put_panel(z_row(row) + tile * kPanel<S>, tile, panel); });
  else
    for (i64 tile = tiles.begin; tile < tiles.end; ++tile) update<1>(first, n, tile, sums + (tile - tiles.begin) * n);
}

// h = m w_hr^T for units [begin, begin + count) of P, one panel.
template <class S, Cell cell>
inline void ForwardLane<S, cell>::direct_projection(i64 begin, i64 count) {
  const Dots<S> dots(p_.dtype, s_.H, false);
  alignas(64) S sums[kRowGroup][kPanel<S>];
  const S* m[kRowGroup];
  for (i64 first = 0; first < n_; first += kRowGroup) {
    const i64 n = smaller(kRowGroup, n_ - first);
    for (i64 r = 0; r < n; ++r) m[r] = &m_[(first + r) * hidden_pitch_];
    dots.multiply({w_.w_hr, p_.dtype, s_.H, m}, begin, count, n, sums[0], kPanel<S>, false);
    for (i64 r = 0; r < n; ++r)
      std::memcpy(&h_next_[(first + r) * state_pitch_ + begin], sums[r], size_t(count) * sizeof(S));
  }
}

}  // namespace
}  // namespace fastlstm
