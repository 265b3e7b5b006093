// What a call would run, without running it: the size of a weight cache, the instruction set, the plans of the CPU and
// of the CUDA kernels. No GPU is needed.
#include <algorithm>

#include "bindings/operators.h"
#include "bindings/packed_weights.h"
#include "cpu/pairs.h"
#include "cuda/plan.h"

namespace fastlstm {
namespace {

Sizes layer_sizes(i64 input, i64 hidden, i64 projected, i64 directions) {
  Sizes s{};
  s.I = input;
  s.H = hidden;
  s.P = projected ? projected : hidden;
  s.D = directions;
  s.G = 4;
  s.projected = projected > 0;
  return s;
}

// device: compute capability, multiprocessors, bytes of shared memory of a block, blocks of a cluster, and, if they are
// known, how many clusters of 2, 4, 8 and 16 blocks are resident together; wish: regime, blocks, batch. problem: null,
// or why there is no plan.
cuda::Plan planned(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                   const std::vector<i64>& wish, const char** problem) {
  FASTLSTM_CHECK(kind >= 0 && kind < 4 && (device.size() == 4 || device.size() == 8) && wish.size() == 3 &&
                     hidden > 0 && hidden < 1 << 20,
                 "fastlstm: not the arguments of a plan");
  cuda::Device gpu{int(device[0]), int(device[1]), int(device[2]), int(device[3]), {}};
  for (size_t i = 4; i < device.size(); ++i) gpu.resident[i - 4] = int(device[i]);
  return cuda::plan_of({cuda::Kind(kind), backward, int(hidden), int(directions), B}, gpu,
                       {int(wish[0]), int(wish[1]), int(wish[2])}, problem);
}

}  // namespace

// purpose: the pass, "forward", "backward", or "both" for a backward pass that computes the gates again. 0: it reads
// the weights as they are stored.
i64 cpu_cache_bytes(const std::string& purpose, i64 T, i64 B, i64 input, i64 hidden, i64 projected, i64 directions,
                    i64 gates, bool is_double) {
  const Kernels& kernels = cpu_kernels();
  Sizes s = layer_sizes(input, hidden, projected, directions);
  s.T = T;
  s.B = B;
  s.G = gates;
  const bool needs_forward = purpose != "backward" && !kernels.forward_reads_stored(s, is_double);
  const bool needs_backward =
      purpose != "forward" && !kernels.backward_reads_stored(s, is_double ? Dtype::f64 : Dtype::f32);
  if (!needs_forward && !needs_backward) return 0;
  const size_t forward = PackedWeights::round_up(kernels.forward_bytes(s, is_double));
  const size_t backward = PackedWeights::round_up(kernels.backward_bytes(s, is_double));
  // One buffer serves the forward and the backward pass in turn.
  const size_t bytes = needs_forward && needs_backward ? forward + backward : std::max(forward, backward);
  return PackedWeights::kHeaderBytes + i64(bytes);
}

std::string cpu_isa() { return pair_kernels() ? pair_kernels()->name : cpu_kernels().name; }

// machine: bytes of L2 and L3, and 1 if some cores are slower than others; empty: this machine.
std::string cpu_plan(i64 T, i64 B, i64 input, i64 hidden, i64 projected, i64 directions, i64 threads,
                     const std::vector<i64>& machine) {
  STD_TORCH_CHECK(machine.empty() || machine.size() == 3, "fastlstm: not the arguments of a plan");
  Sizes s = layer_sizes(input, hidden, projected, directions);
  s.T = T;
  s.B = B;
  char text[512];
  cpu_kernels().describe(s, int(threads), machine.empty() ? nullptr : machine.data(), text, sizeof text);
  return text;
}

std::vector<i64> cuda_plan(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                           const std::vector<i64>& wish) {
  const char* problem;
  const cuda::Plan p = planned(kind, backward, B, hidden, directions, device, wish, &problem);
  if (problem) return {};
  return {i64(p.regime), p.batch,        p.blocks, p.tiles,          p.parts,     p.resident,
          i64(p.rest),   p.shared_bytes, p.groups, p.exchange_words, p.rest_words};
}

std::string cuda_obstacle(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                          const std::vector<i64>& wish) {
  const char* problem;
  planned(kind, backward, B, hidden, directions, device, wish, &problem);
  return problem ? problem : "";
}

}  // namespace fastlstm
