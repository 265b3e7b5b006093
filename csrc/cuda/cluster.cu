// The kernels of the regime "cluster".
#include "kernels.h"

namespace fastlstm::cuda {

FASTLSTM_KERNELS(FASTLSTM_DEFINE, cluster, InCluster, 4, 6)

Kernels cluster_kernels() {
  static const Kernel kernels[] = {FASTLSTM_KERNELS(FASTLSTM_LIST, cluster, InCluster, 4, 6)};
  return {kernels, kernels + sizeof kernels / sizeof *kernels};
}

}  // namespace fastlstm::cuda
