// What plans know of the machine, read once.
#pragma once

#include <unistd.h>

#include <cstdio>

#include "cpu/cores.h"
#include "lstm.h"

namespace fastlstm {
namespace {

struct Machine {
  i64 second_level;  // bytes of a core's L2
  i64 third_level;   // bytes of the L3 that a process can hope for
  bool uneven;       // some cores are slower than others
};

// The L3 that a core reaches, or 0. What sysconf tells is that of a whole socket, of which an AMD core reaches an
// eighth or less.
inline i64 nearest_third_level() {
  long kilobytes = 0;
#ifdef __linux__
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
#endif
  return i64(kilobytes) << 10;
}

// Where the system does not tell: a common server core.
constexpr Machine kCommonMachine = {1 << 20, 16 << 20, false};

inline const Machine& this_machine() {
  static const Machine machine = [] {
    Machine m = kCommonMachine;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const i64 second = sysconf(_SC_LEVEL2_CACHE_SIZE), nearest = nearest_third_level();
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
