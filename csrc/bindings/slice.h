// A part of a tensor.
#pragma once

#include "bindings/array.h"

namespace fastlstm {

// Rows [first, first + count) of the first dimension, as a view: the array has to outlive it.
struct Slice {
  Array array;
  i64 sizes[3];

  Slice(const Array& of, i64 first, i64 count) {
    if (!of) return;
    sizes[0] = count;
    for (i64 k = 1; k < of.dim; ++k) sizes[k] = of.sizes[k];
    array.data = static_cast<char*>(of.data) + first * of.strides[0] * i64(aoti_torch_dtype_element_size(of.dtype));
    array.dim = of.dim;
    array.sizes = sizes;
    array.strides = of.strides;
    array.dtype = of.dtype;
  }
  Slice(const Slice&) = delete;
};

}  // namespace fastlstm
