// What plans know of the machine, read once.
#pragma once

#include <unistd.h>

#include "cpu/cores.h"
#include "lstm.h"

namespace fastlstm {
namespace {

struct Machine {
  i64 second_level;  // bytes of a core's L2
  i64 third_level;   // bytes of the L3 that a process can hope for
  bool uneven;       // some cores are slower than others
};

// Where the system does not tell: a common server core.
constexpr Machine kCommonMachine = {1 << 20, 16 << 20, false};

inline const Machine& this_machine() {
  static const Machine machine = [] {
    Machine m = kCommonMachine;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const i64 second = sysconf(_SC_LEVEL2_CACHE_SIZE), nearest = nearest_third_level("/sys/devices");
    // sysconf knows that of a whole socket, of which an AMD core reaches a part.
    const i64 third = nearest > 0 ? nearest : sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (second > 0) m.second_level = second;
    // A large L3 is shared by many cores, and by other processes.
    if (third > 0) m.third_level = third < 4 * m.third_level ? third : 4 * m.third_level;
#endif
    m.uneven = uneven_cores();
    return m;
  }();
  return machine;
}

}  // namespace
}  // namespace fastlstm
