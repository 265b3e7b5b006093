// Any other CPU: see dots.h.
#pragma once

namespace fastlstm {
namespace {

constexpr int kMostRows = 1;
constexpr int32_t kFlip = 0;

template <int R>
__attribute__((noinline)) void int8_dots(const uint8_t* const* rows, const int8_t* w, i64 groups, Sums* sums) {
  static_assert(R == 1, "one row");
  std::memset(sums[0], 0, sizeof sums[0]);
  for (i64 g = 0; g < groups; ++g)
    for (int column = 0; column < kColumns; ++column, w += 4)
      for (int k = 0; k < 4; ++k) sums[0][column] += int32_t(rows[0][4 * g + k]) * w[k];
}

}  // namespace
}  // namespace fastlstm
