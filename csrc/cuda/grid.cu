// The kernels of the regime "grid".
#include "kernels.h"

namespace fastlstm::cuda {

FASTLSTM_KERNELS(FASTLSTM_DEFINE, grid, InGrid, 3, 5)

Kernels grid_kernels() {
  static const Kernel kernels[] = {FASTLSTM_KERNELS(FASTLSTM_LIST, grid, InGrid, 3, 5)};
  return {kernels, kernels + sizeof kernels / sizeof *kernels};
}

}  // namespace fastlstm::cuda
