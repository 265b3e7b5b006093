// NVIDIA's driver, as far as starting kernels takes it. It is looked up when it is first needed: a build knows nothing
// of CUDA, and a machine without it can load this library. tests/test_ahead.py holds the types against the driver's own
// header, which Triton brings.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm::ahead {

using Result = int;
using Handle_ = void*;  // of a context, a module, a function, a stream

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    uint64_t alignment;
  } value;
};

struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  Handle_ stream;
  LaunchAttribute* attributes;
  unsigned count;
};

// Numbers of the driver's header.
constexpr int kProcessors = 16, kMajor = 75, kMinor = 76, kSharedOptin = 97;  // attributes of a device
constexpr int kMostShared = 8, kLargeClusters = 14;                           // attributes of a function
constexpr int kClusterSize = 4;                                               // attribute of a launch
constexpr int kRelaxed = 2;                                                   // mode of a capture

struct Driver {
  Result (*init)(unsigned);
  Result (*device)(int*, int);
  Result (*attribute)(int*, int, int);
  Result (*retain)(Handle_*, int);
  Result (*current)(Handle_*);
  Result (*push)(Handle_);
  Result (*pop)(Handle_*);
  Result (*load)(Handle_*, const void*);
  Result (*function)(Handle_*, Handle_, const char*);
  Result (*set)(Handle_, int, int);
  Result (*capture)(int*);
  Result (*clusters)(int*, Handle_, const LaunchConfig*);
  Result (*launch)(const LaunchConfig*, Handle_, void**, void**);
  Result (*name)(Result, const char**);
  Result (*text)(Result, const char**);

  // Throws std::runtime_error where there is no driver, or one that is too old. Asked once.
  static const Driver& get();

  // Throws unless `result` is success; says what failed, for whom, and what the driver says of it.
  void check(Result result, const char* what, const char* whom = "") const;
};

// The context of a device, current meanwhile; most of the time it is already.
class InContext {
 public:
  InContext(const Driver& driver, Handle_ context);
  ~InContext();
  InContext(const InContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// PyTorch's current stream of a device, by a function of its CUDA library, to which nothing here is linked.
Handle_ current_stream(int device);

}  // namespace fastlstm::ahead
