// What lies between two layers of a stack.
#pragma once

#include <utility>

#include "bindings/block.h"
#include "bindings/heap.h"

namespace fastlstm {

class Scratch {
  struct NoHeader {};

 public:
  Scratch() = default;
  Scratch(Shape shape, int32_t dtype) {
    expect_again(2 * bytes_of(shape, dtype));  // and the output, which is as large
    block_ = Block<NoHeader>::make(shape, dtype);
    array = block_->view(dtype);
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
  Block<NoHeader>* block_ = nullptr;
};

}  // namespace fastlstm
