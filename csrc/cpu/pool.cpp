#include "cpu/pool.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <thread>
#include <utility>

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

#include "cpu/cores.h"
#include "cpu/park.h"

namespace fastlstm {
namespace {

// Nanoseconds. A worker looks for the next region so long before it sleeps: longer than a caller needs from one step of
// a stream to the next, or from forward to backward, because an idle core of a virtual machine takes its time to wake;
// shorter than anybody notices.
constexpr int64_t kLinger = 200'000;
// A borrowed one: without us it would look for torch's next operator as long.
constexpr int64_t kBorrowedLinger = 1'000'000;
// A caller waits so long, awake, for workers that are in the middle of an item.
constexpr int64_t kPatience = 200'000;

enum State : uint32_t {
  kAbsent,   // there is no such thread yet
  kFree,     // of no call
  kClaimed,  // of a call, outside of a region
  kInvited,  // there is a region, and the worker has not come
  kInside,   // takes items
  kAwaited,  // is inside; the caller sleeps until it leaves
  kOver,     // of a borrowed thread: the call is over
};

}  // namespace

// Who changes the state: a caller claims (absent or free to claimed), invites (to invited), closes the region (invited
// to claimed), waits (inside to awaited) and dismisses (claimed to free); the worker comes (invited to inside) and
// leaves (inside or awaited to claimed). A region is open to those who come while they are invited, so a worker never
// touches a region that its caller has left.
struct alignas(128) Worker {
  std::atomic<uint32_t> state{kAbsent};
  std::atomic<bool> asleep{false};
  Threads* team;  // set before the worker is invited
  int place;
  Park park;
  Share share;

  bool claim(int number);
  void start(int number);
  void work(int64_t linger);
  bool invited_soon(int64_t linger) const;
  void wait_until_out(int64_t since, int& late);
};

namespace {

Worker* const workers = new Worker[Threads::kMostWorkers];  // for ever: at exit some may still sleep on theirs
std::atomic<int> calls{0};                                  // in flight
std::atomic<int> busy{0};  // threads of all calls: callers, and the workers that they have claimed
std::atomic<bool> forked{false};

// A child of fork has none of its parent's threads. Where a worker was does not matter: nobody waits for it here.
[[maybe_unused]] void forget_workers() {
  for (int k = 0; k < Threads::kMostWorkers; ++k) new (&workers[k]) Worker;
  calls = busy = 0;
  forked = true;
}

}  // namespace

// ---- workers ------------------------------------------------------------------------------------------------

bool Worker::claim(int number) {
  uint32_t now_free = kFree;
  if (state.compare_exchange_strong(now_free, kClaimed, std::memory_order_acquire)) return true;
  uint32_t absent = kAbsent;
  if (!state.compare_exchange_strong(absent, kClaimed, std::memory_order_acquire)) return false;
  try {
    start(number);
  } catch (const std::exception&) {  // no more threads, or memory for one: the call goes on without
    state.store(kAbsent, std::memory_order_release);
    return false;
  }
  return true;
}

void Worker::start(int number) {
#ifndef _WIN32
  sigset_t all, before;  // signals are for the threads of the program
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  struct Restore {
    const sigset_t& mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
  } restore{before};
#endif
  // Nobody joins it: at exit it sleeps, or looks at memory that stays.
  std::thread([this, number] {
    char name[16];
    std::snprintf(name, sizeof name, "fastlstm %d", number);
#ifdef __linux__
    pthread_setname_np(pthread_self(), name);
#elif defined(__APPLE__)
    pthread_setname_np(name);
#endif
    work(kLinger);
  }).detach();
}

void Worker::work(int64_t linger) {
  for (;;) {
    if (!invited_soon(linger)) {
      asleep.store(true);
      const uint32_t seen = state.load();
      if (seen == kOver) return;
      if (seen != kInvited) park.sleep(state, seen);
      asleep.store(false);
    }
    uint32_t invited = kInvited;
    if (!state.compare_exchange_strong(invited, kInside, std::memory_order_acquire)) continue;
    team->wake_two();
    team->take_items(place);
    // From here on the team may be gone.
    if (state.exchange(kClaimed, std::memory_order_acq_rel) == kAwaited) park.wake(state);
  }
}

bool Worker::invited_soon(int64_t linger) const {
  const int64_t begin = now();
  do {
    for (int k = 0; k < 16; ++k) {
      const uint32_t seen = state.load(std::memory_order_relaxed);
      if (seen == kInvited || seen == kOver) return seen == kInvited;
      relax();
    }
    // Whoever has work goes first: a neighbour on this core, and above all a caller that the system has put here.
    std::this_thread::yield();
  } while (now() - begin < linger);
  return false;
}

// The caller's wait for a worker that is inside; `since` is when it began to wait for all of them.
void Worker::wait_until_out(int64_t since, int& late) {
  uint32_t inside = kInside;
  while (state.load(std::memory_order_acquire) == kInside) {
    for (int k = 0; k < 16 && state.load(std::memory_order_relaxed) == kInside; ++k) relax();
    if (now() - since < kPatience) continue;
    if (!state.compare_exchange_strong(inside, kAwaited, std::memory_order_acquire)) break;
    ++late;
    while (state.load(std::memory_order_acquire) == kAwaited) park.sleep(state, kAwaited);
  }
}

// ---- the threads of a call ----------------------------------------------------------------------------------

// Threads are shared fairly among the calls in flight; what others leave may be taken too. others: threads of others.
static int fair_count(int bound, int others) { return std::max(bound / std::max(1, calls.load()), bound - others); }

Threads::Threads() = default;

Threads::Threads(int wanted, uint64_t kind, Lender lender) {
#ifndef _WIN32
  static const int registered = pthread_atfork(nullptr, nullptr, forget_workers);
  (void)registered;
#endif
  counted_ = true;
  calls.fetch_add(1);
  const int others = busy.fetch_add(1);
  if (wanted <= 1) return;
  const int cores = usable_cores();
  bound_ = std::min({wanted, cores, kMostWorkers + 1});
  if (lender.threads <= std::min(cores, 2 * bound_)) lender_ = lender;
  usefulness_ = &usefulness_of(kind);
  count_ = std::max(1, std::min(bound_, fair_count(bound_, others)));
  if (count_ > 1 && usefulness_->limited()) count_ = std::min(count_, usefulness_->most(now()));
}

Threads::~Threads() {
  if (!counted_) return;
  dismiss(1);
  busy.fetch_sub(1);
  calls.fetch_sub(1);
}

// Claims or dismisses workers until there are as many as the call should have now for so many items; whether there is
// one at all.
bool Threads::recruit(int64_t items) {
  if (count_ <= 1) return false;
  int wanted = std::min(count_, std::max(1, fair_count(bound_, busy.load(std::memory_order_relaxed) - size_)));
  wanted = int(std::min(items, int64_t(wanted)));
  if (usefulness_->limited()) wanted = std::min(wanted, usefulness_->most(now()));
  if (lent_) {
    size_ = wanted;
    return size_ > 1;
  }
  dismiss(wanted);
  for (int k = 0; k < bound_ - 1 && size_ < wanted; ++k) {
    if (!workers[k].claim(k + 1)) continue;
    busy.fetch_add(1, std::memory_order_relaxed);
    members_[size_ - 1] = &workers[k];
    ++size_;
  }
  return size_ > 1;
}

void Threads::dismiss(int size) {
  for (; size_ > size; --size_) {
    members_[size_ - 2]->state.store(kFree, std::memory_order_release);
    busy.fetch_sub(1, std::memory_order_relaxed);
  }
}

void Threads::together(void (*body)(void* context), void* context) {
  // OpenMP's threads do not survive fork, and there are as many sets of them as callers.
  if (count_ == 1 || !lender_.lend || !usefulness_->borrows() || forked.load() || calls.load() > 1)
    return body(context);
  borrow(body, context);
}

void Threads::borrow(void (*body)(void* context), void* context) {
  struct Call {
    Threads& threads;
    void (*body)(void* context);
    void* context;
    int64_t done = 0;

    void lead() {
      try {
        body(context);
      } catch (...) {
        threads.error_ = std::current_exception();
      }
      for (int k = 0; k < threads.count_ - 1; ++k) {
        Worker& worker = threads.lent_[size_t(k)];
        worker.state.exchange(kOver);
        if (worker.asleep.load()) worker.park.wake(worker.state);
      }
      done = now();
    }
  } call{*this, body, context};
  dismiss(1);
  lent_.reset(new Worker[size_t(count_ - 1)]);
  for (int k = 0; k < count_ - 1; ++k) {
    lent_[size_t(k)].state = kClaimed;
    members_[k] = &lent_[size_t(k)];
  }
  busy.fetch_add(count_ - 1);
  lender_.lend(
      count_,
      [](int64_t begin, int64_t end, void* context) {
        Call& call = *static_cast<Call*>(context);
        if (begin == 0) return call.lead();
        for (; begin < end; ++begin) call.threads.lent_[size_t(begin - 1)].work(kBorrowedLinger);
      },
      &call);
  busy.fetch_sub(count_ - 1);
  const int64_t end = now(), waited = end - call.done;
  if (waited > kPatience) usefulness_->record(-waited, count_, 1, end);
  size_ = 1;
  lent_.reset();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

Share& Threads::share(int place) { return place ? members_[place - 1]->share : own_; }

void Threads::run(int64_t n, bool backwards, Body body, void* context, double uncut) {
  if (n <= 1 || !recruit(n)) {
    for (int64_t k = 0; k < n; ++k) body(backwards ? n - 1 - k : k, context);
    return;
  }
  body_ = body;
  context_ = context;
  const int64_t begin = now();
  open(n, backwards);
  wake_two();
  take_items(0);
  const int64_t done = now();
  const int late = meet(done);
  const int64_t end = now();
  // The time of this thread alone, at the pace of its items, less what it took, the meeting included. Threads that help
  // less than an eighth are not worth their while: the call is then cut into more parts than it needs.
  if (taken_ > 0) {
    const int64_t own = done - begin, alone = int64_t(uncut * double(own * n / taken_));
    usefulness_->record(alone - (end - begin) - own / 8, size_, late, end);
  }
  if (failed_.exchange(false, std::memory_order_relaxed)) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Threads::open(int64_t n, bool backwards) {
  for (int k = 0; k < size_; ++k) {
    share(k).begin = k * n / size_;
    share(k).end = (k + 1) * n / size_;
    share(k).next.store(share(k).begin, std::memory_order_relaxed);
  }
  backwards_ = backwards;
  taken_ = 0;
  woken_.store(size_, std::memory_order_relaxed);  // nobody is woken before all are invited
  for (int k = 1; k < size_; ++k) {
    Worker& worker = *members_[k - 1];
    worker.team = this;
    worker.place = k;
    worker.state.exchange(kInvited);
  }
  woken_.store(1);
}

// Everybody who comes wakes two more, so that many are awake soon; the caller goes on after each of its items, because
// those who were woken may not come.
void Threads::wake_two() {
  for (int k = 0; k < 2; ++k) {
    if (woken_.load() >= size_) return;
    const int place = woken_.fetch_add(1);
    if (place >= size_) return;
    Worker& worker = *members_[place - 1];
    if (worker.asleep.load()) worker.park.wake(worker.state);
  }
}

// Closes the region to those who have not come, and waits for those who are inside; how many of them were late.
int Threads::meet(int64_t since) {
  int late = 0;
  for (int k = 1; k < size_; ++k) {
    uint32_t invited = kInvited;
    if (members_[k - 1]->state.compare_exchange_strong(invited, kClaimed, std::memory_order_acquire)) continue;
    members_[k - 1]->wait_until_out(since, late);
  }
  return late;
}

void Threads::take_items(int place) {
  for (int k = 0; k < size_; ++k) {
    Share& from = share((place + k) % size_);
    while (from.next.load(std::memory_order_relaxed) < from.end) {
      const int64_t item = from.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= from.end) break;
      try {
        body_(backwards_ ? from.begin + from.end - 1 - item : item, context_);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_acq_rel)) error_ = std::current_exception();
      }
      if (place == 0) {
        ++taken_;
        wake_two();
      }
    }
  }
}

}  // namespace fastlstm
