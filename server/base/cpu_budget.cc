#include "server/base/cpu_budget.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/strings/str_format.h"
#include "server/base/cgroup.h"

namespace tern {
namespace {

// Quota in CPUs: the smallest of those that limit this process; 0 = none.
double QuotaV2(const std::string& root) {
  double quota = 0;
  VisitCgroups(root, "/sys/fs/cgroup", "", [&](const std::string& folder) {
    std::istringstream line(FirstLine(folder + "/cpu.max"));
    std::string limit;
    double period = 0;
    if (line >> limit >> period && limit != "max" && period > 0) {
      const double cpus = std::atof(limit.c_str()) / period;
      if (cpus > 0 && (quota == 0 || cpus < quota)) quota = cpus;
    }
  });
  return quota;
}

double QuotaV1(const std::string& root) {
  for (const char* mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
    double quota = 0;
    VisitCgroups(root, mount, "cpu", [&](const std::string& folder) {
      const double limit = std::atof(FirstLine(folder + "/cpu.cfs_quota_us").c_str());
      const double period = std::atof(FirstLine(folder + "/cpu.cfs_period_us").c_str());
      if (limit > 0 && period > 0 && (quota == 0 || limit / period < quota)) quota = limit / period;
    });
    if (quota > 0) return quota;
  }
  return 0;
}

}  // namespace

std::string CpuBudget::ToString() const {
  return absl::StrFormat("%d thread%s (affinity %d, %s)", threads, threads == 1 ? "" : "s",
                         affinity,
                         quota_cpus > 0 ? absl::StrFormat("cgroup quota %.2f", quota_cpus)
                                        : std::string("no cgroup quota"));
}

CpuBudget ReadCpuBudget(const std::string& root) {
  CpuBudget budget;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    budget.affinity = std::max(1, CPU_COUNT(&set));
  } else {  // more CPUs than the set has room for (1024)
    budget.affinity = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  budget.quota_cpus = QuotaV2(root);
  if (budget.quota_cpus == 0) budget.quota_cpus = QuotaV1(root);
  budget.threads = budget.affinity;
  if (budget.quota_cpus > 0) {
    budget.threads = std::min(budget.threads, static_cast<int>(std::floor(budget.quota_cpus)));
  }
  budget.threads = std::max(1, budget.threads);
  return budget;
}

CpuThrottling ReadCpuThrottling(const std::string& root) {
  CpuThrottling result;
  // The process's own group; in a container, whose path is the host's, the root of the mount.
  for (const std::string& folder :
       {"/sys/fs/cgroup" + CgroupFolder(root, ""), std::string("/sys/fs/cgroup"),
        "/sys/fs/cgroup/cpu" + CgroupFolder(root, "cpu"), std::string("/sys/fs/cgroup/cpu")}) {
    std::ifstream in(root + folder + "/cpu.stat");
    std::string key;
    double value = 0;
    bool found = false;
    while (in >> key >> value) {
      if (key == "nr_periods") result.periods = value, found = true;
      if (key == "nr_throttled") result.throttled_periods = value;
      if (key == "throttled_usec") result.throttled_seconds = value * 1e-6;
      if (key == "throttled_time") result.throttled_seconds = value * 1e-9;
    }
    if (found) break;
  }
  return result;
}

}  // namespace tern
