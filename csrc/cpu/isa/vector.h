// Vector types, through the compiler's vector extension: one source for every instruction set.
//
// Include isa.h instead of this file: kVectorBytes, the width of a vector, has to be defined before.
// Everything that is compiled once per instruction set sits in an unnamed namespace. Otherwise the linker could merge
// an AVX-512 copy of a function into the portable kernels.
#pragma once

#include <cmath>
#include <cstring>

#include "lstm.h"

#define FASTLSTM_INLINE inline __attribute__((always_inline))

namespace fastlstm {
namespace {

template <class S>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Word;
  typedef Word Words __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Word;
  typedef Word Words __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

// A vector of S (float or double), and how many numbers it has.
template <class S>
using Vec = typename Simd<S>::V;
template <class S>
constexpr int kLanes = kVectorBytes / int(sizeof(S));

// A vector of 64-bit words.
using Words64 = Simd<double>::Words;

template <class S>
FASTLSTM_INLINE Vec<S> splat(S s) {
  return s - Vec<S>{};
}

}  // namespace
}  // namespace fastlstm
