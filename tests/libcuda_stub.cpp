// A stand-in for NVIDIA's driver: it refuses what a driver refuses, keeps what launches ask for, and hands each launch
// to whoever runs kernels (tests/ptx/ahead.py). Its types are those of the driver's own header, which Triton brings: so
// csrc/triton/driver.h, which declares them again, is held against them by every launch.
#include <cuda.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

// The image may go when it is loaded. Of code for a GPU nothing is needed later, of text all of it.
struct Module {
  std::string text;
};

struct Function {
  std::string text, name;
  int shared = 48 << 10;  // dynamic, until more is asked for
  int cluster = 0;        // blocks that it was compiled for, as far as that is known
  bool large = false;     // whether clusters of more than 8 blocks are allowed
};

// Gets the text of the image, the name of the function, a line of JSON, and pointers to the arguments, null after the
// last.
using Runner = void (*)(const char* image, const char* name, const char* launch, void** arguments);

int arch = 90, devices = 8, version = 12080, most_shared = 227 << 10;
int processors = 132, groups = 7;  // of 18 multiprocessors
Runner runner = nullptr;
std::string launches;
int64_t launched = 0;
bool keeps = false;
bool capturing = false;
thread_local CUcontext current = nullptr;
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
std::mutex lock;

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(intptr_t(device) + 1); }

bool is_cubin(const char* image) { return !std::memcmp(image, "\177ELF", 4); }

// Of the GPU that code is for: in the flags of the file, where newer compilers put it one byte higher.
int arch_of(const char* image) {
  uint32_t flags;
  std::memcpy(&flags, image + 48, sizeof flags);
  const int high = int(flags >> 8 & 0xff), low = int(flags & 0xff);
  return image[8] >= 8 ? high : low;  // of the ABI of the file
}

bool runs(const char* image) {
  if (is_cubin(image)) return arch_of(image) / 10 == arch / 10 && arch_of(image) <= arch;
  const char* target = std::strstr(image, ".target sm_");
  return target && std::atoi(target + std::strlen(".target sm_")) <= arch;
}

std::string member(const char* name, int64_t value) {
  return std::string(", \"") + name + "\": " + std::to_string(value);
}

// A pool of attributes that the launches of these kernels may have: only the size of a cluster.
CUresult read(const CUlaunchConfig& config, int* cluster) {
  *cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const CUlaunchAttribute& one = config.attrs[i];
    if (one.id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) return CUDA_ERROR_INVALID_VALUE;
    if (one.value.clusterDim.y != 1 || one.value.clusterDim.z != 1) return CUDA_ERROR_INVALID_VALUE;
    *cluster = int(one.value.clusterDim.x);
  }
  return *cluster > 1 && arch < 90 ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

CUresult refuse(const CUlaunchConfig& config, const Function& function, int cluster) {
  const unsigned threads = config.blockDimX * config.blockDimY * config.blockDimZ;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (!config.gridDimX || !config.gridDimY || !config.gridDimZ || !threads) return CUDA_ERROR_INVALID_VALUE;
  if (config.gridDimX > 0x7fffffffu || config.gridDimY > 65535 || config.gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  if (threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  if (config.sharedMemBytes > unsigned(function.shared)) return CUDA_ERROR_INVALID_VALUE;
  if (config.gridDimX % unsigned(cluster)) return CUDA_ERROR_INVALID_VALUE;
  if (function.cluster && cluster != function.cluster) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  if (cluster > (function.large ? 16 : 8)) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// For tests: another GPU and driver; who runs kernels; the launches since the last call, a line of JSON each, which are
// kept from the first call on.
void stub_gpu(int of_arch, int shared, int of_version) {
  arch = of_arch;
  most_shared = shared;
  version = of_version;
}
// As if the GPU were one with so many groups of multiprocessors, each of which has room for a cluster of 16 blocks.
void stub_groups(int given) { groups = given; }
void stub_processors(int given) { processors = given; }
void stub_runner(Runner given) { runner = given; }
// Whether a stream is being captured: what is unsafe then is refused in threads that have not relaxed.
void stub_capture(bool captures) { capturing = captures; }
bool stub_relaxed() { return capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED; }
// When the last launch came, in nanoseconds of Python's perf_counter.
int64_t stub_launched() { return launched; }
const char* stub_launches() {
  static std::string given;
  keeps = true;
  given = std::exchange(launches, "");
  return given.c_str();
}

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* found) { return *found = version, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) {
  if (index < 0 || index >= devices) return CUDA_ERROR_INVALID_DEVICE;
  return *device = index, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = processors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = most_shared; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = context_of(device), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = std::exchange(current, nullptr);
  return CUDA_SUCCESS;
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* given) {
  const char* image = static_cast<const char*>(given);
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (capturing && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (!is_cubin(image) && std::memcmp(image, "//", 2)) return CUDA_ERROR_INVALID_IMAGE;
  if (!runs(image)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  if (version < 12000) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  return *module = reinterpret_cast<CUmodule>(new Module{is_cubin(image) ? "" : image}), CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const std::string& text = reinterpret_cast<Module*>(module)->text;
  if (!text.empty() && text.find(name) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
  Function* found = new Function{text, name};
  if (!text.empty()) {
    const char* cluster = std::strstr(text.c_str(), ".reqnctapercluster ");
    found->cluster = cluster ? std::atoi(cluster + std::strlen(".reqnctapercluster ")) : 1;
  }
  return *function = reinterpret_cast<CUfunction>(found), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    return reinterpret_cast<Function*>(function)->large = value, CUDA_SUCCESS;
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > most_shared) return CUDA_ERROR_INVALID_VALUE;
  return reinterpret_cast<Function*>(function)->shared = value, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* found, CUfunction given, const CUlaunchConfig* config) {
  int cluster;
  if (const CUresult error = read(*config, &cluster)) return error;
  if (const CUresult error = refuse(*config, *reinterpret_cast<Function*>(given), cluster)) return error;
  return *found = groups * (18 / cluster), CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction given, void** arguments, void** extra) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  launched = int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
  const Function& function = *reinterpret_cast<Function*>(given);
  int cluster;
  if (const CUresult error = read(*config, &cluster)) return error;
  if (const CUresult error = refuse(*config, function, cluster)) return error;
  if (extra) return CUDA_ERROR_INVALID_VALUE;
  if (!runner && !keeps) return CUDA_SUCCESS;
  const std::string line = "{\"arch\": " + std::to_string(arch) + member("x", config->gridDimX) +
                           member("y", config->gridDimY) + member("z", config->gridDimZ) +
                           member("threads", config->blockDimX) + member("shared", config->sharedMemBytes) +
                           member("cluster", cluster) + member("stream", reinterpret_cast<intptr_t>(config->hStream)) +
                           member("device", reinterpret_cast<intptr_t>(current) - 1) + "}";
  {
    const std::lock_guard<std::mutex> locked(lock);
    launches += line + "\n";
  }
  if (runner) runner(function.text.c_str(), function.name.c_str(), line.c_str(), arguments);
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
  switch (error) {
    case CUDA_ERROR_NO_BINARY_FOR_GPU: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION: *name = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"; break;
    case CUDA_ERROR_INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case CUDA_ERROR_NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case CUDA_ERROR_INVALID_CLUSTER_SIZE: *name = "CUDA_ERROR_INVALID_CLUSTER_SIZE"; break;
    case CUDA_ERROR_INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    default: *name = "CUDA_ERROR_INVALID_VALUE";
  }
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "no kernel image is available for execution on the device"
                                                : "of a stand-in";
  return CUDA_SUCCESS;
}

}  // extern "C"
