// The regime "wide", for layers of 16-bit numbers whose weights do not fit the registers of a cluster: what both passes
// share. Each block of a cluster owns as many units as the others. A warp keeps most of its weights in registers and
// reads the others from shared memory at every step.
//
// What goes through a cluster are messages of 16 bytes, a warp's to one or two blocks: many small ones to many blocks
// take longer. Each block begins with another one, so that nobody has all of them at once.
#pragma once

#include "arguments.h"
#include "element.h"

namespace fastlstm::cuda {

#if defined(FASTLSTM_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The sizes of the shape that keeps so many tiles of terms in registers, and whether all sequences have all steps and
// none restarts. A kernel for any rows asks where a row begins, and the instruction that waits for the answer also
// waits for whatever else is on its way: a sixth of a step of backward.
template <int resident, bool dense>
struct WideSizes {
  static constexpr WideShape kShape = wide_shape(resident);
  static constexpr bool kDense = dense;
  static constexpr int kResident = resident, kBlocks = kShape.blocks, kTiles = kShape.tiles, kParts = kWideParts;
  static constexpr int kOwn = kTiles * kUnits, kAll = kBlocks * kOwn;  // units of a block, of a cluster
  static constexpr int kWarps = kTiles * kParts, kThreads = kWarps * kLanes;
  static_assert(kShape.blocks > 0 && kThreads == kOwn * kSequences, "a thread has one cell");
};

template <class W>
struct WidePlace {
  unsigned thread, warp, lane, q, pair;  // lane = 4 * q + pair
  int rank;                              // of the block in its cluster
  int direction;
  int sequence;  // the first of the cluster

  MEMBER WidePlace(const Layer& p, int thread) : thread(unsigned(thread)) {
    warp = unsigned(thread) / kLanes;
    lane = unsigned(thread) % kLanes;
    q = lane / 4;
    pair = lane % 4;
    rank = int(block_index() % W::kBlocks);
    const int64_t all = p.first_group + block_index() / W::kBlocks;
    direction = int(all % p.D);
    sequence = int(all / p.D * kSequences);
  }
  // Rows of such layers fit 32 bits: there is no memory for more. Products of 64 bits take three times as long.
  MEMBER static int row(const Layer& p, int t, int column) {
    return (!W::kDense && p.offsets ? int(p.offsets[t]) : t * p.B) + column;
  }
  // Steps of a sequence; 0 if there is no such one.
  MEMBER static int steps_of(const Layer& p, int sequence) {
    return !W::kDense ? p.steps_of(sequence) : sequence < p.B ? p.T : 0;
  }
  // Steps of the longest sequence of the cluster.
  MEMBER int steps(const Layer& p) const {
    int found = 0;
    for (int n = 0; n < kSequences; ++n) found = max(found, steps_of(p, sequence + n));
    return found;
  }
};

// A factor lies in pieces of 16 bytes: an octet, eight terms of a sequence that follow each other. Four octets are a
// chunk, the terms of two matrix instructions, of which each lane reads one piece. The sequences of an octet change
// places, so that eight lanes read from all banks.
DEVICE unsigned piece_of(unsigned octet, unsigned sequence) { return octet * kSequences + (sequence ^ octet % 4 * 2); }

// The weights of a warp, M x K tiles of 16 rows and 16 terms, `held` of them in registers. Those in shared memory,
// which no other warp reads, lie between them in the order of multiplying, so that reading goes on meanwhile.
template <class E, int M, int K, int held>
struct TileWeights {
  static constexpr int kEarly = 4;
  static constexpr int kAll = M * K, kRest = kAll - held;
  uint4 words[held];
  const uint4* rest;  // [kRest][kLanes]

  static_assert(K % 2 == 0 && kRest >= kEarly);

  static FASTLSTM_BOTH constexpr int held_before(int tile) { return tile * held / kAll; }
  static FASTLSTM_BOTH constexpr bool is_held(int tile) { return held_before(tile + 1) > held_before(tile); }
  static FASTLSTM_BOTH constexpr int held_tile(int h) { return ((h + 1) * kAll - 1) / held; }
  static FASTLSTM_BOTH constexpr int rest_tile(int r) { return r * kAll / kRest; }

  // `read(m, row, term)`: a weight, rows counted from those of the m-th. Those for registers come through the place of
  // the others: loads straight into them would be unrolled, with more addresses than there are registers.
  template <class Read>
  MEMBER TileWeights(char* memory, unsigned warp, unsigned lane, const Read& read) {
    auto* own = reinterpret_cast<uint4*>(memory) + warp * (kRest * kLanes) + lane;
    rest = own;
#pragma unroll
    for (int first = 0; first < held; first += kRest) {
      const int count = held - first < kRest ? held - first : kRest;
#pragma unroll 2
      for (int h = 0; h < count; ++h) own[h * kLanes] = tile_of(held_tile(first + h), lane, read);
#pragma unroll
      for (int h = 0; h < count; ++h) words[first + h] = own[h * kLanes];
    }
#pragma unroll 2
    for (int r = 0; r < kRest; ++r) own[r * kLanes] = tile_of(rest_tile(r), lane, read);
  }
  template <class Read>
  MEMBER static uint4 tile_of(int tile, unsigned lane, const Read& read) {
    const int m = tile % M, k = tile / M;
    uint32_t quad[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + 8 * (i % 2), term = k / 2 * 32 + lane % 4 * 8 + k % 2 * 4 + i / 2 * 2;
      quad[i] = E::pack(read(m, row, term), read(m, row, term + 1));
    }
    return {quad[0], quad[1], quad[2], quad[3]};
  }
  // The first of those in shared memory, which a warp reads before it waits for the factor: it has nothing else to do,
  // and the registers that sums will take.
  struct Early {
    uint4 tiles[kEarly];
  };
  MEMBER Early early() const {
    Early found;
#pragma unroll
    for (int k = 0; k < kEarly; ++k) found.tiles[k] = rest[k * kLanes];
    return found;
  }
  // Adds the products with a factor whose chunks begin at `factor`.
  MEMBER void multiply(float (&total)[M][4], const Early& early, const uint4* factor, unsigned lane) const {
    const auto add = [&](int tile, uint32_t x, uint32_t y) {
      const int h = held_before(tile), r = tile - h;
      E::Matrix::add(total[tile % M], is_held(tile) ? words[h] : r < kEarly ? early.tiles[r] : rest[r * kLanes], x, y);
    };
    const uint4* pieces = factor + piece_of(lane % 4, lane / 4);
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      const uint4 b = pieces[k / 2 * kLanes];
#pragma unroll
      for (int m = 0; m < M; ++m) add(k * M + m, b.x, b.y);
#pragma unroll
      for (int m = 0; m < M; ++m) add((k + 1) * M + m, b.z, b.w);
    }
  }
};

// Barriers of two buffers that take turns, `count` for each, in every block; each counts so many bytes a step.
// Two buffers are enough: see exchange.h.
template <int count>
struct WideBarriers {
  uint64_t* barriers;
  uint32_t bytes;

  MEMBER WideBarriers(const Layer& p, int bytes)
      : barriers(reinterpret_cast<uint64_t*>(shared_memory() + p.shared.barriers)), bytes(bytes) {
    if (thread_index() == 0) {
      for (int k = 0; k < 2 * count; ++k) init_barrier(barriers + k);
      publish_barriers();
      for (int k = 0; k < 2 * count; ++k) expect_bytes(barriers + k, bytes);
    }
    sync_cluster();
  }
  MEMBER uint64_t* at(int s, int which) const { return barriers + s % 2 * count + which; }
  // Until all of step s has arrived. One thread of each barrier `arms` it, for step s + 2.
  MEMBER void wait(int s, int which, bool arms) const {
    wait_barrier(at(s, which), s / 2 % 2);
    if (arms) expect_bytes(at(s, which), bytes);
  }
};

#endif

}  // namespace fastlstm::cuda
