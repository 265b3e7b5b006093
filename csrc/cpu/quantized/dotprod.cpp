// The kernels of quantised weights, compiled for the dot products of Armv8.2. setup.py has the flags.
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(dotprod)
