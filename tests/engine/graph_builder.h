// Builds small random networks for the engine's tests. Weights and inputs come from one seeded
// generator.
#ifndef TERN_TESTS_ENGINE_GRAPH_BUILDER_H_
#define TERN_TESTS_ENGINE_GRAPH_BUILDER_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/graph/graph.h"
#include "server/tensor/cluster.h"

namespace tern::engine::testing {

using graph::ClipRange;
using graph::ConvAttributes;
using graph::Graph;
using graph::kNoValue;
using graph::Node;
using graph::OpType;
using graph::PoolAttributes;
using graph::Value;
using graph::ValueId;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr ClipRange kReluRange{0.0f, kInfinity};
inline constexpr ClipRange kRelu6Range{0.0f, 6.0f};

class GraphBuilder {
 public:
  explicit GraphBuilder(Shape input, unsigned seed = 1) : random_(seed) {
    graph_.name = "random";
    graph_.input = graph_.AddValue({"input", std::move(input), {}, {}});
  }

  ValueId input() const { return graph_.input; }
  const Graph& graph() const { return graph_; }
  const Shape& shape(ValueId id) const { return graph_.shape(id); }

  Tensor Random(Shape shape, float lo = -1.0f, float hi = 1.0f) {
    Tensor tensor(DType::kF32, std::move(shape));
    std::uniform_real_distribution<float> uniform(lo, hi);
    for (float& v : tensor.data<float>()) v = uniform(random_);
    return tensor;
  }

  ValueId Add(Node node) {
    node.name = absl::StrCat(graph::Name(node.op), "_", graph_.nodes.size());
    auto shape = graph::InferShape(graph_, node);
    EXPECT_TRUE(shape.ok()) << shape.status();
    return Finish(std::move(node), shape.ok() ? *shape : Shape{1});
  }
  // For operators whose output shape is an attribute.
  ValueId AddShaped(Node node, Shape shape) {
    node.name = absl::StrCat(graph::Name(node.op), "_", graph_.nodes.size());
    node.output = graph_.AddValue({absl::StrCat(node.name, "_out"), shape, {}, {}});
    graph_.nodes.push_back(std::move(node));
    return graph_.nodes.back().output;
  }

  ValueId Conv(ValueId x, int outputs, int kernel, ConvAttributes conv = {},
               std::optional<ClipRange> clip = {}, ValueId residual = kNoValue) {
    return ConvRect(x, outputs, kernel, kernel, conv, clip, residual);
  }
  ValueId ConvRect(ValueId x, int outputs, int kernel_h, int kernel_w, ConvAttributes conv = {},
                   std::optional<ClipRange> clip = {}, ValueId residual = kNoValue) {
    Node node;
    node.op = OpType::kConv;
    node.inputs = {x};
    if (residual != kNoValue) node.inputs.push_back(residual);
    node.conv = conv;
    node.clip = clip;
    const int64_t channels = graph_.shape(x)[0] / conv.groups;
    const float range = 1.7f / std::sqrt(static_cast<float>(channels * kernel_h * kernel_w));
    node.weight = Random({outputs, channels, kernel_h, kernel_w}, -range, range);
    node.bias = Random({outputs}, -0.5f, 0.5f);
    return Add(std::move(node));
  }
  ValueId FullyConnected(ValueId x, int outputs, std::optional<ClipRange> clip = {},
                         ValueId residual = kNoValue) {
    Node node;
    node.op = OpType::kFullyConnected;
    node.inputs = {x};
    if (residual != kNoValue) node.inputs.push_back(residual);
    node.clip = clip;
    const int64_t channels = graph_.shape(x)[0];
    const float range = 1.7f / std::sqrt(static_cast<float>(channels));
    node.weight = Random({outputs, channels}, -range, range);
    node.bias = Random({outputs}, -0.5f, 0.5f);
    return Add(std::move(node));
  }
  ValueId BatchNorm(ValueId x, std::optional<ClipRange> clip = {}) {
    Node node;
    node.op = OpType::kBatchNorm;
    node.inputs = {x};
    node.clip = clip;
    node.weight = Random({graph_.shape(x)[0]}, 0.5f, 1.5f);
    node.bias = Random({graph_.shape(x)[0]}, -0.5f, 0.5f);
    return Add(std::move(node));
  }
  ValueId Unary(OpType op, ValueId x) {
    Node node;
    node.op = op;
    node.inputs = {x};
    if (op == OpType::kClip) node.clip = ClipRange{-0.4f, 0.6f};
    if (op == OpType::kHardSigmoid) {
      node.alpha = 1.0f / 6.0f;
      node.beta = 0.5f;
    }
    return Add(std::move(node));
  }
  ValueId Binary(OpType op, ValueId a, ValueId b, std::optional<ClipRange> clip = {}) {
    Node node;
    node.op = op;
    node.inputs = {a, b};
    node.clip = clip;
    return Add(std::move(node));
  }
  ValueId Constant(Shape shape, float lo = 0.5f, float hi = 1.5f) {
    Value value{absl::StrCat("constant_", graph_.values.size()), shape, Random(shape, lo, hi), {}};
    return graph_.AddValue(std::move(value));
  }
  ValueId Pool(OpType op, ValueId x, PoolAttributes pool) {
    Node node;
    node.op = op;
    node.inputs = {x};
    node.pool = pool;
    return Add(std::move(node));
  }
  ValueId GlobalAverage(ValueId x) {
    Node node;
    node.op = OpType::kGlobalAveragePool;
    node.inputs = {x};
    return Add(std::move(node));
  }
  ValueId Concat(std::vector<ValueId> inputs, int axis = 0) {
    Node node;
    node.op = OpType::kConcat;
    node.inputs = std::move(inputs);
    node.axis = axis;
    return Add(std::move(node));
  }
  ValueId Reshape(ValueId x, Shape shape) {
    Node node;
    node.op = OpType::kReshape;
    node.inputs = {x};
    return AddShaped(std::move(node), std::move(shape));
  }
  ValueId Flatten(ValueId x) { return Reshape(x, Shape{graph_.shape(x).elements()}); }
  ValueId Transpose(ValueId x, std::vector<int> perm) {
    Node node;
    node.op = OpType::kTranspose;
    node.inputs = {x};
    node.perm = std::move(perm);
    return Add(std::move(node));
  }
  ValueId Slice(ValueId x, int axis, int64_t start, int64_t end, int64_t step = 1) {
    Node node;
    node.op = OpType::kSlice;
    node.inputs = {x};
    node.axis = axis;
    node.start = start;
    node.end = end;
    node.step = step;
    return Add(std::move(node));
  }
  ValueId Pad(ValueId x, std::vector<int64_t> before, std::vector<int64_t> after, float value) {
    Node node;
    node.op = OpType::kPad;
    node.inputs = {x};
    node.pads_before = std::move(before);
    node.pads_after = std::move(after);
    node.pad_value = value;
    return Add(std::move(node));
  }
  ValueId Softmax(ValueId x, int axis) {
    Node node;
    node.op = OpType::kSoftmax;
    node.inputs = {x};
    node.axis = axis;
    return Add(std::move(node));
  }
  ValueId ReduceMean(ValueId x, std::vector<int> axes, Shape shape) {
    Node node;
    node.op = OpType::kReduceMean;
    node.inputs = {x};
    node.axes = std::move(axes);
    return AddShaped(std::move(node), std::move(shape));
  }

  Graph Finish(ValueId output) {
    graph_.output = output;
    const absl::Status status = graph::Validate(graph_);
    EXPECT_TRUE(status.ok()) << status;
    return graph_;
  }

 private:
  ValueId Finish(Node node, Shape shape) {
    node.output = graph_.AddValue({absl::StrCat(node.name, "_out"), std::move(shape), {}, {}});
    graph_.nodes.push_back(std::move(node));
    return graph_.nodes.back().output;
  }

  Graph graph_;
  std::mt19937 random_;
};

struct NamedGraph {
  std::string name;
  Graph graph;
};

inline ConvAttributes Strided(int stride, int pad, int groups = 1) {
  ConvAttributes conv;
  conv.stride_h = conv.stride_w = stride;
  conv.pad_top = conv.pad_left = conv.pad_bottom = conv.pad_right = pad;
  conv.groups = groups;
  return conv;
}

inline PoolAttributes Window(int kernel, int stride, int pad = 0, bool ceil = false,
                             bool include = false) {
  PoolAttributes pool;
  pool.kernel_h = pool.kernel_w = kernel;
  pool.stride_h = pool.stride_w = stride;
  pool.pad_top = pool.pad_left = pool.pad_bottom = pool.pad_right = pad;
  pool.ceil_mode = ceil;
  pool.count_include_pad = include;
  return pool;
}

// Every operator at least once, with channel counts that are and are not multiples of 8.
inline std::vector<NamedGraph> Zoo() {
  std::vector<NamedGraph> zoo;
  const auto add = [&](std::string name, Graph graph) {
    zoo.push_back({std::move(name), std::move(graph)});
  };
  {
    GraphBuilder b({3, 17, 13});
    ValueId x = b.Conv(b.input(), 16, 7, Strided(2, 3), kReluRange);
    x = b.Pool(OpType::kMaxPool, x, Window(3, 2, 1));
    x = b.Conv(x, 24, 1);
    x = b.Conv(x, 20, 3, Strided(1, 1), kRelu6Range);
    add("ConvPool", b.Finish(b.GlobalAverage(x)));
  }
  {
    GraphBuilder b({5, 9, 11});
    ConvAttributes uneven;
    uneven.stride_h = 2;
    uneven.pad_top = 0;
    uneven.pad_left = 2;
    uneven.pad_bottom = 1;
    uneven.pad_right = 1;
    ValueId x = b.ConvRect(b.input(), 10, 3, 5, uneven);
    ConvAttributes dilated;
    dilated.dilation_h = 2;
    dilated.dilation_w = 3;
    dilated.pad_top = dilated.pad_bottom = 2;
    dilated.pad_left = dilated.pad_right = 3;
    add("ConvUnevenPadsAndDilation", b.Finish(b.Conv(x, 8, 3, dilated)));
  }
  {
    GraphBuilder b({32, 9, 9});
    ValueId x = b.Conv(b.input(), 32, 3, Strided(1, 1, 32), kRelu6Range);
    x = b.Conv(x, 32, 3, Strided(2, 1, 4));
    x = b.Conv(x, 64, 3, Strided(1, 1, 16), kReluRange);
    add("ConvGroupsAndDepthwise", b.Finish(x));
  }
  {
    GraphBuilder b({6, 8, 8});
    add("ConvDepthwiseOddChannels",
        b.Finish(b.Conv(b.input(), 6, 3, Strided(1, 1, 6), kReluRange)));
  }
  {
    GraphBuilder b({16, 8, 8});
    const ValueId skip = b.Conv(b.input(), 16, 1, {}, kReluRange);
    const ValueId inner = b.Conv(skip, 16, 3, Strided(1, 1), kReluRange);
    const ValueId sum = b.Conv(inner, 16, 3, Strided(1, 1), kReluRange, skip);  // skip dies here
    const ValueId again =
        b.Conv(sum, 16, 3, Strided(1, 1), {}, sum);          // reads its own input as residual
    const ValueId kept = b.Conv(again, 16, 1, {}, {}, sum);  // sum lives on
    add("ConvResiduals", b.Finish(b.Binary(OpType::kAdd, kept, sum, kReluRange)));
  }
  {
    GraphBuilder b({12, 5, 5});
    ValueId x = b.Conv(b.input(), 16, 3);
    x = b.FullyConnected(b.Flatten(x), 24, kReluRange);
    const ValueId skip = x;
    x = b.FullyConnected(x, 24, kReluRange);
    x = b.FullyConnected(x, 24, {}, skip);
    add("FullyConnectedAfterFlatten", b.Finish(b.FullyConnected(x, 10)));
  }
  {
    GraphBuilder b({16, 7, 7});
    ValueId x = b.Pool(OpType::kMaxPool, b.input(), Window(3, 2, 0, true));
    x = b.Conv(x, 16, 1);
    x = b.Pool(OpType::kAveragePool, x, Window(3, 1, 1, false, false));
    x = b.Pool(OpType::kAveragePool, x, Window(3, 1, 1, false, true));
    add("Pools", b.Finish(b.Pool(OpType::kAveragePool, x, Window(2, 2, 0, true, true))));
  }
  {
    GraphBuilder b({8, 6, 6});
    ValueId x = b.Conv(b.input(), 8, 1);
    for (OpType op : {OpType::kHardSwish, OpType::kClip, OpType::kSilu, OpType::kSigmoid,
                      OpType::kHardSigmoid, OpType::kRelu}) {
      x = b.Unary(op, x);
    }
    add("Unaries", b.Finish(b.BatchNorm(x, kReluRange)));
  }
  {
    GraphBuilder b({16, 6, 6});
    ValueId x = b.Conv(b.input(), 16, 3, Strided(1, 1));
    ValueId gate = b.Conv(b.GlobalAverage(x), 16, 1);
    gate = b.Unary(OpType::kHardSigmoid, gate);
    x = b.Binary(OpType::kMul, x, gate);
    x = b.Binary(OpType::kMul, gate, x);
    x = b.Binary(OpType::kMul, x, x);
    x = b.Binary(OpType::kSub, x, b.input());
    x = b.Binary(OpType::kDiv, x, b.Constant({16, 1, 1}));
    x = b.Binary(OpType::kMul, x, b.Constant({6}));
    x = b.Binary(OpType::kAdd, b.Constant({1}), x);
    add("Arithmetic", b.Finish(b.Binary(OpType::kAdd, x, gate, kReluRange)));
  }
  for (int channels : {8, 6}) {
    GraphBuilder b({channels, 6, 6});
    const ValueId p = b.Conv(b.input(), channels, 3, Strided(1, 1), kReluRange);
    const ValueId q = b.Conv(b.input(), 2 * channels, 1);
    ValueId x = b.BatchNorm(b.Concat({p, q, b.input()}), kReluRange);
    x = b.Concat({x, b.Pool(OpType::kMaxPool, x, Window(3, 1, 1))}, 1);
    x = b.Conv(x, 8, 1);
    add(absl::StrCat("Concat", channels), b.Finish(x));
  }
  {
    GraphBuilder b({12, 6, 8});
    ValueId x = b.Slice(b.input(), 0, 2, 10);
    x = b.Slice(x, 2, 1, 8, 2);
    x = b.Pad(x, {0, 1, 2}, {0, 2, 1}, 0.0f);
    x = b.Pad(x, {1, 0, 0}, {0, 0, 1}, 0.25f);
    x = b.Transpose(x, {2, 0, 1});
    add("SlicePadTranspose", b.Finish(b.Conv(x, 8, 1)));
  }
  {
    GraphBuilder b({12, 4, 6});
    ValueId x = b.Conv(b.input(), 12, 1);
    x = b.Reshape(x, {3, 4, 4, 6});
    x = b.Transpose(x, {1, 0, 2, 3});
    x = b.Reshape(x, {12, 4, 6});
    x = b.Conv(x, 12, 3, Strided(1, 1));
    x = b.Reshape(x, {6, 8, 6});     // one image to another
    x = b.Reshape(x, {2, 3, 8, 6});  // a split without a join
    x = b.Transpose(x, {2, 3, 0, 1});
    add("ShuffleAndReshapes", b.Finish(b.Reshape(x, {288})));
  }
  {
    GraphBuilder b({10, 5, 4});
    ValueId x = b.ReduceMean(b.input(), {2}, {10, 5, 1});
    x = b.Binary(OpType::kMul, b.input(), x);
    x = b.ReduceMean(x, {1, 2}, {10});
    x = b.FullyConnected(x, 7);
    add("ReduceMeanSoftmax", b.Finish(b.Softmax(x, 0)));
  }
  {
    GraphBuilder b({4, 5, 5});
    add("SoftmaxOverChannels", b.Finish(b.Softmax(b.Conv(b.input(), 8, 1), 0)));
  }
  return zoo;
}

// max |a - b| over max |b|.
inline float RelativeDifference(absl::Span<const float> a, absl::Span<const float> b) {
  float largest = 1e-20f, difference = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    largest = std::max(largest, std::abs(b[i]));
    const float d = std::abs(a[i] - b[i]);
    difference = d <= difference ? difference : d;  // NaN wins
  }
  return difference / largest;
}

}  // namespace tern::engine::testing

#endif  // TERN_TESTS_ENGINE_GRAPH_BUILDER_H_
