// sigmoid and tanh of a vector.
#pragma once

#include "cpu/float_mode.h"
#include "cpu/simd.h"

namespace fastlstm {
namespace {

// exp(y) = scale * (1 + fraction) with scale = 2^n, |fraction| <= 0.42. NaN stays NaN; y must lie within
// [-126 ln 2, 127 ln 2]. fma(a, b, c): a * b + c.
template <class Fma>
FASTLSTM_INLINE void split_exp(Vec<float> y, Vec<float>& scale, Vec<float>& fraction, const Fma& fma) {
  using Int = Simd<float>::Int;
  constexpr float kMagic = 0x1.8p23f + 127;  // adding it rounds to an integer; the low bits are then its exponent
  const Vec<float> shifted = fma(y, splat(0x1.715476p+0f), splat(kMagic));
  const Vec<float> n = shifted - kMagic;
  Vec<float> r = fma(n, splat(-0x1.62e400p-1f), y);  // ln 2 in two parts: the first has trailing zeros
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  scale = (Vec<float>)((Int)shifted << 23);
  // (exp(r) - 1 - r) / r^2, least maximum error over |r| <= ln 2 / 2: 3.4e-9 in exp(r)
  Vec<float> p = splat(0x1.6dbc66p-10f);
  p = fma(p, r, splat(0x1.124148p-7f));
  p = fma(p, r, splat(0x1.555454p-5f));
  p = fma(p, r, splat(0x1.555486p-3f));
  p = fma(p, r, splat(0.5f));
  fraction = fma(r * r, p, r);
}

FASTLSTM_INLINE void split_exp(Vec<float> y, Vec<float>& scale, Vec<float>& fraction) {
  split_exp(y, scale, fraction,
            [](Vec<float> a, Vec<float> b, Vec<float> c) FASTLSTM_INLINE_LAMBDA { return fma(a, b, c); });
}

// A closed gate is 0: sigmoid(-88) would be denormal.
FASTLSTM_INLINE Vec<float> sigmoid(Vec<float> x) {
  Vec<float> scale, fraction;
  split_exp(-clamp(x, -88.0f, 87.0f), scale, fraction);
  const Vec<float> s = divide(splat(1.0f), fma(scale, fraction, scale) + 1.0f);
  return kFlushesDenormals ? s : s < 0x1p-126f ? Vec<float>{} : s;
}

// (exp(2x) - 1) / (exp(2x) + 1) without cancellation near zero and without overflow.
FASTLSTM_INLINE Vec<float> tanh(Vec<float> x) {
  Vec<float> scale, fraction;
  split_exp(clamp(x + x, -20.0f, 20.0f), scale, fraction);  // tanh(10) rounds to 1
  const Vec<float> expm1 = fma(scale, fraction, scale - 1.0f);
  return divide(expm1, expm1 + 2.0f);
}

// float64 has to be right, not fast: it calls the C library for each number.
FASTLSTM_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (int k = 0; k < kLanes<double>; ++k) x[k] = 1.0 / (1.0 + std::exp(-x[k]));
  return x;
}
FASTLSTM_INLINE Vec<double> tanh(Vec<double> x) {
  for (int k = 0; k < kLanes<double>; ++k) x[k] = std::tanh(x[k]);
  return x;
}

}  // namespace
}  // namespace fastlstm
