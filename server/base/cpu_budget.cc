#include "server/base/cpu_budget.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "absl/strings/str_format.h"

namespace tern {
namespace {

std::string FirstLine(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// The cgroup v2 folder of this process, or "" under v1.
std::string CgroupFolder(const std::string& root) {
  std::ifstream in(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  }
  return "";
}

// Quota in CPUs over the path from the process's own cgroup up to the root: any ancestor may limit.
double QuotaV2(const std::string& root) {
  double quota = 0;
  std::string folder = CgroupFolder(root);
  for (;;) {
    std::istringstream line(FirstLine(root + "/sys/fs/cgroup" + folder + "/cpu.max"));
    std::string limit;
    double period = 0;
    if (line >> limit >> period && limit != "max" && period > 0) {
      const double cpus = std::atof(limit.c_str()) / period;
      if (cpus > 0 && (quota == 0 || cpus < quota)) quota = cpus;
    }
    if (folder.empty() || folder == "/") break;
    folder = folder.substr(0, folder.find_last_of('/'));
  }
  return quota;
}

double QuotaV1(const std::string& root) {
  for (const char* folder : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
    const double quota = std::atof(FirstLine(root + folder + "/cpu.cfs_quota_us").c_str());
    const double period = std::atof(FirstLine(root + folder + "/cpu.cfs_period_us").c_str());
    if (quota > 0 && period > 0) return quota / period;
  }
  return 0;
}

}  // namespace

std::string CpuBudget::ToString() const {
  return absl::StrFormat("%d thread%s (affinity %d, %s)", threads, threads == 1 ? "" : "s", affinity,
                         quota_cpus > 0 ? absl::StrFormat("cgroup quota %.2f", quota_cpus)
                                        : std::string("no cgroup quota"));
}

CpuBudget ReadCpuBudget(const std::string& root) {
  CpuBudget budget;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) budget.affinity = std::max(1, CPU_COUNT(&set));
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
  for (const std::string& folder : {"/sys/fs/cgroup" + CgroupFolder(root), std::string("/sys/fs/cgroup/cpu")}) {
    std::ifstream in(root + folder + "/cpu.stat");
    std::string key;
    double value = 0;
    bool found = false;
    while (in >> key >> value) {
      if (key == "nr_throttled") result.periods = value, found = true;
      if (key == "throttled_usec") result.seconds = value * 1e-6;
      if (key == "throttled_time") result.seconds = value * 1e-9;
    }
    if (found) break;
  }
  return result;
}

}  // namespace tern
