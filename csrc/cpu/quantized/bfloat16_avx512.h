// AVX-512 with BF16, where the CPU gains by it (isa/x86.h). See bfloat16.h.
#pragma once

#include "cpu/bfloat16_chain.h"
#include "cpu/quantized/bfloat16_rows.h"

namespace fastlstm {
namespace {

constexpr double kBfloat16Rate = 56;  // of two such instructions a cycle, as on Zen 5
constexpr int kBfloat16Most = kPanelRows, kPaired = 1;
constexpr bool kScaled = false, kAdds = true;
constexpr Preparing kPreparing{};
using Bfloat16Rows = RoundedRows<1>;

inline void bfloat16_dots(i64 n, const uint16_t* const* a, const uint16_t* w, const float*, i64 pairs, Columns* sums) {
  alignas(64) Columns products[kBfloat16Most];
  pair_products<Bfloat16Chain>(n, a, 2, w, pairs, products, PutAdded{sums, true}, w + pairs * 128);
}

}  // namespace
}  // namespace fastlstm
