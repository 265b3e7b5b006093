// What an x86 CPU has. __builtin_cpu_supports would tell, but on Windows, and with some builds of clang, nothing that
// is linked answers it.
#pragma once

#ifdef __x86_64__
#define FASTLSTM_X86 1
#ifdef __FLT16_MANT_DIG__  // of compilers that know AVX-512 FP16, as setup.py asks
#define FASTLSTM_FLOAT16 1
#endif

#include <cpuid.h>

namespace fastlstm {

struct X86Features {
  bool avx2 = false;    // and FMA, F16C
  bool avx512 = false;  // F, BW, DQ and VL
  // Dot products of bytes: with the registers of AVX-512, or with those of AVX2.
  bool avx512_vnni = false, avx_vnni = false;
  bool avx512_bf16 = false;  // dot products of bfloat16 numbers
  // Whether these are twice as many products a cycle as float32 has. On Intel they are as many or fewer.
  bool fast_bf16 = false;
  bool avx512_fp16 = false;  // arithmetic of float16
};

inline X86Features x86_features() {
  const auto has = [](unsigned word, auto... bits) { return (... && (word >> bits & 1)); };
  X86Features features;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 12 /* FMA */, 27 /* OSXSAVE */, 28 /* AVX */, 29 /* F16C */))
    return features;
  unsigned low, high;  // of XCR0: the registers that the system keeps for each thread
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!has(low, 1, 2) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = has(b, 5);
  features.avx512 = features.avx2 && has(low, 5, 6, 7) && has(b, 16 /* F */, 17 /* DQ */, 30 /* BW */, 31 /* VL */);
  features.avx512_vnni = features.avx512 && has(c, 11);
  features.avx512_fp16 = features.avx512 && has(d, 23);
  const bool more = __get_cpuid_count(7, 1, &a, &b, &c, &d);
  features.avx_vnni = features.avx2 && more && has(a, 4);
  features.avx512_bf16 = features.avx512 && more && has(a, 5);
  const unsigned amd[] = {0x68747541, 0x69746e65, 0x444d4163};  // "AuthenticAMD"
  __get_cpuid(0, &a, &b, &c, &d);
  features.fast_bf16 = features.avx512_bf16 && b == amd[0] && d == amd[1] && c == amd[2];
  return features;
}

}  // namespace fastlstm
#endif
