// Plain calls in inference without an operator: functions that Python calls, for float weights and for quantised ones.
// An operator with that many tensors takes 6 us before anything is computed, half of a step of a small layer in ONNX
// Runtime; such a function takes 2.
//
// Nothing is kept from call to call: every tensor is read anew through DLPack's exchange, its memory, shape, strides
// and dtype, so whatever has become of a weight is seen. What is not a plain tensor with memory on the CPU, or does not
// fit, is refused: a function returns None, and the operator computes the call or says what is wrong. The exchange
// does not tell how large a storage is. A part of one that has been freed is seen by its low address: its distance from
// the beginning. fast_path.py looks at the storage of the input, and at all where memory may have such addresses.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "bindings/block.h"
#include "bindings/operators.h"
#include "bindings/python.h"
#include "bindings/quantized.h"
#include "bindings/stack.h"

namespace fastlstm {
namespace {

using python::Object;

python::Api api;

struct Refused {};

// ---- arguments ----------------------------------------------------------------------------------------------

int32_t number_of(python::Tensor::Dtype dtype) {
  enum : uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4 };
  if (dtype.code == kFloat && dtype.bits == 32) return aoti_torch_dtype_float32();
  if (dtype.code == kFloat && dtype.bits == 64) return aoti_torch_dtype_float64();
  if (dtype.code == kFloat && dtype.bits == 16) return aoti_torch_dtype_float16();
  if (dtype.code == kBfloat && dtype.bits == 16) return aoti_torch_dtype_bfloat16();
  if (dtype.code == kInt && dtype.bits == 8) return aoti_torch_dtype_int8();
  if (dtype.code == kUnsigned && dtype.bits == 8) return aoti_torch_dtype_uint8();
  return -1;
}

python::Tensor::Dtype dtype_of_number(int32_t number) {
  if (number == aoti_torch_dtype_float32()) return {2, 32, 1};
  if (number == aoti_torch_dtype_float64()) return {2, 64, 1};
  return {uint8_t(number == aoti_torch_dtype_bfloat16() ? 4 : 2), 16, 1};
}

// A subclass may mean something else by its operations; only Parameter does not.
bool is_plain(Object* object) {
  Object* const type = api.type_of(object);
  api.drop(type);  // classes of living objects live
  return type == api.tensor_type || type == api.parameter_type;
}

// The imaginary part of a conjugate has other numbers than its memory, and every second place of it.
bool is_negated(Object* object, const python::Tensor& t) {
  i64 elements = 1;
  for (i64 k = 0; k < t.dim; ++k) {
    if (t.shape[k] > 1 && t.strides[k] == 1) return false;  // it has neighbours
    elements *= t.shape[k];
  }
  if (elements != 1) return elements != 0;
  Object* const arguments = api.tuple(1);
  if (!arguments) return true;
  api.hold(object);
  api.set_item(arguments, 0, object);
  Object* const answer = api.call(api.is_negated, arguments);
  api.drop(arguments);
  if (answer) api.drop(answer);
  return answer != api.no;
}

// Below it is what has been freed.
constexpr uintptr_t kLow = uintptr_t(1) << (sizeof(void*) == 8 ? 32 : 16);

// Absent where it is refused. low: whether memory may have low addresses.
Array look_at(Object* object, bool low) {
  python::Tensor t;
  if (!is_plain(object) || api.exchange->read(object, &t) != 0 || t.device_type != python::kOnCpu) return {};
  if (t.dim > 0 && (t.strides[t.dim - 1] != 1 || is_negated(object, t))) return {};
  char* const data = static_cast<char*>(t.data) + t.byte_offset;
  const bool empty = std::find(t.shape, t.shape + t.dim, 0) != t.shape + t.dim;
  if (!empty && (!t.data || (!low && reinterpret_cast<uintptr_t>(data) < kLow))) return {};
  return Array::view(data, t.dim, t.shape, t.strides, number_of(t.dtype));
}

Array read(Object* object, bool low) {
  Array found = look_at(object, low);
  if (!found) throw Refused();
  return found;
}

std::vector<Array> read_all(Object* tuple, bool low) {
  std::vector<Array> found;
  const ptrdiff_t count = api.size(tuple);
  if (count < 0) throw Refused();
  found.reserve(size_t(count));
  for (ptrdiff_t k = 0; k < count; ++k) found.push_back(read(api.item(tuple, k), low));
  return found;
}

// ---- results ------------------------------------------------------------------------------------------------

// A new tensor: an empty tensor of torch, handed over by DLPack, takes twice as long to make.
class NewTensor {
 public:
  NewTensor() = default;
  NewTensor(Shape shape, int32_t dtype) : block_(Block<python::Managed>::make(shape, dtype)) {
    array = block_->view(dtype);
    block_->header = {
        python::kVersion,
        nullptr,
        [](python::Managed* m) { std::free(m); },
        0,
        {array.data, python::kOnCpu, 0, int32_t(array.dim), dtype_of_number(dtype), block_->sizes, block_->strides, 0}};
  }
  NewTensor(NewTensor&& other) noexcept { *this = std::move(other); }
  NewTensor& operator=(NewTensor&& other) noexcept {
    std::swap(block_, other.block_);
    array = std::move(other.array);
    return *this;
  }
  ~NewTensor() { std::free(block_); }

  Object* to_python() {
    void* object;
    if (api.exchange->to_python(&block_->header, &object) != 0) throw Refused();
    block_ = nullptr;
    return static_cast<Object*>(object);
  }

  Array array;

 private:
  Block<python::Managed>* block_ = nullptr;
};

// An object that we own, until it is given away.
class Owned {
 public:
  explicit Owned(Object* object) : object_(object) {
    if (!object) throw Refused();
  }
  Owned(Owned&& other) noexcept : object_(other.release()) {}
  ~Owned() {
    if (object_) api.drop(object_);
  }
  Object* release() { return std::exchange(object_, nullptr); }

 private:
  Object* object_;
};

Owned pair(Owned a, Owned b) {
  Object* const tuple = api.tuple(2);
  Owned owned(tuple);
  api.set_item(tuple, 0, a.release());
  api.set_item(tuple, 1, b.release());
  return owned;
}

// ---- the functions ------------------------------------------------------------------------------------------

// Lets other threads of Python run, in calls that are long enough for it.
class Unlocked {
 public:
  explicit Unlocked(bool wanted) : state_(wanted ? api.unlock() : nullptr) {}
  ~Unlocked() {
    if (state_) api.lock(state_);
  }
  Unlocked(const Unlocked&) = delete;

 private:
  void* state_;
};

// Multiplications from which on a call lets them run, ~5 us; those of 8-bit weights count a quarter.
constexpr i64 kLong = 1 << 18;

bool is_long(const Array& x, const std::vector<Array>& weights) {
  i64 rows = 1, numbers = 0;
  for (i64 k = 0; k + 1 < x.dim; ++k) rows *= x.sizes[k];
  for (const Array& w : weights) {
    if (w.dim != 2 && w.dim != 4) continue;  // no matrix, nor the panels of one
    i64 n = 1;
    for (i64 k = 0; k < w.dim; ++k) n *= w.sizes[k];
    numbers += w.dtype == aoti_torch_dtype_int8() ? n / 4 : n;
  }
  return rows * numbers >= kLong;
}

// The states of a call: None, or a tuple of `count` tensors.
struct GivenStates {
  Array h0, c0;

  GivenStates(Object* given, bool low, ptrdiff_t count = 2) {
    if (given == api.none) return;
    if (api.size(given) != count) throw Refused();
    h0 = read(api.item(given, 0), low);
    if (count == 2) c0 = read(api.item(given, 1), low);
  }
};

// (weights, x, (h0, c0) or None, layers, directions, caches, low): of 0 layers, one step of a cell. Tuples of tensors.
Object* infer(Object* const* given) {
  const bool low = api.to_long(given[6]) != 0;
  const Array x = look_at(given[1], low);
  if (!x) return nullptr;
  const std::vector<Array> weights = read_all(given[0], low), caches = read_all(given[5], true);
  const GivenStates states(given[2], low);
  const StackArguments arguments{x,         weights, api.to_long(given[3]), api.to_long(given[4]), states.h0,
                                 states.c0, caches};
  NewTensor y, h, c;
  {
    const Unlocked unlocked(is_long(x, weights));
    if (arguments.layers == 0) {
      if (!infer_cell(arguments, false, [&](Shape of_h, Shape of_c) {
            h = NewTensor(of_h, x.dtype);
            c = NewTensor(of_c, x.dtype);
            return std::make_pair(&h.array, &c.array);
          }))
        throw Refused();
    } else if (!infer_stack(arguments, false, [&](Shape of_y, Shape of_h, Shape of_c) {
                 y = NewTensor(of_y, x.dtype);
                 h = NewTensor(of_h, x.dtype);
                 c = NewTensor(of_c, x.dtype);
                 return std::make_tuple(&y.array, &h.array, &c.array);
               })) {
      throw Refused();
    }
  }
  Owned found = pair(Owned(h.to_python()), Owned(c.to_python()));
  return (arguments.layers == 0 ? std::move(found) : pair(Owned(y.to_python()), std::move(found))).release();
}

// (weights, x, (h0, c0) or (h0,) of an RNN or None, what a stack is, low): of a 2-D x, one step of a cell. What a stack
// is: what the operator has between the weights and h0.
Object* infer_small(Object* const* given) {
  const bool low = api.to_long(given[4]) != 0;
  const Array x = look_at(given[1], low), none;
  if (!x) return nullptr;
  const std::vector<Array> weights = read_all(given[0], low);
  if (api.size(given[3]) != 7) throw Refused();
  i64 n[7];
  for (ptrdiff_t k = 0; k < 7; ++k) n[k] = api.to_long(api.item(given[3], k));
  const bool has_cell = n[0] == 4;
  const GivenStates states(given[2], low, has_cell ? 2 : 1);
  const QuantizedArguments a{x,    weights, n[0],      n[1] != 0, n[2], n[3], n[4],
                             n[5], n[6],    states.h0, states.c0, none, none, none};
  NewTensor y, h, c;
  {
    const Unlocked unlocked(is_long(x, weights));
    infer_quantized(a, [&](const Call& call) {
      const i64 B = call.sizes.B, rows = a.layers * a.directions;
      if (call.one_step) {
        h = NewTensor({B, a.state()}, x.dtype);
        c = NewTensor({B, a.cells()}, x.dtype);
        return std::make_tuple(&h.array, &h.array, &c.array);
      }
      y = NewTensor({call.sizes.T, B, a.directions * a.state()}, x.dtype);
      h = NewTensor({rows, B, a.state()}, x.dtype);
      c = NewTensor({rows, B, a.cells()}, x.dtype);
      return std::make_tuple(&y.array, &h.array, &c.array);
    });
  }
  Owned hidden(h.to_python());
  Owned found = has_cell ? pair(std::move(hidden), Owned(c.to_python())) : std::move(hidden);
  return (x.dim == 2 ? std::move(found) : pair(Owned(y.to_python()), std::move(found))).release();
}

template <Object* compute(Object* const*), ptrdiff_t count>
Object* call(Object*, Object* const* arguments, ptrdiff_t given) {
  if (given == count) try {
      if (Object* const found = compute(arguments)) return found;
    } catch (...) {  // whatever it was, the operator finds it too
    }
  api.clear_error();
  api.hold(api.none);
  return api.none;
}

python::Method methods[] = {{"infer", call<infer, 7>, python::kFastCall, nullptr},
                            {"infer_small", call<infer_small, 5>, python::kFastCall, nullptr}};

}  // namespace

// addresses: those of python::Api. Returns those of the functions' PyMethodDefs, or nothing where addresses or the
// exchange of tensors are others than here.
std::vector<i64> cpu_direct(const std::vector<i64>& addresses) {
  if (sizeof(void*) != sizeof(i64)) return {};
  FASTLSTM_CHECK(addresses.size() * sizeof(i64) == sizeof api, "fastlstm: expected ", sizeof api / sizeof(i64),
                 " addresses, got ", addresses.size());
  std::memcpy(static_cast<void*>(&api), addresses.data(), sizeof api);
  while (api.exchange && api.exchange->version.major != python::kVersion.major) api.exchange = api.exchange->older;
  if (!api.exchange || !api.exchange->read) return {};
  return {reinterpret_cast<i64>(&methods[0]), reinterpret_cast<i64>(&methods[1])};
}

}  // namespace fastlstm
