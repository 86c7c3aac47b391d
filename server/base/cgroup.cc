#include "server/base/cgroup.h"

#include <fstream>

#include "absl/strings/str_cat.h"

namespace tern {
namespace {

// The folder above, "" for the root.
std::string Parent(const std::string& folder) {
  const size_t slash = folder.find_last_of('/');
  return slash == std::string::npos ? "" : folder.substr(0, slash);
}

}  // namespace

std::string CgroupFolder(const std::string& root, const std::string& controller) {
  // Lines are "<id>:<controllers, comma-separated>:<folder>"; v2's is "0::<folder>".
  std::ifstream in(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {
    const size_t first = line.find(':');
    if (first == std::string::npos) continue;
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers =
        absl::StrCat(",", line.substr(first + 1, second - first - 1), ",");
    if (controllers.find(absl::StrCat(",", controller, ",")) == std::string::npos) continue;
    return line.substr(second + 1);
  }
  return "";
}

void VisitCgroups(const std::string& root, const std::string& mount, const std::string& controller,
                  const std::function<void(const std::string& folder)>& visit) {
  for (std::string folder = CgroupFolder(root, controller);; folder = Parent(folder)) {
    visit(root + mount + folder);
    if (folder.empty()) return;
  }
}

std::string FirstLine(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

}  // namespace tern
