// The kernels of quantised weights, compiled for the instruction set that every CPU of the architecture has. setup.py
// has the flags.
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED(portable)
