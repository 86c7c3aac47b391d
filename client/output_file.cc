#include "client/output_file.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/status.h"

namespace tern::client {
namespace {

namespace fs = std::filesystem;

constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP};

// The path of the unfinished file, for the handler: memory that is never freed.
char unfinished[PATH_MAX];
std::atomic<bool> is_unfinished{false};

// Set with SA_RESETHAND: the signal comes again when this returns, and ends the process.
void RemoveAndEnd(int signal) {
  if (is_unfinished) ::unlink(unfinished);
  ::raise(signal);
}

// Where a write to `path` ends up, also if nothing is there yet.
fs::path FollowLinks(fs::path path) {
  std::error_code code;
  for (int links = 0; links < 40; ++links) {  // Linux's own limit
    const fs::path target = fs::read_symlink(path, code);
    if (code) break;
    path = path.parent_path() / target;
  }
  return path;
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Open(const std::string& path) {
  std::error_code code;
  const fs::file_status status = fs::status(path, code);
  if (status.type() == fs::file_type::none) {
    return absl::NotFoundError(absl::StrCat(path, ": ", code.message()));
  }
  if (fs::is_directory(status)) {
    return absl::NotFoundError(absl::StrCat(path, " is a directory, want a file"));
  }
  const bool whole = !fs::exists(status) || fs::is_regular_file(status);
  const std::string target = whole ? FollowLinks(path).string() : path;
  std::unique_ptr<OutputFile> output(
      new OutputFile(target, whole ? absl::StrCat(target, ".part.", getpid()) : ""));
  if (!output->file_) {
    return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  return output;
}

OutputFile::OutputFile(std::string path, std::string temporary)
    : path_(std::move(path)), temporary_(std::move(temporary)) {
  if (!temporary_.empty() && temporary_.size() < sizeof(unfinished)) {
    std::memcpy(unfinished, temporary_.c_str(), temporary_.size() + 1);
    is_unfinished = true;
    struct sigaction action = {};
    action.sa_handler = RemoveAndEnd;
    action.sa_flags = SA_RESETHAND;
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      ::sigaction(kSignals[i], nullptr, &before_[i]);
      // What is ignored (nohup) stays so.
      if (before_[i].sa_handler != SIG_IGN) ::sigaction(kSignals[i], &action, nullptr);
    }
  }
  file_.open(temporary_.empty() ? path_ : temporary_, std::ios::binary | std::ios::trunc);
}

OutputFile::~OutputFile() {
  if (temporary_.empty()) return;
  if (is_unfinished.exchange(false)) {
    for (size_t i = 0; i < std::size(kSignals); ++i) ::sigaction(kSignals[i], &before_[i], nullptr);
  }
  std::error_code ignored;
  fs::remove(temporary_, ignored);  // renamed by Keep, or of no use
}

absl::Status OutputFile::Keep() {
  file_.close();
  if (!file_) return absl::DataLossError(absl::StrCat(path_, ": writing failed"));
  if (temporary_.empty()) return absl::OkStatus();
  std::error_code code;
  fs::rename(temporary_, path_, code);
  if (code) return absl::DataLossError(absl::StrCat(path_, ": ", code.message()));
  return absl::OkStatus();
}

absl::Status WriteFile(const std::string& path, const std::string& bytes) {
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> file, OutputFile::Open(path));
  file->stream() << bytes;
  return file->Keep();
}

}  // namespace tern::client
