// Files that come into being whole or not at all.
#ifndef TERN_CLIENT_OUTPUT_FILE_H_
#define TERN_CLIENT_OUTPUT_FILE_H_

#include <csignal>
#include <fstream>
#include <memory>
#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tern::client {

// What is written goes to a file beside the target first, which Keep renames. Without Keep, and if
// SIGINT, SIGTERM or SIGHUP ends the process, that file goes and the target is as before. Links are
// followed, and a target that is a device or a pipe is written as it is. One at a time in a
// process.
class OutputFile {
 public:
  // NOT_FOUND if it cannot be made, or is a folder.
  static absl::StatusOr<std::unique_ptr<OutputFile>> Open(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  std::ostream& stream() { return file_; }
  // DATA_LOSS if writing has failed. The last call.
  absl::Status Keep();

 private:
  OutputFile(std::string path, std::string temporary);

  const std::string path_;
  const std::string temporary_;  // empty: the target itself is open
  std::ofstream file_;
  struct sigaction before_[3] = {};
};

// An OutputFile of these bytes.
absl::Status WriteFile(const std::string& path, const std::string& bytes);

}  // namespace tern::client

#endif  // TERN_CLIENT_OUTPUT_FILE_H_
