// Starting a kernel: on a GPU, or in the emulator.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "bindings/check.h"

#ifdef FASTLSTM_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace fastlstm::cuda {

// The kernel of a plan; null if this build has none.
inline const Kernel* find_kernel(Regime regime, Kind kind, int batch, int resident) {
#ifdef FASTLSTM_NO_CLUSTER
  if (has_clusters(regime)) return nullptr;
  const Kernels all = regime == Regime::block ? block_kernels() : grid_kernels();
#else
  const Kernels all = regime == Regime::block     ? block_kernels()
                      : regime == Regime::cluster ? cluster_kernels()
                      : regime == Regime::wide    ? wide_kernels()
                                                  : grid_kernels();
#endif
  for (const Kernel* k = all.begin; k != all.end; ++k)
    if (k->kind == kind && k->batch == batch && k->resident == resident) return k;
  return nullptr;
}

inline auto* entry(const Kernel& kernel, const Forward& p) {
  return p.is_dense() && kernel.dense_forward ? kernel.dense_forward : kernel.forward;
}
inline auto* entry(const Kernel& kernel, const Backward& p) {
  return p.is_dense() && kernel.dense_backward ? kernel.dense_backward : kernel.backward;
}

#ifndef FASTLSTM_EMULATE
inline void check(cudaError_t error, const char* what) {
  FASTLSTM_CHECK(error == cudaSuccess, "fastlstm: ", what, " failed: ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// The device that is current meanwhile.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Lets a kernel use what the device has. Always the same, for threads that launch the same kernel: it is a limit of the
// function, not of a launch.
inline cudaError_t allow(const void* kernel, int shared_bytes, bool cluster) {
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess || !cluster) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);  // of 16 blocks
}
#endif

struct Launch {
  const Kernel* kernel;
  int64_t groups;  // of all launches
  int device;
  int64_t stream;

  // All groups, in as many launches as the plan says.
  template <class Arguments>
  void run(Arguments p) const {
    for (p.first_group = 0; p.first_group < groups; p.first_group += p.plan.groups)
      start(p, std::min(p.plan.groups, groups - p.first_group));
  }

 private:
  template <class Arguments>
  void start(const Arguments& p, int64_t now) const {
    auto* const function = entry(*kernel, p);
    const int threads = p.plan.tiles * p.plan.parts * kLanes;
    const int64_t blocks = now * p.plan.blocks;
#ifdef FASTLSTM_EMULATE
    emulator::run([&] { function(p); }, blocks, p.plan.blocks, threads, p.shared.total);
#else
    FASTLSTM_CHECK(blocks < (int64_t(1) << 31), "fastlstm: too many sequences for one launch: ", p.B);
    const OnDevice current(device);
    const auto* symbol = reinterpret_cast<const void*>(function);
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    check(allow(symbol, most, has_clusters(p.plan.regime)), "setting the limits of a kernel");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(p.shared.total);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    config.attrs = &attribute;
    if (has_clusters(p.plan.regime)) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(p.plan.blocks), 1, 1};
      config.numAttrs = 1;
    } else if (p.plan.regime == Regime::grid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
    }
    void* arguments[] = {const_cast<Arguments*>(&p)};
    check(cudaLaunchKernelExC(&config, symbol, arguments), "starting a kernel");
#endif
  }
};

// {compute capability * 10, multiprocessors, bytes of shared memory of a block, blocks of the largest cluster}, and on
// a GPU how many clusters of 2, 4, 8 and 16 blocks are resident together, if each block takes a multiprocessor.
inline std::vector<int64_t> device_facts([[maybe_unused]] int64_t device) {
#ifdef FASTLSTM_EMULATE
  return {90, 132, 227 << 10, 16};  // of an H100
#else
  const int index = int(device), shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  const int arch =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  const OnDevice current(index);
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(block_kernels().begin->forward)),
        "looking for code for this GPU");
  int cluster = 1, resident[4] = {};
#ifndef FASTLSTM_NO_CLUSTER
  if (arch >= 90 && attribute(cudaDevAttrClusterLaunch, index)) {
    // Asked for as a launch would be: large ones need more multiprocessors side by side than some GPUs have, and this
    // build may have no code of clusters for this one.
    const auto* symbol = reinterpret_cast<const void*>(cluster_kernels().begin->forward);
    for (int i = 0; i < 4; ++i) {
      const unsigned blocks = 2u << i;
      cudaLaunchConfig_t config{};
      cudaLaunchAttribute size{};
      size.id = cudaLaunchAttributeClusterDimension;
      size.val.clusterDim = {blocks, 1, 1};
      config.gridDim = dim3(blocks);
      config.blockDim = dim3(kMaxWarps * kLanes);
      config.dynamicSmemBytes = size_t(shared);
      config.attrs = &size;
      config.numAttrs = 1;
      int active = 0;
      if (allow(symbol, shared, true) == cudaSuccess &&
          cudaOccupancyMaxActiveClusters(&active, symbol, &config) == cudaSuccess && active > 0) {
        resident[i] = active;
        cluster = int(blocks);
      }
    }
    cudaGetLastError();  // a refusal is an answer
  }
#endif
  return {arch,        attribute(cudaDevAttrMultiProcessorCount, index),
          shared,      cluster,
          resident[0], resident[1],
          resident[2], resident[3]};
#endif
}

}  // namespace fastlstm::cuda
