#include "server/tensor/quantized_weights.h"

#include <algorithm>
#include <bit>

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

StoredForm FormOf(const QuantizedWeights& weights) {
  StoredForm form;
  const int largest = LargestMagnitude(weights.codes.data<int8_t>());
  if (weights.scheme == WeightScheme::kInt8) {
    form.code_bits = largest < 64 ? 7 : 8;
  } else if (largest <= LargestCode(weights.scheme)) {
    form.code_bits = weights.scheme == WeightScheme::kTernaryCluster ? 0 : CodeBits(weights.scheme);
  }
  if (!weights.cluster_scales.empty()) {
    const auto scales = weights.cluster_scales.data<int8_t>();
    const auto [least, most] = std::minmax_element(scales.begin(), scales.end());
    form.scale_bits = *least < 1 ? 8 : std::bit_width(static_cast<uint8_t>(*most));
  }
  return form;
}

int64_t StoredBits(const QuantizedWeights& weights) {
  const StoredForm form = FormOf(weights);
  const int64_t codes = weights.codes.elements();
  const int64_t scales = weights.cluster_scales.empty() ? 0 : weights.cluster_scales.elements();
  return (form.code_bits == 0 ? 8 * ((codes + 4) / 5) : form.code_bits * codes) +
         form.scale_bits * scales;
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
