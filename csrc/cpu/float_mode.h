// Denormal numbers, below 1.2e-38 in float32 and 2.2e-308 in float64, take a core up to a hundred times longer than
// others. The kernels count them as zero: what they read, and what they compute. So a closed gate is 0, and nothing
// slows down where states or gradients fade away. The error is smaller than the smallest normal number.
//
// torch.set_flush_denormal asks the same of one thread only. Here every thread of a call has it, so results depend
// neither on that switch nor on the number of threads. float16 keeps its small numbers: as float32 they are not
// denormal.
#pragma once

#include <cstdint>

namespace fastlstm {
namespace {

#if defined(__SSE__)
constexpr bool kFlushesDenormals = true;
using FloatMode = uint32_t;
constexpr FloatMode kFlush = 1u << 15 | 1u << 6;  // MXCSR: results (FTZ) and operands (DAZ)
inline FloatMode float_mode() {
  FloatMode mode;
  asm volatile("stmxcsr %0" : "=m"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { asm volatile("ldmxcsr %0" ::"m"(mode) : "memory"); }
#elif defined(__aarch64__)
constexpr bool kFlushesDenormals = true;
using FloatMode = uint64_t;
constexpr FloatMode kFlush = 1u << 24;  // FPCR.FZ: both
inline FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
// CPUs with no such mode, or none that is known here. Closed gates are 0 all the same (activations.h); what fades away
// becomes denormal.
constexpr bool kFlushesDenormals = false;
using FloatMode = uint32_t;
constexpr FloatMode kFlush = 0;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

// While it lives, the thread that made it counts denormal numbers as zero. Then the thread's state is as it was.
class FlushDenormals {
 public:
  FlushDenormals() : before_(float_mode()) { set_float_mode(before_ | kFlush); }
  ~FlushDenormals() { set_float_mode(before_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  const FloatMode before_;
};

}  // namespace
}  // namespace fastlstm
