#include "tests/quant/simulate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "server/engine/ops.h"

namespace tern::quant {
namespace {

void RoundToCodes(const QuantParams& params, Tensor& tensor) {
  for (float& v : tensor.data<float>()) v = params.Dequantize(params.Quantize(v));
}

// The result of an operator: fixed point rounds ties upwards.
void RoundResult(graph::Arithmetic arithmetic, const QuantParams& params, Tensor& tensor) {
  if (arithmetic != graph::Arithmetic::kFixedPoint) return RoundToCodes(params, tensor);
  for (float& v : tensor.data<float>()) {
    const float code = std::floor(v / params.scale + 0.5f) + static_cast<float>(params.zero_point);
    v = params.Dequantize(static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, code))));
  }
}

}  // namespace

Tensor Simulate(const graph::Graph& graph, const Tensor& input, int threads) {
  const int64_t all = input.shape()[0];
  Tensor logits(DType::kF32, Shape{all, graph.classes()});
  constexpr int64_t kBatch = 100;
  const int64_t elements = graph.shape(graph.input).elements();
  graph::Graph real = graph;
  for (graph::Node& node : real.nodes) {
    if (!node.quantized) continue;
    node.weight = Dequantize(*node.quantized);
    node.quantized.reset();
  }
  for (int64_t first = 0; first < all; first += kBatch) {
    const int64_t n = std::min(kBatch, all - first);
    std::vector<Tensor> values(graph.values.size());
    values[graph.input] = Tensor(DType::kF32, graph.shape(graph.input).WithBatch(n));
    std::memcpy(values[graph.input].raw(), input.data<float>().data() + first * elements,
                n * elements * sizeof(float));
    if (graph.values[graph.input].quant)
      RoundToCodes(*graph.values[graph.input].quant, values[graph.input]);
    for (const graph::Node& node : real.nodes) {
      std::vector<const Tensor*> inputs;
      for (graph::ValueId id : node.inputs) {
        inputs.push_back(graph.values[id].constant ? &*graph.values[id].constant : &values[id]);
      }
      auto result = engine::RunFloatNode(real, node, inputs, threads);
      if (!result.ok()) {
        std::fprintf(stderr, "%s: %s\n", node.name.c_str(), result.status().ToString().c_str());
        std::abort();
      }
      values[node.output] = *std::move(result);
      if (graph.values[node.output].quant)
        RoundResult(graph.arithmetic, *graph.values[node.output].quant, values[node.output]);
    }
    std::memcpy(logits.data<float>().data() + first * graph.classes(), values[graph.output].raw(),
                n * graph.classes() * sizeof(float));
  }
  return logits;
}

}  // namespace tern::quant
