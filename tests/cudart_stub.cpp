// A stub of the CUDA runtime: it keeps what launches ask for and refuses what a driver refuses. It runs nothing, unless
// it is given somebody who runs kernels (tests/ptx/cuda.py).
//
// tests/test_cuda_host.py links it with csrc/cuda/bindings.cpp, the host's part of the CUDA kernels, as it is. The
// kernels are empty functions, one for each line that the tables of kernels can have. A GPU is described by its
// multiprocessors, in parts (GPCs) that a cluster cannot leave, and by what they hold.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/arguments.h"

namespace fastlstm::cuda {
namespace {

template <int regime, int kind, int batch, int resident>
struct Empty {
  static void forward(Forward) {}
  static void backward(Backward) {}
};

template <int regime, int kind, int batch, int... resident>
void list(std::vector<Kernel>* table) {
  (table->push_back({Kind(kind), batch, resident, Empty<regime, kind, batch, resident>::forward,
                     Empty<regime, kind, batch, resident>::backward}),
   ...);
}

// A kernel for every number of tiles in registers: tests/test_cuda_plans.py knows which there are.
template <int regime, int... kinds>
std::vector<Kernel> every(std::integer_sequence<int, kinds...>) {
  std::vector<Kernel> table;
  (list<regime, kinds, 8, 0, 2, 3, 4, 5, 6, 8, 28>(&table), ...);
  (list<regime, kinds, 16, 0, 2, 3, 4, 5, 6, 8>(&table), ...);
  return table;
}

template <int regime>
const std::vector<Kernel>& table_of() {
  static const std::vector<Kernel> table = every<regime>(std::make_integer_sequence<int, 4>());
  return table;
}

template <int regime>
Kernels kernels_of() {
  const std::vector<Kernel>& table = table_of<regime>();
  return {table.data(), table.data() + table.size()};
}

}  // namespace

Kernels block_kernels() { return kernels_of<0>(); }
Kernels cluster_kernels() { return kernels_of<1>(); }
Kernels grid_kernels() { return kernels_of<2>(); }
Kernels wide_kernels() { return kernels_of<3>(); }

namespace {

// What a GPU has. Threads, registers and shared memory are those of a multiprocessor unless they are of a block.
struct Gpu {
  int arch = 90, shared_of_a_block = 227 << 10, shared = 228 << 10, threads = 2048, registers = 64 << 10;
  std::vector<int> parts = {18, 18, 16, 16, 16, 16, 16, 16};  // multiprocessors of each

  int processors() const {
    int sum = 0;
    for (const int part : parts) sum += part;
    return sum;
  }
};

struct Allowed {
  int shared = 48 << 10;  // dynamic, until more is asked for
  bool large_clusters = false;
};

constexpr int kPortable = 8, kLargest = 16;              // blocks of a cluster
constexpr int kMostThreads = 1024, kReserved = 1 << 10;  // of a block; bytes of it that the system takes
constexpr int kRegisters = 255;                          // of a thread, at most

Gpu gpu;
int current = 0, devices = 2;
std::map<const void*, Allowed> allowed;
cudaError_t last = cudaSuccess;
std::string launches;

// Gets the line of a launch, and the argument of the kernel as bytes.
using Runner = void (*)(const char* launch, const void* argument, size_t bytes);
Runner runner = nullptr;

cudaError_t give(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

// The regime and the line of a kernel, and its pass; null for any other function.
struct Found {
  const Kernel* kernel = nullptr;
  int regime = 0;
  bool backward = false;
};

Found find(const void* function) {
  const Kernels all[] = {block_kernels(), cluster_kernels(), grid_kernels(), wide_kernels()};
  for (int regime = 0; regime < 4; ++regime)
    for (const Kernel* k = all[regime].begin; k != all[regime].end; ++k) {
      if (reinterpret_cast<const void*>(k->forward) == function) return {k, regime, false};
      if (reinterpret_cast<const void*>(k->backward) == function) return {k, regime, true};
    }
  return {};
}

// The launch bounds of a kernel.
int most_threads(const void* function) {
  const Found found = find(function);
  if (found.regime != int(Regime::wide)) return kMaxWarps * kLanes;
  return wide_shape(found.kernel->resident).tiles * kWideParts * kLanes;
}

int blocks_of_a_processor(const cudaLaunchConfig_t& config, const void* function) {
  const int threads = int(config.blockDim.x), bytes = int(config.dynamicSmemBytes) + kReserved;
  const int registers = std::min(kRegisters, gpu.registers / most_threads(function));
  return std::min({gpu.threads / threads, gpu.shared / bytes, gpu.registers / (threads * registers)});
}

int clusters_together(const cudaLaunchConfig_t& config, const void* function, int blocks) {
  int sum = 0;
  for (const int part : gpu.parts) sum += part * blocks_of_a_processor(config, function) / blocks;
  return sum;
}

struct Attributes {
  int cluster = 1;
  bool cooperative = false;
};

cudaError_t read(const cudaLaunchConfig_t& config, Attributes* found) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& one = config.attrs[i];
    if (one.id == cudaLaunchAttributeClusterDimension) {
      if (one.val.clusterDim.y != 1 || one.val.clusterDim.z != 1) return cudaErrorInvalidConfiguration;
      found->cluster = int(one.val.clusterDim.x);
    } else if (one.id == cudaLaunchAttributeCooperative) {
      found->cooperative = one.val.cooperative != 0;
    } else {
      return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

cudaError_t refuse(const cudaLaunchConfig_t& config, const void* function, const Attributes& with) {
  const Allowed& may = allowed[function];
  const auto one = [](const dim3& d) { return d.y == 1 && d.z == 1 && d.x > 0; };
  if (!find(function).kernel) return cudaErrorInvalidDeviceFunction;
  if (!one(config.gridDim) || !one(config.blockDim)) return cudaErrorInvalidConfiguration;
  if (config.blockDim.x > kMostThreads || config.gridDim.x >= 1u << 31) return cudaErrorInvalidConfiguration;
  if (int(config.blockDim.x) > most_threads(function)) return cudaErrorLaunchOutOfResources;  // its launch bounds
  if (config.dynamicSmemBytes > size_t(may.shared)) return cudaErrorInvalidValue;
  if (with.cluster != 1) {
    if (gpu.arch < 90) return cudaErrorNotSupported;
    if (with.cluster < 1 || with.cluster > (may.large_clusters ? kLargest : kPortable))
      return cudaErrorInvalidClusterSize;
    if (config.gridDim.x % unsigned(with.cluster)) return cudaErrorInvalidConfiguration;
    if (clusters_together(config, function, with.cluster) == 0) return cudaErrorInvalidClusterSize;
  }
  if (with.cooperative &&
      int64_t(config.gridDim.x) > int64_t(blocks_of_a_processor(config, function)) * gpu.processors())
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

std::string member(const char* name, int64_t value) {
  return std::string(", \"") + name + "\": " + std::to_string(value);
}

}  // namespace
}  // namespace fastlstm::cuda

using namespace fastlstm::cuda;

extern "C" {

// For the test: the launches since the last call, a line of JSON each; another GPU, with so many equal parts.
__attribute__((visibility("default"))) const char* stub_launches() {
  static std::string given;
  given = std::move(launches);
  launches.clear();
  return given.c_str();
}

__attribute__((visibility("default"))) void stub_runner(Runner given) { runner = given; }

__attribute__((visibility("default"))) void stub_gpu(int arch, int parts, int processors, int shared_of_a_block) {
  gpu.arch = arch;
  gpu.parts.assign(size_t(parts), processors / parts);
  gpu.shared_of_a_block = shared_of_a_block;
  gpu.shared = shared_of_a_block + kReserved;
  allowed.clear();
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidClusterSize: return "invalid cluster size";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "invalid argument";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices) return give(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= devices) return give(cudaErrorInvalidDevice);
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = gpu.processors(); break;
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.arch / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.arch % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = gpu.shared_of_a_block; break;
    case cudaDevAttrClusterLaunch: *value = gpu.arch >= 90; break;
    default: return give(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* function) {
  *found = {};
  return give(find(function).kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  if (!find(function).kernel) return give(cudaErrorInvalidDeviceFunction);
  if (which == cudaFuncAttributeNonPortableClusterSizeAllowed && gpu.arch >= 90) {
    allowed[function].large_clusters = value != 0;
  } else if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && value <= gpu.shared_of_a_block) {
    allowed[function].shared = value;
  } else {
    return give(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config) {
  Attributes with;
  cudaError_t error = read(*config, &with);
  if (error == cudaSuccess) error = refuse(*config, function, with);
  *clusters = error == cudaSuccess ? clusters_together(*config, function, with.cluster) : 0;
  return give(error);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  Attributes with;
  cudaError_t error = read(*config, &with);
  if (error == cudaSuccess) error = refuse(*config, function, with);
  if (error != cudaSuccess) return give(error);
  const Found found = find(function);
  const Layer& layer = *(found.backward ? static_cast<Layer*>(static_cast<Backward*>(arguments[0]))
                                        : static_cast<Layer*>(static_cast<Forward*>(arguments[0])));
  const std::string line = "{\"regime\": " + std::to_string(found.regime) + member("kind", int(found.kernel->kind)) +
                           member("batch", found.kernel->batch) + member("resident", found.kernel->resident) +
                           member("backward", found.backward) + member("grid", config->gridDim.x) +
                           member("block", config->blockDim.x) + member("shared", int64_t(config->dynamicSmemBytes)) +
                           member("cluster", with.cluster) + member("cooperative", with.cooperative) +
                           member("stream", reinterpret_cast<intptr_t>(config->stream)) + member("device", current) +
                           member("first_group", layer.first_group) + member("T", layer.T) + "}\n";
  launches += line;
  if (runner) runner(line.c_str(), arguments[0], found.backward ? sizeof(Backward) : sizeof(Forward));
  return cudaSuccess;
}

}  // extern "C"
