// Chooses the instruction set, once, when the first kernel is called: the fastest one that this CPU has, or the one
// that the environment variable FASTLSTM_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/float16.h"
#include "cpu/isa/x86.h"

namespace fastlstm {

#ifdef FASTLSTM_X86
extern const Kernels avx512_kernels, avx2_kernels;
#endif
#ifdef FASTLSTM_FLOAT16
extern const Float16Kernels avx512fp16_products;
#endif
extern const Kernels portable_kernels;

namespace {

// What this CPU has of products in float16, or null.
const Float16Kernels* supported_float16() {
#ifdef FASTLSTM_FLOAT16
  if (x86_features().avx512_fp16) return &avx512fp16_products;
#endif
  return nullptr;
}

bool supported(const Kernels& kernels) {
#ifdef FASTLSTM_X86
  static const X86Features features = x86_features();
  if (&kernels == &avx512_kernels) return features.avx512;
  if (&kernels == &avx2_kernels) return features.avx2;
#endif
  return &kernels == &portable_kernels;
}

const Kernels& choose() {
  const Kernels* const fastest_first[] = {
#ifdef FASTLSTM_X86
      &avx512_kernels, &avx2_kernels,
#endif
      &portable_kernels};
  const char* wanted = std::getenv("FASTLSTM_ISA");
  if (!wanted || !*wanted) {
    for (const Kernels* kernels : fastest_first)
      if (supported(*kernels)) return *kernels;
  }
  const Float16Kernels* const half = supported_float16();
  std::string available = half ? half->name : "";
  if (wanted == available) return *fastest_first[0];
  for (const Kernels* kernels : fastest_first) {
    if (!supported(*kernels)) continue;
    if (std::strcmp(wanted, kernels->name) == 0) return *kernels;
    available += (available.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error("FASTLSTM_ISA=" + std::string(wanted) +
                           " is not available on this machine; choose one of: " + available + ", or unset it");
}

const Float16Kernels* choose_float16() {
  const Float16Kernels* const half = supported_float16();
  const char* wanted = std::getenv("FASTLSTM_ISA");
  return half && wanted && *wanted && std::strcmp(wanted, half->name) != 0 ? nullptr : half;
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

const Float16Kernels* float16_kernels() {
  static const Float16Kernels* const kernels = choose_float16();
  return kernels;
}

}  // namespace fastlstm
