#include "triton/driver.h"

#include <dlfcn.h>

#include <string>

#include "bindings/check.h"

#ifdef FASTLSTM_STUB  // of tests, which name a stand-in
#define FASTLSTM_TEXT_OF(name) #name
#define FASTLSTM_TEXT(name) FASTLSTM_TEXT_OF(name)
constexpr const char* kDriver = FASTLSTM_TEXT(FASTLSTM_STUB);
#else
constexpr const char* kDriver = "libcuda.so.1";
#endif

namespace fastlstm::ahead {
namespace {

template <class Function>
void find(void* library, const char* name, Function** found) {
  *found = reinterpret_cast<Function*>(dlsym(library, name));
  FASTLSTM_CHECK(*found, "fastlstm: the driver of the GPU is too old, it has no ", name,
                 "; the compiled kernels need that of CUDA 12 or newer");
}

Driver opened() {
  void* library = dlopen(kDriver, RTLD_NOW | RTLD_LOCAL);
  FASTLSTM_CHECK(library, "fastlstm: there is no driver of a GPU: ", dlerror());
  Driver driver;
  find(library, "cuInit", &driver.init);
  find(library, "cuDeviceGet", &driver.device);
  find(library, "cuDeviceGetAttribute", &driver.attribute);
  find(library, "cuDevicePrimaryCtxRetain", &driver.retain);
  find(library, "cuCtxGetCurrent", &driver.current);
  find(library, "cuCtxPushCurrent_v2", &driver.push);
  find(library, "cuCtxPopCurrent_v2", &driver.pop);
  find(library, "cuModuleLoadData", &driver.load);
  find(library, "cuModuleGetFunction", &driver.function);
  find(library, "cuFuncSetAttribute", &driver.set);
  find(library, "cuThreadExchangeStreamCaptureMode", &driver.capture);
  find(library, "cuOccupancyMaxActiveClusters", &driver.clusters);
  find(library, "cuLaunchKernelEx", &driver.launch);
  find(library, "cuGetErrorName", &driver.name);
  find(library, "cuGetErrorString", &driver.text);
  driver.check(driver.init(0), "starting the driver");
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = opened();  // what throws is tried again
  return driver;
}

void Driver::check(Result result, const char* what, const char* whom) const {
  if (result == 0) return;
  const char *called = nullptr, *said = nullptr;
  name(result, &called);
  text(result, &said);
  FASTLSTM_CHECK(false, "fastlstm: ", what, *whom ? " " : "", whom, " failed: ", called ? called : "error",
                 called ? "" : std::to_string(result), ", ", said ? said : "which the driver does not explain");
}

InContext::InContext(const Driver& driver, Handle_ context) : driver_(driver) {
  Handle_ now = nullptr;
  driver.check(driver.current(&now), "asking for the current context");
  if (now == context) return;
  driver.check(driver.push(context), "changing the context");
  pushed_ = true;
}

InContext::~InContext() {
  Handle_ popped;
  if (pushed_) driver_.pop(&popped);
}

Handle_ current_stream(int device) {
#ifdef FASTLSTM_STUB  // of tests, whose tensors are on the CPU
  return device >= 0 ? nullptr : nullptr;
#else
  using Find = AOTITorchError (*)(int32_t, void**);
  static const Find find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Find>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  FASTLSTM_CHECK(find, "fastlstm: this torch does not say which stream of the GPU is current");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return stream;
#endif
}

}  // namespace fastlstm::ahead
