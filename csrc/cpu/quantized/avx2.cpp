// The kernels of quantised weights, compiled for AVX2. setup.py has the flags.
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(avx2)
