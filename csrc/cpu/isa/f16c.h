// float16 on x86: the instructions of F16C, which every CPU with AVX2 has.
#pragma once

#include "cpu/isa/fallback.h"

namespace fastlstm {
namespace {

#if defined(__F16C__)
inline float half_to_float(uint16_t v) { return _cvtsh_ss(v); }
inline uint16_t float_to_half(float f) { return uint16_t(_cvtss_sh(f, 0)); }
#else
using fallback::float_to_half;
using fallback::half_to_float;
#endif

}  // namespace
}  // namespace fastlstm
