// The variants behind elementwise.h; same contracts, one namespace per instruction set.
// Included by files with their own instruction-set flags: keep it free of inline code.
#ifndef TERN_SERVER_KERNELS_ELEMENTWISE_VARIANTS_H_
#define TERN_SERVER_KERNELS_ELEMENTWISE_VARIANTS_H_

#include <cstddef>
#include <cstdint>

namespace tern::kernels {

// elementwise.h describes it.
struct FloatEpilogue {
  const float* multiplier = nullptr;  // [channels]
  const float* offset = nullptr;
  float residual_multiplier = 0.0f;
  float lo = 0.0f, hi = 255.0f;
};

}  // namespace tern::kernels

// The constants of FixedPointLayer, FixedPointAdd and FixedPointMap where 32 bits hold every sum.
namespace tern::kernels {

struct NarrowLayer {
  const int32_t* multiplier;  // [channels]
  const int32_t* offset;
  int32_t residual_multiplier;
  int32_t shift;
  uint8_t lo, hi;
};

struct NarrowSum {
  int32_t multiplier_a, multiplier_b;  // a map has only the first
  int32_t offset;
  int32_t shift;
  uint8_t lo, hi;
};

}  // namespace tern::kernels

#define TERN_DECLARE_ELEMENTWISE(variant)                                                      \
  namespace tern::kernels::variant {                                                           \
  void QuantizeF32(const float* src, size_t n, float scale, int zero_point, uint8_t* dst);     \
  void DequantizeU8(const uint8_t* src, size_t n, float scale, int zero_point, float* dst);    \
  void LookupU8(const uint8_t* src, size_t n, const uint8_t* table, uint8_t* dst);             \
  void AddU8(const uint8_t* a, float ma, const uint8_t* b, float mb, float offset, uint8_t lo, \
             uint8_t hi, size_t n, uint8_t* dst);                                              \
  void MulChannelsU8(const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,      \
                     size_t pixels, size_t channels, uint8_t* dst);                            \
  void ScaleChannelsU8(const uint8_t* src, const FloatEpilogue& scale, size_t pixels,          \
                       size_t channels, uint8_t* dst);                                         \
  void SumPixelsU8(const uint8_t* src, size_t pixels, size_t channels, int32_t* sums);         \
  void FinishS32(const int32_t* acc, const uint8_t* residual, const FloatEpilogue& epilogue,   \
                 size_t pixels, size_t channels, uint8_t* dst, float* dst_f32);                \
  void RequantizeS32(const int32_t* acc, const uint8_t* residual, const NarrowLayer& layer,    \
                     size_t pixels, size_t channels, uint8_t* dst);                            \
  void AddFixedU8(const uint8_t* a, const uint8_t* b, const NarrowSum& sum, size_t n,          \
                  uint8_t* dst);                                                               \
  void MulChannelsFixedU8(const uint8_t* a, int za, const uint8_t* b, int zb,                  \
                          const NarrowSum& sum, size_t pixels, size_t channels, uint8_t* dst); \
  /* sums[i] += x . (w + i * stride) over n elements, for the first `count` <= 4 of i. */      \
  void DotU8S8(const uint8_t* x, const int8_t* w, int64_t stride, int count, size_t n,         \
               int32_t* sums);                                                                 \
  }

TERN_DECLARE_ELEMENTWISE(scalar)
TERN_DECLARE_ELEMENTWISE(avx2)

#undef TERN_DECLARE_ELEMENTWISE

#endif  // TERN_SERVER_KERNELS_ELEMENTWISE_VARIANTS_H_
