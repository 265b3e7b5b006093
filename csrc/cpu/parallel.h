// Loops over the threads of a call.
#pragma once

#include "cpu/float_mode.h"
#include "cpu/pool.h"
#include "lstm.h"

namespace fastlstm {
namespace {

// Runs f(item) for every item of [0, n) on any of the threads. The caller's thread flushes denormals already. If f
// throws the caller gets one of the exceptions, once all threads have ended. backwards, uncut: see Threads::run.
template <class F>
inline void parallel(Threads& threads, i64 n, const F& f, bool backwards = false, double uncut = 1) {
  threads.run(
      n, backwards,
      [](i64 item, void* context) {
        const FlushDenormals flush;
        (*static_cast<const F*>(context))(item);
      },
      const_cast<void*>(static_cast<const void*>(&f)), uncut);
}

// Runs f() with all threads at hand: what it shares begins at once.
template <class F>
inline void together(Threads& threads, const F& f) {
  threads.together([](void* context) { (*static_cast<const F*>(context))(); },
                   const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace fastlstm
