// Builds small graphs for tests: every node's shape is inferred, weights come from a fixed seed.
#ifndef TERN_TESTS_GRAPH_GRAPH_BUILDER_H_
#define TERN_TESTS_GRAPH_GRAPH_BUILDER_H_

#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/graph/graph.h"

namespace tern::testing {

class GraphBuilder {
 public:
  explicit GraphBuilder(Shape input, uint32_t seed = 1) : random_(seed) {
    graph_.name = "test";
    graph_.input = graph_.AddValue({.name = "input", .shape = std::move(input)});
  }

  graph::ValueId input() const { return graph_.input; }
  const Shape& shape(graph::ValueId id) const { return graph_.shape(id); }
  graph::Graph& graph() { return graph_; }

  Tensor Random(Shape shape, float lo = -1.0f, float hi = 1.0f) {
    Tensor tensor(DType::kF32, std::move(shape));
    std::uniform_real_distribution<float> distribution(lo, hi);
    for (float& value : tensor.data<float>()) value = distribution(random_);
    return tensor;
  }
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }

  // Appends any node; `shape` for those whose result is declared. Ends the test program if
  // the node does not fit: the test is wrong then.
  graph::ValueId Add(graph::Node node, Shape shape = {}) {
    node.name = std::string(graph::Name(node.op)) + "_" + std::to_string(graph_.nodes.size());
    node.output = graph_.AddValue({.name = node.name + ":out", .shape = std::move(shape)});
    absl::StatusOr<Shape> inferred = graph::InferShape(graph_, node);
    if (!inferred.ok()) {
      std::cerr << inferred.status() << std::endl;
      std::abort();
    }
    graph_.values[node.output].shape = *inferred;
    graph_.nodes.push_back(node);
    return node.output;
  }

  graph::ValueId Constant(Tensor value) {
    return graph_.AddValue({.name = "constant" + std::to_string(graph_.values.size()),
                            .shape = value.shape(),
                            .constant = value});
  }
  graph::ValueId Scalar(float value) { return Constant(Tensor::Of<float>({}, {value})); }

  graph::ValueId Conv(graph::ValueId x, int o, int k = 1, graph::ConvAttributes attributes = {}) {
    graph::Node node{.op = graph::OpType::kConv, .inputs = {x}, .conv = attributes};
    node.weight = Random({o, shape(x)[0] / attributes.groups, k, k});
    node.bias = Random({o});
    return Add(std::move(node));
  }
  graph::ValueId FullyConnected(graph::ValueId x, int o) {
    graph::Node node{.op = graph::OpType::kFullyConnected, .inputs = {x}};
    node.weight = Random({o, shape(x)[0]});
    node.bias = Random({o});
    return Add(std::move(node));
  }
  graph::ValueId BatchNorm(graph::ValueId x) {
    graph::Node node{.op = graph::OpType::kBatchNorm, .inputs = {x}};
    node.weight = Random({shape(x)[0]}, 0.5f, 1.5f);
    node.bias = Random({shape(x)[0]});
    return Add(std::move(node));
  }
  graph::ValueId Op(graph::OpType op, std::vector<graph::ValueId> inputs) {
    return Add({.op = op, .inputs = std::move(inputs)});
  }
  graph::ValueId Relu(graph::ValueId x) { return Op(graph::OpType::kRelu, {x}); }
  graph::ValueId Clip(graph::ValueId x, float lo, float hi) {
    graph::Node node{.op = graph::OpType::kClip, .inputs = {x}};
    node.clip = graph::ClipRange{lo, hi};
    return Add(std::move(node));
  }
  graph::ValueId Concat(std::vector<graph::ValueId> inputs) {
    return Op(graph::OpType::kConcat, std::move(inputs));
  }
  graph::ValueId Reshape(graph::ValueId x, Shape shape) {
    return Add({.op = graph::OpType::kReshape, .inputs = {x}}, std::move(shape));
  }
  graph::ValueId Slice(graph::ValueId x, int axis, int64_t start, int64_t end, int64_t step = 1) {
    graph::Node node{.op = graph::OpType::kSlice, .inputs = {x}};
    node.axis = axis;
    node.start = start;
    node.end = end;
    node.step = step;
    return Add(std::move(node));
  }
  graph::ValueId Pad(graph::ValueId x, std::vector<int64_t> before, std::vector<int64_t> after,
                     float value = 0.0f) {
    graph::Node node{.op = graph::OpType::kPad, .inputs = {x}};
    node.pads_before = std::move(before);
    node.pads_after = std::move(after);
    node.pad_value = value;
    return Add(std::move(node));
  }
  graph::ValueId Pool(graph::OpType op, graph::ValueId x, graph::PoolAttributes pool) {
    return Add({.op = op, .inputs = {x}, .pool = pool});
  }

  graph::Graph Finish(graph::ValueId output) {
    graph_.output = output;
    return graph_;
  }

 private:
  graph::Graph graph_;
  std::mt19937 random_;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_GRAPH_GRAPH_BUILDER_H_
