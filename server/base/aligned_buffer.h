// A 64-byte-aligned, uninitialised heap buffer with `kSlackBytes` readable bytes after
// its end, so that vector loads of the last elements stay inside the allocation.
#ifndef TERN_SERVER_BASE_ALIGNED_BUFFER_H_
#define TERN_SERVER_BASE_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace tern {

// Move only; not thread safe for concurrent mutation.
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kSlackBytes = 64;

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size_bytes) : size_(size_bytes) {
    const size_t total = (size_bytes + kSlackBytes + kAlignment - 1) / kAlignment * kAlignment;
    void* p = std::aligned_alloc(kAlignment, total);
    if (p == nullptr) throw std::bad_alloc();
    // The slack is defined memory: kernels may read it, never use it.
    std::memset(static_cast<char*>(p) + size_bytes, 0, total - size_bytes);
    data_.reset(p);
  }

  void* data() { return data_.get(); }
  const void* data() const { return data_.get(); }
  template <typename T>
  T* as() {
    return static_cast<T*>(data_.get());
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_.get());
  }
  size_t size_bytes() const { return size_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

}  // namespace tern

#endif  // TERN_SERVER_BASE_ALIGNED_BUFFER_H_
