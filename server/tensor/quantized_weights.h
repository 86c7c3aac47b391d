// Quantised weights of one convolution or fully connected layer, as stored in an artifact.
#ifndef TERN_SERVER_TENSOR_QUANTIZED_WEIGHTS_H_
#define TERN_SERVER_TENSOR_QUANTIZED_WEIGHTS_H_

#include <vector>

#include "absl/types/span.h"
#include "server/tensor/tensor.h"

namespace tern {

enum class WeightScheme : uint8_t {
  kInt8 = 0,            // one scale per output channel
  kInt4Cluster = 1,     // codes -7..7
  kTernaryCluster = 2,  // codes -1..1
  kInt3Cluster = 3,     // codes -3..3
};

// Cluster schemes have scales per cluster of input channels.
constexpr bool IsClustered(WeightScheme scheme) { return scheme != WeightScheme::kInt8; }

// Bits of a code in two's complement.
constexpr int CodeBits(WeightScheme scheme) {
  switch (scheme) {
    case WeightScheme::kInt8:
      return 8;
    case WeightScheme::kInt4Cluster:
      return 4;
    case WeightScheme::kInt3Cluster:
      return 3;
    case WeightScheme::kTernaryCluster:
      return 2;
  }
  return 0;
}

// The largest magnitude of a cluster scheme's code, 2^(bits - 1) - 1; 128 for int8, which uses all
// of s8.
constexpr int LargestCode(WeightScheme scheme) {
  return scheme == WeightScheme::kInt8 ? 128 : (1 << (CodeBits(scheme) - 1)) - 1;
}

constexpr const char* Name(WeightScheme scheme) {
  switch (scheme) {
    case WeightScheme::kInt8:
      return "int8";
    case WeightScheme::kInt4Cluster:
      return "int4-cluster";
    case WeightScheme::kInt3Cluster:
      return "int3-cluster";
    case WeightScheme::kTernaryCluster:
      return "ternary-cluster";
  }
  return "?";
}

// real weight = steps[o] * cluster_scales[o][g(c)] * codes[o][c][kh][kw]
//
// int8: cluster_scales is empty (all 1) and codes are -128..127. Tern's own quantiser keeps to
// -63..63:
//   oneDNN's u8 x s8 products saturate in pairs on CPUs without VNNI (2*255*63 = 32130 fits
//   s16), and a layer with larger codes runs on our own exact kernels there.
// cluster schemes: cluster_scales is s8 [o][G], 1..127, with g(c) from ClusterMap(c, n); the
//   product scale * ternary code fits s8, so the same weights run exactly as int8 on VNNI. So do
//   3-bit ones with scales up to 42 and 4-bit ones up to 18, which is as far as Tern's own
//   quantiser goes (4-bit weights in fixed point: up to 127).
// In every case 255 * sum over j of |cluster_scale * code| < 2^31 for each o: s32 sums are
// exact. Grouped convolutions are int8 only.
struct QuantizedWeights {
  WeightScheme scheme = WeightScheme::kInt8;
  int cluster_size = 0;      // N; 0 for int8
  Tensor codes;              // s8, OIHW: [o, c / groups, kh, kw]; fully connected [o, c]
  Tensor cluster_scales;     // s8 [o, G], or empty
  std::vector<float> steps;  // [o], > 0
};

// The largest |code|.
int LargestMagnitude(absl::Span<const int8_t> codes);

// How codes and cluster scales lie in an artifact (server/artifact/FORMAT.md).
struct StoredForm {
  int code_bits = 8;   // two's complement; 0: ternary codes, five to a byte
  int scale_bits = 0;  // unsigned, as many as the largest scale takes; 0 without scales
};
// int8 codes within -63..63 take 7 bits. Codes and scales outside their scheme's range take 8, as
// they are in memory.
StoredForm FormOf(const QuantizedWeights& weights);

// Bits that a layer's codes and cluster scales take in an artifact. Steps and biases (one float
// each per output channel) are not counted.
int64_t StoredBits(const QuantizedWeights& weights);

// The real weights, f32, in the shape of `codes`.
Tensor Dequantize(const QuantizedWeights& weights);

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_QUANTIZED_WEIGHTS_H_
