// Small random networks and images for the quantiser's tests.
#ifndef TERN_TESTS_QUANT_NETWORKS_H_
#define TERN_TESTS_QUANT_NETWORKS_H_

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "server/graph/graph.h"

namespace tern::quant {

// Standard normal numbers that do not depend on the standard library (sum of 12 uniforms).
class Normal {
 public:
  explicit Normal(uint64_t seed) : random_(seed) {}
  float operator()() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(random_() >> 11) * 0x1.0p-53;
    return static_cast<float>(sum);
  }
  Tensor Fill(Shape shape, float scale) {
    Tensor tensor(DType::kF32, std::move(shape));
    for (float& v : tensor.data<float>()) v = scale * (*this)();
    return tensor;
  }
  uint64_t bits() { return random_(); }

 private:
  std::mt19937_64 random_;
};

// Builds graphs node by node. Shapes are given by the caller.
class Builder {
 public:
  explicit Builder(Shape input, uint64_t seed = 1) : normal_(seed) {
    graph_.name = "test";
    graph_.input = graph_.AddValue({.name = "input", .shape = std::move(input)});
    graph_.output = graph_.input;
  }

  // 3x3 (or 1x1) convolution with He-scaled weights, padding to keep the size, then ReLU if asked.
  graph::ValueId Conv(const std::string& name, graph::ValueId x, int outputs, int kernel, bool relu,
                      int groups = 1, graph::ValueId residual = graph::kNoValue) {
    const Shape in = graph_.shape(x);
    graph::Node node;
    node.name = name;
    node.op = graph::OpType::kConv;
    node.inputs = {x};
    if (residual != graph::kNoValue) node.inputs.push_back(residual);
    node.conv.groups = groups;
    node.conv.pad_top = node.conv.pad_left = node.conv.pad_bottom = node.conv.pad_right =
        kernel / 2;
    if (relu) node.clip = graph::ClipRange{0.0f, std::numeric_limits<float>::infinity()};
    const int64_t fan_in = in[0] / groups * kernel * kernel;
    node.weight = normal_.Fill(Shape{outputs, in[0] / groups, kernel, kernel},
                               std::sqrt(2.0f / static_cast<float>(fan_in)));
    node.bias = normal_.Fill(Shape{outputs}, 0.1f);
    return Add(std::move(node), Shape{outputs, in[1], in[2]});
  }

  graph::ValueId Simple(const std::string& name, graph::OpType op,
                        std::vector<graph::ValueId> inputs, Shape output) {
    graph::Node node;
    node.name = name;
    node.op = op;
    node.inputs = std::move(inputs);
    return Add(std::move(node), std::move(output));
  }

  graph::ValueId MaxPool2(const std::string& name, graph::ValueId x) {
    graph::Node node;
    node.name = name;
    node.op = graph::OpType::kMaxPool;
    node.inputs = {x};
    node.pool.kernel_h = node.pool.kernel_w = node.pool.stride_h = node.pool.stride_w = 2;
    const Shape in = graph_.shape(x);
    return Add(std::move(node), Shape{in[0], in[1] / 2, in[2] / 2});
  }

  graph::ValueId FullyConnected(const std::string& name, graph::ValueId x, int outputs) {
    const int64_t inputs = graph_.shape(x).elements();
    graph::Node node;
    node.name = name;
    node.op = graph::OpType::kFullyConnected;
    node.inputs = {x};
    node.weight =
        normal_.Fill(Shape{outputs, inputs}, 1.0f / std::sqrt(static_cast<float>(inputs)));
    node.bias = normal_.Fill(Shape{outputs}, 0.1f);
    return Add(std::move(node), Shape{outputs});
  }

  graph::ValueId Add(graph::Node node, Shape output) {
    node.output = graph_.AddValue({.name = node.name + ".out", .shape = std::move(output)});
    graph_.nodes.push_back(std::move(node));
    graph_.output = graph_.nodes.back().output;
    return graph_.output;
  }

  graph::Graph& graph() { return graph_; }
  Normal& normal() { return normal_; }

 private:
  graph::Graph graph_;
  Normal normal_;
};

// conv, residual block, max pool, two branches into a concatenation, grouped convolution, global
// pool, classifier.
inline graph::Graph SmallNetwork(uint64_t seed = 1) {
  Builder b(Shape{3, 12, 12}, seed);
  const auto stem = b.Conv("stem", b.graph().input, 10, 3, true);
  const auto first = b.Conv("block.conv1", stem, 10, 3, true);
  const auto sum = b.Conv("block.conv2", first, 10, 3, true, 1, stem);
  const auto pooled = b.MaxPool2("pool", sum);
  const auto left = b.Conv("left", pooled, 9, 1, true);
  const auto right = b.Conv("right", pooled, 7, 3, true);
  const auto both = b.Simple("concat", graph::OpType::kConcat, {left, right}, Shape{16, 6, 6});
  const auto grouped = b.Conv("grouped", both, 16, 3, false, 16);
  const auto mixed = b.Conv("mixed", grouped, 12, 1, true);
  const auto mean = b.Simple("mean", graph::OpType::kGlobalAveragePool, {mixed}, Shape{12, 1, 1});
  const auto flat = b.Simple("flatten", graph::OpType::kReshape, {mean}, Shape{12});
  b.FullyConnected("classifier", flat, 5);
  return b.graph();
}

// Smooth random images: neighbouring pixels correlate as in photographs.
inline Tensor SmoothImages(int count, const Shape& sample, uint64_t seed) {
  Normal normal(seed);
  Tensor images = normal.Fill(sample.WithBatch(count), 1.0f);
  const int64_t width = sample[2];
  auto data = images.data<float>();
  for (size_t i = width; i < data.size(); ++i)
    data[i] = 0.6f * data[i] + 0.5f * data[i - 1] + 0.4f * data[i - width];
  float largest = 1e-6f;
  for (float v : data) largest = std::max(largest, std::fabs(v));
  for (float& v : data) v *= 3.0f / largest;
  return images;
}

}  // namespace tern::quant

#endif  // TERN_TESTS_QUANT_NETWORKS_H_
