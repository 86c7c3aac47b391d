// Where this process's control group lies.
#ifndef TERN_SERVER_BASE_CGROUP_H_
#define TERN_SERVER_BASE_CGROUP_H_

#include <functional>
#include <string>

namespace tern {

// This process's cgroup folder ("/kubepods/pod1"), "" if there is none: under v2 (`controller`
// empty) or under v1's hierarchy of `controller`. From `root`/proc/self/cgroup.
std::string CgroupFolder(const std::string& root, const std::string& controller);

// Calls `visit` with the process's own folder, its ancestors and at last the root of the hierarchy
// that is mounted at `root` + `mount`: any of them may limit. Inside a container the own path is
// the host's and may not exist here; then only the root, which is the container's own group,
// counts.
void VisitCgroups(const std::string& root, const std::string& mount, const std::string& controller,
                  const std::function<void(const std::string& folder)>& visit);

// The first line of a file; "" if it cannot be read.
std::string FirstLine(const std::string& path);

}  // namespace tern

#endif  // TERN_SERVER_BASE_CGROUP_H_
