// A dense, row-major tensor that owns its storage.
#ifndef TERN_SERVER_TENSOR_TENSOR_H_
#define TERN_SERVER_TENSOR_TENSOR_H_

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "server/tensor/dtype.h"
#include "server/tensor/shape.h"

namespace tern {

// Storage is zero-initialised. Copying copies the elements. Thread compatible.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, Shape shape)
      : dtype_(dtype), shape_(std::move(shape)), bytes_(SizeOf(dtype) * shape_.elements()) {}
  // Takes the values in row-major order; there must be shape.elements() of them.
  template <typename T>
  static Tensor Of(Shape shape, const std::vector<T>& values) {
    Tensor tensor(DTypeOf<T>::value, std::move(shape));
    if (!tensor.bytes_.empty() && !values.empty()) {
      std::memcpy(tensor.bytes_.data(), values.data(),
                  std::min(tensor.bytes_.size(), values.size() * sizeof(T)));
    }
    return tensor;
  }

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  int64_t elements() const { return shape_.elements(); }
  size_t size_bytes() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }

  // Elements as T, which must be the dtype's C++ type (not checked).
  template <typename T>
  absl::Span<T> data() {
    return absl::MakeSpan(reinterpret_cast<T*>(bytes_.data()), bytes_.size() / sizeof(T));
  }
  template <typename T>
  absl::Span<const T> data() const {
    return absl::MakeConstSpan(reinterpret_cast<const T*>(bytes_.data()),
                               bytes_.size() / sizeof(T));
  }
  const void* raw() const { return bytes_.data(); }
  void* raw() { return bytes_.data(); }

  // The same bytes under another shape with as many elements (not checked).
  Tensor Reshaped(Shape shape) const {
    Tensor result = *this;
    result.shape_ = std::move(shape);
    return result;
  }

 private:
  DType dtype_ = DType::kF32;
  Shape shape_{0};
  std::vector<char> bytes_;
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_TENSOR_H_
