// Small files that are read again when they change: secrets and certificates that an orchestrator
// replaces while the process runs.
#ifndef TERN_SERVER_BASE_WATCHED_FILES_H_
#define TERN_SERVER_BASE_WATCHED_FILES_H_

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/base/file.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"

namespace tern {

// What tells one content of the files from the next without reading them (device, inode, size,
// times, through links).
std::string FileStamps(const std::vector<std::string>& paths);

// The value that `parse` makes of the files' contents. There is no thread: the files are looked at
// when somebody asks. Thread safe.
template <typename T>
class WatchedFiles {
 public:
  // How often the files are looked at.
  static constexpr absl::Duration kCheckEvery = absl::Seconds(1);

  // Takes the contents in the order of the paths. Its errors must not quote secrets: they are
  // logged.
  using Parse = std::function<absl::StatusOr<T>(const std::vector<std::string>& contents)>;

  // Errors of ReadFile, of `parse`. `reload_failed` (may be null) is called once for each change
  // that cannot be used. `clock` must outlive the object.
  static absl::StatusOr<std::unique_ptr<WatchedFiles>> Open(std::vector<std::string> paths,
                                                            uint64_t max_bytes, Parse parse,
                                                            std::function<void()> reload_failed,
                                                            const Clock* clock) {
    std::unique_ptr<WatchedFiles> files(new WatchedFiles(
        std::move(paths), max_bytes, std::move(parse), std::move(reload_failed), clock));
    // Before reading: a change in between is then seen by the next look.
    files->stamps_ = FileStamps(files->paths_);
    files->checked_ = clock->Now();
    TERN_ASSIGN_OR_RETURN(files->value_, files->Read());
    return files;
  }

  // The value of the files as they were at most kCheckEvery ago; if they cannot be used, the last
  // one that could, and the reason is logged.
  std::shared_ptr<const T> Current() const {
    std::lock_guard<std::mutex> lock(mutex_);
    const absl::Time now = clock_->Now();
    if (now >= checked_ && now - checked_ < kCheckEvery) return value_;
    checked_ = now;
    std::string stamps = FileStamps(paths_);
    if (stamps == stamps_) return value_;
    stamps_ = std::move(stamps);
    absl::StatusOr<std::shared_ptr<const T>> value = Read();
    if (value.ok()) {
      TERN_LOG_INFO("{}: changed, read again", absl::StrJoin(paths_, ", "));
      value_ = *std::move(value);
    } else {
      TERN_LOG_ERROR("{}: changed and cannot be used, the content of before stays valid: {}",
                     absl::StrJoin(paths_, ", "), value.status().ToString());
      if (reload_failed_) reload_failed_();
    }
    return value_;
  }

 private:
  WatchedFiles(std::vector<std::string> paths, uint64_t max_bytes, Parse parse,
               std::function<void()> reload_failed, const Clock* clock)
      : paths_(std::move(paths)),
        max_bytes_(max_bytes),
        parse_(std::move(parse)),
        reload_failed_(std::move(reload_failed)),
        clock_(clock) {}

  absl::StatusOr<std::shared_ptr<const T>> Read() const {
    std::vector<std::string> contents;
    for (const std::string& path : paths_) {
      TERN_ASSIGN_OR_RETURN(contents.emplace_back(), ReadFile(path, max_bytes_));
    }
    TERN_ASSIGN_OR_RETURN(T value, parse_(contents));
    return std::make_shared<const T>(std::move(value));
  }

  const std::vector<std::string> paths_;
  const uint64_t max_bytes_;
  const Parse parse_;
  const std::function<void()> reload_failed_;
  const Clock* const clock_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const T> value_;
  mutable std::string stamps_;
  mutable absl::Time checked_;
};

}  // namespace tern

#endif  // TERN_SERVER_BASE_WATCHED_FILES_H_
