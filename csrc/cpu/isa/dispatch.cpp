// Chooses the instruction set, once, when the first kernel is called: the fastest one that this CPU has, or the one
// that the environment variable FASTLSTM_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa/x86.h"
#include "cpu/pairs.h"

namespace fastlstm {

#ifdef FASTLSTM_X86
extern const Kernels avx512_kernels, avx2_kernels;
extern const PairKernels avx512bf16_products;
#endif
#ifdef FASTLSTM_FLOAT16
extern const PairKernels avx512fp16_products;
#endif
extern const Kernels portable_kernels;

namespace {

// Calls f(kernels, whether they are taken without being named) for those that this CPU has, the best ones first: where
// both are fast, bfloat16 is the more exact.
template <class F>
void each_pair_kernels(const F& f) {
#ifdef FASTLSTM_X86
  const X86Features features = x86_features();
  if (features.fast_bf16) f(avx512bf16_products, true);
#ifdef FASTLSTM_FLOAT16
  if (features.avx512_fp16) f(avx512fp16_products, true);
#endif
  if (features.avx512_bf16 && !features.fast_bf16) f(avx512bf16_products, false);
#endif
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
  if (pair_kernels()) return *fastest_first[0];
  std::string available;
  const auto list = [&](const char* name) { available += (available.empty() ? "" : ", ") + std::string(name); };
  each_pair_kernels([&](const PairKernels& kernels, bool) { list(kernels.name); });
  for (const Kernels* kernels : fastest_first) {
    if (!supported(*kernels)) continue;
    if (std::strcmp(wanted, kernels->name) == 0) return *kernels;
    list(kernels->name);
  }
  throw std::runtime_error("FASTLSTM_ISA=" + std::string(wanted) +
                           " is not available on this machine; choose one of: " + available + ", or unset it");
}

const PairKernels* choose_pairs() {
  const char* const wanted = std::getenv("FASTLSTM_ISA");
  const PairKernels* chosen = nullptr;
  each_pair_kernels([&](const PairKernels& kernels, bool by_itself) {
    const bool take = wanted && *wanted ? std::strcmp(wanted, kernels.name) == 0 : by_itself;
    if (take && !chosen) chosen = &kernels;
  });
  return chosen;
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

const PairKernels* pair_kernels() {
  static const PairKernels* const kernels = choose_pairs();
  return kernels;
}

}  // namespace fastlstm
