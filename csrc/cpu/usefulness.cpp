#include "cpu/usefulness.h"

#include <algorithm>
#include <chrono>

namespace fastlstm {

int64_t now() {
  using std::chrono::steady_clock;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

void Usefulness::record(int64_t saved, int threads, int late, int64_t time) {
  int64_t credit = credit_.load(std::memory_order_relaxed) + saved;
  int64_t total = std::min(kTrust, saved_.load(std::memory_order_relaxed) + saved);
  if (credit >= kCredit) {
    if (limited()) pause_until_.store(0, std::memory_order_relaxed);  // a trial has shown that threads help again
    credit = std::min(credit, kCredit + std::max(int64_t(0), total) / kCreditOfSaved);
  } else if (credit < 0) {
    const int64_t wanted = std::max(2 * pause_.load(std::memory_order_relaxed), kPauseOfLoss * -saved);
    const int64_t pause = std::clamp(wanted, kShortestPause, kLongestPause);
    most_.store(std::max(1, threads - std::max(1, late)), std::memory_order_relaxed);
    pause_.store(pause, std::memory_order_relaxed);
    pause_until_.store(time + pause, std::memory_order_relaxed);
    own_since_.store(own_since_.load(std::memory_order_relaxed) ? 0 : time, std::memory_order_relaxed);
    credit = kTrialCredit;
    total = 0;
  }
  if (total == kTrust && pause_.load(std::memory_order_relaxed)) {
    pause_.store(0, std::memory_order_relaxed);
    own_since_.store(0, std::memory_order_relaxed);
  }
  saved_.store(total, std::memory_order_relaxed);
  credit_.store(credit, std::memory_order_relaxed);
}

Usefulness& usefulness_of(uint64_t kind) {
  static Usefulness table[64];  // kinds that share a place share their fate, for the length of a pause
  return table[(kind * 0x9e3779b97f4a7c15) >> 58];
}

}  // namespace fastlstm
