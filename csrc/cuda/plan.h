// Which CUDA kernel computes a layer, in which pieces: plain C++, shared by the planner (plan.cpp), which needs no GPU,
// and by the kernels, which find their way through shared memory by it.
//
// Units come in tiles of 16, sequences in tiles of 8: what one matrix instruction takes. A warp holds the weights of
// one tile of units, all four gates, or of a part of their terms; a block holds some such warps; a group of blocks
// holds all units of one direction for one batch of sequences. Blocks of a group exchange the state of every step:
// within one block, through the shared memory of a cluster, or through global memory in a cooperative launch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTLSTM_BOTH __host__ __device__
#else
#define FASTLSTM_BOTH
#endif

namespace fastlstm::cuda {

// How numbers are stored and multiplied: 16-bit; float32 in TF32; float32 without rounding factors.
enum class Kind : int { bf16, f16, tf32, exact };

// How the state of a step travels from the units that computed it to all that multiply it.
enum class Regime : int { block, cluster, grid, wide };
FASTLSTM_BOTH constexpr bool has_clusters(Regime regime) { return regime == Regime::cluster || regime == Regime::wide; }

// Where the weights lie that do not fit registers.
enum class Rest : int { none, shared, global };

struct Device {
  int arch;          // compute capability, 10 * major + minor
  int processors;    // streaming multiprocessors
  int shared_bytes;  // that one block may use
  int cluster;       // blocks of the largest cluster; 1 where there are none
  int resident[4];   // clusters of 2, 4, 8 and 16 blocks that find a place together; 0 where nobody has asked
};

struct Shape {
  Kind kind;
  bool backward;
  int H, D;
  int64_t B;
};

struct Plan {
  Regime regime;
  int batch;         // sequences of a group: 8 or 16
  int blocks;        // of a group
  int tiles;         // of 16 units, of a block
  int parts;         // warps that share the terms of one tile of units
  int resident;      // tiles of 16 terms whose weights a warp keeps in registers, at most; a constant of the kernel
  Rest rest;         // where the others are
  int shared_bytes;  // of a block
  int64_t groups;    // of a launch: all, or as many as fit the GPU together if the regime is grid
  int64_t exchange_words, rest_words;  // of a launch: 32-bit words of work space in global memory
};

constexpr int kUnits = 16;     // of a tile; also the terms of a tile of products
constexpr int kSequences = 8;  // of a tile
constexpr int kLanes = 32;
constexpr int kMaxWarps = 8;  // of a block: with more, a thread has too few registers for its weights
constexpr int kMaxParts = 8;  // of the terms of a tile of units
constexpr int kStages = 3;    // steps whose inputs are on their way or in use
constexpr int kGates = 4;
constexpr int kTooMuch = 1 << 30;  // bytes of shared memory, for any GPU

FASTLSTM_BOTH constexpr int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }
FASTLSTM_BOTH constexpr int tiles_of(int H) { return ceil_div(H, kUnits); }

// 32-bit words of a tile of 16 units x 8 sequences, in the order in which a warp multiplies them.
FASTLSTM_BOTH constexpr int operand_words(Kind kind) { return kind < Kind::tf32 ? 64 : 128; }
// Words of each lane of the weights of 16 units for 16 terms, all gates.
FASTLSTM_BOTH constexpr int weight_words(Kind kind) { return kind < Kind::tf32 ? 16 : 32; }
FASTLSTM_BOTH constexpr int element_bytes(Kind kind) { return kind < Kind::tf32 ? 2 : 4; }

// Tiles of terms whose weights a warp does not keep in registers.
FASTLSTM_BOTH constexpr int rest_tiles(const Plan& plan, int H) {
  const int more = ceil_div(tiles_of(H), plan.parts) - plan.resident;
  return more > 0 ? more : 0;
}
FASTLSTM_BOTH constexpr int64_t rest_words_of_a_block(const Plan& plan, Kind kind, int H) {
  return int64_t(rest_tiles(plan, H)) * plan.tiles * plan.parts * kLanes * weight_words(kind);
}

// ---- the regime wide

// Blocks of a cluster, tiles of units of a block, tiles of 16 x 16 weights that a warp keeps in registers: what there
// are kernels for. The small shape is for tests.
struct WideShape {
  int blocks, tiles, resident;

  FASTLSTM_BOTH constexpr int units() const { return blocks * tiles * kUnits; }
};
constexpr WideShape kWideShapes[] = {{8, 1, 4}, {16, 3, 28}};
constexpr int kWideParts = 4;  // warps that share the terms of a tile of units, forward
FASTLSTM_BOTH constexpr WideShape wide_shape(int resident) {
  for (const WideShape& shape : kWideShapes)
    if (shape.resident == resident) return shape;
  return {};
}
// Of a block, words of weights that are not in registers. Of a warp's tiles of weights each lane has 4 words. Forward
// it has all gates of a tile of units for a part of all terms, backward the terms of the block for a part of all units.
FASTLSTM_BOTH constexpr int64_t wide_rest_words(const Plan& plan) {
  const int tiles = kGates * plan.blocks * plan.tiles / kWideParts;  // of a warp, in either pass
  return int64_t(plan.tiles) * kWideParts * (tiles - plan.resident) * 4 * kLanes;
}

// Where things lie in the shared memory of a block; offsets in bytes, each a multiple of 16.
struct Shared {
  int operand;   // 2 buffers: the state, in backward the gradients of the gates, of all units for all sequences
  int own;       // regime wide: the state of this block's units
  int bias;      // regime wide
  int partial;   // sums of each part, before they are added up
  int ring;      // inputs of kStages steps: forward the input product, backward the gates
  int cells;     // backward: c of kStages steps, and of the steps before
  int rest;      // weights
  int barriers;  // mbarriers
  int total;

  // words of one operand buffer
  static FASTLSTM_BOTH constexpr int64_t buffer_words(Kind kind, bool backward, int H, int batch) {
    return int64_t(backward ? kGates : 1) * tiles_of(H) * (batch / kSequences) * operand_words(kind);
  }

  static FASTLSTM_BOTH constexpr Shared of(const Plan& plan, Kind kind, bool backward, int H) {
    const int columns = plan.batch / kSequences * 2, warps = plan.tiles * plan.parts, threads = warps * kLanes;
    const int own_cells = 2 * ceil_div(columns, plan.parts);  // of a thread, at most
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t begin = at;
      at += bytes;
      return int(begin);
    };
    Shared s{};
    if (plan.regime == Regime::wide) {
      const int own = plan.tiles * kUnits, piece = 16;  // 8 numbers
      s.operand = take(2 * piece * int64_t(backward ? kGates * own : plan.blocks * own));
      s.own = take(backward ? 0 : piece * own);
      s.bias = take(backward ? 0 : int64_t(threads) * kGates * 4);
      // Forward, of 4 gates of 4 cells of a lane; backward, 2 buffers of what all blocks add to this one's gradients.
      s.partial = take(backward ? 2 * 4 * int64_t(plan.blocks) * own * kSequences : int64_t(threads) * 4 * kGates * 4);
      s.ring = take(backward ? 0 : int64_t(kStages) * threads * kGates * 4);
      s.rest = take(4 * wide_rest_words(plan));
      s.barriers = take(8 * (backward ? 2 : 2 * kWideParts));
      s.total = int(at);
      return s;
    }
    s.operand = take(plan.regime == Regime::grid ? 0 : 2 * 4 * buffer_words(kind, backward, H, plan.batch));
    s.partial = take(plan.parts > 1 ? int64_t(warps) * kLanes * 4 * columns * 2 * (backward ? 1 : kGates) : 0);
    s.ring = take(int64_t(kStages) * own_cells * threads * kGates * (backward ? element_bytes(kind) : 4));
    s.cells = take(backward ? int64_t(kStages) * own_cells * threads * 8 : 0);
    s.rest = take(plan.rest == Rest::shared ? 4 * rest_words_of_a_block(plan, kind, H) : 0);
    s.barriers = take(plan.regime == Regime::cluster ? 16 : 0);
    s.total = at < kTooMuch ? int(at) : kTooMuch;
    return s;
  }
};

// What the caller asks of the choice; 0 or -1: nothing.
struct Wish {
  int regime = -1, blocks = 0, batch = 0;
};

// The plan of a layer. `problem` is null, or says why there is none for such a wish; it has static storage.
Plan plan_of(const Shape& shape, const Device& device, const Wish& wish, const char** problem);

}  // namespace fastlstm::cuda
