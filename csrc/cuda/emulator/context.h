// Switching between fibers: a Context is a stack with the registers of a function that was interrupted on it.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastlstm::cuda::emulator {

constexpr size_t kStack = 64 << 10;  // bytes of a fiber's stack

#if defined(__x86_64__)
struct Context {
  void* stack = nullptr;
  // The first `change` to this context calls entry() on the stack [base, base + kStack).
  void start(char* base, void (*entry)());
  static void change(Context& from, Context& to);
};
#else
struct Context {
  ucontext_t context;
  void start(char* base, void (*entry)());
  static void change(Context& from, Context& to);
};
#endif

}  // namespace fastlstm::cuda::emulator
