// A short list of numbers, one per dimension. Up to kInline of them lie in the object itself, so
// that the engine's runs, which make and copy such lists, allocate nothing.
#ifndef TERN_SERVER_TENSOR_EXTENTS_H_
#define TERN_SERVER_TENSOR_EXTENTS_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "absl/types/span.h"

namespace tern {

// A value type; behaves as a std::vector<int64_t> as far as it goes.
class Extents {
 public:
  static constexpr size_t kInline = 6;  // rank 4 with the batch in front, and one to spare

  Extents() = default;
  explicit Extents(size_t size, int64_t value = 0) {
    for (size_t i = 0; i < size; ++i) push_back(value);
  }
  Extents(std::initializer_list<int64_t> values) 
      : Extents(absl::Span<const int64_t>(values.begin(), values.size())) {}
  explicit Extents(absl::Span<const int64_t> values) {
    for (int64_t value : values) push_back(value);
  }

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int64_t* data() { return size_ > kInline ? large_.data() : small_.data(); }
  const int64_t* data() const { return size_ > kInline ? large_.data() : small_.data(); }
  int64_t* begin() { return data(); }
  int64_t* end() { return data() + size_; }
  const int64_t* begin() const { return data(); }
  const int64_t* end() const { return data() + size_; }
  int64_t& operator[](size_t i) { return data()[i]; }
  int64_t operator[](size_t i) const { return data()[i]; }
  int64_t& back() { return data()[size_ - 1]; }
  int64_t back() const { return data()[size_ - 1]; }

  void push_back(int64_t value) {
    if (size_ < kInline) {
      small_[size_++] = value;
      return;
    }
    if (size_ == kInline) large_.assign(small_.begin(), small_.end());
    large_.push_back(value);
    ++size_;
  }
  // These numbers behind `first`.
  Extents Behind(int64_t first) const {
    Extents result{first};
    for (int64_t value : *this) result.push_back(value);
    return result;
  }

  friend bool operator==(const Extents& a, const Extents& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
  friend bool operator!=(const Extents& a, const Extents& b) { return !(a == b); }

 private:
  size_t size_ = 0;
  std::array<int64_t, kInline> small_{};
  std::vector<int64_t> large_;  // all of them, if they are more
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_EXTENTS_H_
