// No number in this file is a float or a double, and no operator but integer ones is used.
#include "server/reference/fixed_point.h"

#include <algorithm>

#include "server/graph/fixed_point.h"
#include "server/reference/ops.h"
#include "server/tensor/cluster.h"

namespace tern::reference {

using graph::Graph;
using graph::Node;
using graph::OpType;

std::vector<int32_t> IntegerWeights(const QuantizedWeights& weights) {
  const Shape& shape = weights.codes.shape();
  const absl::Span<const int8_t> codes = weights.codes.data<int8_t>();
  std::vector<int32_t> result(codes.begin(), codes.end());
  if (weights.scheme == WeightScheme::kInt8) return result;
  const int64_t channels = shape[1], taps = shape.elements() / (shape[0] * shape[1]);
  const ClusterMap map(static_cast<int>(channels), weights.cluster_size);
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t o = static_cast<int64_t>(i) / (channels * taps);
    const int c = static_cast<int>(static_cast<int64_t>(i) / taps % channels);
    result[i] *= weights.cluster_scales.data<int8_t>()[o * map.clusters() + map.cluster_of(c)];
  }
  return result;
}

std::vector<int64_t> FixedPointSums(const Graph& graph, const Node& node, const Codes& inputs,
                                    int64_t n) {
  const FixedPointLayer layer = graph::FixedPointOf(graph, node);
  const Shape& weight = node.quantized->codes.shape();
  const std::vector<int32_t> w = IntegerWeights(*node.quantized);
  const Shape& x = graph.shape(node.inputs[0]);
  const Shape& out = graph.shape(node.output);
  const int32_t padding = graph.values[node.inputs[0]].quant->zero_point;
  const int64_t rows = out.rank() == 3 ? out[1] : 1, columns = out.rank() == 3 ? out[2] : 1;
  std::vector<int64_t> sums;
  sums.reserve(n * out.elements());
  for (int64_t image = 0; image < n; ++image) {
    const uint8_t* sample = inputs[0] + image * x.elements();
    for (int64_t o = 0; o < out[0]; ++o) {
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t column = 0; column < columns; ++column) {
          int32_t acc = 0;
          ForEachProduct(node, weight, x, o, h, column, [&](int64_t wi, int64_t xi) {
            acc += w[wi] * (xi >= 0 ? sample[xi] : padding);
          });
          int64_t sum = int64_t{acc} * layer.multiplier[o] + layer.offset[o];
          if (node.has_residual()) sum += inputs[1][sums.size()] * layer.residual_multiplier;
          sums.push_back(sum);
        }
      }
    }
  }
  return sums;
}

void FixedPointLinear(const Graph& graph, const Node& node, const Codes& inputs, int64_t n,
                      uint8_t* out) {
  const FixedPointLayer layer = graph::FixedPointOf(graph, node);
  for (int64_t sum : FixedPointSums(graph, node, inputs, n)) {
    *out++ = static_cast<uint8_t>(std::clamp<int64_t>(sum >> layer.shift, layer.lo, layer.hi));
  }
}

namespace {

// Calls fn(code of input 0, code of input 1) for every element of a broadcast result.
template <typename F>
void Binary(const Graph& graph, const Node& node, const Codes& inputs, int64_t n, uint8_t* out,
            F fn) {
  const Shape& y = graph.shape(node.output);
  const Shape &a = graph.shape(node.inputs[0]), &b = graph.shape(node.inputs[1]);
  for (int64_t image = 0; image < n; ++image) {
    for (int64_t i = 0; i < y.elements(); ++i) {
      *out++ = fn(inputs[0][image * a.elements() + BroadcastIndex(a, y, i)],
                  inputs[1][image * b.elements() + BroadcastIndex(b, y, i)]);
    }
  }
}

}  // namespace

void FixedPointAddition(const Graph& graph, const Node& node, const Codes& inputs, int64_t n,
                        uint8_t* out) {
  Binary(graph, node, inputs, n, out, graph::FixedPointAddOf(graph, node));
}

void FixedPointMultiplication(const Graph& graph, const Node& node, const Codes& inputs, int64_t n,
                              uint8_t* out) {
  const QuantParams &a = *graph.values[node.inputs[0]].quant,
                    &b = *graph.values[node.inputs[1]].quant;
  const FixedPointMap map = graph::FixedPointProduct(a, b, *graph.values[node.output].quant);
  const int32_t za = a.zero_point, zb = b.zero_point;
  Binary(graph, node, inputs, n, out,
         [=](uint8_t p, uint8_t q) { return map(int64_t{p - za} * (q - zb)); });
}

void FixedPointAveragePool(const Graph& graph, const Node& node, const Codes& inputs, int64_t n,
                           uint8_t* out) {
  const Shape& x = graph.shape(node.inputs[0]);
  const Shape& y = graph.shape(node.output);
  const QuantParams &from = *graph.values[node.inputs[0]].quant,
                    &to = *graph.values[node.output].quant;
  const graph::PoolAttributes pool = AveragePoolOf(node, x);
  const uint8_t* plane = inputs[0];
  for (int64_t i = 0; i < n * y[0]; ++i, plane += x[1] * x[2]) {
    for (int64_t oh = 0; oh < y[1]; ++oh) {
      for (int64_t ow = 0; ow < y[2]; ++ow) {
        const PoolWindow window = WindowAt(pool, x, oh, ow);
        *out++ = graph::FixedPointMean(from, to,
                                       window.count)(WindowSum(window, plane, x, from.zero_point));
      }
    }
  }
}

}  // namespace tern::reference
