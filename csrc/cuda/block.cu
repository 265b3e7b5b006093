// The kernels of the regime "block".
#include "kernels.h"

namespace fastlstm::cuda {

FASTLSTM_NARROW_KERNELS(FASTLSTM_DEFINE, block, InBlock)
FASTLSTM_KERNELS(FASTLSTM_DEFINE, block, InBlock, 4, 6)

Kernels block_kernels() {
  static const Kernel kernels[] = {FASTLSTM_KERNELS(FASTLSTM_LIST, block, InBlock, 4, 6)
                                       FASTLSTM_NARROW_KERNELS(FASTLSTM_LIST, block, InBlock)};
  return {kernels, kernels + sizeof kernels / sizeof *kernels};
}

}  // namespace fastlstm::cuda
