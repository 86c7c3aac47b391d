// Shapes. The letters of the project: n batch, c channels, h rows, w columns, o output
// channels, k kernel; sizes are in elements unless a name ends in _bytes.
#ifndef TERN_SERVER_TENSOR_SHAPE_H_
#define TERN_SERVER_TENSOR_SHAPE_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "server/tensor/extents.h"

namespace tern {

// A list of extents, outermost first. A value type.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : dims_(dims) {}
  explicit Shape(absl::Span<const int64_t> dims) : dims_(dims) {}
  explicit Shape(Extents dims) : dims_(std::move(dims)) {}

  int rank() const { return static_cast<int>(dims_.size()); }
  int64_t operator[](int i) const { return dims_[i]; }
  int64_t& operator[](int i) { return dims_[i]; }
  const Extents& extents() const { return dims_; }
  std::vector<int64_t> dims() const { return {dims_.begin(), dims_.end()}; }
  // Product of the extents; 1 for rank 0.
  int64_t elements() const;
  // "[64,3,7,7]"
  std::string ToString() const;
  // This shape with `n` put in front.
  Shape WithBatch(int64_t n) const;

  friend bool operator==(const Shape& a, const Shape& b) { return a.dims_ == b.dims_; }
  friend bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }

 private:
  Extents dims_;
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_SHAPE_H_
