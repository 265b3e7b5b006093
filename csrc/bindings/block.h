// Arrays whose memory is ours: a tensor of torch takes longer to make.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "bindings/array.h"

namespace fastlstm {

using Shape = std::initializer_list<i64>;

inline size_t bytes_of(Shape shape, int32_t dtype) {
  i64 elements = 1;
  for (i64 n : shape) elements *= n;
  return size_t(elements) * aoti_torch_dtype_element_size(dtype);
}

// A contiguous, uninitialised array in one block of memory with all that describes it. std::free frees it.
template <class Header>
struct Block {
  Header header;  // first: the block may be freed by its address
  i64 dim, sizes[3], strides[3];

  static Block* make(Shape shape, int32_t dtype) {
    const size_t bytes = bytes_of(shape, dtype);
    void* const memory = std::malloc(sizeof(Block) + kAlignment + bytes);
    if (!memory) throw OutOfMemory(bytes);
    Block* const block = new (memory) Block{};
    block->dim = i64(shape.size());
    for (i64 k = block->dim, step = 1; k-- > 0; step *= std::max(shape.begin()[k], i64(1))) {
      block->sizes[k] = shape.begin()[k];
      block->strides[k] = step;
    }
    return block;
  }

  void* data() {
    const auto end = reinterpret_cast<uintptr_t>(this + 1);
    return reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
  }
  Array view(int32_t dtype) { return Array::view(data(), dim, sizes, strides, dtype); }

 private:
  static constexpr size_t kAlignment = 64;
};

}  // namespace fastlstm
