// AVX-512 with FP16: products in float16, as pairs.h has them. See bfloat16.h.
#pragma once

#include "cpu/float16_chain.h"
#include "cpu/quantized/bfloat16.h"

namespace fastlstm {
namespace {

constexpr double kBfloat16Rate = 36;
constexpr int kBfloat16Most = kFloat16Rows, kPaired = 1;
constexpr bool kScaled = true;

// Panels of scaled weights.
constexpr Preparing kPreparing{58, 2, 4, 1, kPanelRows};

// Calls f with what makes vectors of a panel float16.
template <class F>
FASTLSTM_INLINE void with_scales(const float* scales, const F& f) {
  const auto of = [&](int v) { return Scaled(_mm512_loadu_si512(scales + 16 * v)); };
  const Scaled scaled[4] = {of(0), of(1), of(2), of(3)};
  f([&](int v, __m512i bits) FASTLSTM_INLINE_LAMBDA { return scaled[v](bits); });
}

// Rows of activations, each by itself. The scale of a row that has numbers which are not finite is below zero.
class Bfloat16Rows {
 public:
  Bfloat16Rows() = default;
  Bfloat16Rows(i64 rows, i64 K)
      : K_(K), pitch_(round_up(K, 32) + 32), block_(Buffer<uint16_t>::bytes(rows * pitch_) +
                                                    Buffer<float>::bytes(rows * (K + 1)) + Buffer<float>::bytes(rows)) {
    char* at = block_.get();
    data_ = Buffer<uint16_t>(at, rows * pitch_);
    exact_ = Buffer<float>(at, rows * (K + 1));
    scale_ = Buffer<float>(at, rows);
  }

  const uint16_t* data(i64 row) const { return &data_[row * pitch_]; }
  const float* exact(i64 row) const { return &exact_[row * (K_ + 1)]; }  // and a zero
  float scale(i64 row) const { return scale_[row]; }

  void put(i64 row, const float* x) {
    scale_[row] = round_row(x, K_, &data_[row * pitch_]);
    float* const to = &exact_[row * (K_ + 1)];
    std::memcpy(to, x, size_t(K_) * sizeof(float));
    to[K_] = 0;
  }

  // Of products of which rows are in float32: see bfloat16.h.
  static constexpr int kExactRows = fastlstm::kExactRows;
  static float largest_scale(const float* scales, i64 K) { return largest_row(scales, K); }
  template <int R>
  __attribute__((noinline)) static void exact_dots(const float* const* a, const uint16_t* w, const float* scales,
                                                   i64 pairs, Columns* sums) {
    const auto number = [&](int r, i64 k) FASTLSTM_INLINE_LAMBDA { return a[r][k]; };
    with_scales(scales,
                [&](const auto& weights) FASTLSTM_INLINE_LAMBDA { float32_dots<R>(number, w, weights, pairs, sums); });
  }

 private:
  i64 K_ = 0, pitch_ = 0;
  Buffer<char> block_;
  Buffer<uint16_t> data_;
  Buffer<float> exact_, scale_;
};

template <int R>
__attribute__((noinline)) void tile_dots(const uint16_t* const* a, const uint16_t* w, const float* scales, i64 pairs,
                                         Columns* sums) {
  with_scales(scales,
              [&](const auto& weights) FASTLSTM_INLINE_LAMBDA { float16_dots<R>(a, 2, w, weights, pairs, sums); });
}

inline void prepared_dots(i64 n, const uint16_t* const* a, const void* panel, i64 pairs, Columns* sums) {
  pair_products<Float16Chain>(n, a, 2, static_cast<const uint16_t*>(panel), pairs, sums, PutSums{sums}, panel);
}

inline void prepare_panel(const uint16_t* w, const float* scales, i64 pairs, void* to) {
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int v = 0; v < 4; ++v) {
    const Scaled scaled(_mm512_loadu_si512(scales + 16 * v));
    for (i64 pair = 0; pair < pairs; ++pair) {
      const i64 at = 2 * pair * kColumns + 32 * v;
      _mm512_storeu_si512(out + at, scaled(_mm512_loadu_si512(w + at)));
    }
  }
}

}  // namespace
}  // namespace fastlstm
