// The definitions of elementwise.h, literally.
#include <algorithm>
#include <cmath>

#include "server/kernels/elementwise_variants.h"
#include "server/tensor/quant_params.h"

namespace tern::kernels::scalar {
namespace {

// The order of the operands makes NaN give lo, as the vector min and max do.
uint8_t RoundAndClamp(float v, float lo, float hi) {
  return static_cast<uint8_t>(std::min(std::max(lo, std::nearbyint(v)), hi));
}

}  // namespace

void QuantizeF32(const float* src, size_t n, float scale, int zero_point, uint8_t* dst) {
  const QuantParams params{scale, zero_point};
  for (size_t i = 0; i < n; ++i) {
    dst[i] = std::isnan(src[i]) ? static_cast<uint8_t>(zero_point) : params.Quantize(src[i]);
  }
}

void DequantizeU8(const uint8_t* src, size_t n, float scale, int zero_point, float* dst) {
  const QuantParams params{scale, zero_point};
  for (size_t i = 0; i < n; ++i) dst[i] = params.Dequantize(src[i]);
}

void LookupU8(const uint8_t* src, size_t n, const uint8_t* table, uint8_t* dst) {
  for (size_t i = 0; i < n; ++i) dst[i] = table[src[i]];
}

void AddU8(const uint8_t* a, float ma, const uint8_t* b, float mb, float offset, uint8_t lo,
           uint8_t hi, size_t n, uint8_t* dst) {
  for (size_t i = 0; i < n; ++i) {
    const float v =
        std::fma(static_cast<float>(a[i]), ma, std::fma(static_cast<float>(b[i]), mb, offset));
    dst[i] = RoundAndClamp(v, lo, hi);
  }
}

void RequantizeU8(const uint8_t* src, float m, float offset, size_t n, uint8_t* dst) {
  for (size_t i = 0; i < n; ++i) {
    dst[i] = RoundAndClamp(std::fma(static_cast<float>(src[i]), m, offset), 0.0f, 255.0f);
  }
}

void MulChannelsU8(const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,
                   size_t pixels, size_t channels, uint8_t* dst) {
  for (size_t p = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c) {
      const size_t i = p * channels + c;
      const int product = (a[i] - za) * (b[c] - zb);
      const float v = std::fma(static_cast<float>(product), m, static_cast<float>(zy));
      dst[i] = RoundAndClamp(v, 0.0f, 255.0f);
    }
  }
}

void SumPixelsU8(const uint8_t* src, size_t pixels, size_t channels, int32_t* sums) {
  std::fill(sums, sums + channels, 0);
  for (size_t p = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c) sums[c] += src[p * channels + c];
  }
}

}  // namespace tern::kernels::scalar
