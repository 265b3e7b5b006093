// Sums of the rows of a matrix as PyTorch stores it, each times a number: out = a w, where w [Q, K] is read row by row,
// once, and nothing is packed but a part of w that fits L1, where rows are many. The sums run over q in the order, and
// with the roundings, of multiply_panel in gemm.h, so a pass may take either.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"

namespace fastlstm {
namespace {

// Columns [begin, end) of a matrix w [Q, K]; row q of the sum is row `row(q)` of the matrix.
struct StoredColumns {
  const void* data;
  Dtype dtype;
  i64 K, begin, end;
};

template <class S>
class RowSums {
 public:
  // For up to `rows` rows of `columns` columns.
  RowSums(Dtype dtype, i64 rows, i64 columns) : pitch_(pitch<S>(columns)) {
    if (rows >= kManyRows) return;  // they go by panels
    chain_ = Buffer<S>(rows * pitch_);
    if (element_bytes(dtype) != sizeof(S)) wide_ = Buffer<S>(kTogether * columns);
  }

  // out.row(n)[0 .. end - begin) = sum over q < Q of a.row(n)[q] * row(q) of w, for N rows. most: terms of a chain.
  template <class Row>
  void sum(i64 N, Matrix<const S> a, i64 Q, const StoredColumns& w, const Row& row, Matrix<S> out,
           i64 most = kChain) const {
    if (!chain_) return by_panels(N, a, Q, w, row, out, most);
    const i64 columns = w.end - w.begin;
    const Matrix<S> chain{chain_.get(), pitch_};
    for (i64 q = 0; q == 0 || q < Q; q += most) {
      const Matrix<S> sums = q > 0 ? chain : out;
      for (i64 n = 0; n < N; ++n) std::memset(sums.row(n), 0, size_t(columns) * sizeof(S));
      add_rows(N, a, q, smaller(q + most, Q), w, row, sums);
      if (q > 0) add(N, columns, out, sums);
    }
  }

 private:
  static constexpr i64 kTogether = 8;  // rows of w that pass over the sums together: fewer loads and stores of these
  static constexpr int kRows = kVectorBytes >= 64 ? 2 : 1;  // of the sums: their factors stay in registers

  // From so many rows on it is worth while to copy a part of w to where it is dense: sums then stay in registers.
  static constexpr i64 kManyRows = 8;

  template <class Row>
  static void by_panels(i64 N, Matrix<const S> a, i64 Q, const StoredColumns& w, const Row& row, Matrix<S> out,
                        i64 most) {
    const Buffer<i64> first(Q);
    for (i64 q = 0; q < Q; ++q) first[q] = row(q) * w.K + w.begin;
    Buffer<S> panel(most * kPanel<S>);
    panel.zero();  // its padding is read
    for (i64 k = 0; k < w.end - w.begin; k += kPanel<S>)
      for (i64 q = 0; q < Q; q += most) {
        const i64 width = smaller(kPanel<S>, w.end - w.begin - k), terms = smaller(most, Q - q);
        for (i64 j = 0; j < terms; ++j) convert_in(&panel[j * kPanel<S>], w.data, w.dtype, first[q + j] + k, width);
        multiply_rows<S>(N, a.row(0) + q, a.pitch, 1, terms, panel.get(), kPanel<S>, out.row(0) + k, out.pitch, width,
                         q > 0);
      }
  }

  static void add(i64 N, i64 columns, Matrix<S> to, Matrix<S> from) {
    for (i64 n = 0; n < N; ++n)
      for_vectors<S>(columns, [&](i64 k, i64 width) FASTLSTM_INLINE_LAMBDA {
        store_n(to.row(n) + k, load_n(from.row(n) + k, width) + load_n(to.row(n) + k, width), width);
      });
  }

  // sums += rows [q_begin, q_end).
  template <class Row>
  void add_rows(i64 N, Matrix<const S> a, i64 q_begin, i64 q_end, const StoredColumns& w, const Row& row,
                Matrix<S> sums) const {
    const i64 columns = w.end - w.begin;
    for (i64 q = q_begin; q < q_end; q += kTogether) {
      const i64 count = smaller(kTogether, q_end - q);
      const S* rows[kTogether];
      for (i64 j = 0; j < count; ++j) {
        const i64 first = row(q + j) * w.K + w.begin;
        rows[j] = static_cast<const S*>(w.data) + first;
        if (!wide_) continue;
        convert_in(&wide_[j * columns], w.data, w.dtype, first, columns);
        rows[j] = &wide_[j * columns];
      }
      i64 n = 0;
      if (count == kTogether) {
        for (; n + kRows <= N; n += kRows) add_tile<kTogether, kRows>(a.row(n) + q, a.pitch, rows, columns, sums, n);
        for (; n < N; ++n) add_tile<kTogether, 1>(a.row(n) + q, a.pitch, rows, columns, sums, n);
      } else {
        for (; n < N; ++n)
          for (i64 j = 0; j < count; ++j) add_tile<1, 1>(a.row(n) + q + j, a.pitch, rows + j, columns, sums, n);
      }
    }
  }

  // Adds Q rows of w, one after the other, to R rows of sums from n on.
  template <int Q, int R>
  __attribute__((noinline)) static void add_tile(const S* a, i64 a_pitch, const S* const* rows, i64 columns,
                                                 Matrix<S> sums, i64 n) {
    Vec<S> factor[R][Q];
    const S* w[Q];
    S* to[R];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) w[q] = rows[q];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      to[r] = sums.row(n + r);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) factor[r][q] = splat(a[r * a_pitch + q]);
    }
    i64 k = 0;
#pragma GCC unroll 1
    for (; k + kLanes<S> <= columns; k += kLanes<S>) {
      Vec<S> sum[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sum[r] = load(to[r] + k);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const Vec<S> numbers = load(w[q] + k);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) sum[r] = add_product(sum[r], factor[r][q], numbers);
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) store(to[r] + k, sum[r]);
    }
    if (k == columns) return;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      Vec<S> sum = load_n(to[r] + k, columns - k);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sum = add_product(sum, factor[r][q], load_first(w[q] + k, columns - k));
      store_n(to[r] + k, sum, columns - k);
    }
  }

  i64 pitch_;
  Buffer<S> chain_;  // sums of the rows that are being added up
  Buffer<S> wide_;   // rows of 16-bit weights as S
};

}  // namespace
}  // namespace fastlstm
