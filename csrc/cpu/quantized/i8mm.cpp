// The kernels of quantised weights, compiled for the matrix products of Armv8.6: of bytes (i8mm) and of bfloat16
// numbers. setup.py has the flags.
#define FASTLSTM_BFLOAT16_PRODUCTS
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(i8mm)
