#include "server/tensor/quantized_weights.h"

#include "server/tensor/cluster.h"

namespace tern {

int LargestMagnitude(absl::Span<const int8_t> codes) {
  // Over extremes of unsigned bytes, because every x86 has instructions for 16 of them at a time.
  uint8_t least = 128, most = 128;
  for (int8_t code : codes) {
    const uint8_t shifted = static_cast<uint8_t>(static_cast<uint8_t>(code) ^ 0x80);
    least = shifted < least ? shifted : least;
    most = shifted > most ? shifted : most;
  }
  return std::max(128 - least, most - 128);
}

Tensor Dequantize(const QuantizedWeights& weights) {
  const Shape& shape = weights.codes.shape();
  const int64_t outputs = shape[0];
  const int64_t channels = shape.rank() > 1 ? shape[1] : 1;
  const int64_t taps = outputs * channels > 0 ? shape.elements() / (outputs * channels) : 0;
  Tensor real(DType::kF32, shape);
  auto out = real.data<float>();
  const auto codes = weights.codes.data<int8_t>();
  const auto scales = weights.cluster_scales.data<int8_t>();
  const bool clustered = weights.scheme != WeightScheme::kInt8;
  const ClusterMap map(static_cast<int>(channels), clustered ? weights.cluster_size : 1);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      const float scale = clustered ? scales[o * map.clusters() + map.cluster_of(c)] : 1.0f;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t i = (o * channels + c) * taps + t;
        out[i] = weights.steps[o] * (scale * codes[i]);
      }
    }
  }
  return real;
}

}  // namespace tern
