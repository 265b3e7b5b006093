// Rows of numbers as the products of float16.h take them.
#pragma once

#include "cpu/float16.h"
#include "cpu/memory.h"

namespace fastlstm {
namespace {

// Of activations or of gradients. Without kernels there are none.
class Float16Rows {
 public:
  Float16Rows() = default;
  Float16Rows(const Float16Kernels* kernels, i64 rows, i64 K)
      : kernels_(kernels), K_(K), pitch_(round_up(K, 32) + 32), data_(rows * pitch_), scales_(rows) {}

  explicit operator bool() const { return kernels_; }
  void put(i64 row, const float* x) const { scales_[row] = kernels_->round_row(x, K_, &data_[row * pitch_]); }
  // Every step-th row from `first` on.
  Float16Matrix from(i64 first, i64 step = 1) const {
    if (!kernels_) return {};
    return {&data_[first * pitch_], step * pitch_, &scales_[first], step};
  }

 private:
  const Float16Kernels* kernels_ = nullptr;
  i64 K_ = 0, pitch_ = 0;
  Buffer<uint16_t> data_;
  Buffer<float> scales_;
};

}  // namespace
}  // namespace fastlstm
