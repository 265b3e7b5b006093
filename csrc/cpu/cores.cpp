#include "cpu/cores.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/usefulness.h"

namespace fastlstm {
namespace {

// The numbers of a file, up to the first word that is none.
std::istringstream numbers_of(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return std::istringstream(line);
}

// Cores of one group; 0 without a quota. Version 2 has both numbers in one file, version 1 a file for each.
double quota_of(const std::string& folder) {
  double quota = 0, period = 0;
  if (numbers_of(folder + "/cpu.max") >> quota >> period) return period > 0 ? quota / period : 0;
  if (numbers_of(folder + "/cpu.cfs_quota_us") >> quota && numbers_of(folder + "/cpu.cfs_period_us") >> period)
    return quota > 0 && period > 0 ? quota / period : 0;  // -1: no quota
  return 0;
}

int measure_cores() {
  int cores = std::max(1, int(std::thread::hardware_concurrency()));
#ifdef __linux__
  // A machine may have more cores than a cpu_set_t: then the mask is left alone.
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) cores = std::min(cores, CPU_COUNT(&mask));
  static const int quota = [] {
    std::ifstream file("/proc/self/cgroup");
    std::stringstream text;
    text << file.rdbuf();
    return quota_cores(text.str(), "/sys/fs/cgroup");
  }();
  if (quota > 0) cores = std::min(cores, quota);
#endif
  return std::max(1, cores);
}

}  // namespace

int quota_cores(const std::string& membership, const std::string& root) {
  double least = 0;
  std::istringstream lines(membership);
  for (std::string line; std::getline(lines, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    // Within a container the path may be that outside of it; then only the root is there.
    for (;;) {
      const double quota = quota_of(root + (unified ? "" : "/cpu") + (path == "/" ? "" : path));
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return int(std::ceil(least));
}

bool uneven_cores() {
#if defined(__linux__)
  return uneven_cores("/sys/devices");
#elif defined(__APPLE__)
  int levels = 1;
  size_t size = sizeof levels;
  return sysctlbyname("hw.nperflevels", &levels, &size, nullptr, 0) == 0 && levels > 1;
#else
  return false;
#endif
}

bool uneven_cores(const std::string& devices) {
  // Intel: a device of its own for each kind of core.
  if (std::ifstream(devices + "/cpu_core/cpus") && std::ifstream(devices + "/cpu_atom/cpus")) return true;
  // ARM: each core's share of the fastest one's capacity.
  int first = 0, capacity = 0;
  for (int k = 0; numbers_of(devices + "/system/cpu/cpu" + std::to_string(k) + "/cpu_capacity") >> capacity; ++k) {
    if (k == 0) first = capacity;
    if (capacity != first) return true;
  }
  return false;
}

int64_t nearest_third_level(const std::string& devices) {
  const std::string cache = devices + "/system/cpu/cpu0/cache/index3";
  int level = 0;
  int64_t kilobytes = 0;
  const bool known = (numbers_of(cache + "/level") >> level) && (numbers_of(cache + "/size") >> kilobytes);
  return known && level == 3 ? kilobytes << 10 : 0;
}

int usable_cores() {
  static const int wanted = [] {
    const char* text = std::getenv("FASTLSTM_CORES");
    int cores = 0;
    if (text) std::istringstream(text) >> cores;
    return cores;
  }();
  if (wanted > 0) return wanted;
  constexpr int64_t kEvery = 100'000'000;
  thread_local int cores = 0;
  thread_local int64_t asked = 0;
  const int64_t time = now();
  if (!cores || time - asked > kEvery) {
    cores = measure_cores();
    asked = time;
  }
  return cores;
}

}  // namespace fastlstm
