// The kernels, compiled for AVX-512. setup.py has the flags.
#include "cpu/kernels.h"

FASTLSTM_KERNELS(avx512)
