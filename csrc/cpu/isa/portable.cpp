// The kernels, compiled for the instruction set that every CPU of the architecture has. setup.py has the flags.
#include "cpu/kernels.h"

FASTLSTM_KERNELS(portable)
