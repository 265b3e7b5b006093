// Matrix instructions, and float16.
#include <cmath>

#include "machine.h"

namespace fastlstm::cuda::emulator {

float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, e = x >> 10 & 31, m = x & 0x3ff;
  if (e == 0) {
    const float y = float(m) * 0x1p-24f;
    return sign ? -y : y;
  }
  return float_of(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}

namespace {

float element(Product kind, const uint32_t* words, int half) {
  const uint16_t x = uint16_t(words[0] >> 16 * half);
  return kind == Product::bf16 ? float_of(uint32_t(x) << 16) : f16_to_float(x);
}

// The layouts are those of the instructions m16n8k16 and m16n8k8.
void multiply(Product kind, Operands* lanes) {
  const int K = kind == Product::tf32 ? 8 : 16;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, at = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int i = row + 8 * (r % 2);
      if (K == 8) {
        a[i][at + 4 * (r / 2)] = float_of(lanes[lane].a[r] & ~uint32_t(0x1fff));
        if (r < 2) b[at + 4 * r][row] = float_of(lanes[lane].b[r] & ~uint32_t(0x1fff));
      } else {
        for (int half = 0; half < 2; ++half) {
          a[i][2 * at + 8 * (r / 2) + half] = element(kind, &lanes[lane].a[r], half);
          if (r < 2) b[2 * at + 8 * r + half][row] = element(kind, &lanes[lane].b[r], half);
        }
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    float sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = lanes[i % 8 * 4 + j / 2].c[i / 8 * 2 + j % 2];
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
    for (int j = 0; j < 8; ++j) lanes[i % 8 * 4 + j / 2].c[i / 8 * 2 + j % 2] = sum[j];
  }
}

}  // namespace

void matrix_product(Product kind, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Warp& warp = machine->current->warp();
  warp.lanes[machine->current->thread % kLanes] = {c, a, {b0, b1}};
  // The last lane to come computes for all before any other goes on.
  if (warp.product.arrived + 1 == warp.product.size) multiply(kind, warp.lanes);
  meet(warp.product, false);
}

uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000)  // below the smallest normal number: in units of 2^-24
    return uint16_t(sign | uint32_t(std::nearbyint(float_of(magnitude) * 0x1p24f)));
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
float from_f16(uint16_t x) { return f16_to_float(x); }

}  // namespace fastlstm::cuda::emulator
