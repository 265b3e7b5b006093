// What is used of CPython and of DLPack's exchange of tensors, in our own words. The library is linked with neither:
// Python hands over the addresses (fastlstm/kernels/direct.py). All of these are of stable ABIs, so one build serves
// every Python and every torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm::python {

struct Object;  // PyObject: we look into none

// PyMethodDef of a function with METH_FASTCALL.
struct Method {
  const char* name;
  Object* (*call)(Object* self, Object* const* arguments, ptrdiff_t count);
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x80;

// DLTensor, DLManagedTensorVersioned and DLPackExchangeAPI of DLPack 1.
struct Tensor {
  void* data;
  int32_t device_type, device;
  int32_t dim;
  struct Dtype {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
constexpr Version kVersion{1, 3};
constexpr int32_t kOnCpu = 1;
struct Managed {
  Version version;
  void* owner;
  void (*free)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
struct Exchange {
  Version version;
  const Exchange* older;
  void* allocate;
  void* managed;
  int (*to_python)(Managed*, void** object);  // takes ownership
  int (*read)(void* object, Tensor* tensor);  // a view, good as long as the object is
};

// In the order in which Python hands them over.
struct Api {
  Object* (*tuple)(ptrdiff_t size);              // PyTuple_New
  int (*set_item)(Object*, ptrdiff_t, Object*);  // PyTuple_SetItem: takes the item over
  ptrdiff_t (*size)(Object*);                    // PyTuple_Size
  Object* (*item)(Object*, ptrdiff_t);           // PyTuple_GetItem: lends it
  Object* (*type_of)(Object*);                   // PyObject_Type
  void (*hold)(Object*);                         // Py_IncRef
  void (*drop)(Object*);                         // Py_DecRef
  long (*to_long)(Object*);                      // PyLong_AsLong
  Object* (*call)(Object*, Object* arguments);   // PyObject_CallObject
  void (*clear_error)();                         // PyErr_Clear
  void* (*unlock)();                             // PyEval_SaveThread
  void (*lock)(void*);                           // PyEval_RestoreThread
  Object *none, *no, *tensor_type, *parameter_type;
  Object* is_negated;  // Tensor.is_neg
  const Exchange* exchange;
};

}  // namespace fastlstm::python
