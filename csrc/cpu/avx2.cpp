#include "kernels.h"

FASTLSTM_KERNELS(avx2)
