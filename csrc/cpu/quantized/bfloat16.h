// Sums of products with bfloat16 weights: the part of these kernels that differs between instruction sets. Each header
// below defines, in the unnamed namespace:
//
//   kBfloat16Rate   products a cycle, what follows a panel included: for plan.h
//   Bfloat16Rows    activations as the products take them
//   kBfloat16Most   rows that one call takes at most
//   kPaired         rows that one instruction takes together: calls begin at a multiple of it
//   kWidens         whether more rows than that may take panels in float32 (widened_panels.h)
//   bfloat16_dots<R>(a, w, pairs, sums)   sums[r][column] = a[r] times that column of the panel w, 2 * pairs terms
//
// Where there are dot products of bfloat16, these take activations that are rounded to it. Terms and their roundings
// are the same for every number of rows, so that a row's bits do not depend on its batch.
#pragma once

#include "cpu/memory.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {
namespace {

// What the gate sums of a panel are, of one row.
using Columns = float[kColumns];

}  // namespace
}  // namespace fastlstm

// The sources of kernels that take them say so: results must not depend on what else a compiler is allowed to use.
#if !defined(FASTLSTM_BFLOAT16_PRODUCTS)
#include "cpu/quantized/bfloat16_widened.h"
#elif defined(__AVX512BF16__)
#include "cpu/quantized/bfloat16_avx512.h"
#else
#include "cpu/quantized/bfloat16_neon.h"
#endif
