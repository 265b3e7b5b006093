#include "kernels.h"

FASTLSTM_KERNELS(portable)
