// How many cores there are for the calling thread.
#pragma once

#include <cstdint>
#include <string>

namespace fastlstm {

// The smallest of: cores of the machine, those of the calling thread's affinity mask, and the quota of the container
// (rounded up). At least 1. FASTLSTM_CORES replaces it, for tests. Cheap: asked again ten times a second.
int usable_cores();

// The quota of a cgroup in cores, rounded up; 0 without a quota. membership: the text of /proc/self/cgroup; root: where
// cgroups are mounted. The smallest one of the group and those around it counts, of version 1 and of version 2.
int quota_cores(const std::string& membership, const std::string& root);

// Whether some cores of this machine are slower than others: Apple's, Intel's hybrid ones, big and little ones of ARM.
bool uneven_cores();

// The same from what Linux says of its devices; devices: /sys/devices.
bool uneven_cores(const std::string& devices);

// Bytes of the L3 that a core reaches, as Linux says of its devices; 0 if it does not say.
int64_t nearest_third_level(const std::string& devices);

}  // namespace fastlstm
