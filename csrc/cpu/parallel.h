// Loops over torch's threads.
#pragma once

#include <atomic>
#include <exception>

#include "cpu/float_mode.h"
#include "lstm.h"

namespace fastlstm {
namespace {

// What the threads of a loop share: its body, and the first exception that one of them met. No exception may leave a
// function that a pool of threads runs.
template <class F>
struct ParallelLoop {
  const F& f;
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;

  static void run(i64 begin, i64 end, void* context) {
    auto& loop = *static_cast<ParallelLoop*>(context);
    const FlushDenormals flush;
    try {
      for (i64 item = begin; item < end && !loop.failed.load(std::memory_order_relaxed); ++item) loop.f(item);
    } catch (...) {
      if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
  }
};

// Runs f(item) for every item of [0, n) on torch's threads. The caller's thread flushes denormals already. If f throws
// the caller gets one of the exceptions, once all threads have ended.
template <class F>
inline void parallel(const Threads& threads, i64 n, const F& f) {
  if (threads.count <= 1 || n <= 1) {
    for (i64 item = 0; item < n; ++item) f(item);
    return;
  }
  ParallelLoop<F> loop{f};
  threads.run(n, &ParallelLoop<F>::run, &loop);
  if (loop.failed) std::rethrow_exception(loop.error);
}

}  // namespace
}  // namespace fastlstm
