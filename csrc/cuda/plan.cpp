// The choice of a plan. Where a sequence's numbers are added up in which order follows from H, the kind and the GPU
// alone: B and D decide only how many sequences share a block's work, so a row's result does not depend on its batch.
#include "plan.h"

#include <algorithm>

namespace fastlstm::cuda {
namespace {

// The most units whose 16-bit weights the registers of a cluster hold.
constexpr int kClusterUnits = 512;
// Weights in shared memory are read anew at every step; many take longer than an exchange between blocks.
constexpr int kQuickRest = 64 << 10;

struct Chooser {
  const Shape& shape;
  const Device& device;
  const Wish& wish;

  int units() const { return tiles_of(shape.H); }

  // Tiles of terms whose weights a warp keeps in registers: what there are kernels for (kernels.h).
  int resident(Regime regime, int part_tiles, int batch) const {
    const bool wide = batch > kSequences;
    if (shape.kind == Kind::exact) return 0;
    const bool grid = regime == Regime::grid;  // which loads its other factor from L2 into registers
    if (shape.kind == Kind::tf32) return wide ? 2 : grid ? 3 : 4;
    if (regime == Regime::block && part_tiles <= 4) return 4;
    return !wide ? 8 : grid ? 5 : 6;
  }

  // A plan of so many tiles of units a block; `fits` says whether there is room for it.
  Plan plan(Regime regime, int tiles, int batch, bool* fits) const {
    Plan p{};
    p.regime = regime;
    p.batch = batch;
    p.tiles = tiles;
    p.blocks = ceil_div(units(), tiles);
    p.parts = regime == Regime::block ? 1 : std::max(std::min({kMaxWarps / tiles, kMaxParts, units()}), 1);
    const int part_tiles = ceil_div(units(), p.parts);
    p.resident = resident(regime, part_tiles, batch);
    p.rest = rest_tiles(p, shape.H) ? Rest::shared : Rest::none;
    p.shared_bytes = Shared::of(p, shape.kind, shape.backward, shape.H).total;
    if (p.shared_bytes > device.shared_bytes && regime == Regime::grid) {
      p.rest = Rest::global;
      p.shared_bytes = Shared::of(p, shape.kind, shape.backward, shape.H).total;
    }
    *fits = p.shared_bytes <= device.shared_bytes && tiles <= kMaxWarps && device.arch >= 80;
    return p;
  }

  int64_t rest_bytes(const Plan& p) const { return 4 * rest_words_of_a_block(p, shape.kind, shape.H); }

  bool allows(Regime regime) const { return wish.regime < 0 || wish.regime == int(regime); }

  // With the fewest sequences that a group can have: what the others of the batch do must not matter.
  bool block(bool quick, Plan* found) const {
    if (!allows(Regime::block) || wish.blocks > 1) return false;
    bool fits = false;
    *found = plan(Regime::block, units(), kSequences, &fits);
    return fits && (!quick || rest_bytes(*found) <= kQuickRest);
  }

  bool cluster(Plan* found) const {
    if (!allows(Regime::cluster) || device.cluster < 2) return false;
    bool any = false;
    for (int blocks = 2; blocks <= device.cluster; blocks *= 2) {
      if (wish.blocks && blocks != wish.blocks) continue;
      const int tiles = ceil_div(units(), blocks);
      bool fits = false;
      Plan p = plan(Regime::cluster, tiles, kSequences, &fits);
      if (!fits || p.blocks < 2) continue;
      p.blocks = blocks;  // a power of two: the last ones may have nothing to do
      *found = p;
      any = true;
      if (rest_bytes(p) <= kQuickRest) break;
    }
    return any;
  }

  bool wide(Plan* found) const {
    if (!allows(Regime::wide) || shape.kind >= Kind::tf32 || device.arch < 90) return false;
    if (wish.regime < 0 && shape.H <= kClusterUnits) return false;
    for (const WideShape& sizes : kWideShapes) {
      if (shape.H > sizes.units() || device.cluster < sizes.blocks) continue;
      if (wish.blocks && wish.blocks != sizes.blocks) continue;
      Plan p{};
      p.regime = Regime::wide;
      p.batch = kSequences;
      p.blocks = sizes.blocks;
      p.tiles = sizes.tiles;
      p.parts = kWideParts;
      p.resident = sizes.resident;
      p.rest = Rest::shared;
      p.shared_bytes = Shared::of(p, shape.kind, shape.backward, shape.H).total;
      if (p.shared_bytes > device.shared_bytes) continue;
      *found = p;
      return true;
    }
    return false;
  }

  bool grid(Plan* found) const {
    if (!allows(Regime::grid)) return false;
    for (int tiles = 1; tiles <= kMaxWarps; ++tiles) {
      if (wish.blocks && ceil_div(units(), tiles) != wish.blocks) continue;
      bool fits = false;
      *found = plan(Regime::grid, tiles, kSequences, &fits);
      if (fits && found->blocks <= device.processors) return true;
    }
    return false;
  }

  // Groups that run together. Clusters have to lie in one part of the GPU: some multiprocessors are left over.
  int64_t together(const Plan& p) const {
    int asked = 0;
    if (has_clusters(p.regime))
      for (int i = 0; i < 4; ++i)
        if (p.blocks == 2 << i) asked = device.resident[i];
    return asked > 0 ? asked : device.processors / p.blocks;
  }

  // More sequences a group once all processors have some; the order of sums stays.
  void widen(Plan* p) const {
    const int64_t groups = shape.D * ((shape.B + kSequences - 1) / kSequences);
    const bool full = groups > together(*p);
    if (p->regime != Regime::wide && (wish.batch ? wish.batch == 2 * kSequences : full)) {
      bool fits = false;
      Plan wide = plan(p->regime, p->tiles, 2 * kSequences, &fits);
      wide.blocks = p->blocks;
      if (fits && (wide.rest != Rest::global || p->rest == Rest::global)) *p = wide;
    }
    p->groups = shape.D * ((shape.B + p->batch - 1) / p->batch);
    if (p->regime == Regime::grid) {
      p->groups = std::min(p->groups, together(*p));
      p->exchange_words = p->groups * 2 * Shared::buffer_words(shape.kind, shape.backward, shape.H, p->batch);
    }
    if (p->rest == Rest::global) p->rest_words = p->groups * p->blocks * rest_words_of_a_block(*p, shape.kind, shape.H);
  }
};

}  // namespace

Plan plan_of(const Shape& shape, const Device& device, const Wish& wish, const char** problem) {
  const Chooser choose{shape, device, wish};
  Plan p{};
  *problem = nullptr;
  if (choose.block(true, &p) || choose.wide(&p) || choose.cluster(&p) || choose.block(false, &p) || choose.grid(&p)) {
    choose.widen(&p);
    if (wish.batch && p.batch != wish.batch) *problem = "a block has no room for so many sequences";
    return p;
  }
  *problem = device.arch < 80 ? "the kernels need a GPU from sm_80 on" : "no regime has room for so many units";
  if (wish.regime >= 0 || wish.blocks) *problem = "the regime that was asked for has no room for this layer";
  return p;
}

}  // namespace fastlstm::cuda
