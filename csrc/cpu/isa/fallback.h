// What an instruction set may define better, in code that every CPU can run: see isa.h.
#pragma once

#include "cpu/isa/vector.h"

namespace fastlstm {
namespace {
namespace fallback {

FASTLSTM_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  x = x > high ? splat(high) : x;
  return x < low ? splat(low) : x;
}

FASTLSTM_INLINE Vec<float> divide(Vec<float> a, Vec<float> b) { return a / b; }

FASTLSTM_INLINE Words64 multiply_low(const Words64& a, const Words64& b) {
  return (a & 0xffffffffu) * (b & 0xffffffffu);
}

template <class S>
FASTLSTM_INLINE Vec<S> load_first(const S* p, i64 n) {
  Vec<S> v = {};
  for (i64 k = 0; k < n; ++k) v[k] = p[k];
  return v;
}
template <class S>
FASTLSTM_INLINE void store_first(S* p, Vec<S> v, i64 n) {
  std::memcpy(p, &v, size_t(n) * sizeof(S));
}

inline float half_to_float(uint16_t v) {
  const uint32_t sign = uint32_t(v & 0x8000u) << 16, magnitude = v & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float f;
  if (magnitude >= 0x7c00u) {
    bits |= 0x7f800000u;  // inf, NaN
  } else if (magnitude >= 0x0400u) {
    bits += 112u << 23;  // the exponent counts from -127 instead of -15
  } else {               // a denormal half
    f = float(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {                                  // a denormal half: an addition rounds it
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

}  // namespace fallback
}  // namespace
}  // namespace fastlstm
