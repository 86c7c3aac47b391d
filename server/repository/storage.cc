#include "server/repository/storage.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "server/base/file.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"

namespace tern::repository {
namespace {

namespace fs = std::filesystem;

constexpr char kTempPrefix[] = ".tmp-";
constexpr char kTrashPrefix[] = ".trash-";
constexpr uint64_t kMaxConfigBytes = 1 << 20;
constexpr uint64_t kMaxLabelsBytes = 16 << 20;
constexpr uint64_t kMaxDefaultBytes = 64;

absl::Status SystemError(absl::string_view what, absl::string_view path, int error) {
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case EEXIST:
    case ENOTEMPTY:
      return absl::AlreadyExistsError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::InternalError(message);
  }
}

// A name that no other folder of this or a living process has.
std::string UniqueName(const char* prefix) {
  static std::atomic<uint64_t> counter{0};
  return absl::StrCat(prefix, ::getpid(), "-", counter++);
}

bool IsUnfinished(absl::string_view name) {
  return absl::StartsWith(name, kTempPrefix) || absl::StartsWith(name, kTrashPrefix);
}

std::string ParentOf(const std::string& path) { return fs::path(path).parent_path().string(); }

void RemoveTree(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) TERN_LOG_WARN("cannot remove {}: {}", path, error.message());
}

// rename that never replaces. Without it an empty folder at `to` would be replaced silently.
int RenameNew(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return 0;
  if (errno != EINVAL && errno != ENOSYS) return errno;
  struct stat
      info;  // a file system without the flag; the repository's lock keeps other writers out
  if (::lstat(to.c_str(), &info) == 0) return EEXIST;
  return ::rename(from.c_str(), to.c_str()) == 0 ? 0 : errno;
}

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text_.empty())
      text_ = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

}  // namespace

absl::StatusOr<RootLock> RootLock::Acquire(const std::string& root) {
  std::error_code error;
  fs::create_directories(root, error);
  if (error && !fs::is_directory(root))
    return SystemError("create repository", root, error.value());
  const std::string path = absl::StrCat(root, "/.lock");
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (fd < 0) return SystemError("open", path, errno);
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    ::close(fd);
    if (reason == EWOULDBLOCK) {
      return absl::FailedPreconditionError(
          absl::StrCat("repository ", root, " is in use by another process"));
    }
    return SystemError("lock", path, reason);
  }
  return RootLock(fd);
}

RootLock::~RootLock() {
  if (fd_ >= 0) ::close(fd_);  // releases the lock
}

absl::StatusOr<TempFolder> TempFolder::Create(const std::string& parent) {
  std::string path = absl::StrCat(parent, "/", UniqueName(kTempPrefix));
  TERN_RETURN_IF_ERROR(MakeFolder(path));
  return TempFolder(std::move(path));
}

TempFolder::~TempFolder() {
  if (!path_.empty()) RemoveTree(path_);
}

absl::Status TempFolder::Publish(const std::string& target) {
  TERN_RETURN_IF_ERROR(SyncDirectory(path_));
  const int error = RenameNew(path_, target);
  if (error != 0) return SystemError("publish", target, error);
  path_.clear();
  absl::Status synced = SyncDirectory(ParentOf(target));
  if (!synced.ok()) RemoveFolder(target).IgnoreError();  // not known to be on disk: take it back
  return synced;
}

absl::Status MakeFolder(const std::string& path) {
  if (::mkdir(path.c_str(), 0755) != 0) return SystemError("create folder", path, errno);
  return absl::OkStatus();
}

absl::Status RemoveFolder(const std::string& path) {
  const std::string parent = ParentOf(path);
  const std::string trash = absl::StrCat(parent, "/", UniqueName(kTrashPrefix));
  const int error = RenameNew(path, trash);
  if (error == ENOENT) {
    // Deleted already; unless it has gone elsewhere with all that was around it.
    std::error_code ignored;
    if (fs::is_directory(parent, ignored)) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("remove ", path, ": the folder around it is gone, ", parent));
  }
  if (error != 0) return SystemError("remove", path, error);
  // Even unsynced the deletion has happened for this process; a power cut may bring the folder back
  // whole.
  const absl::Status synced = SyncDirectory(parent);
  if (!synced.ok()) TERN_LOG_WARN("{}", synced.ToString());
  RemoveTree(trash);
  return absl::OkStatus();
}

void CleanUp(const std::string& folder) {
  const auto names = ListFolder(folder);
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    if (IsUnfinished(name) || absl::StartsWith(name, absl::StrCat(kDefaultFile, ".tmp."))) {
      TERN_LOG_INFO("removing {}/{}: left by a process that ended early", folder, name);
      RemoveTree(absl::StrCat(folder, "/", name));
    }
  }
}

absl::StatusOr<std::vector<std::string>> ListFolder(const std::string& path) {
  std::vector<std::string> names;
  std::error_code error;
  fs::directory_iterator it(path, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error))
    names.push_back(it->path().filename().string());
  if (error) return SystemError("list", path, error.value());
  std::sort(names.begin(), names.end());
  return names;
}

bool IsRealFolder(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

bool IsGone(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) != 0 && errno == ENOENT;
}

std::optional<uint64_t> ParseVersion(absl::string_view name) {
  uint64_t version = 0;
  if (name.empty() || name.size() > 18 || name[0] == '0') return std::nullopt;
  if (!std::all_of(name.begin(), name.end(), [](char c) { return absl::ascii_isdigit(c); }))
    return std::nullopt;
  if (!absl::SimpleAtoi(name, &version)) return std::nullopt;
  return version;
}

std::vector<uint64_t> VersionsOnDisk(const std::string& model_folder) {
  std::vector<uint64_t> versions;
  const auto names = ListFolder(model_folder);
  if (!names.ok()) return versions;
  for (const std::string& name : *names) {
    if (const auto version = ParseVersion(name)) versions.push_back(*version);
  }
  std::sort(versions.begin(), versions.end());
  return versions;
}

absl::StatusOr<std::vector<std::string>> FoldersBeside(const std::string& model_folder,
                                                       uint64_t version) {
  auto names = ListFolder(model_folder);
  if (absl::IsNotFound(names.status())) return std::vector<std::string>();
  TERN_RETURN_IF_ERROR(names.status());
  std::erase_if(*names, [&](const std::string& name) {
    if (IsUnfinished(name)) return true;
    if (const auto parsed = ParseVersion(name)) return *parsed == version;
    return !IsRealFolder(absl::StrCat(model_folder, "/", name));
  });
  return names;
}

absl::StatusOr<std::string> ReadRegularFile(const std::string& path, uint64_t max_bytes) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) return SystemError("open", path, errno);
  if (!S_ISREG(info.st_mode))
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  return ReadFile(path, max_bytes);
}

absl::StatusOr<VersionFile> FindVersionFile(const std::string& version_folder, uint64_t max_bytes) {
  if (!IsRealFolder(version_folder)) {
    struct stat info;
    if (::lstat(version_folder.c_str(), &info) != 0) {
      return SystemError("open folder", version_folder, errno);
    }
    return absl::InvalidArgumentError(
        absl::StrCat(version_folder, ": not a folder (links are not followed)"));
  }
  VersionFile found;
  for (const char* name : {kFloatFile, kQuantizedFile}) {
    const std::string path = absl::StrCat(version_folder, "/", name);
    struct stat info;
    if (::lstat(path.c_str(), &info) != 0) {
      if (errno == ENOENT) continue;
      return SystemError("open", path, errno);
    }
    if (!S_ISREG(info.st_mode))
      return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
    if (!found.path.empty()) {
      return absl::FailedPreconditionError(absl::StrCat(version_folder, ": holds both ", kFloatFile,
                                                        " and ", kQuantizedFile,
                                                        ", want one of them"));
    }
    found = VersionFile{path, name == kQuantizedFile, static_cast<uint64_t>(info.st_size)};
  }
  if (found.path.empty()) {
    return absl::NotFoundError(
        absl::StrCat(version_folder, ": holds neither ", kFloatFile, " nor ", kQuantizedFile));
  }
  if (found.bytes > max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(found.path, ": ", found.bytes, " bytes, the limit is ", max_bytes));
  }
  return found;
}

absl::Status ValidateConfig(const v1::ModelConfig& config) {
  const auto check = [](const char* field, uint64_t got, uint64_t most) {
    if (got <= most) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(field, ": got ", got, ", want at most ", most));
  };
  TERN_RETURN_IF_ERROR(check("batching.max_batch_size", config.batching().max_batch_size(), 1024));
  TERN_RETURN_IF_ERROR(
      check("batching.max_delay_us", config.batching().max_delay_us(), 10'000'000));
  TERN_RETURN_IF_ERROR(check("batching.max_queue", config.batching().max_queue(), 1'000'000));
  TERN_RETURN_IF_ERROR(check("batching.preferred_batch_size: entries",
                             config.batching().preferred_batch_size_size(), 32));
  TERN_RETURN_IF_ERROR(
      check("batching.target_p99_us", config.batching().target_p99_us(), 60'000'000));
  TERN_RETURN_IF_ERROR(
      check("brownout.queue_wait_us", config.brownout().queue_wait_us(), 60'000'000));
  const double drop = config.brownout().max_top1_drop();
  if (!(drop >= 0 && drop <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("brownout.max_top1_drop: got ", drop, ", want 0..1"));
  }
  TERN_RETURN_IF_ERROR(check("instances", config.instances(), 256));
  const std::string& labels = config.labels_file();
  if (!labels.empty() && (labels[0] == '.' || labels.find('/') != std::string::npos ||
                          labels.find('\0') != std::string::npos || labels.size() > 255)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "labels_file: got '", labels, "', want the name of a file in the model's folder"));
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::ModelConfig> ParseConfig(absl::string_view text, absl::string_view name) {
  v1::ModelConfig config;
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(std::string(text), &config)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", error.text()));
  }
  TERN_RETURN_IF_ERROR(Annotate(ValidateConfig(config), name));
  return config;
}

absl::StatusOr<v1::ModelConfig> ReadConfig(const std::string& model_folder) {
  const std::string path = absl::StrCat(model_folder, "/", kConfigFile);
  TERN_ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kMaxConfigBytes));
  return ParseConfig(text, path);
}

absl::StatusOr<std::vector<std::string>> ReadLabels(const std::string& model_folder,
                                                    const v1::ModelConfig& config,
                                                    int64_t classes) {
  if (config.labels_file().empty()) return std::vector<std::string>();
  const std::string path = absl::StrCat(model_folder, "/", config.labels_file());
  TERN_ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kMaxLabelsBytes));
  auto labels = classify::ParseLabels(text, classes);
  // Not by its path: of a model that is being imported it leads into a temporary folder.
  if (!labels.ok()) return Annotate(labels.status(), config.labels_file());
  return labels;
}

absl::StatusOr<uint64_t> ReadDefault(const std::string& model_folder) {
  const std::string path = absl::StrCat(model_folder, "/", kDefaultFile);
  TERN_ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kMaxDefaultBytes));
  const auto version = ParseVersion(absl::StripAsciiWhitespace(text));
  if (!version) return absl::DataLossError(absl::StrCat(path, ": not a version number"));
  return *version;
}

absl::Status WriteDefault(const std::string& model_folder, uint64_t version) {
  const std::string path = absl::StrCat(model_folder, "/", kDefaultFile);
  const auto before = ReadRegularFile(path, kMaxDefaultBytes);
  const std::string text = absl::StrCat(version, "\n");
  const absl::Status status = ReplaceFile(path, {text});
  if (status.ok()) return status;
  // It may have been renamed into place and only not be known to be on disk: taken back.
  if (const auto now = ReadRegularFile(path, kMaxDefaultBytes); now.ok() && *now == text) {
    if (before.ok()) {
      ReplaceFile(path, {*before}).IgnoreError();
    } else {
      ::unlink(path.c_str());
    }
  }
  return status;
}

}  // namespace tern::repository
