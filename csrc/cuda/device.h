// What the kernels ask of a GPU: the place of a thread, barriers, matrix instructions, and the three ways in which one
// thread's numbers reach another. emulator/emulator.h has the same functions on a CPU, for tests; nothing else differs
// between the two.
#pragma once

#ifdef FASTLSTM_EMULATE
#include "emulator/emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
// One block a multiprocessor, and as many registers as its threads may have then.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define ARGUMENT __grid_constant__

namespace fastlstm::cuda {

DEVICE int thread_index() { return int(threadIdx.x); }
DEVICE int64_t block_index() { return blockIdx.x; }
DEVICE int block_threads() { return int(blockDim.x); }
DEVICE char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The same number, but to the compiler another one each time: what is computed from it cannot be computed once before a
// loop and then take up a register in it.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- copies from global to shared memory that go on while the thread computes; it alone waits for its own

// `bytes` is 4, 8 or 16; without `real` the target becomes zero and nothing is read.
template <int bytes>
DEVICE void copy_async(void* target, const void* source, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(target)), "l"(source), "n"(bytes),
               "r"(real ? bytes : 0)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `pending` groups are there.
template <int pending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- matrix instructions: c[16, 8] += a[16, k] b[k, 8], in the lanes of a warp

struct Bf16Product {
  MEMBER static void add(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};
struct F16Product {
  MEMBER static void add(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};
struct Tf32Product {
  MEMBER static void add(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};

// ---- numbers

DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }
DEVICE uint16_t to_bf16(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float from_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
DEVICE uint16_t to_f16(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float from_f16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
// The hardware would cut the last 13 bits off; rounding halves the error.
DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Relative error 2^-11.
DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float exp_quick(float x) { return __expf(x); }
DEVICE float exp_exact(float x) { return expf(x); }
DEVICE float reciprocal_quick(float x) { return __fdividef(1.0f, x); }
DEVICE float reciprocal_exact(float x) { return __frcp_rn(x); }

// ---- clusters: blocks that reach into each other's shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// One arrival and `bytes` of stores complete a phase; phases alternate in parity.
DEVICE void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Makes the barriers known to the cluster; then sync_cluster.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is complete; what its bytes carried can be read then. It lies in this block's shared
// memory: to acquire more than that, as a scope of the cluster would, empties L1.
DEVICE void wait_barrier(uint64_t* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The place that `p` has in this block's shared memory, in that of another block of the cluster.
DEVICE uint32_t remote_address(const void* p, int block) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(block));
  return address;
}
// Stores that count as bytes at a barrier of the block that they go to.
DEVICE void store_remote(uint32_t* target, uint32_t value, uint64_t* barrier, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   remote_address(target, block)),
               "r"(value), "r"(remote_address(barrier, block))
               : "memory");
}
DEVICE void store_remote(uint32_t* target, uint32_t first, uint32_t second, uint64_t* barrier, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   remote_address(target, block)),
               "r"(first), "r"(second), "r"(remote_address(barrier, block))
               : "memory");
}
DEVICE void store_remote(uint4* target, const uint4& value, uint64_t* barrier, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   remote_address(target, block)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(remote_address(barrier, block))
               : "memory");
}

#endif

// ---- through global memory, among blocks that are on the GPU together

DEVICE void store_global(uint32_t* target, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}
DEVICE void store_global(uint32_t* target, uint32_t first, uint32_t second) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(first), "r"(second) : "memory");
}
// Two words, past L1, which other multiprocessors do not update.
DEVICE uint2 load_global2(const uint32_t* source) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(source) : "memory");
  return v;
}
DEVICE uint4 load_global4(const uint32_t* source) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
}
// Publishes what the threads of this block stored before the barrier that this thread has just passed.
DEVICE void release_add(int* counter, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
// Until the counter has reached `value`; what was published by then can be read.
DEVICE void acquire(const int* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}

}  // namespace fastlstm::cuda
#endif
