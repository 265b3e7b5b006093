// aarch64 with dot products (Armv8.2): an instruction adds 16 products of signed bytes. See dots.h.
#pragma once

#include <arm_neon.h>

namespace fastlstm {
namespace {

constexpr int kMostRows = 4;
constexpr int32_t kFlip = 128;

template <int R>
__attribute__((noinline)) void int8_dots(const uint8_t* const* rows, const int8_t* w, i64 groups, Sums* sums) {
  for (int first = 0; first < kColumns / 4; first += 4) {
    int32x4_t acc[R][4];
#pragma GCC unroll 16
    for (int k = 0; k < 4 * R; ++k) acc[k / 4][k % 4] = vdupq_n_s32(0);
    for (i64 g = 0; g < groups; ++g) {
      int8x16_t four[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t bytes;
        std::memcpy(&bytes, rows[r] + 4 * g, 4);
        four[r] = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int8x16_t weights = vld1q_s8(w + (kColumns * g + 4 * (first + v)) * 4);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][v] = vdotq_s32(acc[r][v], four[r], weights);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < 4 * R; ++k) vst1q_s32(sums[k / 4] + 4 * (first + k % 4), acc[k / 4][k % 4]);
  }
}

}  // namespace
}  // namespace fastlstm
