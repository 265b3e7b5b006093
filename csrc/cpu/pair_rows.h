// Rows of numbers as the products of pairs.h take them.
#pragma once

#include "cpu/memory.h"
#include "cpu/pairs.h"

namespace fastlstm {
namespace {

// Of activations or of gradients. Without kernels there are none.
class PairRows {
 public:
  PairRows() = default;
  PairRows(const PairKernels* kernels, i64 rows, i64 K)
      : kernels_(kernels), K_(K), pitch_(round_up(K, 32) + 32), data_(rows * pitch_), scales_(rows) {}

  explicit operator bool() const { return kernels_; }
  void put(i64 row, const float* x) const { scales_[row] = kernels_->round_row(x, K_, &data_[row * pitch_]); }
  // Every step-th row from `first` on.
  PairMatrix from(i64 first, i64 step = 1) const {
    if (!kernels_) return {};
    return {&data_[first * pitch_], step * pitch_, &scales_[first], step};
  }

 private:
  const PairKernels* kernels_ = nullptr;
  i64 K_ = 0, pitch_ = 0;
  Buffer<uint16_t> data_;
  Buffer<float> scales_;
};

// Which of n rows have products in float16, and which in float32: those of a scale below zero, and those of one above
// both `least` and limit(), which is asked for only if it matters.
template <i64 most>
struct Division {
  i64 row_of[most];  // first rows for float16, then those for float32
  i64 count = 0;     // of the first ones

  template <class ScaleOf, class Limit>
  Division(i64 n, const ScaleOf& scale_of, float least, const Limit& limit) {
    float large = -1;
    for (i64 r = 0, end = n; r < n; ++r) {
      const float scale = scale_of(r);
      if (scale > least && large < 0) large = limit();
      row_of[scale < 0 || (scale > least && scale > large) ? --end : count++] = r;
    }
  }
};

}  // namespace
}  // namespace fastlstm
