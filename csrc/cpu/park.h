// Sleep until a number changes: a futex on Linux, a condition variable elsewhere.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace fastlstm {

class Park {
 public:
  // Sleeps if `word` is still `value`. May return too early: the caller looks again.
  void sleep(std::atomic<uint32_t>& word, uint32_t value) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return word.load() != value; });
#endif
  }

  // After a change of `word`: wakes who sleeps.
  void wake(std::atomic<uint32_t>& word) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
#else
    (void)word;
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }  // not between the sleeper's look and its sleep
    changed_.notify_all();
#endif
  }

 private:
#ifndef __linux__
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

// Tells the core that it waits for another one.
inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` returns at once
#endif
}

}  // namespace fastlstm
