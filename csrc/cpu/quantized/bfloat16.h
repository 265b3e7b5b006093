// Sums of products with bfloat16 weights: the part of these kernels that differs between instruction sets. Each header
// below defines, in the unnamed namespace:
//
//   kBfloat16Rate   products a cycle, what follows a panel included: for plan.h
//   Bfloat16Rows    activations as the products take them
//   kBfloat16Most   rows that one call takes at most
//   kPaired         rows that one instruction takes together: calls begin at a multiple of it
//   kScaled         whether sums are to be multiplied by the scales of their row and column: see below
//   kPreparing      of panels that are prepared once a call, if there are such
//   kAdds           whether bfloat16_dots adds to what is in sums; not if it is kScaled
//   bfloat16_dots(n, a, w, scales, pairs, sums)   sums[r][column] = a[r] times that column of the panel w, 2 * pairs
//                                                 terms, for n rows; scales of the columns
//
// or, instead of the last two, tile_dots<R>, which makes the sums of R rows.
//
// and if there are such panels
//
//   prepare_panel(w, scales, pairs, out)
//   prepared_dots(n, a, panel, pairs, sums)   what bfloat16_dots makes, of n rows; if it is not kScaled,
//                                             added to what is in sums
//
// and if it is kScaled, in Bfloat16Rows
//
//   largest_scale(scales, K)   rows of a larger scale that is above 1, and those of one below zero, have exact_dots
//                              instead
//   kExactRows                 rows that one call takes of these
//   exact_dots<R>(a, w, scales, pairs, sums)   what bfloat16_dots makes, of float32 rows times their scale
//
// Where products are those of 16-bit numbers, activations are rounded. Terms and their roundings are the same for every
// number of rows, so that a row's bits do not depend on its batch.
#pragma once

#include "cpu/memory.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {
namespace {

// What the gate sums of a panel are, of one row.
using Columns = float[kColumns];

// Of what products of many steps take instead of the panels, made of these once a call.
struct Preparing {
  double rate = 0;   // products a cycle; 0: there is no such thing
  i64 bytes = 0;     // of one of its numbers
  double speed = 0;  // bytes a cycle, of weights before and after, in memory that may be new
  i64 least = 0;     // rows that should take them
  i64 most = 1;      // rows that one call takes
};

}  // namespace
}  // namespace fastlstm

// The sources of kernels that take them say so: results must not depend on what else a compiler is allowed to use.
#if defined(FASTLSTM_BFLOAT16_PRODUCTS) && defined(__AVX512BF16__)
#include "cpu/quantized/bfloat16_avx512.h"
#else

#if defined(FASTLSTM_FLOAT16_PRODUCTS)
#include "cpu/quantized/bfloat16_float16.h"
#elif defined(FASTLSTM_BFLOAT16_PRODUCTS)
#include "cpu/quantized/bfloat16_neon.h"
#else
#include "cpu/quantized/bfloat16_widened.h"
#endif

namespace fastlstm {
namespace {

constexpr bool kAdds = false;

template <class Number>
inline void bfloat16_dots(i64 n, const Number* const* a, const uint16_t* w, const float* scales, i64 pairs,
                          Columns* sums) {
  with_rows<kBfloat16Most>(n, [&](auto rows) { tile_dots<decltype(rows)::value>(a, w, scales, pairs, sums); });
}

}  // namespace
}  // namespace fastlstm
#endif
