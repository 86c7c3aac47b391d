// The repository's folders and files: names, safe reads, atomic publication and removal. Knows no
// networks. Nothing here follows a symbolic link inside a model's folder or opens anything but
// regular files (opening a pipe would block). Paths are absolute or relative to the working
// directory; functions are thread safe as far as callers do not change one folder at once.
#ifndef TERN_SERVER_REPOSITORY_STORAGE_H_
#define TERN_SERVER_REPOSITORY_STORAGE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "tern/v1/model.pb.h"

namespace tern::repository {

inline constexpr char kConfigFile[] = "config.textproto";
inline constexpr char kLabelsFile[] = "labels.txt";
inline constexpr char kDefaultFile[] = "default";
inline constexpr char kFloatFile[] = "model.onnx";
inline constexpr char kQuantizedFile[] = "model.tern";

// An exclusive flock on <root>/.lock, released when this goes (or the process dies). Move only.
class RootLock {
 public:
  // Creates root (and its parents) if needed. FAILED_PRECONDITION if another holder exists;
  // PERMISSION_DENIED or INTERNAL if root cannot be created or written.
  static absl::StatusOr<RootLock> Acquire(const std::string& root);
  RootLock(RootLock&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  RootLock& operator=(RootLock&&) = delete;
  ~RootLock();

 private:
  explicit RootLock(int fd) : fd_(fd) {}
  int fd_;
};

// A new, empty folder `parent`/.tmp-*, removed with its content unless it was published. Not thread
// safe.
class TempFolder {
 public:
  static absl::StatusOr<TempFolder> Create(const std::string& parent);
  TempFolder(TempFolder&& other) noexcept : path_(std::move(other.path_)) { other.path_.clear(); }
  TempFolder& operator=(TempFolder&&) = delete;
  ~TempFolder();

  const std::string& path() const { return path_; }
  // Syncs the folder and renames it to `target` beside it; after this returns OK it survives a
  // power cut, after an error nothing is at `target`. ALREADY_EXISTS if something was there before.
  absl::Status Publish(const std::string& target);

 private:
  explicit TempFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

// mkdir; INTERNAL with errno's text.
absl::Status MakeFolder(const std::string& path);

// Makes the folder vanish by one rename to `parent`/.trash-*, then removes it. OK if it does not
// exist in a folder that does; FAILED_PRECONDITION if that is gone too. Another error means that it
// is still there; leftovers in the trash are only logged.
absl::Status RemoveFolder(const std::string& path);

// Removes what a process that died left in `folder`: .tmp-*, .trash-*, default.tmp.*. Failures are
// logged.
void CleanUp(const std::string& folder);

// Names in a folder, sorted. NOT_FOUND, PERMISSION_DENIED, INTERNAL.
absl::StatusOr<std::vector<std::string>> ListFolder(const std::string& path);

// True for a folder that is not a symbolic link.
bool IsRealFolder(const std::string& path);
// True if nothing is there, not even a link.
bool IsGone(const std::string& path);

// "1" .. "999999999999999999" without leading zeros; nothing for any other name.
std::optional<uint64_t> ParseVersion(absl::string_view name);

// Versions that have a folder (or anything else with such a name) in the model's folder, rising.
std::vector<uint64_t> VersionsOnDisk(const std::string& model_folder);

// What a model's folder holds beside this version: other folders, and whatever has a version's
// name; sorted. Without the repository's own .tmp-* and .trash-*. Nothing if there is no such
// folder; the errors of ListFolder.
absl::StatusOr<std::vector<std::string>> FoldersBeside(const std::string& model_folder,
                                                       uint64_t version);

// ReadFile of a regular file. INVALID_ARGUMENT if it is something else (a link, a pipe).
absl::StatusOr<std::string> ReadRegularFile(const std::string& path, uint64_t max_bytes);

// The one network file of a version folder.
struct VersionFile {
  std::string path;
  bool quantized = false;
  uint64_t bytes = 0;
};
// NOT_FOUND if there is none, or no such folder; FAILED_PRECONDITION if there are both;
// INVALID_ARGUMENT if the folder or the file is not a real one; RESOURCE_EXHAUSTED if it is larger
// than max_bytes.
absl::StatusOr<VersionFile> FindVersionFile(const std::string& version_folder, uint64_t max_bytes);

// INVALID_ARGUMENT naming the field if a number is beyond what the server can use, or labels_file
// is not the name of a file in the model's own folder.
absl::Status ValidateConfig(const v1::ModelConfig& config);
// Parses and validates a config; INVALID_ARGUMENT begins with `name` and gives line and column of a
// syntax error.
absl::StatusOr<v1::ModelConfig> ParseConfig(absl::string_view text, absl::string_view name);
// The config of config.textproto. Errors of reading, and ParseConfig's.
absl::StatusOr<v1::ModelConfig> ReadConfig(const std::string& model_folder);
// The labels of the config, checked to be `classes` many (0 = any number); empty if it names no
// file.
absl::StatusOr<std::vector<std::string>> ReadLabels(const std::string& model_folder,
                                                    const v1::ModelConfig& config, int64_t classes);

// The default pointer. NOT_FOUND if there is none; DATA_LOSS if it is not a version number.
absl::StatusOr<uint64_t> ReadDefault(const std::string& model_folder);
// After an error the pointer is what it was, as far as the disk lets it.
absl::Status WriteDefault(const std::string& model_folder, uint64_t version);

}  // namespace tern::repository

#endif  // TERN_SERVER_REPOSITORY_STORAGE_H_
