// The cells. Of int8 weights all is made of operations that IEEE 754 defines: the same bits from every instruction set.
// Products with bfloat16 differ between these anyway, so such cells compute as activations.h does, which is faster.
// With e(x) = exp(-x) and t(x) = exp(2x) - 1, so that tanh(x) = t / (t + 2):
//
//   c' = c / (1 + e(f)) + t(g) / ((1 + e(i)) * (t(g) + 2))
//   h' = t(c') / ((1 + e(o)) * (t(c') + 2))
//
// Three quotients instead of five.
#pragma once

#include "cpu/activations.h"

namespace fastlstm {
namespace {

// a * b + c, rounded once.
FASTLSTM_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  for (int k = 0; k < kLanes<float>; ++k) c[k] = std::fma(a[k], b[k], c[k]);
  return c;
#endif
}

// How a cell computes: a * b + c, and a / b for b in [1, 2^96].
struct FastArithmetic {
  static FASTLSTM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return fma(a, b, c); }
  static FASTLSTM_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) { return divide(a, b); }
};

struct DefinedArithmetic {
  static FASTLSTM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return fused(a, b, c); }
  // Newton's steps from a reciprocal that is right to an eighth. A division would take three times as long.
  static FASTLSTM_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
    using Int = Simd<float>::Int;
    Vec<float> r = (Vec<float>)(Int{} + 0x7ef311c7 - (Int)b);
#pragma GCC unroll 3
    for (int step = 0; step < 3; ++step) r = fused(r, fused(-b, r, splat(1.0f)), r);
    const Vec<float> q = a * r;
    return fused(fused(-b, q, a), r, q);
  }
};

template <class A>
constexpr auto kMultiplyAdd = [](Vec<float> a, Vec<float> b, Vec<float> c)
                                  FASTLSTM_INLINE_LAMBDA { return A::multiply_add(a, b, c); };

// 1 + exp(-x); a gate of less than exp(-40) is closed.
template <class A>
FASTLSTM_INLINE Vec<float> one_and_exp(Vec<float> x) {
  Vec<float> scale, fraction;
  split_exp(-clamp(x, -40.0f, 40.0f), scale, fraction, kMultiplyAdd<A>);
  return A::multiply_add(scale, fraction, scale) + 1.0f;
}

// exp(2x) - 1; tanh(10) rounds to 1.
template <class A>
FASTLSTM_INLINE Vec<float> exp2_less_one(Vec<float> x) {
  Vec<float> scale, fraction;
  split_exp(clamp(x + x, -20.0f, 20.0f), scale, fraction, kMultiplyAdd<A>);
  return A::multiply_add(scale, fraction, scale - 1.0f);
}

// The next state of units whose gate sums are these; c becomes the new one, h is returned.
template <class A>
FASTLSTM_INLINE Vec<float> next_state(Vec<float> i, Vec<float> f, Vec<float> g, Vec<float> o, Vec<float>& c) {
  const Vec<float> of_g = exp2_less_one<A>(g);
  c = A::quotient(c, one_and_exp<A>(f)) + A::quotient(of_g, one_and_exp<A>(i) * (of_g + 2.0f));
  const Vec<float> of_c = exp2_less_one<A>(c);
  return A::quotient(of_c, one_and_exp<A>(o) * (of_c + 2.0f));
}

// The next state of an RNN. NaN stays NaN.
template <class A>
FASTLSTM_INLINE Vec<float> next_state(Vec<float> z, bool relu) {
  if (relu) return z < 0 ? Vec<float>{} : z;
  const Vec<float> of_z = exp2_less_one<A>(z);
  return A::quotient(of_z, of_z + 2.0f);
}

}  // namespace
}  // namespace fastlstm
