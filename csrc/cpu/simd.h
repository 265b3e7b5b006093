// Vectors in memory: whole ones, and the first n numbers of one.
//
// Types and arithmetic are in isa/: Vec<S> is a vector of kLanes<S> numbers of type S, float or double.
#pragma once

#include "cpu/isa/isa.h"

namespace fastlstm {
namespace {

template <class S>
FASTLSTM_INLINE Vec<S> load(const S* p) {
  return (Vec<S>)*reinterpret_cast<const typename Simd<S>::Unaligned*>(p);
}
template <class S>
FASTLSTM_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename Simd<S>::Unaligned*>(p) = (typename Simd<S>::Unaligned)v;
}
// The first n lanes; the others read as zero and are not written.
template <class S>
FASTLSTM_INLINE Vec<S> load_n(const S* p, i64 n) {
  return n >= kLanes<S> ? load(p) : load_first(p, n);
}
template <class S>
FASTLSTM_INLINE void store_n(S* p, Vec<S> v, i64 n) {
  if (n >= kLanes<S>)
    store(p, v);
  else
    store_first(p, v, n);
}

// Calls f(first, lanes) for each vector of n numbers; the last one may be shorter. A lambda that is passed here has to
// be FASTLSTM_INLINE_LAMBDA: then the compiler knows that whole vectors are whole.
#define FASTLSTM_INLINE_LAMBDA __attribute__((always_inline))
template <class S, class F>
FASTLSTM_INLINE void for_vectors(i64 n, const F& f) {
  i64 k = 0;
  for (; k + kLanes<S> <= n; k += kLanes<S>) f(k, i64(kLanes<S>));
  if (k < n) f(k, n - k);
}

}  // namespace
}  // namespace fastlstm
