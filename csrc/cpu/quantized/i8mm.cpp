// The kernels of quantised weights, compiled for the matrix products of Armv8.6 (i8mm). setup.py has the flags.
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(i8mm)
