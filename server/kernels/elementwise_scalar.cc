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

// A shift of 32 or more is one of 31: |sum| < 2^31.
uint8_t ShiftAndClamp(int32_t sum, int shift, uint8_t lo, uint8_t hi) {
  return static_cast<uint8_t>(std::clamp<int32_t>(sum >> std::min(shift, 31), lo, hi));
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

void ScaleChannelsU8(const uint8_t* src, const FloatEpilogue& scale, size_t pixels, size_t channels,
                     uint8_t* dst) {
  for (size_t p = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c) {
      const size_t i = p * channels + c;
      const float v = std::fma(static_cast<float>(src[i]), scale.multiplier[c], scale.offset[c]);
      dst[i] = RoundAndClamp(v, scale.lo, scale.hi);
    }
  }
}

void SumPixelsU8(const uint8_t* src, size_t pixels, size_t channels, int32_t* sums) {
  std::fill(sums, sums + channels, 0);
  for (size_t p = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c) sums[c] += src[p * channels + c];
  }
}

void FinishS32(const int32_t* acc, const uint8_t* residual, const FloatEpilogue& epilogue,
               size_t pixels, size_t channels, uint8_t* dst, float* dst_f32) {
  for (size_t p = 0, i = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c, ++i) {
      float v = std::fma(static_cast<float>(acc[i]), epilogue.multiplier[c], epilogue.offset[c]);
      if (residual != nullptr) {
        v = std::fma(static_cast<float>(residual[i]), epilogue.residual_multiplier, v);
      }
      if (dst != nullptr) {
        dst[i] = RoundAndClamp(v, epilogue.lo, epilogue.hi);
      } else {
        dst_f32[i] = std::min(std::max(epilogue.lo, v), epilogue.hi);
      }
    }
  }
}

void RequantizeS32(const int32_t* acc, const uint8_t* residual, const NarrowLayer& layer,
                   size_t pixels, size_t channels, uint8_t* dst) {
  for (size_t p = 0, i = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c, ++i) {
      int32_t sum = acc[i] * layer.multiplier[c] + layer.offset[c];
      if (residual != nullptr) sum += residual[i] * layer.residual_multiplier;
      dst[i] = ShiftAndClamp(sum, layer.shift, layer.lo, layer.hi);
    }
  }
}

void AddFixedU8(const uint8_t* a, const uint8_t* b, const NarrowSum& sum, size_t n, uint8_t* dst) {
  for (size_t i = 0; i < n; ++i) {
    dst[i] = ShiftAndClamp(a[i] * sum.multiplier_a + b[i] * sum.multiplier_b + sum.offset,
                           sum.shift, sum.lo, sum.hi);
  }
}

void MulChannelsFixedU8(const uint8_t* a, int za, const uint8_t* b, int zb, const NarrowSum& sum,
                        size_t pixels, size_t channels, uint8_t* dst) {
  for (size_t p = 0, i = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c, ++i) {
      dst[i] = ShiftAndClamp((a[i] - za) * (b[c] - zb) * sum.multiplier_a + sum.offset, sum.shift,
                             sum.lo, sum.hi);
    }
  }
}

void DotU8S8(const uint8_t* x, const int8_t* w, int64_t stride, int count, size_t n,
             int32_t* sums) {
  for (int i = 0; i < count; ++i, w += stride) {
    for (size_t c = 0; c < n; ++c) sums[i] += x[c] * w[c];
  }
}

}  // namespace tern::kernels::scalar
