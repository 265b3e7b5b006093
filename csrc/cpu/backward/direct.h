// Products over a chunk of one direction from the weights as PyTorch stores them, for calls of few rows: products.h
// without packed weights. Weight gradients are written once, where they belong. Everything has the same bits either
// way.
#pragma once

#include "cpu/backward/direction.h"

namespace fastlstm {
namespace {

// dx for columns [begin, end) of I. It is added where the other direction has written.
template <class S>
inline void BackwardDirection<S>::direct_input_grad(i64 begin, i64 end) const {
  if (begin >= end) return;
  const i64 rows = chunk_rows(), most = smaller(rows, kRowGroup), out_pitch = pitch<S>(end - begin);
  const RowSums<S> sums(p_.dtype, most, end - begin);
  const Buffer<S> out(most * out_pitch);
  const StoredColumns w{p_.weights[all_.direction].w_ih, p_.dtype, s_.I, begin, end};
  for (i64 first = 0; first < rows; first += kRowGroup) {
    const i64 n = smaller(kRowGroup, rows - first);
    sums.sum(
        n, {chunk.dinputs_row(first), chunk.gate_pitch}, s_.gate_units(), w,
        [this](i64 q) { return gate_row<S>(s_, q); }, {out.get(), out_pitch}, gradient_chain(s_));
    for (i64 i = 0; i < n; ++i) put_input_grad(first + i, begin, end - begin, &out[i * out_pitch]);
  }
}

// What went into the products of the chunk, row by row: direct_weight_grads reads it.
template <class S>
inline void BackwardDirection<S>::collect_inputs() {
  const i64 rows = chunk_rows();
  const auto collect = [&](Buffer<S>& to, i64 columns, const auto& fill) {
    to = padded(rows, columns);
    for (i64 row = 0; row < rows; ++row) fill(row, &to[row * pitch<S>(columns)]);
  };
  if (dw_.w_ih) {
    collect(chunk.x, s_.I, [&](i64 row, S* to) { product_input(row, 0, s_.I, to); });
    collect(chunk.h, s_.P, [&](i64 row, S* to) { product_input(row, s_.I, s_.I + s_.P, to); });
  }
  if (dw_.w_hr) collect(chunk.hidden, s_.H, [&](i64 row, S* to) { hidden_before_projection(row, 0, s_.H, to); });
}

// Writes the weight gradients of a range of tiles of kPanel gate units and of as many units of a projection.
template <class S>
inline void BackwardDirection<S>::direct_weight_grads(i64 panel_begin, i64 panel_end) const {
  const i64 rows = chunk_rows();
  // Rows [row, row + count) of a gradient [.., K] from columns q on of d and from what went into the product.
  const auto multiply = [&](void* out, i64 row, i64 count, i64 K, const S* d, i64 d_pitch, const Buffer<S>& inputs) {
    alignas(64) S block[kPanel<S>][kPanel<S>];
    for (i64 k = 0; k < K && out; k += kPanel<S>)
      for (i64 i = 0; i < count; i += kPanel<S>) {
        const i64 n = smaller(kPanel<S>, count - i), width = smaller(kPanel<S>, K - k), at = (row + i) * K + k;
        multiply_rows<S>(n, d + i, 1, d_pitch, rows, &inputs[k], pitch<S>(K),
                         narrow_ ? block[0] : static_cast<S*>(out) + at, narrow_ ? kPanel<S> : K, width, false);
        for (i64 r = 0; r < n && narrow_; ++r) convert_out(out, p_.dtype, at + r * K, block[r], width);
      }
  };
  const auto runs = [&](i64 N, const auto& row_of,
                        const auto& f) {  // f(q, row, count): runs of rows that are neighbours
    for (i64 q = panel_begin * kPanel<S>; q < smaller(panel_end * kPanel<S>, N);) {
      i64 end = q + 1;
      while (end < smaller(panel_end * kPanel<S>, N) && row_of(end) == row_of(q) + end - q) ++end;
      f(q, row_of(q), end - q);
      q = end;
    }
  };
  if (dw_.w_ih)
    runs(
        s_.gate_units(), [&](i64 q) { return gate_row<S>(s_, q); },
        [&](i64 q, i64 row, i64 count) {
          multiply(dw_.w_ih, row, count, s_.I, chunk.dinputs_row(0) + q, chunk.gate_pitch, chunk.x);
          multiply(dw_.w_hh, row, count, s_.P, chunk.drecurrent_row(0) + q, chunk.gate_pitch, chunk.h);
          if (!dw_.b || s_.layer_norm) return;  // vector_grads has the bias then
          for_vectors<S>(count, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
            const Vec<S> sum = sum_rows<S>(chunk.dgates_row(0) + q + k, chunk.gate_pitch, rows);
            put_vector(dw_.b, row + k, sum, n);
          });
        });
  if (dw_.w_hr)
    runs(
        s_.P, [](i64 p) { return p; },
        [&](i64 p, i64 row, i64 count) {
          multiply(dw_.w_hr, row, count, s_.H, chunk.dhidden_row(0) + p, chunk.state_pitch, chunk.hidden);
        });
}

}  // namespace
}  // namespace fastlstm
