// Element types.
#ifndef TERN_SERVER_TENSOR_DTYPE_H_
#define TERN_SERVER_TENSOR_DTYPE_H_

#include <cstddef>
#include <cstdint>

namespace tern {

enum class DType : uint8_t { kF32 = 0, kU8 = 1, kS8 = 2, kS32 = 3, kS64 = 4 };

constexpr size_t SizeOf(DType type) {
  switch (type) {
    case DType::kF32:
    case DType::kS32:
      return 4;
    case DType::kU8:
    case DType::kS8:
      return 1;
    case DType::kS64:
      return 8;
  }
  return 0;
}

constexpr const char* Name(DType type) {
  switch (type) {
    case DType::kF32:
      return "f32";
    case DType::kU8:
      return "u8";
    case DType::kS8:
      return "s8";
    case DType::kS32:
      return "s32";
    case DType::kS64:
      return "s64";
  }
  return "?";
}

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kU8;
};
template <>
struct DTypeOf<int8_t> {
  static constexpr DType value = DType::kS8;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kS32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kS64;
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_DTYPE_H_
