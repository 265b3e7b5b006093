// The kernels of bfloat16 weights, compiled for AVX-512 with BF16. setup.py has the flags.
#define FASTLSTM_BFLOAT16_PRODUCTS
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED_BFLOAT16(avx512bf16, avx512vnni)
