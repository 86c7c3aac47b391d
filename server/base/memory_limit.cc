#include "server/base/memory_limit.h"

#include <fstream>

#include "absl/strings/numbers.h"
#include "server/base/cgroup.h"

namespace tern {
namespace {

// MemTotal of /proc/meminfo, which counts in kibibytes; 0 if it cannot be read.
uint64_t MachineMemory(const std::string& root) {
  std::ifstream in(root + "/proc/meminfo");
  std::string key, unit;
  uint64_t value = 0;
  while (in >> key >> value) {
    if (key == "MemTotal:") return value * 1024;
    std::getline(in, unit);
  }
  return 0;
}

}  // namespace

uint64_t ReadMemoryLimit(const std::string& root) {
  uint64_t limit = MachineMemory(root);
  // No limit is "max" under v2, and under v1 a number beyond any machine's memory.
  const auto lower = [&](const std::string& file) {
    uint64_t bytes = 0;
    if (!absl::SimpleAtoi(FirstLine(file), &bytes) || bytes == 0) return;
    if (limit == 0 || bytes < limit) limit = bytes;
  };
  VisitCgroups(root, "/sys/fs/cgroup", "",
               [&](const std::string& folder) { lower(folder + "/memory.max"); });
  VisitCgroups(root, "/sys/fs/cgroup/memory", "memory",
               [&](const std::string& folder) { lower(folder + "/memory.limit_in_bytes"); });
  return limit;
}

}  // namespace tern
