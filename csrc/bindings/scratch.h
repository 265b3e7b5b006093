// What lies between two layers of a stack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <utility>

#include "bindings/array.h"
#include "bindings/heap.h"

namespace fastlstm {

// A contiguous, uninitialised array, in one block of memory with its sizes. A tensor of torch takes longer to make.
class Scratch {
 public:
  Scratch() = default;
  Scratch(std::initializer_list<i64> shape, int32_t dtype) {
    i64 elements = 1;
    for (i64 n : shape) elements *= n;
    const size_t bytes = size_t(elements) * aoti_torch_dtype_element_size(dtype);
    expect_again(2 * bytes);  // and the output, which is as large
    block_ = std::malloc(sizeof(Block) + kAlignment + bytes);
    if (!block_) throw OutOfMemory(bytes);
    Block* const block = new (block_) Block;
    for (i64 k = i64(shape.size()), step = 1; k-- > 0; step *= std::max(shape.begin()[k], i64(1))) {
      block->sizes[k] = shape.begin()[k];
      block->strides[k] = step;
    }
    const auto end = reinterpret_cast<uintptr_t>(block + 1);
    void* const data = reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
    array = Array::view(data, i64(shape.size()), block->sizes, block->strides, dtype);
  }
  Scratch(Scratch&& other) noexcept { *this = std::move(other); }
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(array, other.array);
    return *this;
  }
  ~Scratch() { std::free(block_); }

  Array array;

 private:
  static constexpr size_t kAlignment = 64;
  struct Block {
    i64 sizes[3], strides[3];
  };
  void* block_ = nullptr;
};

}  // namespace fastlstm
