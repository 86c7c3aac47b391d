// Files: whole reads with a size limit, crash-safe writes, checksums.
#ifndef TERN_SERVER_BASE_FILE_H_
#define TERN_SERVER_BASE_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace tern {

// The whole file. NOT_FOUND if it does not exist, RESOURCE_EXHAUSTED if it is larger than
// `max_bytes`, INVALID_ARGUMENT if it is not a regular file, PERMISSION_DENIED or INTERNAL (with
// errno's text) otherwise. Thread safe.
absl::StatusOr<std::string> ReadFile(const std::string& path, uint64_t max_bytes = 4ull << 30);

// A file's content in memory of its own. Move only.
class FileBytes {
 public:
  FileBytes() = default;
  FileBytes(FileBytes&& other) noexcept;
  FileBytes& operator=(FileBytes&& other) noexcept;
  ~FileBytes();

  absl::string_view view() const { return {data_, size_}; }

 private:
  friend absl::StatusOr<FileBytes> ReadLargeFile(const std::string& path, uint64_t max_bytes);
  char* data_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

// As ReadFile, for files of many megabytes: into pages that were not cleared twice and are huge
// where the system allows it, which takes a third of the time. (A mapping of the file itself would
// be quicker still, and a crash if somebody cut the file.)
absl::StatusOr<FileBytes> ReadLargeFile(const std::string& path, uint64_t max_bytes = 4ull << 30);

// Writes `path`.tmp.<pid>.<n>, fsyncs it, renames it over `path` and fsyncs the folder: after
// a crash at any moment `path` holds the old content or the new one, never a part. Whatever is at
// `path` is replaced, a link or a pipe too.
// Errors: NOT_FOUND (no such folder), PERMISSION_DENIED, RESOURCE_EXHAUSTED (disk full) or
// INTERNAL, with errno's text; the temporary file is removed. Temporary files of killed processes
// are stepped over. Thread safe.
absl::Status ReplaceFile(const std::string& path, absl::Span<const absl::string_view> parts);

// The same for a path that a user named: links are followed, also to where nothing is yet, and what
// is a device or a pipe is written as it is (which waits for a pipe's reader).
absl::Status WriteFileAtomically(const std::string& path,
                                 absl::Span<const absl::string_view> parts);

// fsync of a directory, so that renames in it survive a power cut.
absl::Status SyncDirectory(const std::string& path);

// CRC-32C (Castagnoli) as in RFC 3720, starting from 0.
uint32_t Crc32c(absl::string_view data);

// Lower-case hexadecimal SHA-256.
std::string Sha256Hex(absl::string_view data);

}  // namespace tern

#endif  // TERN_SERVER_BASE_FILE_H_
