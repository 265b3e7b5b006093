// Zoneout (Krueger et al.): in training each unit of a state keeps its value with a given probability; otherwise the
// state is the expectation of that. Random choices are a hash of seed, direction, time, sequence and unit, as in
// fastlstm/reference.py: forward and backward draw them again instead of keeping them.
#pragma once

#include "cpu/memory.h"

namespace fastlstm {
namespace {

// The hash that makes the random numbers, of 32-bit words. The lanes of a vector may be wider than that.
template <class Word>
FASTLSTM_INLINE Word mix(Word x) {
  x = ((x ^ (x >> 16)) * 0x21f0aaadu) & 0xffffffffu;
  x = ((x ^ (x >> 15)) * 0x735a2d97u) & 0xffffffffu;
  return x ^ (x >> 15);
}

// Zoneout of h (kind 0) or of c (kind 1), for one direction. row_key: Extended::row_key of the row.
template <class S>
class Zoneout {
 public:
  using Words = typename Simd<S>::Words;
  using Word = typename Simd<S>::Word;

  Zoneout() = default;
  Zoneout(double probability, bool random, uint32_t base, int kind, i64 units)
      : active_(probability > 0), random_(random), stays_(S(probability)), changes_(S(1 - probability)),
        threshold_(uint32_t(probability * 0x1p32)) {
    if (!active_ || !random_) return;
    keys_ = Buffer<Word>(round_up(units, kLanes<S>));
    for (i64 u = 0; u < round_up(units, kLanes<S>); ++u) keys_[u] = mix(uint32_t(base + 2 * u + kind));
  }

  explicit operator bool() const { return active_; }

  // The state of kLanes units after a step, from the one before it and the one that the step made.
  FASTLSTM_INLINE Vec<S> state(Vec<S> before, Vec<S> after, uint32_t row_key, i64 unit) const {
    return random_ ? (stay(row_key, unit) ? before : after) : fma(splat(changes_), after, stays_ * before);
  }
  // Divides d, the gradient of that state, between the state before the step and the one that the step made.
  FASTLSTM_INLINE void divide(Vec<S> d, uint32_t row_key, i64 unit, Vec<S>& before, Vec<S>& after) const {
    if (random_) {
      const auto stays = stay(row_key, unit);
      before = stays ? d : Vec<S>{};
      after = stays ? Vec<S>{} : d;
    } else {
      before = stays_ * d;
      after = changes_ * d;
    }
  }

 private:
  FASTLSTM_INLINE typename Simd<S>::Int stay(uint32_t row_key, i64 unit) const {
    Words key;
    std::memcpy(&key, &keys_[unit], sizeof key);
    return mix(key ^ Word(row_key)) < Word(threshold_);
  }

  bool active_ = false, random_ = false;
  S stays_ = 0, changes_ = 1;
  uint32_t threshold_ = 0;
  Buffer<Word> keys_;
};

}  // namespace
}  // namespace fastlstm
