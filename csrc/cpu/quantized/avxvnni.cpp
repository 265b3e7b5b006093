// The kernels of quantised weights, compiled for AVX2 with AVX-VNNI. setup.py has the flags.
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(avxvnni)
