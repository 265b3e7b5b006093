// Layer normalisation (Ba et al.) of a row: normal = (v - mean) / sqrt(variance + 1e-5). Gain and bias are the cell's.
#pragma once

#include "cpu/cells/cell.h"
#include "cpu/memory.h"

namespace fastlstm {
namespace {

// The sum of a vector's numbers, in the order of a binary tree.
template <class S>
FASTLSTM_INLINE S horizontal_sum(Vec<S> v) {
#pragma GCC unroll 4
  for (int half = kLanes<S> / 2; half; half /= 2) {
    Vec<S> other = {};
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<S>; ++k) other[k] = v[k ^ half];
    v += other;
  }
  return v[0];
}

// sums[j] = sum over n elements of terms[j], which f(first, lanes, terms) computes for a vector of elements. Lanes
// beyond the last element do not count.
template <class S, int N, class F>
FASTLSTM_INLINE void sum_vectors(i64 n, S (&sums)[N], const F& f) {
  Vec<S> even[N] = {}, odd[N] = {}, terms[N];  // two chains, because an addition waits for the one before it
  i64 k = 0;
  for (; k + 2 * kLanes<S> <= n; k += 2 * kLanes<S>) {
    f(k, i64(kLanes<S>), terms);
    for (int j = 0; j < N; ++j) even[j] += terms[j];
    f(k + kLanes<S>, i64(kLanes<S>), terms);
    for (int j = 0; j < N; ++j) odd[j] += terms[j];
  }
  for_vectors<S>(n - k, [&](i64 first, i64 lanes) FASTLSTM_INLINE_LAMBDA {
    f(k + first, lanes, terms);
    for (int j = 0; j < N; ++j) {
      Vec<S> counted = {};
      std::memcpy(&counted, &terms[j], size_t(lanes) * sizeof(S));
      even[j] += counted;
    }
  });
  for (int j = 0; j < N; ++j) sums[j] = horizontal_sum<S>(even[j] + odd[j]);
}

// Mean and scale of each row of a group, rows of n elements. row(i): the elements of row i.
template <class S>
struct Moments {
  alignas(64) S mean[kRowGroup], scale[kRowGroup];  // scale = 1 / sqrt(variance + epsilon)

  template <class Row>
  FASTLSTM_INLINE Moments(i64 rows, i64 n, const Row& row) {
    S sums[kRowGroup][1] = {};
#pragma GCC unroll 1
    for (i64 i = 0; i < rows; ++i) {
      const S* a = row(i);
      sum_vectors<S>(n, sums[i], [&](i64 k, i64 lanes, Vec<S>(&term)[1]) FASTLSTM_INLINE_LAMBDA {
        term[0] = load_n(a + k, lanes);
      });
    }
    for (i64 i = 0; i < kRowGroup; ++i) mean[i] = sums[i][0] / S(n);
#pragma GCC unroll 1
    for (i64 i = 0; i < rows; ++i) {
      const S* a = row(i);
      sum_vectors<S>(n, sums[i], [&](i64 k, i64 lanes, Vec<S>(&term)[1]) FASTLSTM_INLINE_LAMBDA {
        const Vec<S> distance = load_n(a + k, lanes) - mean[i];
        term[0] = distance * distance;
      });
    }
    for (i64 i = 0; i < kRowGroup; ++i) scale[i] = S(1) / std::sqrt(sums[i][0] / S(n) + S(1e-5));
  }
  // Element v of row i.
  FASTLSTM_INLINE Vec<S> normalise(i64 i, Vec<S> v) const { return (v - mean[i]) * scale[i]; }
};

// Gradient of values before they were normalised. d: gradient of normal * gain. mean and slope: the means over the row
// of d * gain and of d * gain * normal.
template <class S>
FASTLSTM_INLINE Vec<S> normalise_grad(Vec<S> d, Vec<S> gain, Vec<S> normal, S scale, S mean, S slope) {
  return (d * gain - mean - normal * slope) * scale;
}

}  // namespace
}  // namespace fastlstm
