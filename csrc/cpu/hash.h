// The hash that tells whether weights changed since they were packed. (A version counter would miss edits through
// `.data`.) It reads at the speed of memory; it is not made to resist an attacker.
//
// Each 64-bit word, changed by a key that depends on its position, contributes the product of its two halves, as in NH
// and XXH3. It also adds itself: otherwise a half that is zero would hide a change of the other.
#pragma once

#include "cpu/simd.h"

namespace fastlstm {
namespace {

typedef uint64_t LooseWords __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

FASTLSTM_INLINE void absorb(const Words64& words, const Words64& key, Words64& sum) {
  const Words64 mixed = words ^ key;
  sum += multiply_low(mixed, mixed >> 32) + words;
}

FASTLSTM_INLINE uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9fb21c651e98df25u;
  return hash ^ hash >> 29;
}

// The hash of `bytes` bytes. It depends on the instruction set: a cache never leaves its process.
inline uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed) {
  constexpr size_t kBytes = kVectorBytes;
  constexpr int kSums = 4, kWords = kVectorBytes / 8;
  constexpr uint64_t kKeys[8] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u,
                                 0xa0761d6478bd642fu, 0xe7037ed1a0b428dbu, 0x8ebc6af09c88c6e3u, 0x589965cc75374cc3u};
  const Words64 step = Words64{} + 0x632be59bd9b4e019u;
  Words64 key, sum[kSums] = {};
  std::memcpy(&key, kKeys, kBytes);
  key ^= seed;
  const char* p = static_cast<const char*>(data);
  const char* end = p + bytes;
  // Each sum has a stretch of its own and asks for what it will read soon: a call later, weights often come from
  // memory, and what the hardware fetches by itself, ahead within one page, leaves a core waiting.
  constexpr size_t kAhead = 1024;
  const size_t stretch = bytes / kSums / kBytes * kBytes;
  for (size_t k = 0; k < stretch; k += kBytes, key += step)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const char* at = p + size_t(s) * stretch + k;
      __builtin_prefetch(at + kAhead);
      absorb((Words64) * reinterpret_cast<const LooseWords*>(at), key, sum[s]);
    }
  p += kSums * stretch;
  for (; p < end; p += kBytes, key += step) {
    Words64 tail = {};
    std::memcpy(&tail, p, size_t(end - p) < kBytes ? size_t(end - p) : kBytes);
    absorb(tail, key, sum[0]);
  }
  uint64_t hashes[kSums] = {};  // four chains side by side, since each one waits for its own products
  for (int k = 0; k < kWords; ++k)
    for (int s = 0; s < kSums; ++s) hashes[s] = mix(hashes[s], sum[s][k]);
  uint64_t result = seed ^ bytes;
  for (int s = 0; s < kSums; ++s) result = mix(result, hashes[s]);
  return result;
}

}  // namespace
}  // namespace fastlstm
