// Memory between two unmapped pages, for kernels that must not touch a byte outside their
// buffers: an access past the guarded edge ends the test with SIGSEGV.
#ifndef TERN_TESTS_TESTING_GUARDED_BUFFER_H_
#define TERN_TESTS_TESTING_GUARDED_BUFFER_H_

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace tern::testing {

// Which edge of the buffer touches an unmapped page. The other edge is followed by slack up to
// its page's end, filled with a pattern: SlackIsUntouched() tells of stray writes there.
enum class Guard { kAfter, kBefore };

inline size_t PageBytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Runs of pages between two that no one may touch. What is given back is kept, up to kKeptBytes, for the next buffer of as many
// pages: the suites make a hundred thousand small buffers, and mapping each anew took half of their time here and four fifths on an
// emulated CPU. Thread-safe.
class GuardedPages {
 public:
  static uint8_t* Take(size_t bytes) {
    GuardedPages& pages = Instance();
    {
      std::lock_guard lock(pages.mutex_);
      std::vector<uint8_t*>& kept = pages.kept_[bytes];
      if (!kept.empty()) {
        uint8_t* inner = kept.back();
        kept.pop_back();
        pages.kept_bytes_ -= bytes;
        return inner;
      }
    }
    void* mapped =
        mmap(nullptr, bytes + 2 * PageBytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) Die("mmap");
    uint8_t* inner = static_cast<uint8_t*>(mapped) + PageBytes();
    if (mprotect(inner, bytes, PROT_READ | PROT_WRITE) != 0) Die("mprotect");
    return inner;
  }
  static void GiveBack(uint8_t* inner, size_t bytes) {
    GuardedPages& pages = Instance();
    {
      std::lock_guard lock(pages.mutex_);
      if (pages.kept_bytes_ + bytes <= kKeptBytes) {
        pages.kept_[bytes].push_back(inner);
        pages.kept_bytes_ += bytes;
        return;
      }
    }
    munmap(inner - PageBytes(), bytes + 2 * PageBytes());
  }

 private:
  static constexpr size_t kKeptBytes = size_t{64} << 20;
  static GuardedPages& Instance() {
    static GuardedPages pages;
    return pages;
  }
  [[noreturn]] static void Die(const char* what) {
    std::perror(what);
    std::abort();
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<uint8_t*>> kept_;  // by their bytes, without the guards
  size_t kept_bytes_ = 0;
};

// `size` elements of a trivial T, zero-filled. Neither copied nor moved.
template <typename T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(size_t size, Guard guard = Guard::kAfter) : size_(size) {
    const size_t bytes = size * sizeof(T);
    inner_bytes_ = std::max<size_t>(1, (bytes + PageBytes() - 1) / PageBytes()) * PageBytes();
    inner_ = GuardedPages::Take(inner_bytes_);
    std::memset(inner_, kPattern, inner_bytes_);
    data_ = guard == Guard::kAfter ? inner_ + inner_bytes_ - bytes : inner_;
    if (bytes > 0) std::memset(data_, 0, bytes);
  }
  GuardedBuffer(const std::vector<T>& values, Guard guard) : GuardedBuffer(values.size(), guard) {
    if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  ~GuardedBuffer() { GuardedPages::GiveBack(inner_, inner_bytes_); }
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

  size_t size_;
  size_t inner_bytes_ = 0;
  uint8_t* inner_ = nullptr;
  uint8_t* data_ = nullptr;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_TESTING_GUARDED_BUFFER_H_
