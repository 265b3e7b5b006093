// Loops over torch's threads.
#pragma once

#include "cpu/float_mode.h"
#include "lstm.h"

namespace fastlstm {
namespace {

// Runs f(item) for every item of [0, n) on torch's threads. The caller's thread flushes denormals already.
template <class F>
inline void parallel(const Threads& threads, i64 n, const F& f) {
  if (threads.count <= 1 || n <= 1) {
    for (i64 item = 0; item < n; ++item) f(item);
    return;
  }
  threads.run(
      n,
      [](i64 begin, i64 end, void* context) {
        const FlushDenormals flush;
        for (i64 item = begin; item < end; ++item) (*static_cast<const F*>(context))(item);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace fastlstm
