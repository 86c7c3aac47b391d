// Shapes. The letters of the project: n batch, c channels, h rows, w columns, o output
// channels, k kernel; sizes are in elements unless a name ends in _bytes.
#ifndef TERN_SERVER_TENSOR_SHAPE_H_
#define TERN_SERVER_TENSOR_SHAPE_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace tern {

// A list of extents, outermost first. A value type.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : dims_(dims) {}
  explicit Shape(std::vector<int64_t> dims) : dims_(std::move(dims)) {}

  int rank() const { return static_cast<int>(dims_.size()); }
  int64_t operator[](int i) const { return dims_[i]; }
  int64_t& operator[](int i) { return dims_[i]; }
  const std::vector<int64_t>& dims() const { return dims_; }
  // Product of the extents; 1 for rank 0.
  int64_t elements() const;
  // "[64,3,7,7]"
  std::string ToString() const;
  // This shape with `n` put in front.
  Shape WithBatch(int64_t n) const;

  friend bool operator==(const Shape& a, const Shape& b) { return a.dims_ == b.dims_; }
  friend bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }

 private:
  std::vector<int64_t> dims_;
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_SHAPE_H_
