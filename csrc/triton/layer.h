// A call of an operator: its sizes, its rows, its weights, and what both passes tell their kernels.
#pragma once

#include <vector>

#include "triton/kernels.h"
#include "triton/tensors.h"

namespace fastlstm::ahead {

using Handle = AtenTensorHandle;
using OptionalHandle = std::optional<AtenTensorHandle>;
using HandleList = std::vector<AtenTensorHandle>;

// What decides which kernel computes a layer.
struct Question {
  Kind kind;
  i64 I, H;
  const Device* device;
  const Row* row;  // null: the layer is not compiled ahead

  // weights: those of all directions, in the order of the operators. batch_sizes: of packed rows, else absent. more:
  // whether the cell has more than the plain one. tf32: whether float32 is multiplied in TF32, for which Python is
  // asked if nobody says it.
  Question(const Array& x, const Array* weights, size_t count, i64 directions, bool back, const Array& batch_sizes,
           bool more, std::optional<bool> tf32 = std::nullopt);
};

// Whether float32 is multiplied in TF32, by what Python says: as cuDNN's RNNs are told to, or PyTorch's products.
bool is_in_tf32(bool matmul);

// Leaves calls to the other operators, as long as somebody wants plans of his own.
void pause(bool paused);

// The rows of a batch; as fastlstm/kernels/rows.py.
struct Rows {
  i64 T = 0, B = 0, count = 0;
  std::vector<i64> sizes, starts;  // of packed rows: the sequences of each step, the first row of each step
  Array both;                      // int64 [T + B], of packed rows: offsets and lengths
  Array lengths;                   // int64 [B]
  Array reset;                     // bool [T, B]

  Rows(const Array& x, const Array& batch_sizes, Array lengths, Array reset, const Place& place);
  bool packed() const { return !sizes.empty(); }
  bool padded() const { return lengths && !packed(); }
  RowsKind kind(bool more) const {
    if (packed()) return RowsKind::packed;
    return lengths || reset || more ? RowsKind::padded : RowsKind::dense;
  }
  // h before each row in a direction, [rows, H], from y [rows, H] and the start [B, H], which may be absent.
  Array states_before(const Array& y, const Array& start, i64 direction, const Place& place) const;

 private:
  void read_packed(const Array& batch_sizes, const Place& place);
};

// The weights of a direction, contiguous. Those of biases are absent where there are none.
struct Weights {
  Array w_ih, w_hh, b_ih, b_hh;

  static std::vector<Weights> split(Array* flat, size_t count, i64 directions, int32_t dtype, const Place& place);
  // Those of the same shapes that lie one after the other in a tensor.
  static std::vector<Weights> of_copies(const Array& copies, const std::vector<Weights>& like);
};

// Rows [4H, n] of gates by unit: [4H, n] with the four gates of a unit together, a copy.
Array by_unit(const Array& w, const Place& place);
// The same numbers [4H] or [4H, n] by gate again, written to `to`.
void copy_by_gate(const Array& to, const Array& by_unit);
// Writes the slots that both passes have.
void set_rows(Arguments* a, const Rows& rows, i64 H, i64 D);
void set_weights(Arguments* a, const std::vector<Weights>& weights, bool inputs);
void set_biases(Arguments* a, const std::vector<Weights>& weights);
// {step, sequence}: elements from one to the next; of packed rows both from a row to the next.
void set_strides(Arguments* a, Slot step, Slot sequence, const Array& t);
// Whether tensors lie as kernels for even sizes read them.
bool even_weights(const std::vector<Weights>& weights, i64 H);
bool even_input(const Array& x);
bool even_gradient(const Array& dy);

// x through w_ih without the biases, float32 [D, rows, 4H] by unit (fastlstm/kernels/triton/input_products.py).
Array input_products(const Question& asked, const Array& x, const std::vector<Weights>& weights, const Rows& rows,
                     const Place& place);

// The gradients of all weights in two launches (fastlstm/kernels/triton/weight_gradients.py), and whether these take a
// layer. x: [T, B, I]. y: [T, B, D * H]. dgates: [D, rows, 4H] by unit. dweights: as the operator takes them, written.
bool takes_weights(const Question& asked, const Rows& rows, i64 D);
void launch_weight_gradients(const Question& asked, const Rows& rows, const Array& x, const Array& y, const Array& h0,
                             const Array& dgates, const std::vector<Array>& dweights);

// How many tiles of a size it takes.
inline i64 tiles_of(i64 n, i64 each) { return (n + each - 1) / each; }

// Bytes to which tensors of gates, and of weights for even sizes, are aligned.
constexpr uintptr_t kAligned = 16;
// Whether a tensor, if it is there, begins at a multiple of so many bytes.
bool aligned(const Array& t, uintptr_t bytes);
// Throws unless a tensor, if it is there, is contiguous, of that type and so many numbers: a kernel reads what it is
// told to.
void check(const Array& t, const char* name, int32_t dtype, i64 count, uintptr_t alignment = 1);
void check_place(const Array& t, const char* name, const Place& place);
// The same of a gradient [T, B, width] or [N, width], of any strides before the last dimension.
void check_strided(const Array& t, int32_t dtype, i64 width);

// What is given away to another operator; or shared with it.
Handle given(Array& t);
OptionalHandle given_or_none(Array& t);
HandleList given(std::vector<Array>& tensors);
Handle shared(const Array& t);
OptionalHandle shared_or_none(const Array& t);
constexpr OptionalHandle kAbsent = std::nullopt;
// Has another operator compute the call, with the arguments of this one.
void call_instead(const char* name, StableIValue* stack);

template <class... A>
void instead(const char* name, const A&... arguments) {
  std::array<StableIValue, sizeof...(A)> stack{torch::stable::detail::from(arguments)...};
  call_instead(name, stack.data());
}

}  // namespace fastlstm::ahead
