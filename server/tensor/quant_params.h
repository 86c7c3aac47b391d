// Affine quantisation of a tensor: real = scale * (q - zero_point).
#ifndef TERN_SERVER_TENSOR_QUANT_PARAMS_H_
#define TERN_SERVER_TENSOR_QUANT_PARAMS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace tern {

// Parameters of a u8 activation tensor, one pair for the whole tensor. Dynamic fixed
// point (Mellempudi et al. 2017, section 2) is the special case where scale is a power of
// two and zero_point is 0 (non-negative tensors) or 128 (signed ones).
struct QuantParams {
  float scale = 1.0f;      // > 0, finite
  int32_t zero_point = 0;  // 0..255; the code of real 0, so that zero padding is exact

  // Nearest code, ties to even, saturated to [0, 255]; NaN gives the zero point.
  uint8_t Quantize(float real) const {
    if (std::isnan(real)) return static_cast<uint8_t>(zero_point);
    const float q = std::nearbyint(real / scale) + static_cast<float>(zero_point);
    return static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, q)));
  }
  float Dequantize(uint8_t q) const {
    return scale * static_cast<float>(static_cast<int32_t>(q) - zero_point);
  }
  friend bool operator==(const QuantParams&, const QuantParams&) = default;
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_QUANT_PARAMS_H_
