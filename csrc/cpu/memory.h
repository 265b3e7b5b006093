// Memory of the kernels: aligned buffers, the pitch of their rows, and integer helpers for sizes.
#pragma once

#include <cstdlib>

#include "cpu/simd.h"
#include "out_of_memory.h"

namespace fastlstm {
namespace {

constexpr i64 round_up(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr i64 ceil_div(i64 n, i64 d) { return (n + d - 1) / d; }
constexpr i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// Row pitch, in elements, for n values: whole vectors and one more. Without that one, rows whose size is a power of
// two would all fall into the same cache set.
template <class S>
constexpr i64 pitch(i64 n) {
  return round_up(n, kLanes<S>) + kLanes<S>;
}

// Element `offset` of an array of S.
template <class S>
inline S* element(void* data, i64 offset) {
  return static_cast<S*>(data) + offset;
}

// Aligned, uninitialised memory that lives as long as the object; throws OutOfMemory. std::vector would fill it with
// zeros, and the linker could merge its functions across instruction sets.
template <class E>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(i64 n) {
    size_ = size_t(n) * sizeof(E);
    block_ = std::malloc(size_ + 64);  // aligned here: std::aligned_alloc bypasses malloc's fast path
    if (!block_) throw OutOfMemory(size_ + 64);
    data_ = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(block_) + 63) & ~uintptr_t(63));
  }
  // n elements of a block that somebody else owns; `at` moves to what follows them.
  Buffer(char*& at, i64 n) : data_(reinterpret_cast<E*>(at)), size_(size_t(n) * sizeof(E)) { at += bytes(n); }
  // Of a block, for n elements.
  static constexpr i64 bytes(i64 n) { return round_up(n * i64(sizeof(E)), 64); }
  ~Buffer() { std::free(block_); }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  void swap(Buffer& other) {
    exchange(block_, other.block_);
    exchange(data_, other.data_);
    exchange(size_, other.size_);
  }
  void zero() { std::memset(static_cast<void*>(data_), 0, size_); }
  E* get() const { return data_; }
  E& operator[](i64 i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  template <class T>
  static void exchange(T& a, T& b) {
    T c = a;
    a = b;
    b = c;
  }
  void* block_ = nullptr;
  E* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
}  // namespace fastlstm
