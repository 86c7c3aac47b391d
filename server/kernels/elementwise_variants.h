// The variants behind elementwise.h; same contracts, one namespace per instruction set.
// Included by files with their own instruction-set flags: keep it free of inline code.
#ifndef TERN_SERVER_KERNELS_ELEMENTWISE_VARIANTS_H_
#define TERN_SERVER_KERNELS_ELEMENTWISE_VARIANTS_H_

#include <cstddef>
#include <cstdint>

#define TERN_DECLARE_ELEMENTWISE(variant)                                                      \
  namespace tern::kernels::variant {                                                           \
  void QuantizeF32(const float* src, size_t n, float scale, int zero_point, uint8_t* dst);     \
  void DequantizeU8(const uint8_t* src, size_t n, float scale, int zero_point, float* dst);    \
  void LookupU8(const uint8_t* src, size_t n, const uint8_t* table, uint8_t* dst);             \
  void AddU8(const uint8_t* a, float ma, const uint8_t* b, float mb, float offset, uint8_t lo, \
             uint8_t hi, size_t n, uint8_t* dst);                                              \
  void RequantizeU8(const uint8_t* src, float m, float offset, size_t n, uint8_t* dst);        \
  void MulChannelsU8(const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,      \
                     size_t pixels, size_t channels, uint8_t* dst);                            \
  void SumPixelsU8(const uint8_t* src, size_t pixels, size_t channels, int32_t* sums);         \
  }

TERN_DECLARE_ELEMENTWISE(scalar)
TERN_DECLARE_ELEMENTWISE(avx2)

#undef TERN_DECLARE_ELEMENTWISE

#endif  // TERN_SERVER_KERNELS_ELEMENTWISE_VARIANTS_H_
