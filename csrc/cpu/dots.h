// Dot products with the rows of a matrix as PyTorch stores it: nothing is packed, and each weight is read once.
//
// Every product is the same sum in the same order, however rows are grouped: in each lane of a vector a chain of fused
// multiply-adds over every kLanes-th number, then a tree over the lanes. So a result depends neither on the batch nor
// on the thread that computes it. The products of gemm.h add in another order: plan.h decides from the sizes of a call
// which of the two it takes.
#pragma once

#include <utility>

#include "cpu/convert.h"
#include "cpu/gemm.h"

namespace fastlstm {
namespace {

// ---- sums over lanes ----------------------------------------------------------------------------------------

// Lane k of the result is lane Index::of(k) of a, or lane Index::of(k) - kLanes of b.
template <class S, class Index, int... k>
FASTLSTM_INLINE Vec<S> pick(Vec<S> a, Vec<S> b, std::integer_sequence<int, k...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::of(k)...);
#else
  return __builtin_shuffle(a, b, typename Simd<S>::Int{Index::of(k)...});
#endif
}
template <class S, class Index>
FASTLSTM_INLINE Vec<S> pick(Vec<S> a, Vec<S> b) {
  return pick<S, Index>(a, b, std::make_integer_sequence<int, kLanes<S>>());
}

// Groups of `width` lanes from a and b in turn: those in their place, or their neighbours.
template <int lanes, int width>
struct InPlace {
  static constexpr int of(int k) { return k + k / width % 2 * lanes; }
};
template <int lanes, int width>
struct Neighbour {
  static constexpr int of(int k) { return (k ^ width) + k / width % 2 * lanes; }
};
template <int lanes, int stride>
struct EveryNth {
  static constexpr int of(int k) { return k * stride % lanes; }
};

// Halves the groups of lanes of `count` vectors by adding each half to the other, and joins pairs of vectors, until
// v[0] holds the sums of all of them, in their order.
template <class S, int count, int width = kLanes<S> / 2>
FASTLSTM_INLINE void add_lanes(Vec<S>* v) {
  constexpr int half = count > 1 ? count / 2 : 1;
#pragma GCC unroll 8
  for (int r = 0; r < half; ++r) {
    const Vec<S> other = v[r + count - half];
    v[r] = pick<S, InPlace<kLanes<S>, width>>(v[r], other) + pick<S, Neighbour<kLanes<S>, width>>(v[r], other);
  }
  if constexpr (width > 1) add_lanes<S, half, width / 2>(v);
}

// out[0..R) (+)= the sum of the lanes of each vector.
template <class S, int R>
FASTLSTM_INLINE void store_lane_sums(Vec<S> (&v)[R], S* out, bool add) {
  typedef S Part __attribute__((vector_size(R * sizeof(S)), aligned(sizeof(S)), may_alias));
  add_lanes<S, R>(v);
  if constexpr (R < kLanes<S>) v[0] = pick<S, EveryNth<kLanes<S>, kLanes<S> / R>>(v[0], v[0]);
  Part sums, *at = reinterpret_cast<Part*>(out);
  std::memcpy(&sums, &v[0], sizeof sums);
  *at = add ? *at + sums : sums;
}

// ---- products -----------------------------------------------------------------------------------------------

// out[n * out_pitch + r] (+)= row r of w . a[n], over K numbers, for R rows of w and N of a. Only `rows` rows of w
// exist: the last one stands in for the others. Not inlined, so that the inner loop has all registers for its sums.
template <class S, int R, int N>
__attribute__((noinline)) void dot_tile(const S* w, i64 rows, const S* const* a, i64 K, S* out, i64 out_pitch,
                                        bool add) {
  const S *wr[R], *an[N];
  Vec<S> sums[N][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) wr[r] = w + smaller(r, rows - 1) * K;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    an[n] = a[n];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[n][r] = Vec<S>{};
  }
  const auto term = [&](const auto& read) FASTLSTM_INLINE_LAMBDA {
    // The smaller side, rows of w or of a, stays in registers while the other one is read.
    Vec<S> kept[R < N ? R : N];
#pragma GCC unroll 8
    for (int j = 0; j < (R < N ? R : N); ++j) kept[j] = read(R < N ? wr[j] : an[j]);
#pragma GCC unroll 8
    for (int j = 0; j < (R < N ? N : R); ++j) {
      const Vec<S> other = read(R < N ? an[j] : wr[j]);
#pragma GCC unroll 8
      for (int i = 0; i < (R < N ? R : N); ++i) {
        Vec<S>& sum = R < N ? sums[j][i] : sums[i][j];
        sum = add_product(sum, kept[i], other);
      }
    }
  };
  i64 k = 0;
#pragma GCC unroll 1
  for (; k + kLanes<S> <= K; k += kLanes<S>) term([k](const S* p) FASTLSTM_INLINE_LAMBDA { return load(p + k); });
  if (k < K) term([k, K](const S* p) FASTLSTM_INLINE_LAMBDA { return load_first(p + k, K - k); });
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store_lane_sums<S, R>(sums[n], out + n * out_pitch, add);
}

// Rows of weights in a tile, and of the batch. Few rows of the batch pass over many of weights, so that enough of
// memory is on its way; a second tile of them finds the weights in L1.
template <class S>
constexpr int kFewRows = smaller(8, kLanes<S>);
constexpr int kFewTile = kVectorBytes >= 64 ? 3 : 2, kFewest = 2 * kFewTile;
template <class S>
constexpr int kManyRows = smaller(4, kLanes<S>);

// A matrix of weights [.., K] as it lies in its tensor.
struct Stored {
  const void* data;
  Dtype dtype;
  i64 K;
};

// out[n * out_pitch + r] (+)= row first + r of w . a[n], for `rows` rows of w and N of a. What follows the last row up
// to a whole tile (8 at most) is overwritten.
template <class S>
class Dots {
 public:
  // most: the largest K.
  Dots(Dtype dtype, i64 most) {
    if (element_bytes(dtype) != sizeof(S)) wide_ = Buffer<S>(kFewRows<S> * most);
  }

  void multiply(const Stored& w, i64 first, i64 rows, const S* const* a, i64 N, S* out, i64 out_pitch, bool add) const {
    N <= kFewest ? tiles<kFewRows<S>, kFewTile>(w, first, rows, a, N, out, out_pitch, add)
                 : tiles<kManyRows<S>, kTileRows>(w, first, rows, a, N, out, out_pitch, add);
  }

 private:
  template <int R, int most>
  void tiles(const Stored& w, i64 first, i64 rows, const S* const* a, i64 N, S* out, i64 out_pitch, bool add) const {
    const i64 groups = ceil_div(N, most);
    for (i64 row = 0; row < rows; row += R) {
      const i64 there = smaller(R, rows - row);
      const S* tile = static_cast<const S*>(w.data) + (first + row) * w.K;
      if (wide_) {  // 16-bit weights: as S they fit the nearest cache
        convert_in(wide_.get(), w.data, w.dtype, (first + row) * w.K, there * w.K);
        tile = wide_.get();
      }
      for (i64 group = 0; group < groups; ++group) {
        const i64 begin = group * N / groups, end = (group + 1) * N / groups;
        with_rows<most>(end - begin, [&](auto n) {
          dot_tile<S, R, decltype(n)::value>(tile, there, a + begin, w.K, out + begin * out_pitch + row, out_pitch,
                                             add);
        });
      }
    }
  }

  Buffer<S> wide_;
};

}  // namespace
}  // namespace fastlstm
