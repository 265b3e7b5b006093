// Packed weights: a layer's weights in kernel order, for one call. They come from the caller's buffer while it holds
// these very weights; otherwise they are packed anew.
//
// An edit of weights through `.data` leaves no trace but the bytes, so a hash of all weights tells whether the buffer
// is up to date (cpu/hash.h). Threads may share a buffer. Its header counts the calls that read it. A call repacks it
// only if no call reads it; a call that finds it busy with other weights packs into memory of its own.
#pragma once

#include <cstdlib>
#include <memory>

#include "bindings/call.h"

namespace fastlstm {

class PackedWeights {
 public:
  static constexpr i64 kHeaderBytes = 64;

  // Which orders are packed. A backward pass that computes the gates again needs both.
  enum Kind { kForward, kBackward, kBoth };

  // cache: uint8 [bytes] as cpu_cache_bytes says, zero at first; or absent.
  PackedWeights(const Call& call, Kind kind, const Array& cache);
  ~PackedWeights();
  PackedWeights(const PackedWeights&) = delete;

  const void* backward() const { return data_; }
  const void* forward() const { return data_ + backward_bytes_; }
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  struct Header;  // at the beginning of a shared buffer
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  bool share(const Call& call, char* base);
  void pack(const Call& call) const;
  uint64_t hash_weights(const Call& call) const;

  const Kind kind_;
  size_t backward_bytes_;  // what lies before the forward order
  std::unique_ptr<char, Free> own_;
  Header* header_ = nullptr;  // of the shared buffer in use
  char* data_ = nullptr;
};

}  // namespace fastlstm
