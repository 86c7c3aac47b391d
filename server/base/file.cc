#include "server/base/file.h"

#include <fcntl.h>
#include <isa-l/crc.h>
#include <openssl/sha.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"

namespace tern {
namespace {

absl::Status ErrnoStatus(const std::string& what, const std::string& path) {
  const int error = errno;
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(error));
  if (error == ENOENT) return absl::NotFoundError(message);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(message);
  return absl::InternalError(message);
}

absl::Status WriteAll(int fd, absl::Span<const absl::string_view> parts, const std::string& path) {
  for (absl::string_view data : parts) {
    while (!data.empty()) {
      const ssize_t n = ::write(fd, data.data(), data.size());
      if (n < 0) {
        if (errno == EINTR) continue;
        return ErrnoStatus("write", path);
      }
      data.remove_prefix(n);
    }
  }
  return absl::OkStatus();
}

// Where a write to `path` ends up, also if nothing is there yet.
std::string FollowLinks(std::filesystem::path path) {
  std::error_code error;
  for (int links = 0; links < 40; ++links) {  // Linux's own limit
    const std::filesystem::path target = std::filesystem::read_symlink(path, error);
    if (error) break;
    path = path.parent_path() / target;
  }
  return path.string();
}

}  // namespace

namespace {

// An open regular file of at most `max_bytes`.
struct OpenFile {
  OpenFile() = default;
  OpenFile(OpenFile&& other) noexcept : fd(std::exchange(other.fd, -1)), size(other.size) {}
  ~OpenFile() {
    if (fd >= 0) ::close(fd);
  }
  int fd = -1;
  size_t size = 0;
};

absl::StatusOr<OpenFile> OpenRegular(const std::string& path, uint64_t max_bytes) {
  OpenFile file;
  // O_NONBLOCK: opening a pipe must not wait for its writer; regular files ignore it.
  file.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd < 0) return ErrnoStatus("open", path);
  struct stat info;
  if (::fstat(file.fd, &info) != 0) return ErrnoStatus("stat", path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  if (static_cast<uint64_t>(info.st_size) > max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": ", info.st_size, " bytes, the limit is ", max_bytes));
  }
  file.size = info.st_size;
  return file;
}

// How much of file.size there was to read: less if the file was cut meanwhile.
absl::StatusOr<size_t> ReadAll(const OpenFile& file, char* to, const std::string& path) {
  size_t done = 0;
  while (done < file.size) {
    const ssize_t n = ::read(file.fd, to + done, file.size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus("read", path);
    if (n == 0) break;
    done += n;
  }
  return done;
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path, uint64_t max_bytes) {
  TERN_ASSIGN_OR_RETURN(const OpenFile file, OpenRegular(path, max_bytes));
  std::string content(file.size, '\0');
  TERN_ASSIGN_OR_RETURN(const size_t done, ReadAll(file, content.data(), path));
  content.resize(done);
  return content;
}

FileBytes::FileBytes(FileBytes&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(other.size_), mapped_(other.mapped_) {}
FileBytes& FileBytes::operator=(FileBytes&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}
FileBytes::~FileBytes() {
  if (data_ != nullptr) ::munmap(data_, mapped_);
}

absl::StatusOr<FileBytes> ReadLargeFile(const std::string& path, uint64_t max_bytes) {
  TERN_ASSIGN_OR_RETURN(const OpenFile file, OpenRegular(path, max_bytes));
  FileBytes bytes;
  if (file.size == 0) return bytes;
  void* memory =
      ::mmap(nullptr, file.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return ErrnoStatus("memory for", path);
  bytes.data_ = static_cast<char*>(memory);
  bytes.mapped_ = file.size;
  ::madvise(memory, file.size, MADV_HUGEPAGE);  // a wish
  TERN_ASSIGN_OR_RETURN(bytes.size_, ReadAll(file, bytes.data_, path));
  return bytes;
}

absl::Status ReplaceFile(const std::string& path, absl::Span<const absl::string_view> parts) {
  static std::atomic<uint64_t> counter{0};
  // A killed process may have left files with our names: in a container every server is process 1.
  std::string temporary;
  int fd = -1;
  do {
    temporary = absl::StrCat(path, ".tmp.", ::getpid(), ".", counter++);
    fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  } while (fd < 0 && errno == EEXIST);
  if (fd < 0) return ErrnoStatus("create", temporary);
  absl::Status status = WriteAll(fd, parts, temporary);
  if (status.ok() && ::fsync(fd) != 0) status = ErrnoStatus("fsync", temporary);
  if (::close(fd) != 0 && status.ok()) status = ErrnoStatus("close", temporary);
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0)
    status = ErrnoStatus("rename to", path);
  if (!status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return SyncDirectory(parent.empty() ? "." : parent);
}

absl::Status WriteFileAtomically(const std::string& path,
                                 absl::Span<const absl::string_view> parts) {
  struct stat info;
  const bool exists = ::stat(path.c_str(), &info) == 0;
  if (!exists && errno != ENOENT) return ErrnoStatus("open", path);
  if (!exists || S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)) {
    return ReplaceFile(FollowLinks(path), parts);
  }
  const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus("open", path);
  absl::Status status = WriteAll(fd, parts, path);
  if (::close(fd) != 0 && status.ok()) status = ErrnoStatus("close", path);
  return status;
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus("open directory", path);
  absl::Status status;
  if (::fsync(fd) != 0) status = ErrnoStatus("fsync directory", path);
  ::close(fd);
  return status;
}

uint32_t Crc32c(absl::string_view data) {
  // crc32_iscsi takes an int length and applies no final inversion.
  uint32_t crc = 0xffffffffu;
  while (!data.empty()) {
    const size_t chunk = std::min<size_t>(data.size(), 1u << 30);
    crc = crc32_iscsi(reinterpret_cast<unsigned char*>(const_cast<char*>(data.data())),
                      static_cast<int>(chunk), crc);
    data.remove_prefix(chunk);
  }
  return ~crc;
}

std::string Sha256Hex(absl::string_view data) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(), digest);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(digest), sizeof(digest)));
}

}  // namespace tern
