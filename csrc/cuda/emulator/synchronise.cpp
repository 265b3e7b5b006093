// What orders threads: barriers of a warp, a block and a cluster, mbarriers, counters; and memory that arrives by them.
#include "machine.h"

namespace fastlstm::cuda::emulator {

Phase& Block::phase(const uint64_t* barrier) {
  for (Phase& phase : phases)
    if (phase.barrier == barrier) return phase;
  fail("a barrier was used before it was initialised");
}

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

namespace {

// Adds expected bytes, or less those that arrived, to a phase; `arrives`: and the one arrival. Ends it if all is there.
void complete(Phase& phase, int64_t expected, bool arrives) {
  if (arrives) {
    if (!phase.armed) fail("a barrier was armed twice in a phase");
    phase.armed = false;
  }
  phase.bytes += expected;
  if (!phase.armed && phase.bytes == 0) phase = {phase.barrier, true, 0, phase.parity ^ 1};
}

// The place of p, which is in this block's shared memory, in the shared memory of another block.
template <class T>
T* in_block(T* p, int rank) {
  Block* own = machine->current->block;
  const auto offset = reinterpret_cast<const char*>(p) - own->memory.data();
  return reinterpret_cast<T*>(machine->blocks[size_t(rank)].memory.data() + offset);
}

}  // namespace

void sync_block() { meet(machine->current->block->sync, true); }
void sync_warp() { meet(machine->current->warp().sync, true); }
void sync_cluster() { meet(machine->cluster, true); }

// ---- asynchronous copies: they happen when they are waited for

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

// ---- mbarriers, and stores into another block of the cluster

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

// ---- counters in global memory

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
