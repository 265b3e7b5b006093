// Chooses the instruction set of the kernels with quantised weights, once, when the first one is called: the fastest
// one on this CPU that FASTLSTM_ISA, if it is set, does not exclude. They give the same int8 results.
// FASTLSTM_QUANTIZED_ISA names any of those that the CPU has, for tests.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa/arm.h"
#include "cpu/isa/x86.h"
#include "cpu/quantized/quantized.h"

namespace fastlstm {

#ifdef FASTLSTM_X86
extern const QuantizedKernels avx512bf16_quantized, avx512vnni_quantized, avxvnni_quantized, avx2_quantized;
#endif
#ifdef FASTLSTM_FLOAT16
extern const QuantizedKernels avx512fp16_quantized;
#endif
#ifdef FASTLSTM_ARM
extern const QuantizedKernels i8mm_quantized, dotprod_quantized;
#endif
extern const QuantizedKernels portable_quantized;

namespace {

struct Choice {
  const QuantizedKernels* kernels;
  const char* isa;  // of the other kernels: FASTLSTM_ISA
};

bool supported(const QuantizedKernels& kernels) {
#ifdef FASTLSTM_X86
  static const X86Features features = x86_features();
#ifdef FASTLSTM_FLOAT16
  if (&kernels == &avx512fp16_quantized) return features.avx512_fp16 && features.avx512_vnni;
#endif
  if (&kernels == &avx512bf16_quantized) return features.avx512_bf16 && features.avx512_vnni;
  if (&kernels == &avx512vnni_quantized) return features.avx512_vnni;
  if (&kernels == &avxvnni_quantized) return features.avx_vnni;
  if (&kernels == &avx2_quantized) return features.avx2;
#endif
#ifdef FASTLSTM_ARM
  static const ArmFeatures features = arm_features();
  if (&kernels == &i8mm_quantized) return features.i8mm && features.bf16;
  if (&kernels == &dotprod_quantized) return features.dotprod;
#endif
  return &kernels == &portable_quantized;
}

// Whether kernels that this CPU supports are taken without being named. With VDPBF16PS an Intel took 1.6 times as long
// as in float32, where nothing is rounded; where it is fast, float16 is not needed.
bool gains([[maybe_unused]] const QuantizedKernels& kernels) {
#ifdef FASTLSTM_X86
  static const bool fast_bf16 = x86_features().fast_bf16;
  if (&kernels == &avx512bf16_quantized) return fast_bf16;
#ifdef FASTLSTM_FLOAT16
  if (&kernels == &avx512fp16_quantized) return !fast_bf16;
#endif
#endif
  return true;
}

const QuantizedKernels& choose() {
  const Choice fastest_first[] = {
#ifdef FASTLSTM_FLOAT16
      {&avx512fp16_quantized, "avx512fp16"},
#endif
#ifdef FASTLSTM_X86
      {&avx512bf16_quantized, "avx512bf16"},
      {&avx512vnni_quantized, "avx512"},  //
      {&avxvnni_quantized, "avx2"},       //
      {&avx2_quantized, "avx2"},
#endif
#ifdef FASTLSTM_ARM
      {&i8mm_quantized, "portable"},  //
      {&dotprod_quantized, "portable"},
#endif
      {&portable_quantized, "portable"}};
  const char *limit = std::getenv("FASTLSTM_ISA"), *wanted = std::getenv("FASTLSTM_QUANTIZED_ISA");
  bool within = !limit || !*limit;
  std::string available;
  for (const Choice& choice : fastest_first) {
    const bool as_others = limit && std::strcmp(limit, choice.isa) == 0;
    within = within || as_others;
    if (!supported(*choice.kernels)) continue;
    if (wanted && *wanted ? std::strcmp(wanted, choice.kernels->name) == 0
                          : within && (as_others || gains(*choice.kernels)))
      return *choice.kernels;
    available += (available.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  throw std::runtime_error("FASTLSTM_QUANTIZED_ISA=" + std::string(wanted ? wanted : "") +
                           " is not available on this machine; choose one of: " + available + ", or unset it");
}

}  // namespace

const QuantizedKernels& quantized_kernels() {
  static const QuantizedKernels& kernels = choose();
  return kernels;
}

}  // namespace fastlstm
