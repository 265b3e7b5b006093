// The kernels of the regime "wide".
#include "kernels.h"

namespace fastlstm::cuda {

FASTLSTM_WIDE_KERNELS(FASTLSTM_DEFINE_WIDE)

Kernels wide_kernels() {
  static const Kernel kernels[] = {FASTLSTM_WIDE_KERNELS(FASTLSTM_LIST_WIDE)};
  return {kernels, kernels + sizeof kernels / sizeof *kernels};
}

}  // namespace fastlstm::cuda
