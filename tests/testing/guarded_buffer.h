// Memory between two unmapped pages, for kernels that must not touch a byte outside their
// buffers: an access past the guarded edge ends the test with SIGSEGV.
#ifndef TERN_TESTS_TESTING_GUARDED_BUFFER_H_
#define TERN_TESTS_TESTING_GUARDED_BUFFER_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace tern::testing {

// Which edge of the buffer touches an unmapped page. The other edge is followed by slack up to
// its page's end, filled with a pattern: SlackIsUntouched() tells of stray writes there.
enum class Guard { kAfter, kBefore };

// `size` elements of a trivial T, zero-filled. Neither copied nor moved.
template <typename T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(size_t size, Guard guard = Guard::kAfter) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = size * sizeof(T);
    inner_bytes_ = (bytes + page - 1) / page * page;
    if (inner_bytes_ == 0) inner_bytes_ = page;
    mapped_bytes_ = inner_bytes_ + 2 * page;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) Die("mmap");
    mapped_ = static_cast<uint8_t*>(mapped);
    inner_ = mapped_ + page;
    if (mprotect(inner_, inner_bytes_, PROT_READ | PROT_WRITE) != 0) Die("mprotect");
    std::memset(inner_, kPattern, inner_bytes_);
    data_ = guard == Guard::kAfter ? inner_ + inner_bytes_ - bytes : inner_;
    if (bytes > 0) std::memset(data_, 0, bytes);
  }
  GuardedBuffer(const std::vector<T>& values, Guard guard) : GuardedBuffer(values.size(), guard) {
    if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  ~GuardedBuffer() { munmap(mapped_, mapped_bytes_); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  T* data() { return reinterpret_cast<T*>(data_); }
  const T* data() const { return reinterpret_cast<const T*>(data_); }
  size_t size() const { return size_; }
  std::vector<T> ToVector() const { return std::vector<T>(data(), data() + size_); }

  bool SlackIsUntouched() const {
    const uint8_t* end = data_ + size_ * sizeof(T);
    for (const uint8_t* p = inner_; p < inner_ + inner_bytes_; ++p) {
      if (p == data_) p = end;
      if (p < inner_ + inner_bytes_ && *p != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr uint8_t kPattern = 0xA5;
  [[noreturn]] static void Die(const char* what) {
    std::perror(what);
    std::abort();
  }

  size_t size_;
  size_t inner_bytes_ = 0;
  size_t mapped_bytes_ = 0;
  uint8_t* mapped_ = nullptr;
  uint8_t* inner_ = nullptr;
  uint8_t* data_ = nullptr;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_TESTING_GUARDED_BUFFER_H_
