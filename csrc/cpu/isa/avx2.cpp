// The kernels, compiled for AVX2. setup.py has the flags.
#include "cpu/kernels.h"

FASTLSTM_KERNELS(avx2)
