// Whether more than one thread has been of use to calls of one kind. Beside busy neighbours it often is not: a worker
// that has to leave its core in the middle of an item keeps the caller waiting for milliseconds. Then the next calls
// take fewer threads, and try again after a pause that grows from failure to failure.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastlstm {

// Steady time in nanoseconds.
int64_t now();

// What is remembered of one kind of call. Calls at the same time may write at the same time: it is a heuristic.
class alignas(64) Usefulness {
 public:
  // How many threads a call may take at `time`.
  int most(int64_t time) {
    if (pause_until_.load(std::memory_order_relaxed) <= time) return kAny;
    return most_.load(std::memory_order_relaxed);
  }
  // Whether `most` would ask for the time at all.
  bool limited() const { return pause_until_.load(std::memory_order_relaxed) != 0; }
  // Whether torch's threads are to be tried, rather than our own. After a failure the other ones have their turn: where
  // torch's look for work on the other cores, ours come late; beside busy neighbours it is torch's that come late. The
  // turn of ours ends with a failure of theirs, and if it has been long and of little use: nobody may have come late.
  bool borrows() {
    const int64_t since = own_since_.load(std::memory_order_relaxed);
    if (since == 0) return true;
    const int64_t turn = now() - since;
    if (turn < kTurnOfPause * pause_.load(std::memory_order_relaxed)) return false;
    if (saved_.load(std::memory_order_relaxed) > turn / kUseOfTurn) return false;
    own_since_.store(0, std::memory_order_relaxed);
    return true;
  }

  // Of one region on `threads` threads: nanoseconds that sharing has saved, and how many workers were late.
  void record(int64_t saved, int threads, int late, int64_t time);

  static constexpr int kAny = 1 << 30;

 private:
  // Sharing may lose this much more than it has saved before it pauses: a first call with cold caches, but no more than
  // a time slice of a neighbour. And half of what it has saved since it last failed: every machine takes a core away
  // now and then, beside a neighbour that wakes for 5 ms every 60 even often, and a pause would cost more than that.
  static constexpr int64_t kCredit = 2'000'000;
  static constexpr int64_t kCreditOfSaved = 2;        // one in so many
  static constexpr int64_t kTrialCredit = 1'000'000;  // the same of a trial after a pause
  static constexpr int64_t kShortestPause = 8'000'000, kLongestPause = 1'000'000'000;
  static constexpr int64_t kPauseOfLoss = 16;     // times what the last region has lost: a trial costs so small a share
  static constexpr int64_t kTurnOfPause = 4;      // pauses that the turn of our threads has at least
  static constexpr int64_t kUseOfTurn = 16;       // then they have to save one part in so many of the time
  static constexpr int64_t kTrust = 100'000'000;  // what sharing must save until failures are forgotten

  std::atomic<int64_t> credit_{kCredit}, saved_{0};
  std::atomic<int64_t> pause_{0}, pause_until_{0};
  std::atomic<int64_t> own_since_{0};  // 0: torch's threads have their turn
  std::atomic<int> most_{kAny};
};

// The memory of calls of this kind.
Usefulness& usefulness_of(uint64_t kind);

}  // namespace fastlstm
