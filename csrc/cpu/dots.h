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

// out[n * out_pitch + r] (+)= the sum of the lanes of v[n * R + r]. As many rows as fill a vector with their sums are
// added up together.
template <class S, int R, int N>
FASTLSTM_INLINE void store_lane_sums(Vec<S>* v, S* out, i64 out_pitch, bool add) {
  typedef S Part __attribute__((vector_size(R * sizeof(S)), aligned(sizeof(S)), may_alias));
  constexpr int most = kLanes<S> / R, rows = N >= most ? most : N >= 2 && most >= 2 ? 2 : 1, count = rows * R;
  add_lanes<S, count>(v);
  if constexpr (count < kLanes<S>) v[0] = pick<S, EveryNth<kLanes<S>, kLanes<S> / count>>(v[0], v[0]);
  alignas(64) S sums[kLanes<S>];
  store(sums, v[0]);
#pragma GCC unroll 4
  for (int n = 0; n < rows; ++n) {
    Part part, *at = reinterpret_cast<Part*>(out + n * out_pitch);
    std::memcpy(&part, sums + n * R, sizeof part);
    *at = add ? *at + part : part;
  }
  if constexpr (N > rows) store_lane_sums<S, R, N - rows>(v + count, out + rows * out_pitch, out_pitch, add);
}

// ---- products -----------------------------------------------------------------------------------------------

// Rows of w, of K numbers each, and what they are multiplied with, row by row.
template <class S>
struct Factors {
  const S* w;
  const S* const* a;
  i64 K;
};

// Where the next rows of w are fetched to, while those before are multiplied.
enum class Fetch { none, first_level, second_level };

// out[n * out_pitch + r] (+)= the sum over all factors of row r of w . a[n], for `rows` rows of w and N of a; R rows of
// w, a tile, at a time. What follows the last row up to a whole tile is overwritten. fetches: where the next tile is
// fetched to. Not inlined, so that the inner loop has all registers for its sums.
template <class S, int R, int N, Fetch fetches>
__attribute__((noinline)) void dot_rows(const Factors<S>* factors, i64 count, i64 rows, S* out, i64 out_pitch,
                                        bool add) {
#pragma GCC unroll 1
  for (i64 row = 0; row < rows; row += R, out += R) {
    Vec<S> sums[N * R];
#pragma GCC unroll 64
    for (int k = 0; k < N * R; ++k) sums[k] = Vec<S>{};
#pragma GCC unroll 1
    for (const Factors<S>* of = factors; of < factors + count; ++of) {
      const i64 K = of->K;
      const S *wr[R], *an[N];
      wr[0] = of->w + row * K;
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r) wr[r] = wr[r - 1] + K;
      if (rows - row < R) {  // the last row stands in for those that do not exist
#pragma GCC unroll 8
        for (int r = 1; r < R; ++r) wr[r] = row + r < rows ? wr[r] : wr[r - 1];
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) an[n] = of->a[n];
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
            Vec<S>& sum = sums[R < N ? j * R + i : i * R + j];
            sum = add_product(sum, kept[i], other);
          }
        }
      };
      i64 k = 0;
#pragma GCC unroll 1
      for (; k + kLanes<S> <= K; k += kLanes<S>) {
        if constexpr (fetches != Fetch::none) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) __builtin_prefetch(wr[r] + k + R * K, 0, fetches == Fetch::first_level ? 3 : 2);
        }
        term([k](const S* p) FASTLSTM_INLINE_LAMBDA { return load(p + k); });
      }
      if (k < K) term([k, K](const S* p) FASTLSTM_INLINE_LAMBDA { return load_first(p + k, K - k); });
    }
    store_lane_sums<S, R, N>(sums, out, out_pitch, add);
  }
}

// Bytes of a tile up to which the next one is fetched into L1 meanwhile. Longer rows the core foresees. With one or two
// rows of the batch there is time for it only where vectors lie across lines: these wait for two lines each, so for
// them it helps in tiles of twice as many bytes, too. More rows of the batch leave a core too little time to foresee
// long rows that come from memory: these are fetched into L2.
constexpr i64 kFetched = 4096;

// Rows of weights in a tile: many where there are few rows of the batch, so that enough chains are in flight.
template <class S>
constexpr int kFewRows = smaller(8, kLanes<S>);
template <class S>
constexpr int kManyRows = smaller(4, kLanes<S>);

// A matrix of weights [.., K] as it lies in its tensor, and rows that it is multiplied with.
template <class S>
struct Stored {
  const void* w;
  Dtype dtype;
  i64 K;
  const S* const* a;
};

// out[n * out_pitch + r] (+)= row first + r of w . a[n], for `rows` rows of w and N of a; of two products their sum,
// whose lanes are added once. What follows the last row up to a whole tile (8 at most) is overwritten.
template <class S>
class Dots {
 public:
  // most: the largest sum of K; far: whether the weights come from memory.
  Dots(Dtype dtype, i64 most, bool far) : far_(far) {
    if (element_bytes(dtype) != sizeof(S)) wide_ = Buffer<S>(kFewRows<S> * most);
  }

  void multiply(const Stored<S>& product, i64 first, i64 rows, i64 N, S* out, i64 out_pitch, bool add) const {
    multiply<1>({product}, first, rows, N, out, out_pitch, add);
  }
  template <int count>
  void multiply(const Stored<S> (&products)[count], i64 first, i64 rows, i64 N, S* out, i64 out_pitch, bool add) const {
    N <= 2 ? tiles<kFewRows<S>, 2>(products, first, rows, N, out, out_pitch, add)
           : tiles<kManyRows<S>, kTileRows>(products, first, rows, N, out, out_pitch, add);
  }

 private:
  template <int R, int most, int count>
  void tiles(const Stored<S> (&products)[count], i64 first, i64 rows, i64 N, S* out, i64 out_pitch, bool add) const {
    // Each group of rows of a takes all rows of w in turn, so that it stays in L1 while they come from L2. Rows of w
    // that have to be widened serve all groups instead.
    const i64 groups = ceil_div(N, most), step = wide_ ? R : rows;
    bool fits = !wide_, split = false;
    for (const Stored<S>& of : products) {
      const bool splits = of.K % kLanes<S> != 0;
      fits = fits && R * of.K * i64(sizeof(S)) <= (splits ? 2 : 1) * kFetched;
      split = split || splits;
    }
    const Fetch fetches = fits && (N > 2 || split)  ? Fetch::first_level
                          : far_ && !wide_ && N > 2 ? Fetch::second_level
                                                    : Fetch::none;
    for (i64 row = 0; row < rows; row += step) {
      const i64 there = smaller(step, rows - row);
      const S* tile[count];
      S* wide = wide_.get();
      for (int k = 0; k < count; ++k) {
        const Stored<S>& of = products[k];
        tile[k] = static_cast<const S*>(of.w) + (first + row) * of.K;
        if (!wide) continue;  // 16-bit weights: as S they fit the nearest cache
        convert_in(wide, of.w, of.dtype, (first + row) * of.K, there * of.K);
        tile[k] = wide;
        wide += R * of.K;
      }
      for (i64 group = 0; group < groups; ++group) {
        const i64 begin = group * N / groups, end = (group + 1) * N / groups;
        Factors<S> factors[count];
        for (int k = 0; k < count; ++k) factors[k] = {tile[k], products[k].a + begin, products[k].K};
        with_rows<most>(end - begin, [&](auto n) {
          S* const at = out + begin * out_pitch + row;
          constexpr int each = decltype(n)::value;
          const auto dot = [&](auto to) FASTLSTM_INLINE_LAMBDA {
            dot_rows<S, R, each, decltype(to)::value>(factors, count, there, at, out_pitch, add);
          };
          if (fetches == Fetch::none) return dot(Constant<Fetch::none>{});
          if (fetches == Fetch::first_level) return dot(Constant<Fetch::first_level>{});
          if constexpr (most > 2) dot(Constant<Fetch::second_level>{});
        });
      }
    }
  }

  bool far_;
  Buffer<S> wide_;
};

}  // namespace
}  // namespace fastlstm
