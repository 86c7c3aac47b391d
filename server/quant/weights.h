// Weight grids: the codes and scales that quantised weights may take, and the ways to choose
// them from the weights alone.
//
// Weights are rows of an [outputs, columns] matrix, one row per output channel. Columns are
// in the order of a ClusterLayout, which makes every cluster a contiguous run.
#ifndef TERN_SERVER_QUANT_WEIGHTS_H_
#define TERN_SERVER_QUANT_WEIGHTS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "server/quant/rounding.h"
#include "server/tensor/quantized_weights.h"
#include "server/tensor/tensor.h"

namespace tern::quant {

// Largest magnitude of an int8 layer's codes: 7 bits (server/tensor/quantized_weights.h).
inline constexpr int kMaxInt8Code = 63;
// Largest cluster scale, and product of scale and code.
inline constexpr int kMaxClusterScale = 127;

// Largest code magnitude of a scheme: 63, 7, 3 or 1.
int MaxCode(WeightScheme scheme);

// The largest cluster scale for rows of `columns` codes of a cluster scheme: 127, 42 for 3-bit and
// 18 for 4-bit codes, so that scale x code fits s8 and the layer can run as int8
// (server/tensor/quantized_weights.h); less where s32 sums would overflow. In fixed point, where
// all rows of a layer share a power-of-two step, 4-bit codes keep the scales up to 127: with 18
// those of most rows would be a handful of integers.
int MaxClusterScale(WeightScheme scheme, int columns, bool fixed_point);

// The order of a layer's weight columns in which clusters are contiguous. OIHW column
// c * taps + t of channel c and tap t; ClusterMap interleaves the channels of two clusters, so
// they are not contiguous there.
struct ClusterLayout {
  std::vector<int> column;  // [columns]: the OIHW column at each position; a permutation
  std::vector<int> begin;   // [G + 1]: cluster g is positions begin[g] .. begin[g + 1] - 1

  int columns() const { return static_cast<int>(column.size()); }
  int clusters() const { return static_cast<int>(begin.size()) - 1; }
};

// `channels` input channels with `taps` weights each, N = `n` channels in a cluster; n == 0: all.
ClusterLayout MakeClusterLayout(int channels, int taps, int n);

// Rows of `weights` (OIHW order, layout.columns() each) in the layout's order, and back.
std::vector<float> ToLayout(const ClusterLayout& layout, absl::Span<const float> weights);
std::vector<int8_t> FromLayout(const ClusterLayout& layout, absl::Span<const int8_t> codes);

// The scale a > 0 that minimises sum (v - a t)^2 over t in {-1, 0, 1}^n, found exactly: the best
// support is the k largest magnitudes for some k. At least 1e-12.
float TernaryScale(absl::Span<const float> values);

// The best of 25 scales max|v| r / max_code, r in [0.4, 1], by squared error after rounding to
// codes -max_code .. max_code. At least 1e-12.
float UniformScale(absl::Span<const float> values, int max_code);

// TernaryScale for max_code 1, else UniformScale.
float InitialScale(absl::Span<const float> values, int max_code);

// Nearest code of v on the grid scale * {-max_code .. max_code}.
inline int NearestCode(float v, float scale, int max_code) {
  const float limit = static_cast<float>(max_code);
  return static_cast<int>(RoundInto(v / scale, -limit, limit));
}

// What cluster scales may be.
struct ScaleGrid {
  int max_scale = kMaxClusterScale;  // integers 1 .. max_scale
  bool power_of_two_step =
      false;  // one power-of-two step for the layer, else one float step per row
};

// The largest cluster scale for rows of `columns` codes of magnitude <= max_code that keeps
// 255 * sum |scale * code| < 2^31 for any codes.
int MaxScaleWithoutOverflow(int columns, int max_code);
// The same for int8 layers: the largest code magnitude, at most kMaxInt8Code.
int MaxInt8CodeWithoutOverflow(int64_t columns);

// Weights of one layer on a grid: real weight = steps[o] * scales[o][g] * codes[o][position].
struct CodedWeights {
  int outputs = 0;
  std::vector<int8_t> codes;    // [outputs, columns], in the layout's order
  std::vector<uint8_t> scales;  // [outputs, G], 1 .. 127
  std::vector<float> steps;     // [outputs], > 0

  float alpha(const ClusterLayout& layout, int o, int g) const {
    return steps[o] * static_cast<float>(scales[static_cast<size_t>(o) * layout.clusters() + g]);
  }
};

// Puts real scales alpha [outputs, G] on the grid. The step is alpha's maximum of the row (or the
// layer, rounded up to a power of two) over max_scale; a scale is never 0, which would kill a
// cluster.
void RoundScales(const ScaleGrid& grid, int clusters, absl::Span<const float> alpha,
                 CodedWeights& weights);

// Nearest codes: per row and cluster InitialScale, codes by it, then RoundScales. `rows` is in the
// layout's order, [outputs, columns].
CodedWeights NearestWeights(const ClusterLayout& layout, int outputs, absl::Span<const float> rows,
                            int max_code, const ScaleGrid& grid);

// As stored in a graph; `shape` is the float weight's shape. `n` is stored as the cluster size (0
// for int8, whose layout has one cluster and whose scales become factors of the steps).
QuantizedWeights ToQuantizedWeights(const ClusterLayout& layout, const CodedWeights& weights,
                                    WeightScheme scheme, int n, const Shape& shape);

// Per-channel int8 of any convolution or fully connected weight, grouped ones too: for each output
// channel the better of the scales of UniformScale. For fixed point the steps are 1..127 times one
// power of two: of the two beside UniformScale's the better one, with the codes nearest to it.
QuantizedWeights NearestInt8(const Tensor& weight, bool fixed_point);

// Multiplies the scales of coded weights by factor [o][g] (int8: [o]) and puts them on the grid
// again.
void RescaleClusters(absl::Span<const double> factor, bool power_of_two_step,
                     QuantizedWeights& weights);

// Share of the layer's multiplications that became additions: 1 - G / columns for ternary layers
// (one multiplication per cluster instead of one per weight), 0 for the others.
double MultiplicationsRemoved(const QuantizedWeights& weights);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_WEIGHTS_H_
