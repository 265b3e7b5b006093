// The kinds of numbers: how they are stored, in which order they lie for a matrix instruction, how they are multiplied.
//
// Products are transposed: gates [units, sequences] = W_hh [units, terms] h [terms, sequences]. The rows of a tile of
// weights are permuted so that the gates of one unit end up in one thread: of lane q * 4 + pair, units q and q + 8 and
// sequences 2 * pair and 2 * pair + 1. The terms of a tile are permuted so that units q and q + 8, which that thread
// then computes, are neighbours in the factor of the next step: no number is shuffled between threads.
#pragma once

#include "device.h"
#include "plan.h"

namespace fastlstm::cuda {

// x + x^3 P(x^2) for |x| <= 0.625, where 2 sigmoid(2x) - 1 cancels; least maximum relative error 2e-8.
DEVICE float tanh_near_zero(float x) {
  const float z = x * x;
  float p = multiply_add(-0.006104946f, z, 0.02100364f);
  p = multiply_add(p, z, -0.0538525f);
  p = multiply_add(p, z, 0.13332783f);
  p = multiply_add(p, z, -0.33333328f);
  return multiply_add(x * z, p, x);
}

// ---- 16-bit numbers. A tile of 16 units x 8 sequences is 64 words [lane][2] of neighbouring terms.

template <class Self, class Product>
struct Narrow {
  using Storage = uint16_t;
  using Matrix = Product;
  static constexpr int kOperandWords = 64, kWeightWords = 16;

  MEMBER static uint32_t pack(float a, float b) { return uint32_t(Self::narrow(a)) | uint32_t(Self::narrow(b)) << 16; }
  // Numbers of units q and q + 8 of a sequence, into a tile that begins at word `tile` of the buffer for step s.
  template <class X>
  MEMBER static void put(X& exchange, int tile, int q, int sequence, float a, float b, int s) {
    exchange.put(tile + (sequence * 4 + q % 4) * 2 + q / 4, pack(a, b), s);
  }
  // Which number word `i` of a lane's weights begins with; `read(gate, unit, term)` counts from the tiles' first ones.
  template <bool backward, class Read>
  MEMBER static uint32_t weight(int i, int q, int pair, const Read& read) {
    const int r = i % 4, term = pair + 4 * (r / 2);
    if (backward) return pack(read(i / 4, q + 8 * (r % 2), term), read(i / 4, q + 8 * (r % 2), term + 8));
    const int gate = 2 * (i / 4 % 2) + r % 2, unit = q + 8 * (i / 8);
    return pack(read(gate, unit, term), read(gate, unit, term + 8));
  }
  // total [4][NT][4]: forward, gates of units: first index 2 * (unit / 8) + gate / 2, last 2 * (gate % 2) + sequence.
  template <class X, int NT, class W>
  MEMBER static void forward(float (&total)[4][NT][4], const W& w, const uint32_t* tiles, int lane) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const uint2 b = X::load2(tiles + nt * kOperandWords + lane * 2);
#pragma unroll
      for (int m = 0; m < 4; ++m) Product::add(total[m][nt], w.quad(m), b.x, b.y);
    }
  }
  // Backward, sums over units of one gate each: first index gate, last 2 * (unit / 8) + sequence.
  template <class X, int NT, class W>
  MEMBER static void backward(float (&total)[4][NT][4], const W& w, const uint32_t* tiles, int gate_words, int lane) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const uint2 b = X::load2(tiles + gate * gate_words + nt * kOperandWords + lane * 2);
        Product::add(total[gate][nt], w.quad(gate), b.x, b.y);
      }
  }
  // Four gates of a unit as they are kept for backward.
  MEMBER static void keep(Storage* at, float i, float f, float g, float o) {
    *reinterpret_cast<uint2*>(at) = {pack(i, f), pack(g, o)};
  }
  MEMBER static float4 kept(const Storage* at) {
    const uint2 both = *reinterpret_cast<const uint2*>(at);
    return {Self::widen(uint16_t(both.x)), Self::widen(uint16_t(both.x >> 16)), Self::widen(uint16_t(both.y)),
            Self::widen(uint16_t(both.y >> 16))};
  }
};

template <class Self>
struct QuickActivations {
  MEMBER static float sigmoid(float x) { return reciprocal_quick(1.0f + exp_quick(-x)); }
  MEMBER static float tanh(float x) {
    return x * x < 0.390625f ? tanh_near_zero(x) : 2.0f * Self::sigmoid(2.0f * x) - 1.0f;
  }
};

// bfloat16 rounds four times as coarsely as the activations err.
struct Bf16 : Narrow<Bf16, Bf16Product> {
  static constexpr Kind kKind = Kind::bf16;
  MEMBER static float widen(Storage x) { return from_bf16(x); }
  MEMBER static Storage narrow(float x) { return to_bf16(x); }
  MEMBER static float sigmoid(float x) { return multiply_add(0.5f, tanh_approximate(0.5f * x), 0.5f); }
  MEMBER static float tanh(float x) { return tanh_approximate(x); }
};

struct F16 : Narrow<F16, F16Product>, QuickActivations<F16> {
  static constexpr Kind kKind = Kind::f16;
  MEMBER static float widen(Storage x) { return from_f16(x); }
  MEMBER static Storage narrow(float x) { return to_f16(x); }
};

// ---- float32

struct Wide {
  using Storage = float;
  static constexpr int kOperandWords = 128, kWeightWords = 32;
  MEMBER static float widen(float x) { return x; }
  MEMBER static float narrow(float x) { return x; }
  MEMBER static void keep(float* at, float i, float f, float g, float o) {
    *reinterpret_cast<float4*>(at) = {i, f, g, o};
  }
  MEMBER static float4 kept(const float* at) { return *reinterpret_cast<const float4*>(at); }
};

// Factors rounded to TF32. A tile is 128 words [lane][2][2]: units q, q + 8 are first terms of two instructions.
struct Tf32 : Wide, QuickActivations<Tf32> {
  static constexpr Kind kKind = Kind::tf32;

  template <class X>
  MEMBER static void put(X& exchange, int tile, int q, int sequence, float a, float b, int s) {
    exchange.put(tile + (sequence * 4 + q % 4) * 4 + q / 4 * 2, to_tf32(a), to_tf32(b), s);
  }
  template <bool backward, class Read>
  MEMBER static uint32_t weight(int i, int q, int pair, const Read& read) {
    const int r = i % 4, term = pair + 4 * (r / 2) + 8 * (i / 16);
    if (backward) return to_tf32(read(i / 4 % 4, q + 8 * (r % 2), term));
    return to_tf32(read(2 * (i / 4 % 2) + r % 2, q + 8 * (i / 8 % 2), term));
  }
  template <class X, int NT, class W>
  MEMBER static void forward(float (&total)[4][NT][4], const W& w, const uint32_t* tiles, int lane) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const uint4 b = X::load4(tiles + nt * kOperandWords + lane * 4);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        Tf32Product::add(total[m][nt], w.quad(m), b.x, b.z);
        Tf32Product::add(total[m][nt], w.quad(4 + m), b.y, b.w);
      }
    }
  }
  template <class X, int NT, class W>
  MEMBER static void backward(float (&total)[4][NT][4], const W& w, const uint32_t* tiles, int gate_words, int lane) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const uint4 b = X::load4(tiles + gate * gate_words + nt * kOperandWords + lane * 4);
        Tf32Product::add(total[gate][nt], w.quad(gate), b.x, b.z);
        Tf32Product::add(total[gate][nt], w.quad(4 + gate), b.y, b.w);
      }
  }
};

// Factors as they are, without matrix instructions. A tile is 128 words [term][8 sequences]; weights of 16 units and
// 16 terms are 1024 words, see `weight`.
struct Exact : Wide {
  static constexpr Kind kKind = Kind::exact;
  MEMBER static float sigmoid(float x) { return reciprocal_exact(1.0f + exp_exact(-x)); }
  MEMBER static float tanh(float x) { return x * x < 0.390625f ? tanh_near_zero(x) : 2.0f * sigmoid(2.0f * x) - 1.0f; }

  template <class X>
  MEMBER static void put(X& exchange, int tile, int q, int sequence, float a, float b, int s) {
    exchange.put(tile + q * 8 + sequence, bits_of(a), s);
    exchange.put(tile + (q + 8) * 8 + sequence, bits_of(b), s);
  }
  // Word `at` of all lanes' weights: forward [term][unit][gate], backward [gate][term][q][2 units q, q + 8].
  template <bool backward, class Read>
  MEMBER static float weight(int at, const Read& read) {
    if (backward) return read(at / 256, at / 2 % 8 + 8 * (at % 2), at / 16 % 16);
    return read(at % 4, at / 4 % 16, at / 64);
  }
  template <class X, int NT, class W>
  MEMBER static void forward(float (&total)[4][NT][4], const W& w, const uint32_t* tiles, int lane) {
    const auto* weights = reinterpret_cast<const float4*>(w.words) + lane / 4;
#pragma unroll 4
    for (int term = 0; term < kUnits; ++term) {
      const float4 low = weights[term * 16], high = weights[term * 16 + 8];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const uint2 b = X::load2(tiles + nt * kOperandWords + term * 8 + lane % 4 * 2);
        const float x = float_of(b.x), y = float_of(b.y);
        add(total[0][nt], low.x, low.y, x, y);
        add(total[1][nt], low.z, low.w, x, y);
        add(total[2][nt], high.x, high.y, x, y);
        add(total[3][nt], high.z, high.w, x, y);
      }
    }
  }
  template <class X, int NT, class W>
  MEMBER static void backward(float (&total)[4][NT][4], const W& w, const uint32_t* tiles, int gate_words, int lane) {
    const auto* weights = reinterpret_cast<const float2*>(w.words) + lane / 4;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll 4
      for (int term = 0; term < kUnits; ++term) {
        const float2 both = weights[gate * 128 + term * 8];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint2 b = X::load2(tiles + gate * gate_words + nt * kOperandWords + term * 8 + lane % 4 * 2);
          add(total[gate][nt], both.x, both.y, float_of(b.x), float_of(b.y));
        }
      }
  }

 private:
  MEMBER static void add(float (&c)[4], float a0, float a1, float x, float y) {
    c[0] = multiply_add(a0, x, c[0]);
    c[1] = multiply_add(a0, y, c[1]);
    c[2] = multiply_add(a1, x, c[2]);
    c[3] = multiply_add(a1, y, c[3]);
  }
};

}  // namespace fastlstm::cuda
