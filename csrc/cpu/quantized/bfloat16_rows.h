// Rows of activations, rounded to bfloat16. The vectors of `together` rows lie in turns: what an instruction takes from
// several rows is one load.
#pragma once

#include "cpu/memory.h"

namespace fastlstm {
namespace {

// To nearest even; NaN stays NaN.
FASTLSTM_INLINE void store_rounded(uint16_t* to, Vec<float> v) {
  using Words = Simd<float>::Words;
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  const Words bits = (Words)v, rounded = bits + (bits >> 16 & 1) + 0x7fff;
  const Halves halves = __builtin_convertvector((v == v ? rounded : bits | 1u << 22) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

template <int together>
class RoundedRows {
 public:
  RoundedRows() = default;
  RoundedRows(i64 rows, i64 K) : K_(K), pitch_(pitch<float>(K)), data_(round_up(rows, together) * pitch_) {
    data_.zero();
  }

  const uint16_t* data(i64 row) const { return &data_[at(row)]; }

  // Past the last number zeros follow, up to a whole vector.
  void put(i64 row, const float* x) {
    uint16_t* to = &data_[at(row)];
    for_vectors<float>(K_, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      store_rounded(to + k * together, n == kLanes<float> ? load(x + k) : load_first(x + k, n));
    });
  }

 private:
  i64 at(i64 row) const { return row / together * together * pitch_ + row % together * kLanes<float>; }

  i64 K_ = 0, pitch_ = 0;
  Buffer<uint16_t> data_;
};

}  // namespace
}  // namespace fastlstm
