#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// This file itself is compiled without the sanitizer: what a GPU does by itself is no access of the kernels. What they
// make it do to memory is told in so many words.
#ifdef FASTLSTM_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read4(void*);
extern "C" void __tsan_write4(void*);
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static void __tsan_read4(void*) {}
static void __tsan_write4(void*) {}
#endif

namespace fastlstm::cuda::emulator {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kLanes = 32;

// What on a GPU would be undefined, and nothing that a caller could catch.
[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "fastlstm, emulated kernel: %s\n", what);
  std::abort();
}

// ---- switching between fibers

#if defined(__x86_64__)
extern "C" void fastlstm_switch(void** from, void* to);
// Saves the registers that a call keeps on the old stack, takes those of the new one from there.
asm(R"(
.text
.local fastlstm_switch
.type fastlstm_switch, @function
fastlstm_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastlstm_switch, . - fastlstm_switch
)");

struct Context {
  void* stack = nullptr;
  void start(char* base, void (*entry)()) {
    void** top = reinterpret_cast<void**>(base + kStack) - 1;  // aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    stack = top;
  }
  static void change(Context& from, Context& to) { fastlstm_switch(&from.stack, to.stack); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* base, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = base;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// ---- threads, warps, blocks

// All threads that take part have to arrive before any goes on.
struct Meeting {
  int size = 0, arrived = 0, generation = 0;
};

// What a lane brings to a matrix instruction.
struct Operands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

struct Warp {
  Meeting sync, product;
  Operands lanes[kLanes];
};

struct Phase {
  const uint64_t* barrier;
  bool armed = true;  // one arrival is expected
  int64_t bytes = 0;  // expected less arrived
  int parity = 0;     // of the phase that is going on
};

struct Block {
  std::vector<char> memory;
  std::vector<Warp> warps;
  std::vector<Phase> phases;
  Meeting sync;

  Phase& phase(const uint64_t* barrier) {
    for (Phase& phase : phases)
      if (phase.barrier == barrier) return phase;
    fail("a barrier was used before it was initialised");
  }
};

struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool real;
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0, rank = 0;
  bool done = false;
  // What it waits for: a meeting to take place, a barrier's phase to end, a counter to get there.
  const Meeting* meeting = nullptr;
  int generation = 0;
  const uint64_t* barrier = nullptr;
  int parity = 0;
  const int* counter = nullptr;
  int value = 0;
  std::vector<std::vector<Copy>> copies{1};  // groups; the last one is still open
#ifdef FASTLSTM_TSAN
  void* sanitizer = nullptr;
#endif

  Warp& warp() { return block->warps[size_t(thread / kLanes)]; }
};

struct Machine {
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  int64_t first = 0;  // block of this group
  Meeting cluster;
  Context scheduler;
  Fiber* current = nullptr;
  char launch = 0;  // what orders a group before the next one
#ifdef FASTLSTM_TSAN
  void* sanitizer = nullptr;
#endif
};

thread_local Machine* machine = nullptr;

void enter(Fiber& fiber) {
  machine->current = &fiber;
#ifdef FASTLSTM_TSAN
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(machine->scheduler, fiber.context);
}

void leave() {
  Fiber& fiber = *machine->current;
#ifdef FASTLSTM_TSAN
  __tsan_switch_to_fiber(machine->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(fiber.context, machine->scheduler);
}

void fiber_main() {
  __tsan_acquire(&machine->launch);
  (*machine->body)();
  __tsan_release(&machine->launch);
  machine->current->done = true;
  leave();
}

// Whether the last one has arrived; the others return when it has. Memory is ordered if `orders`.
bool meet(Meeting& meeting, bool orders) {
  if (orders) __tsan_release(&meeting);
  const bool last = ++meeting.arrived == meeting.size;
  if (last) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    Fiber& fiber = *machine->current;
    fiber.meeting = &meeting;
    fiber.generation = meeting.generation;
    leave();
    fiber.meeting = nullptr;
  }
  if (orders) __tsan_acquire(&meeting);
  return last;
}

void complete(Phase& phase, int64_t expected, bool arrives) {
  if (arrives) {
    if (!phase.armed) fail("a barrier was armed twice in a phase");
    phase.armed = false;
  }
  phase.bytes += expected;
  if (!phase.armed && phase.bytes == 0) phase = {phase.barrier, true, 0, phase.parity ^ 1};
}

bool is_ready(const Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.meeting) return fiber.meeting->generation != fiber.generation;
  if (fiber.barrier) return fiber.block->phase(fiber.barrier).parity != fiber.parity;
  if (fiber.counter) return *fiber.counter >= fiber.value;
  return true;
}

template <class T>
T* in_block(T* p, int rank) {
  Block* own = machine->current->block;
  const auto offset = reinterpret_cast<const char*>(p) - own->memory.data();
  return reinterpret_cast<T*>(machine->blocks[size_t(rank)].memory.data() + offset);
}

// Runs every fiber of the group to its end.
void run_group(std::mt19937_64* random) {
  std::vector<Fiber>& fibers = machine->fibers;
  std::vector<size_t> warps(fibers.size() / kLanes);
  std::iota(warps.begin(), warps.end(), size_t(0));
  for (size_t done = 0; done < fibers.size();) {
    bool progress = false;
    if (random) std::shuffle(warps.begin(), warps.end(), *random);
    for (size_t warp : warps)
      for (bool again = true; again;) {
        again = false;
        for (size_t k = warp * kLanes; k < (warp + 1) * kLanes; ++k)
          if (is_ready(fibers[k])) {
            enter(fibers[k]);
            done += fibers[k].done;
            progress = again = true;
          }
      }
    if (!progress) throw std::runtime_error("deadlock: every thread of a group of blocks waits");
  }
}

float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, e = x >> 10 & 31, m = x & 0x3ff;
  if (e == 0) {
    const float y = float(m) * 0x1p-24f;
    return sign ? -y : y;
  }
  return float_of(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}

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

void run(const std::function<void()>& body, int64_t blocks, int together, int threads, int shared_bytes,
         uint64_t seed) {
  thread_local std::vector<char> stacks;
  Machine here;
  std::mt19937_64 random(seed);
  const size_t count = size_t(together) * size_t(threads);
  if (stacks.size() < count * kStack) stacks.resize(count * kStack);
  machine = &here;
  here.body = &body;
  here.cluster.size = int(count);
#ifdef FASTLSTM_TSAN
  here.sanitizer = __tsan_get_current_fiber();
#endif
  try {
    for (here.first = 0; here.first < blocks; here.first += together) {
      here.blocks = std::vector<Block>(size_t(together));
      here.fibers = std::vector<Fiber>(count);
      for (int rank = 0; rank < together; ++rank) {
        Block& block = here.blocks[size_t(rank)];
        block.memory.assign(size_t(shared_bytes), char(0xff));
        block.warps.resize(size_t(threads / kLanes));
        block.sync.size = threads;
        block.phases.reserve(8);
        for (Warp& warp : block.warps) warp.sync.size = warp.product.size = kLanes;
        for (int thread = 0; thread < threads; ++thread) {
          const size_t k = size_t(rank * threads + thread);
          Fiber& fiber = here.fibers[k];
          fiber.block = &block;
          fiber.rank = rank;
          fiber.thread = thread;
          fiber.context.start(stacks.data() + k * kStack, fiber_main);
#ifdef FASTLSTM_TSAN
          fiber.sanitizer = __tsan_create_fiber(0);
#endif
        }
      }
      __tsan_release(&here.launch);
      run_group(seed ? &random : nullptr);
      __tsan_acquire(&here.launch);
#ifdef FASTLSTM_TSAN
      for (Fiber& fiber : here.fibers) __tsan_destroy_fiber(fiber.sanitizer);
#endif
    }
  } catch (...) {
    machine = nullptr;
    throw;
  }
  machine = nullptr;
}

int thread_index() { return machine->current->thread; }
int64_t block_index() { return machine->first + machine->current->rank; }
int block_threads() { return machine->current->block->sync.size; }
char* shared_memory() { return machine->current->block->memory.data(); }

void sync_block() { meet(machine->current->block->sync, true); }
void sync_warp() { meet(machine->current->warp().sync, true); }
void sync_cluster() { meet(machine->cluster, true); }

void copy_async(void* target, const void* source, int bytes, bool real) {
  machine->current->copies.back().push_back({target, source, bytes, real});
}
void commit_copies() { machine->current->copies.emplace_back(); }
void wait_copies(int pending) {
  auto& groups = machine->current->copies;
  for (; int(groups.size()) - 1 > pending; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front())
      for (int at = 0; at < copy.bytes; at += 4) {
        auto* target = static_cast<uint32_t*>(copy.target) + at / 4;
        const auto* source = static_cast<const uint32_t*>(copy.source) + at / 4;
        if (copy.real) __tsan_read4(const_cast<uint32_t*>(source));
        __tsan_write4(target);
        *target = copy.real ? *source : 0;
      }
}

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

void init_barrier(uint64_t* barrier) {
  std::vector<Phase>& phases = machine->current->block->phases;
  if (phases.size() == phases.capacity()) fail("more barriers than a block of the emulator has room for");
  phases.push_back({barrier});
}
void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  __tsan_release(barrier);
  complete(machine->current->block->phase(barrier), bytes, true);
}
void wait_barrier(uint64_t* barrier, int parity) {
  Fiber& fiber = *machine->current;
  if (fiber.block->phase(barrier).parity == parity) {
    fiber.barrier = barrier;
    fiber.parity = parity;
    leave();
    fiber.barrier = nullptr;
  }
  __tsan_acquire(barrier);
}
void store_remote(uint32_t* target, const uint32_t* values, int count, uint64_t* barrier, int block) {
  uint32_t* there = in_block(target, block);
  for (int k = 0; k < count; ++k) {
    __tsan_write4(there + k);
    there[k] = values[k];
  }
  uint64_t* theirs = in_block(barrier, block);
  __tsan_release(theirs);
  complete(machine->blocks[size_t(block)].phase(theirs), -4 * count, false);
}

void release_add(int* counter, int value) {
  __tsan_release(counter);
  __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}
void acquire(const int* counter, int value) {
  Fiber& fiber = *machine->current;
  if (*counter < value) {
    fiber.counter = counter;
    fiber.value = value;
    leave();
    fiber.counter = nullptr;
  }
  __tsan_acquire(const_cast<int*>(counter));
}

}  // namespace fastlstm::cuda::emulator
