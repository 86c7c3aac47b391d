// Divides the memory that a caller lends for one call of a kernel.
#ifndef TERN_SERVER_KERNELS_SCRATCH_PARTS_H_
#define TERN_SERVER_KERNELS_SCRATCH_PARTS_H_

#include <cstddef>

namespace tern::kernels {

// Parts follow each other, each at a multiple of 64 bytes from the beginning. Not thread safe.
class ScratchParts {
 public:
  // `memory` may be null, to learn only how many bytes() the parts take.
  explicit ScratchParts(void* memory) : begin_(static_cast<char*>(memory)) {}

  template <typename T>
  T* Take(size_t elements) {
    T* part = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (elements * sizeof(T) + 63) / 64 * 64;
    return part;
  }
  // Of all parts so far.
  size_t bytes() const { return bytes_; }

 private:
  char* begin_;
  size_t bytes_ = 0;
};

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_SCRATCH_PARTS_H_
