// Threads of our own. Between the regions of a call they wait for a few microseconds, then they sleep. Nobody waits for
// a thread that has not come: whoever is there takes the items of a region, one after the other, and a worker that
// wakes late finds nothing left. Which thread computes an item has no influence on the numbers.
//
//   Threads        those of one call: the calling thread and some workers, which are asked to come when work is shared
//   region         one Threads::run: n items, which are independent of each other
//   workers        of the process, asleep at first absent; a call claims those that are free and gives them back
//   usefulness.h   whether sharing has paid lately; cores.h: how many cores there are for us
#pragma once

#include <atomic>
#include <exception>
#include <memory>

#include "cpu/usefulness.h"

namespace fastlstm {

struct Worker;

// Items of a region that one thread takes first, so that it finds their data in its caches at every step. Others take
// what is left of them.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t begin = 0, end = 0;
};

class Threads {
 public:
  using Body = void (*)(int64_t item, void* context);
  // Threads of somebody else, all of which have to come if one does.
  struct Lender {
    // Calls body(begin, end, context) over a partition of [0, n) on these threads; 0 on the calling one.
    void (*lend)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context) = nullptr;
    int threads = 0;
  };

  static constexpr int kMostWorkers = 255;

  // The calling thread alone, also within an item of other threads.
  Threads();
  // At most `wanted` threads, fewer where there are not as many cores, where other calls have them, or where they have
  // not been of use to calls of this kind (any number that tells calls apart). lender: see `together`; may be nobody.
  Threads(int wanted, uint64_t kind, Lender lender);
  ~Threads();
  Threads(const Threads&) = delete;

  // What a call is planned for. It may get fewer.
  int count() const { return count_; }

  // Calls body(context), in which regions run. Threads are borrowed from torch for this time if they have been
  // punctual: after an operator of torch its threads look for the next one for many milliseconds, on cores that ours
  // would have to share with them. They compute as workers do, but all of them have to come before this returns: so
  // not where there are more of them than cores, or many more than the call has work for.
  void together(void (*body)(void* context), void* context);

  // Calls body(item, context) for every item of [0, n), on any thread, in any order, and returns when all are done. The
  // first exception is thrown again here. One region at a time; a body shares nothing itself. backwards: a thread takes
  // its own items from the last to the first, so that it begins with those whose data it has used last. uncut: the time
  // that they would take as one item, as a part of all of theirs.
  void run(int64_t n, bool backwards, Body body, void* context, double uncut);

 private:
  friend struct Worker;

  bool recruit(int64_t items);
  void borrow(void (*body)(void* context), void* context);
  void dismiss(int size);
  void open(int64_t n, bool backwards);
  void wake_two();
  int meet(int64_t since);
  void take_items(int place);
  Share& share(int place);

  int count_ = 1, bound_ = 1;  // bound_: threads that there may be of all calls together
  bool counted_ = false;       // among the calls in flight
  int size_ = 1;               // threads that are in this call now; the caller has place 0
  Lender lender_;
  std::unique_ptr<Worker[]> lent_;
  Usefulness* usefulness_ = nullptr;
  Body body_ = nullptr;
  void* context_ = nullptr;
  bool backwards_ = false;
  Share own_;
  int64_t taken_ = 0;          // items of this region that the caller has taken
  std::atomic<int> woken_{0};  // places that somebody has seen to
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  Worker* members_[kMostWorkers];
};

}  // namespace fastlstm
