// Memory that comes and goes with every call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>

namespace fastlstm {

// Says that calls allocate and free so many bytes, again and again.
//
// What is free at the end of glibc's heap goes back to the system where it is more than twice the largest block that
// was ever freed. A training step frees several blocks of about the same size, so it crosses that border each time, and
// the next step gets its memory anew, page by page, at 1 to 3 us each: up to a third of the time of a small layer. One
// block as large as all of them together, freed once, moves the border. Where MALLOC_TRIM_THRESHOLD_ or another
// allocator decides, this changes nothing.
inline void expect_again(size_t bytes) {
  constexpr size_t kMost = (size_t(32) << 20) - (size_t(64) << 10);  // glibc does not learn from larger blocks
  static std::atomic<size_t> expected{0};
  bytes = std::min(bytes, kMost);
  if (bytes <= expected.load(std::memory_order_relaxed)) return;
  expected.store(bytes, std::memory_order_relaxed);
  void* volatile block = std::malloc(bytes);  // volatile: a compiler may leave out a block that nobody uses
  std::free(block);
}

}  // namespace fastlstm
