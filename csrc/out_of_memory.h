// The error of a call that gets no memory: a RuntimeError in Python, as PyTorch's own.
#pragma once

#include <cstddef>
#include <cstdio>
#include <exception>
#include <new>

namespace fastlstm {

class OutOfMemory : public std::exception {
 public:
  // Neither this nor `what` allocates anything.
  explicit OutOfMemory(size_t bytes) {
    std::snprintf(text_, sizeof text_, "fastlstm: could not allocate %zu bytes of memory", bytes);
  }
  OutOfMemory() { std::snprintf(text_, sizeof text_, "fastlstm: out of memory"); }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

// The function f, which throws OutOfMemory where f throws std::bad_alloc: that would be a MemoryError.
template <auto f>
struct Guarded;
template <class R, class... Arguments, R (*f)(Arguments...)>
struct Guarded<f> {
  static R call(Arguments... arguments) {
    try {
      return f(arguments...);
    } catch (const std::bad_alloc&) {
      throw OutOfMemory();
    }
  }
};

}  // namespace fastlstm
