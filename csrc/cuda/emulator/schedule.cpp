// Runs the fibers of a launch: each one until it has to wait, in the order of threads or in a random one.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>

#include "machine.h"

namespace fastlstm::cuda::emulator {

__thread Machine* machine = nullptr;

void fail(const char* what) {
  std::fprintf(stderr, "fastlstm, emulated kernel: %s\n", what);
  std::abort();
}

void leave() {
  Fiber& fiber = *machine->current;
#ifdef FASTLSTM_TSAN
  __tsan_switch_to_fiber(machine->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(fiber.context, machine->scheduler);
}

namespace {

void enter(Fiber& fiber) {
  machine->current = &fiber;
#ifdef FASTLSTM_TSAN
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(machine->scheduler, fiber.context);
}

void fiber_main() {
  __tsan_acquire(&machine->launch);
  try {
    (*machine->body)();
  } catch (...) {  // it must not leave the stack of the fiber
    machine->error = std::current_exception();
  }
  __tsan_release(&machine->launch);
  machine->current->done = true;
  leave();
}

bool is_ready(const Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.meeting) return fiber.meeting->generation != fiber.generation;
  if (fiber.barrier) return fiber.block->phase(fiber.barrier).parity != fiber.parity;
  if (fiber.counter) return *fiber.counter >= fiber.value;
  return true;
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
            if (machine->error) std::rethrow_exception(machine->error);
            done += fibers[k].done;
            progress = again = true;
          }
      }
    if (!progress) throw std::runtime_error("deadlock: every thread of a group of blocks waits");
  }
}

// Makes the blocks of a group and a fiber for each of their threads.
void make_group(Machine& here, std::vector<char>& stacks, int together, int threads, int shared_bytes) {
  here.blocks = std::vector<Block>(size_t(together));
  here.fibers = std::vector<Fiber>(size_t(together) * size_t(threads));
  for (int rank = 0; rank < together; ++rank) {
    Block& block = here.blocks[size_t(rank)];
    block.memory.assign(size_t(shared_bytes), char(0xff));  // NaN
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
      make_group(here, stacks, together, threads, shared_bytes);
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

}  // namespace fastlstm::cuda::emulator
