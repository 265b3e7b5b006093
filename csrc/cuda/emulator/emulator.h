// The functions of device.h on a CPU: the kernels' own code, compiled for the host, then computes real numbers there.
//
// Every thread of a group of blocks is a fiber with a stack of its own. A fiber runs until it has to wait. Two things
// make reading too early visible: shared memory is filled with NaN at first, and an asynchronous copy happens only when
// it is waited for. Built with -fsanitize=thread, every fiber is a thread to the sanitizer, and only what orders
// threads on a GPU orders them here. So the sanitizer reports any missing barrier as a race, in whatever order the
// fibers ran. Not modelled: time, banks of shared memory, the rounding inside tensor cores.
//
// Files: context.h (switching stacks), machine.h (threads, warps, blocks), schedule.cpp (who runs), synchronise.cpp
// (barriers, copies, counters), products.cpp (matrix instructions).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define DEVICE static inline
#define MEMBER inline
#define KERNEL(threads) extern "C" void
#define ARGUMENT

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

namespace fastlstm::cuda {

namespace emulator {
// Runs `body` in all threads of all blocks, one group after the other. A group is `together` blocks that may wait for
// each other. With a `seed` other than 0 the fibers take turns in an order that is drawn from it.
void run(const std::function<void()>& body, int64_t blocks, int together, int threads, int shared_bytes,
         uint64_t seed = 0);

int thread_index();
int64_t block_index();
int block_threads();
char* shared_memory();
void sync_block();
void sync_warp();
void copy_async(void* target, const void* source, int bytes, bool real);
void commit_copies();
void wait_copies(int pending);
enum class Product { bf16, f16, tf32 };
void matrix_product(Product kind, float* c, const uint32_t* a, uint32_t b0, uint32_t b1);
uint16_t to_f16(float x);
float from_f16(uint16_t x);
void init_barrier(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, uint32_t bytes);
void wait_barrier(uint64_t* barrier, int parity);
void sync_cluster();
void store_remote(uint32_t* target, const uint32_t* values, int count, uint64_t* barrier, int block);
void release_add(int* counter, int value);
void acquire(const int* counter, int value);
}  // namespace emulator

using emulator::acquire;
using emulator::block_index;
using emulator::block_threads;
using emulator::commit_copies;
using emulator::expect_bytes;
using emulator::from_f16;
using emulator::init_barrier;
using emulator::release_add;
using emulator::shared_memory;
using emulator::sync_block;
using emulator::sync_cluster;
using emulator::sync_warp;
using emulator::thread_index;
using emulator::to_f16;
using emulator::wait_barrier;

template <int bytes>
DEVICE void copy_async(void* target, const void* source, bool real) {
  emulator::copy_async(target, source, bytes, real);
}
template <int pending>
DEVICE void wait_copies() {
  emulator::wait_copies(pending);
}

template <emulator::Product kind>
struct EmulatedProduct {
  static void add(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    emulator::matrix_product(kind, c, &a.x, b0, b1);
  }
};
using Bf16Product = EmulatedProduct<emulator::Product::bf16>;
using F16Product = EmulatedProduct<emulator::Product::f16>;
using Tf32Product = EmulatedProduct<emulator::Product::tf32>;

DEVICE int opaque(int x) { return x; }
DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE uint32_t bits_of(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
DEVICE float float_of(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
DEVICE uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
DEVICE float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }
// To nearest, halves away from zero.
DEVICE uint32_t to_tf32(float x) {
  const uint32_t u = bits_of(x);
  return (u & 0x7f800000) == 0x7f800000 ? u : (u + 0x1000) & ~uint32_t(0x1fff);
}
DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
// As coarse as the instruction: 11 bits of the result are right.
DEVICE float tanh_approximate(float x) {
  const float y = std::tanh(x);
  return y != y ? y : float_of((bits_of(y) + 0x800) & ~uint32_t(0xfff));
}
DEVICE float exp_quick(float x) { return std::exp(x); }
DEVICE float exp_exact(float x) { return std::exp(x); }
DEVICE float reciprocal_quick(float x) { return 1.0f / x; }
DEVICE float reciprocal_exact(float x) { return 1.0f / x; }

DEVICE void publish_barriers() {}
DEVICE void store_remote(uint32_t* target, uint32_t value, uint64_t* barrier, int block) {
  emulator::store_remote(target, &value, 1, barrier, block);
}
DEVICE void store_remote(uint32_t* target, uint32_t first, uint32_t second, uint64_t* barrier, int block) {
  const uint32_t values[] = {first, second};
  emulator::store_remote(target, values, 2, barrier, block);
}
DEVICE void store_remote(uint4* target, const uint4& value, uint64_t* barrier, int block) {
  emulator::store_remote(&target->x, &value.x, 4, barrier, block);
}

DEVICE void store_global(uint32_t* target, uint32_t value) { *target = value; }
DEVICE void store_global(uint32_t* target, uint32_t first, uint32_t second) {
  target[0] = first;
  target[1] = second;
}
DEVICE uint2 load_global2(const uint32_t* source) { return {source[0], source[1]}; }
DEVICE uint4 load_global4(const uint32_t* source) { return {source[0], source[1], source[2], source[3]}; }

}  // namespace fastlstm::cuda
