#include "server/base/watched_files.h"

#include <sys/stat.h>

#include "absl/strings/str_cat.h"

namespace tern {

std::string FileStamps(const std::vector<std::string>& paths) {
  std::string stamps;
  for (const std::string& path : paths) {
    struct stat info;
    if (::stat(path.c_str(), &info) != 0) {
      absl::StrAppend(&stamps, "absent;");
      continue;
    }
    absl::StrAppend(&stamps, info.st_dev, " ", info.st_ino, " ", info.st_size, " ");
    absl::StrAppend(&stamps, info.st_mtim.tv_sec, " ", info.st_mtim.tv_nsec, " ",
                    info.st_ctim.tv_sec, " ", info.st_ctim.tv_nsec, ";");
  }
  return stamps;
}

}  // namespace tern
