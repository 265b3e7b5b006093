// How the factor of a step reaches every warp that multiplies it. Two buffers take turns: step s reads buffer s % 2.
//
// Why two are enough: a thread sends its part of step s + 1 only after its block has read all of step s (the numbers
// that it sends depend on them), and a wait for step s + 1 ends only when every part of it has been sent. So whoever
// writes for step s + 2, over step s, has waited until all had read step s. (In a cluster that is more than the memory
// model says, which orders the bytes that arrive, and not what their sender had read before. But a number that is read
// is in its register before one that is computed after it can leave, and the next one comes from another
// multiprocessor.)
//
//   put    stores part of the factor of step s
//   sent   this thread has put all that it has for step s; called by every thread, also one that has nothing
//   parts  how many warps share the terms of a tile of units
//   kMayRestGlobally   whether there are plans whose weights lie in global memory
//   wait   until all of step s can be read, from `operand`; `load2`, `load4` read it
#pragma once

#include "layer.h"

namespace fastlstm::cuda {

struct SharedLoads {
  MEMBER static uint2 load2(const uint32_t* p) { return *reinterpret_cast<const uint2*>(p); }
  MEMBER static uint4 load4(const uint32_t* p) { return *reinterpret_cast<const uint4*>(p); }
};

// One block has all units.
struct InBlock : SharedLoads {
  uint32_t* buffers;
  int words;

  static constexpr bool kMayRestGlobally = false;
  MEMBER static constexpr int parts(const Layer&) { return 1; }
  MEMBER InBlock(const Layer& p, const Place&, int words)
      : buffers(reinterpret_cast<uint32_t*>(shared_memory() + p.shared.operand)), words(words) {}
  MEMBER static bool idles(const Layer&, const Place&) { return false; }
  MEMBER const uint32_t* operand(int s) const { return buffers + s % 2 * words; }
  MEMBER void put(int at, uint32_t value, int s) { buffers[s % 2 * words + at] = value; }
  MEMBER void put(int at, uint32_t first, uint32_t second, int s) {
    *reinterpret_cast<uint2*>(buffers + s % 2 * words + at) = {first, second};
  }
  MEMBER void sent(int) {}
  MEMBER void wait(int) { sync_block(); }
  MEMBER void end() {}
};

#if defined(FASTLSTM_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The blocks of a cluster store into each other's shared memory. The bytes that arrive are counted by a barrier of each
// buffer, in every block, so that a step costs one trip between multiprocessors and no barrier among threads for it.
struct InCluster : SharedLoads {
  uint32_t* buffers;
  uint64_t* barriers;
  int words, blocks;  // blocks: those that have units
  bool arms;          // whether this thread sets what the barriers expect

  static constexpr bool kMayRestGlobally = false;
  MEMBER static int parts(const Layer& p) { return p.plan.parts; }
  MEMBER InCluster(const Layer& p, const Place& at, int words)
      : buffers(reinterpret_cast<uint32_t*>(shared_memory() + p.shared.operand)),
        barriers(reinterpret_cast<uint64_t*>(shared_memory() + p.shared.barriers)), words(words),
        blocks(ceil_div(tiles_of(p.H), p.plan.tiles)), arms(thread_index() == 0 && at.rank < blocks) {
    if (arms) {
      init_barrier(barriers);
      init_barrier(barriers + 1);
      publish_barriers();
      expect_bytes(barriers, 4 * words);
      expect_bytes(barriers + 1, 4 * words);
    }
    sync_cluster();
  }
  // A warp without units, which nothing waits for and which could fall behind by more than a phase. Where parts are
  // added up the barrier of the block keeps it in step.
  MEMBER static bool idles(const Layer& p, const Place& at) {
    return !at.real && (p.plan.parts == 1 || at.rank * p.plan.tiles >= tiles_of(p.H));
  }
  MEMBER const uint32_t* operand(int s) const { return buffers + s % 2 * words; }
  MEMBER void put(int at, uint32_t value, int s) {
    for (int block = 0; block < blocks; ++block)
      store_remote(buffers + s % 2 * words + at, value, barriers + s % 2, block);
  }
  MEMBER void put(int at, uint32_t first, uint32_t second, int s) {
    for (int block = 0; block < blocks; ++block)
      store_remote(buffers + s % 2 * words + at, first, second, barriers + s % 2, block);
  }
  MEMBER void sent(int) {}
  MEMBER void wait(int s) {
    wait_barrier(barriers + s % 2, s / 2 % 2);
    // For step s + 2. Its bytes may come before this does: the phase waits for both.
    if (arms) expect_bytes(barriers + s % 2, 4 * words);
  }
  // No block leaves while another may store into its memory.
  MEMBER void end() { sync_cluster(); }
};

#endif

// Blocks that are on the GPU together exchange through L2, and count who has sent.
struct InGrid {
  uint32_t* buffers;
  int* arrived;
  int words, blocks;
  int lane;

  static constexpr bool kMayRestGlobally = true;
  MEMBER static int parts(const Layer& p) { return p.plan.parts; }
  MEMBER InGrid(const Layer& p, const Place& at, int words)
      : buffers(p.exchange + at.group * 2 * words), arrived(p.arrived + p.first_group + at.group), words(words),
        blocks(p.plan.blocks), lane(at.lane) {}
  MEMBER static bool idles(const Layer&, const Place&) { return false; }
  MEMBER static uint2 load2(const uint32_t* p) { return load_global2(p); }
  MEMBER static uint4 load4(const uint32_t* p) { return load_global4(p); }
  MEMBER const uint32_t* operand(int s) const { return buffers + s % 2 * words; }
  MEMBER void put(int at, uint32_t value, int s) { store_global(buffers + s % 2 * words + at, value); }
  MEMBER void put(int at, uint32_t first, uint32_t second, int s) {
    store_global(buffers + s % 2 * words + at, first, second);
  }
  // The barrier collects what the block has stored, the release publishes it.
  MEMBER void sent(int) {
    sync_block();
    if (thread_index() == 0) release_add(arrived, 1);
  }
  MEMBER void wait(int s) {
    if (lane == 0) acquire(arrived, blocks * (s + 1));
    sync_warp();
  }
  MEMBER void end() {}
};

}  // namespace fastlstm::cuda
