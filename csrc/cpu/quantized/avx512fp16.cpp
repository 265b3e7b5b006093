// The kernels of bfloat16 weights, compiled for AVX-512 with FP16. setup.py has the flags.
#define FASTLSTM_FLOAT16_PRODUCTS
#include "cpu/quantized/kernels.h"

FASTLSTM_QUANTIZED_BFLOAT16(avx512fp16, avx512vnni)
