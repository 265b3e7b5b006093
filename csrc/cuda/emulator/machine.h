// The state of an emulated GPU, shared by the files of the emulator: threads as fibers, warps, blocks, and what they
// wait for.
//
// The files of the emulator are compiled without the thread sanitizer: what a GPU does by itself is no access of the
// kernels. What the kernels make it do to memory is told to the sanitizer explicitly, by the functions below.
#pragma once

#include <exception>
#include <vector>

#include "context.h"
#include "emulator.h"

#ifdef FASTLSTM_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read4(void*);
extern "C" void __tsan_write4(void*);
#else
static inline void __tsan_acquire(void*) {}
static inline void __tsan_release(void*) {}
static inline void __tsan_read4(void*) {}
static inline void __tsan_write4(void*) {}
#endif

namespace fastlstm::cuda::emulator {

constexpr int kLanes = 32;

// A point where `size` threads wait for each other: none goes on before all have arrived.
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

// The phase of an mbarrier that is going on.
struct Phase {
  const uint64_t* barrier;
  bool armed = true;  // one arrival is expected
  int64_t bytes = 0;  // expected less arrived
  int parity = 0;     // of the phase that is going on
};

// A block of threads, and its shared memory.
struct Block {
  std::vector<char> memory;
  std::vector<Warp> warps;
  std::vector<Phase> phases;
  Meeting sync;

  Phase& phase(const uint64_t* barrier);
};

// An asynchronous copy that has not happened yet.
struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool real;
};

// A thread of the GPU.
struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0, rank = 0;
  bool done = false;
  // What it waits for, if not null: a meeting to take place, the phase of a barrier to end, a counter to reach `value`.
  const Meeting* meeting = nullptr;
  int generation = 0;
  const uint64_t* barrier = nullptr;
  int parity = 0;
  const int* counter = nullptr;
  int value = 0;
  std::vector<std::vector<Copy>> copies{1};  // groups; the last one is open
#ifdef FASTLSTM_TSAN
  void* sanitizer = nullptr;
#endif

  Warp& warp() { return block->warps[size_t(thread / kLanes)]; }
};

// A launch: the group of blocks that runs now.
struct Machine {
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  int64_t first = 0;  // block of this group
  Meeting cluster;
  Context scheduler;
  Fiber* current = nullptr;
  std::exception_ptr error;  // what ended a fiber: memory that there was not
  char launch = 0;           // an address for the sanitizer: a group is ordered before the next one
#ifdef FASTLSTM_TSAN
  void* sanitizer = nullptr;
#endif
};

// The launch of this thread of the host. (__thread instead of thread_local: an access then calls no function.)
extern __thread Machine* machine;

// Ends the program: on a GPU this would be undefined behaviour, which no caller could catch either.
[[noreturn]] void fail(const char* what);

// Stops the current fiber until what it waits for has happened.
void leave();

// Waits until all threads of the meeting have arrived; true for the last one. Memory is ordered if `orders`.
bool meet(Meeting& meeting, bool orders);

float f16_to_float(uint16_t x);

}  // namespace fastlstm::cuda::emulator
