// Gives the operators to torch, on LibTorch's stable ABI. fastlstm/kernels/triton/ahead/library.py has their schemas.
#include "out_of_memory.h"
#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// Compute capability * 10, and multiprocessors.
std::vector<i64> triton_gpu(i64 index) {
  const Driver& driver = Driver::get();
  int device, major, minor, processors;
  driver.check(driver.device(&device, int(index)), "looking for the GPU", std::to_string(index).c_str());
  driver.check(driver.attribute(&major, kMajor, device), "asking a GPU for its kind");
  driver.check(driver.attribute(&minor, kMinor, device), "asking a GPU for its kind");
  driver.check(driver.attribute(&processors, kProcessors, device), "asking a GPU for its size");
  return {10 * major + minor, processors};
}

void triton_add(i64 index, const std::vector<i64>& kernels, const std::string& names, const std::vector<i64>& plans,
                const std::vector<i64>& together) {
  add_device(int(index), kernels, names, plans, together);
}

std::vector<i64> triton_plan(i64 index, bool back, i64 kind, i64 I, i64 H, i64 D, i64 B) {
  const Device* device = device_of(int(index));
  const Row* row = device ? device->plan({back, Kind(kind), I, H, D, B}) : nullptr;
  const i64* first = reinterpret_cast<const i64*>(row);
  return row ? std::vector<i64>(first, first + sizeof(Row) / sizeof(i64)) : std::vector<i64>();
}

// How many clusters of 1, 2, 4, 8 and 16 blocks there is room for at a time; 0 where no kernel has them.
std::vector<i64> triton_clusters(i64 index) {
  std::vector<i64> found(kClusterSizes, 0);
  const Device* device = device_of(int(index));
  for (int k = 1; device && k < kClusterSizes; ++k) found[size_t(k)] = device->at_once(i64(1) << k);
  return found;
}

}  // namespace

#ifdef FASTLSTM_STUB  // of tests, which have a stand-in for the driver
STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
#endif
  m.impl("lstm_fwd_triton", TORCH_BOX(&Guarded<&lstm_fwd_triton>::call));
  m.impl("lstm_infer_triton", TORCH_BOX(&Guarded<&lstm_infer_triton>::call));
  m.impl("lstm_plain_fwd_triton", TORCH_BOX(&Guarded<&lstm_plain_fwd_triton>::call));
  m.impl("lstm_plain_bwd_triton", TORCH_BOX(&Guarded<&lstm_plain_bwd_triton>::call));
  m.impl("lstm_bwd_triton", TORCH_BOX(&Guarded<&lstm_bwd_triton>::call));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CompositeExplicitAutograd, m) {
  m.impl("triton_gpu", TORCH_BOX(&triton_gpu));
  m.impl("triton_add", TORCH_BOX(&triton_add));
  m.impl("triton_plan", TORCH_BOX(&triton_plan));
  m.impl("triton_clusters", TORCH_BOX(&triton_clusters));
  m.impl("triton_pause", TORCH_BOX(&pause));
  m.impl("triton_failed", TORCH_BOX(&triton_failed));
}

}  // namespace fastlstm::ahead
