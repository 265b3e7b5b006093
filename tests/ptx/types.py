"""The numpy types of registers."""

import numpy as np

U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32
