// The kernels of quantised weights, compiled for AVX-512 with VNNI. setup.py has the flags.
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(avx512vnni)
