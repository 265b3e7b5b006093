// What both passes share: the place of a thread in the layer, its weights, its sums.
#pragma once

#include "arguments.h"
#include "element.h"

namespace fastlstm::cuda {

// Where a thread is: see plan.h. A column is a sequence of this lane, 2 for each tile of sequences; the warps of a tile
// of units share the columns out among them once their sums are added up.
struct Place {
  int warp, lane, q, pair;  // lane = 4 * q + pair
  int rank;                 // of the block in its group
  int tile, part;           // of units; of their terms
  int first, count;         // tiles of terms [first, first + count)
  int direction;
  int64_t group;  // of the launch
  int sequence;   // the first of the group
  bool real;      // whether there is such a tile of units

  MEMBER Place(const Layer& p, int batch) {
    const int thread = thread_index(), part_tiles = ceil_div(tiles_of(p.H), p.plan.parts);
    warp = thread / kLanes;
    lane = thread % kLanes;
    q = lane / 4;
    pair = lane % 4;
    rank = int(block_index() % p.plan.blocks);
    tile = rank * p.plan.tiles + warp / p.plan.parts;
    part = warp % p.plan.parts;
    first = part * part_tiles;
    count = tiles_of(p.H) - first;
    count = count < 0 ? 0 : count > part_tiles ? part_tiles : count;
    group = block_index() / p.plan.blocks;
    const int64_t all = p.first_group + group;
    direction = int(all % p.D);
    sequence = int(all / p.D * batch);
    real = tile < tiles_of(p.H);
  }
  MEMBER int unit(int half) const { return tile * kUnits + q + 8 * half; }
  MEMBER int column(int k) const { return sequence + k / 2 * kSequences + 2 * pair + k % 2; }
};

// The weights of a warp: the first tiles of terms in registers, the others in memory that no other warp reads.
template <class E, int resident, bool backward, class X>
struct WarpWeights {
  static constexpr int kWords = E::kWeightWords;
  uint32_t held[resident > 0 ? resident : 1][kWords];

  // Four words of a tile of this lane, in registers and elsewhere.
  struct Held {
    const uint32_t (&words)[kWords];
    MEMBER uint4 quad(int m) const { return {words[4 * m], words[4 * m + 1], words[4 * m + 2], words[4 * m + 3]}; }
  };
  struct Stored {
    const uint32_t* words;
    int lane;
    MEMBER uint4 quad(int m) const { return reinterpret_cast<const uint4*>(words)[m * kLanes + lane]; }
  };

  MEMBER WarpWeights(const Layer& p, const Place& at) {
    const auto* w = static_cast<const typename E::Storage*>(p.w_hh[at.direction]);
#pragma unroll
    for (int k = 0; k < resident; ++k)
#pragma unroll
      for (int i = 0; i < kWords; ++i) held[k][i] = k < at.count ? word(w, p.H, at, k, i) : 0;
    each_rest_tile(p, at, [&](uint32_t* words, int k) {
      for (int i = 0; i < kWords; ++i) words[place_of(i, at.lane)] = word(w, p.H, at, k, i);
    });
    sync_warp();  // Exact reads what other lanes wrote
  }

  // f(words, k) for the tiles that are not in registers: [kWords / 4][lane][4] words, or as Exact has them. A pointer
  // is either into shared memory or not, so that the compiler takes the instructions of that.
  template <class F>
  MEMBER void each_rest_tile(const Layer& p, const Place& at, const F& f) const {
    if (at.count <= resident) return;
    const int more = rest_tiles(p.plan, p.H), size = kLanes * kWords;
    if (!X::kMayRestGlobally || p.plan.rest == Rest::shared) {
      auto* words = reinterpret_cast<uint32_t*>(shared_memory() + p.shared.rest) + at.warp * more * size;
#pragma unroll 1  // several at once would need registers
      for (int k = resident; k < at.count; ++k) f(words + (k - resident) * size, k);
    } else {
      const int64_t warps = p.plan.tiles * p.plan.parts;
      uint32_t* words = p.rest + ((at.group * p.plan.blocks + at.rank) * warps + at.warp) * more * size;
#pragma unroll 1  // several at once would need registers
      for (int k = resident; k < at.count; ++k) f(words + int64_t(k - resident) * size, k);
    }
  }

  // Word i of this lane, of the k-th tile of terms.
  MEMBER static uint32_t word(const typename E::Storage* w, int H, const Place& at, int k, int i) {
    const auto read = [&](int gate, int unit_in_tile, int term_in_tile) {
      const int unit = at.tile * kUnits + unit_in_tile, term = (at.first + k) * kUnits + term_in_tile;
      if (unit >= H || term >= H) return 0.0f;
      const int64_t row = int64_t(gate) * H + (backward ? term : unit);
      return E::widen(w[row * H + (backward ? unit : term)]);
    };
    if constexpr (E::kKind == Kind::exact) {
      return bits_of(E::template weight<backward>(i * kLanes + at.lane, read));
    } else {
      return E::template weight<backward>(i, at.q, at.pair, read);
    }
  }
  MEMBER static int place_of(int i, int lane) {
    return E::kKind == Kind::exact ? i * kLanes + lane : (i / 4 * kLanes + lane) * 4 + i % 4;
  }
  // Adds what the tiles of terms of this warp contribute. `buffer` is the exchanged factor of all units.
  template <int NT>
  MEMBER void multiply(float (&total)[4][NT][4], const Layer& p, const Place& at, const uint32_t* buffer) const {
    constexpr int tile_words = NT * E::kOperandWords;
    const int gate_words = tiles_of(p.H) * tile_words;
    const uint32_t* tiles = buffer + at.first * tile_words;
    const auto add = [&](const auto& w, int k) {
      if constexpr (backward) {
        E::template backward<X>(total, w, tiles + k * tile_words, gate_words, at.lane);
      } else {
        E::template forward<X>(total, w, tiles + k * tile_words, at.lane);
      }
    };
    if (at.count >= resident) {
#pragma unroll
      for (int k = 0; k < resident; ++k) add(Held{held[k]}, k);
    } else {
#pragma unroll
      for (int k = 0; k < resident; ++k)
        if (k < at.count) add(Held{held[k]}, k);
    }
    each_rest_tile(p, at, [&](const uint32_t* words, int k) { add(Stored{words, at.lane}, k); });
  }
};

// Sums of the parts of a tile of units, added up in shared memory in a fixed order: `count` numbers a lane and part.
template <int count>
struct Partial {
  float* sums;  // [part][number][lane] of this tile of units
  int parts;

  MEMBER Partial(const Layer& p, const Place& at) : parts(p.plan.parts) {
    sums = reinterpret_cast<float*>(shared_memory() + p.shared.partial) + at.warp / parts * (parts * count * kLanes) +
           at.lane;
  }
  MEMBER void put(int part, int number, float value) { sums[(part * count + number) * kLanes] = value; }
  MEMBER float total(int number) const {
    float sum = sums[number * kLanes];
    for (int part = 1; part < parts; ++part) sum += sums[(part * count + number) * kLanes];
    return sum;
  }
};

}  // namespace fastlstm::cuda
