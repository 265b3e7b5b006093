#include "bindings/packed_weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "cpu/parallel.h"

namespace fastlstm {
namespace {

// Threads hash the blocks of a large matrix side by side; then the hashes are hashed.
uint64_t hash_large(const void* data, size_t bytes, uint64_t seed, Threads& threads) {
  constexpr size_t kBlock = 256 << 10;
  const Kernels& kernels = cpu_kernels();
  if (bytes <= kBlock) return kernels.hash(data, bytes, seed);
  std::vector<uint64_t> hashes((bytes + kBlock - 1) / kBlock);
  parallel(threads, i64(hashes.size()), [&](i64 k) {
    hashes[size_t(k)] = kernels.hash(static_cast<const char*>(data) + size_t(k) * kBlock,
                                     std::min(kBlock, bytes - size_t(k) * kBlock), seed);
  });
  return kernels.hash(hashes.data(), hashes.size() * sizeof(uint64_t), seed);
}

size_t element_bytes(const Call& call) { return call.dtype == Dtype::f64 ? 8 : call.dtype == Dtype::f32 ? 4 : 2; }

// Calls f(pointer to a matrix or vector, elements) for each weight of a direction that is packed.
template <class F>
void for_weights(const Call& call, bool biases, DirectionWeights& w, const F& f) {
  const Sizes& s = call.sizes;
  f(w.w_ih, s.gate_units() * s.I);
  f(w.w_hh, s.gate_units() * s.P);
  if (biases && s.bias) {
    f(w.b_ih, s.gate_units());
    f(w.b_hh, s.gate_units());
  }
  if (s.projected) f(w.w_hr, s.P * s.H);
}

// How many times this process is the child of a fork. Of the calls that other threads had in flight then, nothing is
// left in the child but their counts in the headers.
std::atomic<uint32_t> forks{0};
#ifndef _WIN32
[[maybe_unused]] const int forks_are_counted = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
#endif

// Asks for huge pages, where the system gives them on demand: every step reads all weights, and those of a wide layer
// lie in more small pages than a core keeps addresses of. Nothing is there yet, so the pages that it has may go.
void prefer_huge_pages(char* begin, char* end) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;  // the smallest one of x86 and of ARM
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / kHugePage * kHugePage;
  if (first >= last) return;
  const auto at = reinterpret_cast<void*>(first);
  if (madvise(at, last - first, MADV_HUGEPAGE) == 0) madvise(at, last - first, MADV_DONTNEED);
#else
  (void)begin, (void)end;
#endif
}

}  // namespace

struct PackedWeights::Header {
  std::atomic<uint64_t> hash;    // of what was packed and how; 0: nothing yet
  std::atomic<uint64_t> use;     // in the high half `forks`, in the low half calls in flight, or kPacking
  std::atomic<uint64_t> orders;  // in which orders it was packed; 0: never

  static constexpr uint32_t kPacking = ~0u;
  static uint64_t word(uint32_t readers) { return uint64_t(forks.load(std::memory_order_relaxed)) << 32 | readers; }
  static uint32_t readers(uint64_t use) { return use >> 32 == word(0) >> 32 ? uint32_t(use) : 0; }
};

PackedWeights::Memory PackedWeights::allocate(size_t bytes) {
  Memory memory(static_cast<char*>(::operator new(round_up(bytes), std::align_val_t(64), std::nothrow)));
  if (!memory) throw OutOfMemory(bytes);
  return memory;
}

PackedWeights::PackedWeights(const Call& call, Orders orders, const Array& cache, Threads& threads) : orders_(orders) {
  static_assert(sizeof(Header) <= kHeaderBytes);
  if (!orders.forward && !orders.backward) return;
  const Kernels& kernels = cpu_kernels();
  const bool is_double = call.dtype == Dtype::f64;
  if (orders.backward) backward_bytes_ = round_up(kernels.backward_bytes(call.sizes, is_double));
  const size_t bytes = backward_bytes_ + (orders.forward ? kernels.forward_bytes(call.sizes, is_double) : 0);
  const bool fits = cache && cache.dtype == aoti_torch_dtype_uint8() && cache.dim == 1 &&
                    cache.sizes[0] >= i64(bytes) + kHeaderBytes && cache.contiguous();
  if (fits && share(call, static_cast<char*>(cache.data), size_t(cache.sizes[0]), threads)) return;
  own_ = allocate(bytes);
  data_ = own_.get();
  pack(call, call.weights, threads);
}

PackedWeights::~PackedWeights() {
  if (header_) header_->use.fetch_sub(1, std::memory_order_release);
}

// Whether the shared buffer, of so many bytes, now holds these weights, and keeps them as long as this object lives.
bool PackedWeights::share(const Call& call, char* base, size_t bytes, Threads& threads) {
  auto* header = reinterpret_cast<Header*>(base);
  const uint64_t orders = 1 + uint64_t(orders_.forward) + 2 * uint64_t(orders_.backward);
  const uint64_t there = header->orders.load(std::memory_order_relaxed);
  const bool turn = orders_.trains && there != 0 && there != orders;  // the other pass has packed what is there
  const uint64_t wanted = turn ? 0 : hash_weights(call, call.weights, threads);
  uint64_t use = header->use.load(std::memory_order_acquire);
  while (!turn && Header::readers(use) != Header::kPacking && header->hash.load(std::memory_order_acquire) == wanted)
    if (header->use.compare_exchange_weak(use, Header::word(Header::readers(use) + 1), std::memory_order_acq_rel)) {
      // From here on nobody repacks; it may have happened just before.
      if (header->hash.load(std::memory_order_acquire) == wanted) {
        header_ = header;
        data_ = base + kHeaderBytes;
        return true;
      }
      header->use.fetch_sub(1, std::memory_order_release);
      return false;
    }
  if (Header::readers(use) != 0) return false;
  if (!header->use.compare_exchange_strong(use, Header::word(Header::kPacking), std::memory_order_acq_rel))
    return false;
  header_ = header;
  data_ = base + kHeaderBytes;
  header->hash.store(0, std::memory_order_release);
  if (header->orders.exchange(orders, std::memory_order_relaxed) == 0) prefer_huge_pages(data_, base + bytes);
  try {
    if (turn)
      pack(call, call.weights, threads);
    else
      header->hash.store(pack_copy(call, threads), std::memory_order_release);
  } catch (...) {
    header_ = nullptr;
    header->use.store(Header::word(0), std::memory_order_release);
    throw;
  }
  header->use.store(Header::word(1), std::memory_order_release);
  return true;
}

void PackedWeights::pack(const Call& call, const DirectionWeights* weights, Threads& threads) const {
  const Kernels& kernels = cpu_kernels();
  if (orders_.backward) kernels.pack_backward(call.sizes, call.dtype, weights, data_, threads);
  if (orders_.forward) kernels.pack_forward(call.sizes, call.dtype, weights, data_ + backward_bytes_, threads);
}

// Packs a copy of the weights, and returns the hash of this copy.
uint64_t PackedWeights::pack_copy(const Call& call, Threads& threads) const {
  const size_t e = element_bytes(call);
  DirectionWeights copies[2];
  std::vector<Memory> memory;
  for (i64 d = 0; d < call.sizes.D; ++d) {
    copies[d] = call.weights[d];
    for_weights(call, orders_.forward, copies[d], [&](const void*& data, i64 elements) {
      memory.push_back(allocate(size_t(elements) * e));
      std::memcpy(memory.back().get(), data, size_t(elements) * e);
      data = memory.back().get();
    });
  }
  pack(call, copies, threads);
  return hash_weights(call, copies, threads);
}

uint64_t PackedWeights::hash_weights(const Call& call, const DirectionWeights* weights, Threads& threads) const {
  const Kernels& kernels = cpu_kernels();
  const Sizes& s = call.sizes;
  const i64 tag[] = {s.I,
                     s.H,
                     s.P,
                     s.D,
                     s.G,
                     s.bias,
                     s.projected,
                     s.layer_norm,
                     i64(call.dtype),
                     orders_.forward,
                     orders_.backward,
                     kernels.pair_passes(s, call.dtype)};
  uint64_t h = kernels.hash(tag, sizeof tag, 1);
  const size_t e = element_bytes(call);
  for (i64 d = 0; d < s.D; ++d) {
    DirectionWeights w = weights[d];
    for_weights(call, orders_.forward, w,
                [&](const void* data, i64 elements) { h = hash_large(data, size_t(elements) * e, h, threads); });
  }
  return h | 1;  // never the zero of a fresh buffer
}

}  // namespace fastlstm
