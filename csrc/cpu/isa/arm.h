// What a 64-bit Arm CPU has beyond NEON, as its system says.
#pragma once

#ifdef __aarch64__
#define FASTLSTM_ARM 1

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#elif defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#endif

namespace fastlstm {

struct ArmFeatures {
  bool dotprod = false;  // dot products of bytes
  bool i8mm = false;     // products of matrices of bytes, and dot products
  bool bf16 = false;     // products of matrices of bfloat16 numbers
};

inline ArmFeatures arm_features() {
  ArmFeatures features;
#if defined(__linux__)  // by number, because older headers lack the names
  constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13, kBf16 = 1ul << 14;
  features.dotprod = getauxval(AT_HWCAP) & kDotprod;
  features.i8mm = getauxval(AT_HWCAP2) & kI8mm;
  features.bf16 = getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  features.dotprod = has("hw.optional.arm.FEAT_DotProd");
  features.i8mm = has("hw.optional.arm.FEAT_I8MM");
  features.bf16 = has("hw.optional.arm.FEAT_BF16");
#elif defined(_WIN32)
  constexpr DWORD kDotprod = 43, kI8mm = 66, kBf16 = 68;
  features.dotprod = IsProcessorFeaturePresent(kDotprod);
  features.i8mm = IsProcessorFeaturePresent(kI8mm);
  features.bf16 = IsProcessorFeaturePresent(kBf16);
#endif
  features.i8mm = features.i8mm && features.dotprod;
  return features;
}

}  // namespace fastlstm
#endif
