#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "server/graph/passes.h"
#include "server/graph/rewrite.h"

namespace tern::graph {
namespace {

// y = x * scale + shift, per channel (axis 0 of the sample), in double.
struct Affine {
  std::vector<double> scale, shift;
};

// The constant's element for each of `channels`, or nothing if it varies over other axes of
// a value of shape `shape`, or would enlarge it.
std::optional<std::vector<double>> PerChannel(const Tensor& constant, const Shape& shape) {
  if (!BroadcastsTo(constant.shape(), shape)) return std::nullopt;
  const int64_t channels = shape[0];
  const bool spread = constant.shape().rank() < shape.rank() || constant.shape()[0] == 1;
  if (constant.elements() != (spread ? 1 : channels)) return std::nullopt;
  std::vector<double> result(channels);
  for (int64_t c = 0; c < channels; ++c) result[c] = constant.data<float>()[spread ? 0 : c];
  return result;
}

// The node as an affine function of its one variable input, which is stored in `x`.
std::optional<Affine> AsAffine(const Graph& graph, const Node& node, ValueId* x) {
  if (node.op == OpType::kBatchNorm) {
    *x = node.inputs[0];
    const absl::Span<const float> scale = node.weight.data<float>();
    const absl::Span<const float> shift = node.bias.data<float>();
    return Affine{{scale.begin(), scale.end()}, {shift.begin(), shift.end()}};
  }
  if (node.op != OpType::kAdd && node.op != OpType::kSub && node.op != OpType::kMul &&
      node.op != OpType::kDiv) {
    return std::nullopt;
  }
  const bool second = graph.values[node.inputs[1]].constant.has_value();
  const bool first = graph.values[node.inputs[0]].constant.has_value();
  if (first == second) return std::nullopt;
  *x = node.inputs[second ? 0 : 1];
  const Shape& shape = graph.shape(*x);
  if (shape.rank() < 1) return std::nullopt;
  std::optional<std::vector<double>> k =
      PerChannel(*graph.values[node.inputs[second ? 1 : 0]].constant, shape);
  if (!k) return std::nullopt;
  const size_t channels = k->size();
  switch (node.op) {
    case OpType::kAdd:
      return Affine{std::vector<double>(channels, 1.0), *std::move(k)};
    case OpType::kSub:
      if (first) return Affine{std::vector<double>(channels, -1.0), *std::move(k)};
      for (double& v : *k) v = -v;
      return Affine{std::vector<double>(channels, 1.0), *std::move(k)};
    case OpType::kMul:
      return Affine{*std::move(k), std::vector<double>(channels, 0.0)};
    default:  // kDiv
      if (first) return std::nullopt;
      for (double& v : *k) {
        if (v == 0.0) return std::nullopt;
        v = 1.0 / v;
      }
      return Affine{*std::move(k), std::vector<double>(channels, 0.0)};
  }
}

// Whether quantised weights can take the factors: steps must stay positive and finite, and -128 has
// no opposite.
bool CanFold(const Affine& affine, const Node& node) {
  if (!node.quantized) return true;
  for (size_t o = 0; o < affine.scale.size(); ++o) {
    const float step = static_cast<float>(node.quantized->steps[o] * std::fabs(affine.scale[o]));
    if (!(step > 0) || !std::isfinite(step)) return false;
    const absl::Span<const int8_t> codes = node.quantized->codes.data<int8_t>();
    const size_t row = codes.size() / affine.scale.size();
    const auto own = codes.subspan(o * row, row);
    if (affine.scale[o] < 0 && std::find(own.begin(), own.end(), -128) != own.end()) return false;
  }
  return true;
}

// Grouped or not, output channel o owns row o of an OIHW weight.
void Fold(const Affine& affine, Node& node) {
  if (node.quantized) {
    const absl::Span<int8_t> codes = node.quantized->codes.data<int8_t>();
    const absl::Span<float> bias = node.bias.data<float>();
    const size_t row = codes.size() / bias.size();
    for (size_t o = 0; o < bias.size(); ++o) {
      float& step = node.quantized->steps[o];
      step = static_cast<float>(step * std::fabs(affine.scale[o]));
      if (affine.scale[o] < 0) {
        for (int8_t& code : codes.subspan(o * row, row)) code = static_cast<int8_t>(-code);
      }
      bias[o] = static_cast<float>(bias[o] * affine.scale[o] + affine.shift[o]);
    }
    return;
  }
  const absl::Span<float> weight = node.weight.data<float>();
  const absl::Span<float> bias = node.bias.data<float>();
  const size_t row = weight.size() / bias.size();
  for (size_t o = 0; o < bias.size(); ++o) {
    for (float& w : weight.subspan(o * row, row)) w = static_cast<float>(w * affine.scale[o]);
    bias[o] = static_cast<float>(bias[o] * affine.scale[o] + affine.shift[o]);
  }
}

}  // namespace

int FoldBatchNorm(Graph& graph) {
  Wiring wiring(graph);
  std::vector<bool> removed(graph.nodes.size());
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    Node& node = graph.nodes[i];
    ValueId x = kNoValue;
    const std::optional<Affine> affine = AsAffine(graph, node, &x);
    if (!affine || !IsPrivate(graph, wiring, x)) continue;
    Node& layer = graph.nodes[wiring.producer[x]];
    if ((layer.op != OpType::kConv && layer.op != OpType::kFullyConnected) || layer.clip ||
        layer.has_residual() || !CanFold(*affine, layer)) {
      continue;
    }
    Fold(*affine, layer);
    layer.clip = node.clip;
    layer.output = node.output;
    wiring.producer[node.output] = wiring.producer[x];
    removed[i] = true;
  }
  return EraseNodes(graph, removed);
}

}  // namespace tern::graph
