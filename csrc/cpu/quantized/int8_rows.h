// Rows of activations as 8-bit integers, each row by itself: so a row's result does not depend on its batch.
//
//   x = scale * (q - zero),  q in 0..255,  scale = (max(x, 0) - min(x, 0)) / 255
//
// Every operation here is one that IEEE 754 defines, so that all instruction sets give the same bits
// (fastlstm/quantized/reference.py has them one by one). A row with a NaN or an infinite number has the scale NaN.
#pragma once

#include "cpu/dots.h"
#include "cpu/quantized/dots.h"

namespace fastlstm {
namespace {

struct Scale {
  float scale;
  int32_t zero;
};

class Int8Rows {
 public:
  Int8Rows() = default;
  Int8Rows(i64 rows, i64 K)
      : K_(K), pitch_(round_up(K, 64)), block_(Buffer<uint8_t>::bytes(rows * pitch_) + Buffer<Scale>::bytes(rows)) {
    char* at = block_.get();
    data_ = Buffer<uint8_t>(at, rows * pitch_);
    scale_ = Buffer<Scale>(at, rows);
  }

  const uint8_t* data(i64 row) const { return &data_[row * pitch_]; }
  const Scale& scale(i64 row) const { return scale_[row]; }

  // Quantises x [K] as a row.
  void put(i64 row, const float* x) {
    using Int = Simd<float>::Int;
    Vec<float> low = {}, high = {}, odd = {};
    for_vectors<float>(K_, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      const Vec<float> v = n == kLanes<float> ? load(x + k) : load_first(x + k, n);
      low = v < low ? v : low;
      high = v > high ? v : high;
      odd += v * 0.0f;  // NaN of what is not finite
    });
    const float lowest = across(low, [](Vec<float> a, Vec<float> b) FASTLSTM_INLINE_LAMBDA { return b < a ? b : a; });
    const float highest = across(high, [](Vec<float> a, Vec<float> b) FASTLSTM_INLINE_LAMBDA { return b > a ? b : a; });
    const float strange = across(odd, [](Vec<float> a, Vec<float> b) FASTLSTM_INLINE_LAMBDA { return a + b; });
    const float scale = highest * (1 / 255.0f) - lowest * (1 / 255.0f) + strange;
    const float inverse = scale < 0x1p-126f ? 0.0f : 1 / scale;
    constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, to nearest even
    const auto to_integer = [&](float v) { return int32_t(v * inverse + kRound - kRound); };
    const int32_t zero = strange == 0 ? -to_integer(lowest) : 0;
    scale_[row] = {scale < 0x1p-126f ? 0.0f : scale, zero};
    uint8_t* q = &data_[row * pitch_];
    const Int offset = Int{} + (zero - 0x4b400000);  // the bits of kRound
    for_vectors<float>(K_, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      const Vec<float> v = n == kLanes<float> ? load(x + k) : load_first(x + k, n);
      Int i = (Int)(v * inverse + kRound) + offset;
      i = i < 0 ? Int{} : i;
      i = i > 255 ? Int{} + 255 : i;
      store_bytes(q + k, i ^ kFlip);  // past the last number too, up to a whole vector
    });
  }

 private:
  // All lanes, joined by f.
  template <int step = kLanes<float> / 2, class F>
  static FASTLSTM_INLINE float across(Vec<float> v, const F& f) {
    v = f(v, pick<float, Opposite<step>>(v, v));
    if constexpr (step > 1)
      return across<step / 2>(v, f);
    else
      return v[0];
  }
  template <int step>
  struct Opposite {
    static constexpr int of(int k) { return k ^ step; }
  };

  // The low byte of each lane.
  static FASTLSTM_INLINE void store_bytes(uint8_t* to, Simd<float>::Int v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int k = 0; k < kLanes<float>; ++k) to[k] = uint8_t(v[k]);
#endif
  }

  i64 K_ = 0, pitch_ = 0;
  Buffer<char> block_;
  Buffer<uint8_t> data_;
  Buffer<Scale> scale_;
};

}  // namespace
}  // namespace fastlstm
