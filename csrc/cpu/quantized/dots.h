// Sums of products of 8-bit integers, exact in 32 bits: the part of the int8 kernels that differs between instruction
// sets. Each header below defines, in the unnamed namespace:
//
//   kMostRows   rows of activations that one call takes at most
//   kFlip       what is xor-ed to an activation 0..255 before it is stored: 0, or 128 where instructions take signed
//               numbers on both sides
//   int8_dots<R>(a, w, groups, sums)   sums[r][column] = sum over 4 * groups terms of a[r] and the column of the panel
//               w, for R rows
#pragma once

#include "cpu/memory.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {
namespace {

using Sums = int32_t[kColumns];

}  // namespace
}  // namespace fastlstm

#if defined(__AVX512VNNI__)
#include "cpu/quantized/dots_avx512.h"
#elif defined(__x86_64__) && defined(__AVX2__)
#include "cpu/quantized/dots_avx2.h"
#elif defined(__aarch64__)
#include "cpu/quantized/dots_neon.h"
#else
#include "cpu/quantized/dots_generic.h"
#endif
