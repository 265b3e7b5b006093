#include "triton/kernels.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <sstream>

#include "triton/layer.h"

namespace fastlstm::ahead {
namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kStaticShared = 48 << 10;       // that a kernel has without asking
constexpr i64 kWidestInputs = 64;                  // that go through their weights in the loop
constexpr i64 kParts = 2, kSums = 3, kInputs = 4;  // as KERNELS in fastlstm/kernels/triton/ahead/keys.py
constexpr i64 kRowsOfInputs = 64;                  // of a program
constexpr i64 kPartsOfSums = 32;                   // that are added at a time
constexpr i64 kMostWaves = 6;                      // as in fastlstm/kernels/triton/register_plans.py
constexpr i64 kQuarters = 4;                       // the same
constexpr unsigned kPortableCluster = 8;           // blocks that every GPU with clusters takes

// Of a program, unless there are few: as sequences() there.
i64 most_sequences(const Row& row) { return Kind(row.kind) == Kind::exact ? 4 : 8; }

int log2(i64 n) {
  int found = 0;
  while (n > 1) n >>= 1, ++found;
  return found;
}

// As Key.number in fastlstm/kernels/triton/ahead/keys.py.
i64 number(const Row& row, i64 inputs, RowsKind rows, bool keeps, bool even) {
  i64 found = 0;
  const auto add = [&](i64 value, int bits) { found = found << bits | value; };
  add(row.back, 1);
  add(row.regime, 3);
  add(row.kind, 2);
  add(log2(row.units), 4);
  add(log2(row.batch), 4);
  add(log2(inputs ? inputs : 1), 4);
  add(i64(rows), 2);
  add(keeps, 1);
  add(even, 1);
  add(log2(row.blocks), 3);
  return found;
}

// Of such a number, 0 where x does not go through w_ih in the loop.
i64 inputs_bits(i64 number) { return number >> 7 & 15; }

// What a launch of a kernel asks for, on a grid of programs. cluster: the attribute that says its size.
LaunchConfig config_of(const Kernel& kernel, i64 x, i64 y, i64 z, LaunchAttribute* cluster) {
  LaunchConfig config{};
  config.grid[0] = unsigned(x) * kernel.blocks;
  config.grid[1] = unsigned(y);
  config.grid[2] = unsigned(z);
  config.block[0] = kernel.threads;
  config.block[1] = config.block[2] = 1;
  config.shared = kernel.shared;
  if (kernel.blocks > 1) {
    *cluster = {};
    cluster->id = kClusterSize;
    cluster->value.cluster = {kernel.blocks, 1, 1};
    config.attributes = cluster;
    config.count = 1;
  }
  return config;
}

// word: a name, and after a colon its bytes.
Slot slot_of(const std::string& word, const std::string& kernel) {
  static const std::unordered_map<std::string, Slot> known = {
#define FASTLSTM_NAME(name) {#name, k_##name},
      FASTLSTM_SLOTS(FASTLSTM_NAME)};
  const size_t colon = word.find(':');
  const auto found = known.find(word.substr(0, colon));
  FASTLSTM_CHECK(found != known.end() && word.substr(colon + 1) == (found->second < k_rows ? "8" : "4"),
                 "fastlstm: the compiled kernel ", kernel, " takes ", word, ", which this library does not know");
  return found->second;
}

// The code of a kernel, read or compiled by Python: it may take its time, and nobody may wait for the caller meanwhile.
// shared: bytes of a block.
Array image_of(const Kernel& kernel, int device, i64* shared) {
  std::array stack{torch::stable::detail::from(i64(device)), torch::stable::detail::from(kernel.number)};
  call_instead("fastlstm::triton_image", stack.data());
  *shared = *static_cast<i64*>(Array(torch::stable::detail::to<AtenTensorHandle>(stack[1])).data);
  return Array(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

// Modules may be loaded while a graph is captured: what loading allocates is no part of it.
class Uncaptured {
 public:
  explicit Uncaptured(const Driver& driver) : driver_(driver) { driver.capture(&mode_); }
  ~Uncaptured() { driver_.capture(&mode_); }
  Uncaptured(const Uncaptured&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kRelaxed;
};

// What is known of a device: set once, and never taken back, since graphs keep functions.
struct Known {
  std::atomic<bool> asked{false};
  std::atomic<const Device*> device{nullptr};  // null: it has no kernels

  void set(const Device* found) {
    const Device* none = nullptr;
    if (!device.compare_exchange_strong(none, found)) delete found;
    asked.store(true, std::memory_order_release);
  }
};

constexpr int kMostDevices = 64;
Known devices[kMostDevices];

Known& known(int index) {
  FASTLSTM_CHECK(index >= 0 && index < kMostDevices, "fastlstm: there is no GPU ", index);
  return devices[index];
}

}  // namespace

void Arguments::set(Slot slot, i64 number, const char* what) {
  FASTLSTM_CHECK(number >= -(i64(1) << 31) && number < i64(1) << 31, "fastlstm: the triton kernels count ", what,
                 " in 32 bits, got ", number);
  value[size_t(slot)] = uint32_t(number);
}

Device::Device(int index, const std::vector<i64>& kernels, const std::string& names, const std::vector<i64>& plans,
               const std::vector<i64>& together)
    : index_(index) {
  const Driver& driver = Driver::get();
  int device;
  driver.check(driver.device(&device, index), "looking for the GPU", std::to_string(index).c_str());
  driver.check(driver.attribute(&most_shared_, kSharedOptin, device), "asking for the shared memory of a GPU");
  driver.check(driver.attribute(&processors_, kProcessors, device), "asking a GPU for its size");
  driver.check(driver.retain(&context_, device), "taking the context of a GPU");
  FASTLSTM_CHECK(plans.size() % (sizeof(Row) / sizeof(i64)) == 0, "fastlstm: not the plans of compiled kernels");
  const Row* first = reinterpret_cast<const Row*>(plans.data());
  plans_.assign(first, first + plans.size() / (sizeof(Row) / sizeof(i64)));
  std::istringstream lines(names);
  std::string line;
  const i64 *at = kernels.data(), *end = at + kernels.size();
  while (std::getline(lines, line)) read_kernel(&at, end, line);
  FASTLSTM_CHECK(at == end && !kernels_.empty(), "fastlstm: not a list of compiled kernels");
  const InContext current(driver, context_);
  function(kernels_.front().get());
  FASTLSTM_CHECK(together.empty() || together.size() == at_once_.size(), "fastlstm: not the rooms for clusters");
  for (size_t k = 0; k < together.size(); ++k) at_once_[k] = together[k] + 1;
}

// numbers: its key, warps, sequences, blocks. line: its name, that of its function, its arguments.
void Device::read_kernel(const i64** numbers, const i64* end, const std::string& line) {
  FASTLSTM_CHECK(end - *numbers >= 4, "fastlstm: not a list of compiled kernels");
  const i64* n = *numbers;
  *numbers += 4;
  std::istringstream words(line);
  auto kernel = std::make_unique<Kernel>();
  words >> kernel->name >> kernel->entry;
  FASTLSTM_CHECK(n[1] > 0 && n[1] <= 32 && n[2] > 0, "fastlstm: the compiled kernel ", kernel->name, " cannot have ",
                 n[1], " warps");
  FASTLSTM_CHECK(n[3] > 0 && n[3] <= 16 && n[3] == i64(1) << log2(n[3]), "fastlstm: the compiled kernel ", kernel->name,
                 " cannot have clusters of ", n[3], " blocks");
  kernel->number = n[0];
  kernel->threads = unsigned(n[1]) * kLanes;
  kernel->batch = n[2];
  kernel->blocks = unsigned(n[3]);
  kernel->fused = inputs_bits(n[0]) > 0;
  for (std::string word; words >> word;) kernel->slots.push_back(slot_of(word, kernel->name));
  by_number_[n[0]] = kernel.get();
  kernels_.push_back(std::move(kernel));
}

const Row* Device::plan(const Layer& layer) const {
  for (const Row& row : plans_) {
    if (row.back != i64(layer.back) || row.kind != i64(layer.kind)) continue;
    if (layer.H > row.most_units || layer.I > row.most_inputs) continue;
    if (row.blocks == 1 && row.batch == most_sequences(row)) return &row;
    const i64 programs = (layer.B + row.batch - 1) / row.batch * layer.D;
    if (programs <= room(row)) return &row;
  }
  return nullptr;
}

// For how many programs, of few sequences or each of a cluster.
i64 Device::room(const Row& row) const {
  if (row.blocks > 1) return kMostWaves * at_once(row.blocks);
  return processors_ * std::max(i64(1), kQuarters / row.warps);
}

i64 Device::at_once(i64 blocks) const {
  std::atomic<i64>& known = at_once_[size_t(log2(blocks))];
  if (const i64 found = known.load(std::memory_order_relaxed)) return found - 1;
  int found = 0;
  for (const auto& kernel : kernels_) {
    if (kernel->blocks != blocks) continue;
    const Driver& driver = Driver::get();
    const InContext current(driver, context_);
    const Handle_ start = function(kernel.get());
    LaunchAttribute cluster;
    const LaunchConfig config = config_of(*kernel, 1, 1, 1, &cluster);
    // A GPU, or a part of one, whose groups of multiprocessors are too small.
    if (driver.clusters(&found, start, &config)) found = 0;
    break;
  }
  known.store(found + 1, std::memory_order_relaxed);
  return found;
}

Kernel* Device::find(const Wish& wish, i64 inputs, bool even) const {
  const Row& row = *wish.row;
  for (int keeps = wish.keeps; keeps < (row.back ? wish.keeps + 1 : 2); ++keeps)
    for (const RowsKind rows : {wish.rows, wish.rows == RowsKind::dense ? RowsKind::padded : wish.rows}) {
      const auto found = by_number_.find(number(row, inputs, rows, keeps, even));
      if (found != by_number_.end()) return found->second;
    }
  return nullptr;
}

Kernel* Device::find(const Wish& wish) const {
  const bool even = wish.even && wish.even_x;
  for (int odd = !even; odd < 2; ++odd)
    for (i64 inputs = wish.row->inputs; inputs && inputs <= kWidestInputs; inputs *= 2)
      if (Kernel* found = find(wish, inputs, !odd)) return found;
  if (Kernel* found = wish.even ? find(wish, 0, true) : nullptr) return found;
  if (Kernel* found = find(wish, 0, false)) return found;
  if (wish.row->batch == most_sequences(*wish.row)) return nullptr;
  Row more = *wish.row;
  more.batch = most_sequences(more);
  return find({&more, wish.rows, wish.keeps, wish.even, wish.even_x});
}

// Of those that are no pass: for even sizes, or any.
Kernel* Device::find(const Row& row, i64 inputs, bool keeps, bool even) const {
  for (int odd = !even; odd < 2; ++odd) {
    const auto found = by_number_.find(number(row, inputs, RowsKind::dense, keeps, !odd));
    if (found != by_number_.end()) return found->second;
  }
  return nullptr;
}

Kernel* Device::parts_of_weights(const Row& row, bool even) const {
  Row parts = row;
  parts.regime = kParts;
  parts.units = states_of_parts(row.units);
  parts.blocks = 1;
  parts.batch = rows_of_parts(Kind(row.kind));
  return find(parts, kInputsOfParts, true, even);
}

Kernel* Device::sums_of_weights(const Row& row) const {
  Row sums = row;
  sums.regime = kSums;
  sums.blocks = 1;
  sums.units = 16;
  sums.batch = kPartsOfSums;
  return find(sums, 0, true, false);
}

Kernel* Device::input_products(Kind kind, bool even) const {
  return find({0, i64(kind), 0, 0, kInputs, 16, kRowsOfInputs, 0, 0, 1}, 0, false, even);
}

Handle_ Device::function(Kernel* kernel) const {
  if (Handle_ found = kernel->function.load(std::memory_order_acquire)) return found;
  i64 shared;
  const Array image = image_of(*kernel, index_, &shared);
  FASTLSTM_CHECK(shared <= most_shared_, "fastlstm: the compiled kernel ", kernel->name, " takes ", shared,
                 " bytes of shared memory, and the GPU has ", most_shared_);
  const std::lock_guard<std::mutex> lock(loading_);
  if (Handle_ found = kernel->function.load(std::memory_order_relaxed)) return found;
  const Driver& driver = Driver::get();
  const std::string whom = kernel->name + " on GPU " + std::to_string(index_);
  const Uncaptured uncaptured(driver);
  Handle_ module, found;
  kernel->shared = unsigned(shared);
  driver.check(driver.load(&module, image.data), "loading the compiled kernel", whom.c_str());
  driver.check(driver.function(&found, module, kernel->entry.c_str()), "finding the compiled kernel", whom.c_str());
  if (kernel->shared > kStaticShared)
    driver.check(driver.set(found, kMostShared, int(kernel->shared)), "giving shared memory to", whom.c_str());
  if (kernel->blocks > kPortableCluster)
    driver.check(driver.set(found, kLargeClusters, 1), "allowing the clusters of", whom.c_str());
  kernel->function.store(found, std::memory_order_release);
  return found;
}

void Device::launch(Kernel* kernel, Arguments* arguments, i64 x, i64 y, i64 z) const {
  const Driver& driver = Driver::get();
  const InContext current(driver, context_);
  FASTLSTM_CHECK(x > 0 && x * kernel->blocks < i64(1) << 31, "fastlstm: too many sequences for a launch");
  const Handle_ start = function(kernel);
  LaunchAttribute cluster;
  LaunchConfig config = config_of(*kernel, x, y, z, &cluster);
  config.stream = current_stream(index_);
  void* parameters[kSlots + 3];
  size_t count = 0;
  for (const Slot slot : kernel->slots) parameters[count++] = &arguments->value[size_t(slot)];
  for (int more = 0; more < 2; ++more) parameters[count++] = &arguments->value[kNothing];  // no memory of Triton's
  parameters[count] = nullptr;
  if (const Result result = driver.launch(&config, start, parameters, nullptr))
    driver.check(result, "starting the compiled kernel", (kernel->name + " on GPU " + std::to_string(index_)).c_str());
}

void add_device(int index, const std::vector<i64>& kernels, const std::string& names, const std::vector<i64>& plans,
                const std::vector<i64>& together) {
  Known& device = known(index);
  device.set(new Device(index, kernels, names, plans, together));
}

const Device* device_of(int index) {
  Known& device = known(index);
  if (!device.asked.load(std::memory_order_acquire)) {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(i64(index))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastlstm::triton_prepare", "", stack.data(), TORCH_ABI_VERSION));
    if (!device.asked.load(std::memory_order_acquire)) device.set(nullptr);
  }
  return device.device.load(std::memory_order_acquire);
}

}  // namespace fastlstm::ahead
