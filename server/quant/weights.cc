#include "server/quant/weights.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "server/tensor/cluster.h"

namespace tern::quant {
namespace {

constexpr float kSmallestScale = 1e-12f;

}  // namespace

int MaxCode(WeightScheme scheme) {
  return IsClustered(scheme) ? LargestCode(scheme) : kMaxInt8Code;
}

int MaxClusterScale(WeightScheme scheme, int columns, bool fixed_point) {
  const int code = LargestCode(scheme);
  const bool any = fixed_point && scheme == WeightScheme::kInt4Cluster;
  return std::min(any ? kMaxClusterScale : kMaxClusterScale / code,
                  MaxScaleWithoutOverflow(columns, code));
}

ClusterLayout MakeClusterLayout(int channels, int taps, int n) {
  const ClusterMap map(channels, n == 0 ? channels : n);
  ClusterLayout layout;
  layout.column.reserve(static_cast<size_t>(channels) * taps);
  layout.begin.push_back(0);
  for (int g = 0; g < map.clusters(); ++g) {
    for (int c : map.channels_of(g)) {
      for (int t = 0; t < taps; ++t) layout.column.push_back(c * taps + t);
    }
    layout.begin.push_back(layout.columns());
  }
  return layout;
}

std::vector<float> ToLayout(const ClusterLayout& layout, absl::Span<const float> weights) {
  const size_t columns = layout.column.size();
  std::vector<float> rows(weights.size());
  for (size_t row = 0; row < weights.size(); row += columns) {
    for (size_t j = 0; j < columns; ++j) rows[row + j] = weights[row + layout.column[j]];
  }
  return rows;
}

std::vector<int8_t> FromLayout(const ClusterLayout& layout, absl::Span<const int8_t> codes) {
  const size_t columns = layout.column.size();
  std::vector<int8_t> result(codes.size());
  for (size_t row = 0; row < codes.size(); row += columns) {
    for (size_t j = 0; j < columns; ++j) result[row + layout.column[j]] = codes[row + j];
  }
  return result;
}

float TernaryScale(absl::Span<const float> values) {
  // For the support of the k largest magnitudes with sum S_k the best scale is S_k / k and the
  // squared error falls by S_k^2 / k.
  std::vector<float> magnitudes(values.size());
  for (size_t i = 0; i < values.size(); ++i) magnitudes[i] = std::fabs(values[i]);
  std::sort(magnitudes.begin(), magnitudes.end(), std::greater<float>());
  double sum = 0, best_gain = -1, best_scale = 0;
  for (size_t k = 1; k <= magnitudes.size(); ++k) {
    sum += magnitudes[k - 1];
    const double gain = sum * sum / static_cast<double>(k);
    if (gain > best_gain) {
      best_gain = gain;
      best_scale = sum / static_cast<double>(k);
    }
  }
  return std::max(static_cast<float>(best_scale), kSmallestScale);
}

float UniformScale(absl::Span<const float> values, int max_code) {
  float largest = 0;
  for (float v : values) largest = std::max(largest, std::fabs(v));
  constexpr int kRatios = 25;
  double best_error = std::numeric_limits<double>::infinity();
  float best = kSmallestScale;
  for (int i = 0; i < kRatios; ++i) {
    // From 1 downwards: of equally good scales the one that clips nothing wins.
    const float ratio = 1.0f - 0.6f * static_cast<float>(i) / (kRatios - 1);
    const float scale = std::max(largest * ratio / static_cast<float>(max_code), kSmallestScale);
    double error = 0;
    for (float v : values) {
      const float e = v - scale * static_cast<float>(NearestCode(v, scale, max_code));
      error += static_cast<double>(e) * e;
    }
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

float InitialScale(absl::Span<const float> values, int max_code) {
  return max_code == 1 ? TernaryScale(values) : UniformScale(values, max_code);
}

int MaxScaleWithoutOverflow(int columns, int max_code) {
  const int64_t limit = std::numeric_limits<int32_t>::max() / (int64_t{255} * max_code * columns);
  return static_cast<int>(std::clamp<int64_t>(limit, 1, kMaxClusterScale));
}

int MaxInt8CodeWithoutOverflow(int64_t columns) {
  const int64_t limit = std::numeric_limits<int32_t>::max() / (int64_t{255} * columns);
  return static_cast<int>(std::clamp<int64_t>(limit, 1, kMaxInt8Code));
}

void RoundScales(const ScaleGrid& grid, int clusters, absl::Span<const float> alpha,
                 CodedWeights& weights) {
  const int outputs = weights.outputs;
  const float max_scale = static_cast<float>(grid.max_scale);
  weights.scales.resize(alpha.size());
  weights.steps.resize(outputs);
  float layer_step = 0;
  if (grid.power_of_two_step) {
    const float largest = *std::max_element(alpha.begin(), alpha.end());
    layer_step = std::exp2(std::ceil(std::log2(std::max(largest / max_scale, 1e-30f))));
  }
  for (int o = 0; o < outputs; ++o) {
    const absl::Span<const float> row = alpha.subspan(static_cast<size_t>(o) * clusters, clusters);
    float step = layer_step;
    if (!grid.power_of_two_step)
      step = std::max(*std::max_element(row.begin(), row.end()) / max_scale, 1e-30f);
    weights.steps[o] = step;
    for (int g = 0; g < clusters; ++g) {
      const float scale = std::clamp(std::nearbyint(row[g] / step), 1.0f, max_scale);
      weights.scales[static_cast<size_t>(o) * clusters + g] = static_cast<uint8_t>(scale);
    }
  }
}

CodedWeights NearestWeights(const ClusterLayout& layout, int outputs, absl::Span<const float> rows,
                            int max_code, const ScaleGrid& grid) {
  const size_t columns = layout.column.size();
  const int clusters = layout.clusters();
  CodedWeights weights;
  weights.outputs = outputs;
  weights.codes.resize(rows.size());
  std::vector<float> alpha(static_cast<size_t>(outputs) * clusters);
  for (int o = 0; o < outputs; ++o) {
    for (int g = 0; g < clusters; ++g) {
      const size_t first = o * columns + layout.begin[g];
      const size_t count = layout.begin[g + 1] - layout.begin[g];
      const absl::Span<const float> cluster = rows.subspan(first, count);
      const float scale = InitialScale(cluster, max_code);
      alpha[static_cast<size_t>(o) * clusters + g] = scale;
      for (size_t j = 0; j < count; ++j) {
        weights.codes[first + j] = static_cast<int8_t>(NearestCode(cluster[j], scale, max_code));
      }
    }
  }
  RoundScales(grid, clusters, alpha, weights);
  return weights;
}

QuantizedWeights ToQuantizedWeights(const ClusterLayout& layout, const CodedWeights& weights,
                                    WeightScheme scheme, int n, const Shape& shape) {
  QuantizedWeights result;
  result.scheme = scheme;
  result.codes = Tensor::Of<int8_t>(shape, FromLayout(layout, weights.codes));
  result.steps = weights.steps;
  if (scheme == WeightScheme::kInt8) {
    for (size_t o = 0; o < result.steps.size(); ++o) result.steps[o] *= weights.scales[o];
  }
  if (IsClustered(scheme)) {
    result.cluster_size = n;
    std::vector<int8_t> scales(weights.scales.begin(), weights.scales.end());
    result.cluster_scales = Tensor::Of<int8_t>(Shape{weights.outputs, layout.clusters()}, scales);
  }
  return result;
}

QuantizedWeights NearestInt8(const Tensor& weight, bool fixed_point) {
  const int outputs = static_cast<int>(weight.shape()[0]);
  const int columns = static_cast<int>(weight.elements() / outputs);
  const ClusterLayout layout = MakeClusterLayout(columns, 1, 0);
  const int max_code = MaxInt8CodeWithoutOverflow(columns);
  ScaleGrid grid{.max_scale = 1};
  if (fixed_point) grid = ScaleGrid{.power_of_two_step = true};
  CodedWeights coded = NearestWeights(layout, outputs, weight.data<float>(), max_code, grid);
  for (int o = 0; o < outputs && fixed_point; ++o) {
    const auto row = weight.data<float>().subspan(static_cast<size_t>(o) * columns, columns);
    const float wanted = UniformScale(row, max_code) / coded.steps[o];
    double best = std::numeric_limits<double>::infinity();
    for (const float rounded : {std::ceil(wanted), std::floor(wanted)}) {
      const float scale = std::clamp(rounded, 1.0f, static_cast<float>(grid.max_scale));
      const float alpha = scale * coded.steps[o];
      double error = 0;
      for (float v : row) {
        const float e = v - alpha * static_cast<float>(NearestCode(v, alpha, max_code));
        error += static_cast<double>(e) * e;
      }
      if (error >= best) continue;
      best = error;
      coded.scales[o] = static_cast<uint8_t>(scale);
      for (int j = 0; j < columns; ++j) {
        coded.codes[static_cast<size_t>(o) * columns + j] =
            static_cast<int8_t>(NearestCode(row[j], alpha, max_code));
      }
    }
  }
  return ToQuantizedWeights(layout, coded, WeightScheme::kInt8, 0, weight.shape());
}

void RescaleClusters(absl::Span<const double> factor, bool power_of_two_step,
                     QuantizedWeights& weights) {
  const int outputs = static_cast<int>(weights.steps.size());
  if (weights.scheme == WeightScheme::kInt8) {
    for (int o = 0; o < outputs; ++o) {
      weights.steps[o] = std::max(static_cast<float>(weights.steps[o] * factor[o]), 1e-30f);
    }
    return;
  }
  const int clusters = static_cast<int>(weights.cluster_scales.shape()[1]);
  auto scales = weights.cluster_scales.data<int8_t>();
  std::vector<float> alpha(factor.size());
  for (size_t i = 0; i < alpha.size(); ++i)
    alpha[i] = static_cast<float>(factor[i] * weights.steps[i / clusters] * scales[i]);
  ScaleGrid grid;
  grid.max_scale = MaxClusterScale(
      weights.scheme, static_cast<int>(weights.codes.elements() / outputs), power_of_two_step);
  grid.power_of_two_step = power_of_two_step;
  CodedWeights coded;
  coded.outputs = outputs;
  RoundScales(grid, clusters, alpha, coded);
  weights.steps = coded.steps;
  std::copy(coded.scales.begin(), coded.scales.end(), scales.begin());
}

double MultiplicationsRemoved(const QuantizedWeights& weights) {
  if (weights.scheme != WeightScheme::kTernaryCluster) return 0;
  const double columns = static_cast<double>(weights.codes.elements()) / weights.codes.shape()[0];
  return 1.0 - static_cast<double>(weights.cluster_scales.shape()[1]) / columns;
}

}  // namespace tern::quant
