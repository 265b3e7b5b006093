// Packed weights: a layer's weights in kernel order, for one call. They come from the caller's buffer while it holds
// these very weights; otherwise they are packed anew. Kernels that read the weights as they are stored need none.
//
// An edit of weights through `.data` leaves no trace but the bytes, so a hash of all weights tells whether the buffer
// is up to date (cpu/hash.h). What goes into the buffer is packed from a copy of the weights, and the hash is that of
// the copy: whatever other threads and processes write in the meantime, the buffer holds what its hash says.
//
// In training the passes take turns, and each packs in its own order. A pass that finds the order of the other one
// knows without any hash that it has to pack. It packs the weights themselves and leaves no hash, since nobody would
// find its copy again.
//
// Threads may share a buffer. Its header counts the calls that read it. A call repacks it only if no call reads it; a
// call that finds it busy with other weights packs into memory of its own.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "bindings/call.h"

namespace fastlstm {

class PackedWeights {
 public:
  static constexpr i64 kHeaderBytes = 64;

  // In which orders a pass needs the weights. trains: it belongs to a step of training, which has another pass.
  struct Orders {
    bool forward, backward, trains;
  };

  // cache: uint8 [bytes] as cpu_cache_bytes says, zero at first; or absent.
  PackedWeights(const Call& call, Orders orders, const Array& cache, Threads& threads);
  ~PackedWeights();
  PackedWeights(const PackedWeights&) = delete;

  // Null: not needed.
  const void* backward() const { return orders_.backward ? data_ : nullptr; }
  const void* forward() const { return orders_.forward ? data_ + backward_bytes_ : nullptr; }
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  struct Header;  // at the beginning of a shared buffer
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  using Memory = std::unique_ptr<char, Free>;

  static Memory allocate(size_t bytes);
  bool share(const Call& call, char* base, size_t bytes, Threads& threads);
  void pack(const Call& call, const DirectionWeights* weights, Threads& threads) const;
  uint64_t pack_copy(const Call& call, Threads& threads) const;
  uint64_t hash_weights(const Call& call, const DirectionWeights* weights, Threads& threads) const;

  const Orders orders_;
  size_t backward_bytes_ = 0;  // what lies before the forward order
  Memory own_;
  Header* header_ = nullptr;  // of the shared buffer in use
  char* data_ = nullptr;
};

}  // namespace fastlstm
