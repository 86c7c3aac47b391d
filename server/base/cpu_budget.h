// How many CPUs this process may use, from the scheduler's affinity mask and the cgroup
// quota (v2 cpu.max or v1 cpu.cfs_quota_us), whichever is smaller.
#ifndef TERN_SERVER_BASE_CPU_BUDGET_H_
#define TERN_SERVER_BASE_CPU_BUDGET_H_

#include <string>

#include "absl/status/statusor.h"

namespace tern {

struct CpuBudget {
  int threads = 1;          // min(floor(quota), affinity), at least 1
  int affinity = 1;         // CPUs in the affinity mask
  double quota_cpus = 0.0;  // 0 = no quota
  // "2 threads (affinity 2, no cgroup quota)"
  std::string ToString() const;
};

// Reads the machine. `root` is prepended to /proc and /sys paths (tests use a folder).
// Never fails: what cannot be read does not limit.
CpuBudget ReadCpuBudget(const std::string& root = "");

// The cgroup's cpu.stat (v2, or v1's cpu controller); zeros where absent, as without a quota.
struct CpuThrottling {
  double periods = 0;            // in which the group ran and had a quota
  double throttled_periods = 0;  // of them: in which it ran out of it
  double throttled_seconds = 0;  // its threads were held back, added up over CPUs
};
CpuThrottling ReadCpuThrottling(const std::string& root = "");

}  // namespace tern

#endif  // TERN_SERVER_BASE_CPU_BUDGET_H_
