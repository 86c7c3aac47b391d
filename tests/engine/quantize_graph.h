// Turns a float graph into a quantised one by direct rounding: for the engine's tests and its
// benchmark, where the numbers must be typical, not accurate.
#ifndef TERN_TESTS_ENGINE_QUANTIZE_GRAPH_H_
#define TERN_TESTS_ENGINE_QUANTIZE_GRAPH_H_

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "server/graph/graph.h"
#include "server/tensor/cluster.h"

namespace tern::engine::testing {

// [least, largest] of each value, by ValueId.
using Ranges = std::vector<std::pair<float, float>>;

inline Ranges RangesOf(const std::vector<Tensor>& values) {
  Ranges ranges;
  for (const Tensor& tensor : values) {
    std::pair<float, float> range{0.0f, 0.0f};
    for (float v : tensor.data<float>())
      range = {std::min(range.first, v), std::max(range.second, v)};
    ranges.push_back(range);
  }
  return ranges;
}

// Affine parameters that cover the range and 0.
inline QuantParams ParamsFor(std::pair<float, float> range) {
  QuantParams params;
  params.scale = std::max((range.second - range.first) / 255.0f, 1e-6f);
  params.zero_point =
      std::clamp(static_cast<int>(std::lround(-range.first / params.scale)), 0, 255);
  return params;
}

// Direct rounding of f32 weights [o, c, ...]. `max_scale` as in QuantizeOptions.
inline QuantizedWeights QuantizeWeights(const Tensor& weight, WeightScheme scheme, int cluster_size,
                                        int max_scale) {
  const int64_t outputs = weight.shape()[0], channels = weight.shape()[1];
  const int64_t taps = weight.elements() / (outputs * channels);
  const bool clustered = scheme != WeightScheme::kInt8;
  const int limit = scheme == WeightScheme::kInt8          ? 63
                    : scheme == WeightScheme::kInt4Cluster ? 7
                    : scheme == WeightScheme::kInt3Cluster ? 3
                                                           : 1;
  if (max_scale == 0) max_scale = 127 / limit;
  const ClusterMap map(static_cast<int>(channels),
                       clustered ? cluster_size : static_cast<int>(channels));
  QuantizedWeights q;
  q.scheme = scheme;
  q.cluster_size = clustered ? cluster_size : 0;
  q.codes = Tensor(DType::kS8, weight.shape());
  if (clustered) q.cluster_scales = Tensor(DType::kS8, {outputs, map.clusters()});
  const auto w = weight.data<float>();
  auto codes = q.codes.data<int8_t>();
  for (int64_t o = 0; o < outputs; ++o) {
    std::vector<float> largest(map.clusters(), 1e-6f);
    for (int64_t i = 0; i < channels * taps; ++i) {
      float& m = largest[map.cluster_of(static_cast<int>(i / taps))];
      // Ternary codes stand for the mean magnitude rather than the largest.
      m = std::max(m, std::abs(w[o * channels * taps + i]) * (limit == 1 ? 0.6f : 1.0f));
    }
    const float top = *std::max_element(largest.begin(), largest.end());
    q.steps.push_back(top / limit / static_cast<float>(clustered ? max_scale : 1));
    std::vector<int> scales(map.clusters(), 1);
    if (clustered) {
      for (int g = 0; g < map.clusters(); ++g) {
        const float scale = largest[g] / top * static_cast<float>(max_scale);
        scales[g] = std::clamp(static_cast<int>(std::lround(scale)), 1, max_scale);
        q.cluster_scales.data<int8_t>()[o * map.clusters() + g] = static_cast<int8_t>(scales[g]);
      }
    }
    for (int64_t i = 0; i < channels * taps; ++i) {
      const int64_t at = o * channels * taps + i;
      const float step = q.steps[o] * scales[map.cluster_of(static_cast<int>(i / taps))];
      codes[at] = static_cast<int8_t>(std::clamp<long>(std::lround(w[at] / step), -limit, limit));
    }
  }
  return q;
}

struct QuantizeOptions {
  WeightScheme scheme = WeightScheme::kInt8;
  int cluster_size = 4;
  int max_scale = 0;                 // 1..127; 0: as large as keeps scale x code in s8
  bool float_output = true;          // the logits stay f32
  bool first_and_last_int8 = false;  // as deployed networks do
};

// Quantises every value and weight. Grouped convolutions are int8 always.
inline graph::Graph QuantizeGraph(graph::Graph graph, const Ranges& ranges,
                                  const QuantizeOptions& options) {
  for (size_t id = 0; id < graph.values.size(); ++id) {
    const bool output = static_cast<graph::ValueId>(id) == graph.output;
    if (graph.values[id].constant || (output && options.float_output)) continue;
    graph.values[id].quant = ParamsFor(ranges[id]);
  }
  std::vector<graph::Node*> weighted;
  for (graph::Node& node : graph.nodes) {
    if (node.op == graph::OpType::kConv || node.op == graph::OpType::kFullyConnected)
      weighted.push_back(&node);
  }
  for (graph::Node* node : weighted) {
    const bool edge =
        options.first_and_last_int8 && (node == weighted.front() || node == weighted.back());
    const bool int8 = edge || node->conv.groups != 1;
    node->quantized = QuantizeWeights(node->weight, int8 ? WeightScheme::kInt8 : options.scheme,
                                      options.cluster_size, options.max_scale);
    node->weight = Tensor();
  }
  return graph;
}

}  // namespace tern::engine::testing

#endif  // TERN_TESTS_ENGINE_QUANTIZE_GRAPH_H_
