// The kernels that Triton compiled when the wheel was built, or compiles when they are first started, of each device:
// which there are, which one a call takes, loading them, starting them. fastlstm/kernels/triton/ahead/ compiles them
// and reads their manifest.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "bindings/array.h"
#include "triton/driver.h"

namespace fastlstm::ahead {

// What kernels are told, by the names that their sources give it.
enum Slot : int {
#define FASTLSTM_SLOTS(slot)                                                                                    \
  slot(x) slot(w_ih) slot(w_hh) slot(b_ih) slot(b_hh) slot(w_ih_reverse) slot(w_hh_reverse) slot(b_ih_reverse)  \
      slot(b_hh_reverse) slot(h0) slot(c0) slot(offsets) slot(lengths) slot(reset) slot(y) slot(h_n) slot(c_n)  \
          slot(c_all) slot(gates) slot(dy) slot(dc_all) slot(dh_n) slot(dc_n) slot(dgates) slot(dh0) slot(dc0)  \
              slot(parts) slot(products) slot(rows) slot(T) slot(B) slot(I) slot(H) slot(D) slot(x_t) slot(x_b) \
                  slot(dy_t) slot(dy_b) slot(dc_t) slot(dc_b) slot(starts) slot(splits)
#define FASTLSTM_SLOT(name) k_##name,
  FASTLSTM_SLOTS(FASTLSTM_SLOT) kNothing,  // of two pointers that Triton adds
  kSlots
};

// The values of all slots; those of tensors that are absent are 0.
struct Arguments {
  std::array<uint64_t, kSlots> value{};

  void set(Slot slot, const void* pointer) { value[size_t(slot)] = reinterpret_cast<uintptr_t>(pointer); }
  void set(Slot slot, const Array& t) { set(slot, t ? t.data : nullptr); }
  // Numbers have 32 bits, those of steps and strides too.
  void set(Slot slot, i64 number, const char* what);
};

enum class Kind : int { bf16, f16, tf32, exact };
inline i64 bytes_of(Kind kind) { return kind == Kind::tf32 || kind == Kind::exact ? 4 : 2; }
enum class RowsKind : int { dense, padded, packed };

// A line of fastlstm/kernels/triton/ahead/plans.py.
struct Row {
  i64 back, kind, most_units, most_inputs, regime, units, batch, inputs, warps, blocks;
};

// What a plan depends on.
struct Layer {
  bool back;
  Kind kind;
  i64 I, H, D, B;
};

// The tiles of the gradients of weights, as tiles() in fastlstm/kernels/triton/weight_gradients.py.
constexpr i64 kInputsOfParts = 64;    // columns of a tile of inputs
constexpr i64 kElementsOfSums = 128;  // of a program of the second kernel
inline i64 gates_of_parts(i64 units) { return units <= 64 ? 64 : 128; }
inline i64 states_of_parts(i64 units) { return units <= 128 ? units : 128; }  // columns of a tile of states
inline i64 rows_of_parts(Kind kind) { return 128 / bytes_of(kind); }

// What a call wants of a kernel. One that has more will do, except that kept gates differ from those that are not.
struct Wish {
  const Row* row;
  RowsKind rows;
  bool keeps;
  bool even;    // of H, and how weights lie
  bool even_x;  // of I, and how x lies
};

constexpr int kClusterSizes = 5;  // 1 to 16 blocks

struct Kernel {
  std::string name, entry;
  i64 number;
  unsigned threads, shared;  // the latter is known once it is loaded
  i64 batch;
  unsigned blocks;  // of a cluster
  bool fused;       // whether x goes through w_ih in its loop
  std::vector<Slot> slots;
  std::atomic<Handle_> function{nullptr};
};

class Device {
 public:
  // Throws unless the device runs such kernels, one of which it loads.
  // `kernels` and `plans`: numbers as fastlstm/kernels/triton/ahead/library.py lists them; `names`: a line for each;
  // `together`: how many clusters of each size have room, or nothing where the driver is to be asked.
  Device(int index, const std::vector<i64>& kernels, const std::string& names, const std::vector<i64>& plans,
         const std::vector<i64>& together);

  // The plan of a pass; null if there are no kernels for it.
  const Row* plan(const Layer& layer) const;
  // How many clusters of so many blocks are on the GPU together, as was said when it was made, or as the driver says of
  // one of these kernels; 0 if there is no such kernel.
  i64 at_once(i64 blocks) const;
  // The kernel for a call; null if there is none.
  Kernel* find(const Wish& wish) const;
  // The two that find the gradients of weights after a backward pass of that plan. even: as of a wish.
  Kernel* parts_of_weights(const Row& row, bool even) const;
  Kernel* sums_of_weights(const Row& row) const;
  // The one that makes input products; null if there is none. even: whether numbers are read four at a time.
  Kernel* input_products(Kind kind, bool even) const;
  // Starts it on PyTorch's current stream, for tiles of sequences and for directions, or in another grid; each program
  // is a block, or a cluster of them.
  void launch(Kernel* kernel, Arguments* arguments, i64 x, i64 y, i64 z = 1) const;
  i64 processors() const { return processors_; }

 private:
  void read_kernel(const i64** numbers, const i64* end, const std::string& line);
  Handle_ function(Kernel* kernel) const;
  i64 room(const Row& row) const;
  Kernel* find(const Wish& wish, i64 inputs, bool even) const;
  Kernel* find(const Row& row, i64 inputs, bool keeps, bool even) const;

  int index_;
  Handle_ context_ = nullptr;
  int most_shared_ = 0, processors_ = 0;
  std::vector<Row> plans_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
  std::unordered_map<i64, Kernel*> by_number_;
  mutable std::mutex loading_;
  mutable std::array<std::atomic<i64>, kClusterSizes> at_once_{};  // and 1 more; 0 before it was asked
};

// The device of that index with its kernels, for which Python is asked when it is first needed; null if it has none.
const Device* device_of(int index);
void add_device(int index, const std::vector<i64>& kernels, const std::string& names, const std::vector<i64>& plans,
                const std::vector<i64>& together);

}  // namespace fastlstm::ahead
