#include "bindings/packed_weights.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace fastlstm {
namespace {

// Threads hash the blocks of a large matrix side by side; then the hashes are hashed.
uint64_t hash_large(const void* data, size_t bytes, uint64_t seed) {
  constexpr size_t kBlock = 256 << 10;
  const Kernels& kernels = cpu_kernels();
  if (bytes <= kBlock) return kernels.hash(data, bytes, seed);
  std::vector<uint64_t> hashes((bytes + kBlock - 1) / kBlock);
  torch::stable::parallel_for(0, i64(hashes.size()), 1, [&](i64 begin, i64 end) {
    for (i64 k = begin; k < end; ++k)
      hashes[size_t(k)] = kernels.hash(static_cast<const char*>(data) + size_t(k) * kBlock,
                                       std::min(kBlock, bytes - size_t(k) * kBlock), seed);
  });
  return kernels.hash(hashes.data(), hashes.size() * sizeof(uint64_t), seed);
}

}  // namespace

struct PackedWeights::Header {
  std::atomic<uint64_t> hash;    // of what was packed and how; 0: nothing yet
  std::atomic<int32_t> readers;  // calls in flight; -1 while one of them packs
};

PackedWeights::PackedWeights(const Call& call, Kind kind, const Array& cache) : kind_(kind) {
  static_assert(sizeof(Header) <= kHeaderBytes);
  const Kernels& kernels = cpu_kernels();
  const bool is_double = call.dtype == Dtype::f64;
  backward_bytes_ = kind == kForward ? 0 : round_up(kernels.backward_bytes(call.sizes, is_double));
  const size_t bytes =
      backward_bytes_ + (kind == kBackward ? 0 : round_up(kernels.forward_bytes(call.sizes, is_double)));
  const bool fits = cache && cache.dtype == aoti_torch_dtype_uint8() && cache.dim == 1 &&
                    cache.sizes[0] >= i64(bytes) + kHeaderBytes && cache.contiguous();
  if (fits && share(call, static_cast<char*>(cache.data))) return;
  own_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
  FASTLSTM_CHECK(own_ || !bytes, "fastlstm: out of memory for packed weights");
  data_ = own_.get();
  pack(call);
}

PackedWeights::~PackedWeights() {
  if (header_) header_->readers.fetch_sub(1, std::memory_order_release);
}

// Whether the shared buffer now holds these weights, and keeps them as long as this object lives.
bool PackedWeights::share(const Call& call, char* base) {
  auto* header = reinterpret_cast<Header*>(base);
  const uint64_t wanted = hash_weights(call);
  int32_t readers = header->readers.load(std::memory_order_acquire);
  while (readers >= 0 && header->hash.load(std::memory_order_acquire) == wanted)
    if (header->readers.compare_exchange_weak(readers, readers + 1, std::memory_order_acq_rel)) {
      // From here on nobody repacks; it may have happened just before.
      if (header->hash.load(std::memory_order_acquire) == wanted) {
        header_ = header;
        data_ = base + kHeaderBytes;
        return true;
      }
      header->readers.fetch_sub(1, std::memory_order_release);
      return false;
    }
  readers = 0;
  if (!header->readers.compare_exchange_strong(readers, -1, std::memory_order_acq_rel)) return false;
  header_ = header;
  data_ = base + kHeaderBytes;
  header->hash.store(0, std::memory_order_release);
  pack(call);
  // Weights that changed while they were packed may be a mixture: good for this call at most.
  if (hash_weights(call) == wanted) header->hash.store(wanted, std::memory_order_release);
  header->readers.store(1, std::memory_order_release);
  return true;
}

void PackedWeights::pack(const Call& call) const {
  const Kernels& kernels = cpu_kernels();
  if (kind_ != kForward) kernels.pack_backward(call.sizes, call.dtype, call.weights, data_);
  if (kind_ != kBackward) kernels.pack_forward(call.sizes, call.dtype, call.weights, data_ + backward_bytes_);
}

uint64_t PackedWeights::hash_weights(const Call& call) const {
  const Kernels& kernels = cpu_kernels();
  const Sizes& s = call.sizes;
  const i64 tag[] = {s.I, s.H, s.P, s.D, s.G, s.bias, s.projected, s.layer_norm, i64(call.dtype), kind_};
  uint64_t h = kernels.hash(tag, sizeof tag, 1);
  const size_t e = call.dtype == Dtype::f64 ? 8 : call.dtype == Dtype::f32 ? 4 : 2;
  for (i64 d = 0; d < s.D; ++d) {
    const DirectionWeights& w = call.weights[d];
    h = hash_large(w.w_ih, size_t(s.gate_units() * s.I) * e, h);
    h = hash_large(w.w_hh, size_t(s.gate_units() * s.P) * e, h);
    if (kind_ != kBackward && s.bias) {
      h = kernels.hash(w.b_ih, size_t(s.gate_units()) * e, h);
      h = kernels.hash(w.b_hh, size_t(s.gate_units()) * e, h);
    }
    if (s.projected) h = hash_large(w.w_hr, size_t(s.P * s.H) * e, h);
  }
  return h | 1;  // never the zero of a fresh buffer
}

}  // namespace fastlstm
