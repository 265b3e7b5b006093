#include "context.h"

namespace fastlstm::cuda::emulator {

#if defined(__x86_64__)
extern "C" void fastlstm_switch(void** from, void* to);
// Saves the registers that a call keeps on the old stack, takes those of the new one from there.
asm(R"(
.text
.local fastlstm_switch
.type fastlstm_switch, @function
fastlstm_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastlstm_switch, . - fastlstm_switch
)");

void Context::start(char* base, void (*entry)()) {
  void** top = reinterpret_cast<void**>(base + kStack) - 1;  // aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  stack = top;
}
void Context::change(Context& from, Context& to) { fastlstm_switch(&from.stack, to.stack); }
#else
void Context::start(char* base, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = base;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void Context::change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

}  // namespace fastlstm::cuda::emulator
