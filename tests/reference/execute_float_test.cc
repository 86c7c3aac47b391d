#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "server/reference/execute.h"
#include "tests/graph/graph_builder.h"

namespace tern::reference {
namespace {

using graph::ClipRange;
using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::ValueId;
using tern::testing::GraphBuilder;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The output of `graph` for one image (or more) of these values.
std::vector<float> Evaluate(const Graph& graph, const std::vector<float>& input, int64_t n = 1) {
  const Tensor x = Tensor::Of(graph.shape(graph.input).WithBatch(n), input);
  EXPECT_EQ(graph::Validate(graph), absl::OkStatus());
  const auto values = ExecuteFloat(graph, x);
  EXPECT_TRUE(values.ok()) << values.status();
  const Tensor& y = (*values)[graph.output];
  EXPECT_EQ(y.shape(), graph.shape(graph.output).WithBatch(n));
  return {y.data<float>().begin(), y.data<float>().end()};
}

using Floats = std::vector<float>;

TEST(ExecuteFloatTest, ConvolvesWithPadsAndStrideAsByHand) {
  GraphBuilder b({1, 3, 3});
  Node conv{.op = OpType::kConv, .inputs = {b.input()}};
  conv.conv = {.stride_h = 2, .stride_w = 2, .pad_top = 1, .pad_left = 1};
  conv.weight = Tensor::Of<float>({1, 1, 2, 2}, {1, 10, 100, 1000});
  conv.bias = Tensor::Of<float>({1}, {0.5f});
  // Windows with their upper left corner at (-1,-1), (-1,1), (1,-1), (1,1) of
  // 1 2 3 / 4 5 6 / 7 8 9.
  EXPECT_EQ(Evaluate(b.Finish(b.Add(conv)), {1, 2, 3, 4, 5, 6, 7, 8, 9}),
            (Floats{1000.5f, 3200.5f, 7040.5f, 9865.5f}));
}

TEST(ExecuteFloatTest, ConvolvesGroupsAndDilation) {
  GraphBuilder b({2, 1, 3});
  Node conv{.op = OpType::kConv, .inputs = {b.input()}};
  conv.conv = {.dilation_w = 2, .groups = 2};
  conv.weight = Tensor::Of<float>({4, 1, 1, 2}, {1, 2, 3, 4, 5, 6, 7, 8});
  conv.bias = Tensor(DType::kF32, {4});
  // Channel 0 is 1 _ 3, channel 1 is 4 _ 6; outputs 0, 1 see channel 0, 2, 3 channel 1.
  EXPECT_EQ(Evaluate(b.Finish(b.Add(conv)), {1, 2, 3, 4, 5, 6}), (Floats{7, 15, 56, 76}));
}

TEST(ExecuteFloatTest, AddsTheResidualBeforeTheActivation) {
  GraphBuilder b({2});
  Node fc{.op = OpType::kFullyConnected, .inputs = {b.input(), b.input()}, .clip = ClipRange{0, 5}};
  fc.weight = Tensor::Of<float>({2, 2}, {1, 1, 1, -2});
  fc.bias = Tensor::Of<float>({2}, {1, 0});
  // Sums 1+2+1 = 4 and 1-4 = -3, plus 1 and 2: 5 and -1.
  EXPECT_EQ(Evaluate(b.Finish(b.Add(fc)), {1, 2}), (Floats{5, 0}));
}

TEST(ExecuteFloatTest, AveragesDivideByWhatCounts) {
  const Floats x = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  const auto pooled = [&](graph::PoolAttributes pool, OpType op = OpType::kAveragePool) {
    GraphBuilder b({1, 3, 3});
    return Evaluate(b.Finish(b.Pool(op, b.input(), pool)), x);
  };
  graph::PoolAttributes pool{
      .kernel_h = 2, .kernel_w = 2, .stride_h = 2, .stride_w = 2, .pad_top = 1, .pad_left = 1};
  EXPECT_EQ(pooled(pool), (Floats{1, 2.5f, 5.5f, 7}));
  pool.count_include_pad = true;
  EXPECT_EQ(pooled(pool), (Floats{0.25f, 1.25f, 2.75f, 7}));
  EXPECT_EQ(pooled(pool, OpType::kMaxPool), (Floats{1, 3, 7, 9}));
  // Windows cut by ceil_mode count only what is there, with and without count_include_pad.
  pool = {.kernel_h = 2, .kernel_w = 2, .stride_h = 2, .stride_w = 2, .ceil_mode = true};
  EXPECT_EQ(pooled(pool), (Floats{3, 4.5f, 7.5f, 9}));
  pool.count_include_pad = true;
  EXPECT_EQ(pooled(pool), (Floats{3, 4.5f, 7.5f, 9}));
}

TEST(ExecuteFloatTest, AppliesElementwiseFunctions) {
  const auto unary = [](Node node) {
    GraphBuilder b({4});
    node.inputs = {b.input()};
    return Evaluate(b.Finish(b.Add(std::move(node))), {-4, -1, 0, 4});
  };
  EXPECT_EQ(unary({.op = OpType::kRelu}), (Floats{0, 0, 0, 4}));
  EXPECT_EQ(unary({.op = OpType::kClip, .clip = ClipRange{-2, kInfinity}}), (Floats{-2, -1, 0, 4}));
  EXPECT_EQ(unary({.op = OpType::kHardSigmoid, .alpha = 0.25f, .beta = 0.5f}),
            (Floats{0, 0.25f, 0.5f, 1}));
  EXPECT_FLOAT_EQ(unary({.op = OpType::kHardSwish})[1], -1.0f / 3.0f);
  EXPECT_EQ(unary({.op = OpType::kHardSwish})[0], 0);
  EXPECT_FLOAT_EQ(unary({.op = OpType::kSilu})[1], -0.26894143f);
  EXPECT_FLOAT_EQ(unary({.op = OpType::kSigmoid})[3], 0.98201379f);
}

TEST(ExecuteFloatTest, BroadcastsOverChannelsAndPixelsPerImage) {
  GraphBuilder b({2, 1, 2});
  const ValueId means = b.Op(OpType::kGlobalAveragePool, {b.input()});
  const ValueId centred = b.Op(OpType::kSub, {b.input(), means});
  const ValueId scaled = b.Op(OpType::kMul, {b.Constant(Tensor::Of<float>({2}, {1, 10})), centred});
  EXPECT_EQ(Evaluate(b.Finish(scaled), {1, 3, 4, 4, 0, 2, 6, 8}, 2),
            (Floats{-1, 10, 0, 0, -1, 10, -1, 10}));
}

TEST(ExecuteFloatTest, MovesElements) {
  const Floats x = {0, 1, 2, 3, 4, 5};  // [1,2,3]
  const auto moved = [&](auto make) {
    GraphBuilder b({1, 2, 3});
    return Evaluate(b.Finish(make(b)), x);
  };
  EXPECT_EQ(moved([](GraphBuilder& b) {
              return b.Add({.op = OpType::kTranspose, .inputs = {b.input()}, .perm = {2, 0, 1}});
            }),
            (Floats{0, 3, 1, 4, 2, 5}));
  EXPECT_EQ(moved([](GraphBuilder& b) { return b.Slice(b.input(), 2, 0, 3, 2); }),
            (Floats{0, 2, 3, 5}));
  EXPECT_EQ(moved([](GraphBuilder& b) {
              return b.Pad(b.input(), {0, 1, 0}, {0, 0, 1}, 9);
            }),
            (Floats{9, 9, 9, 9, 0, 1, 2, 9, 3, 4, 5, 9}));
  EXPECT_EQ(moved([](GraphBuilder& b) {
              Node node{.op = OpType::kConcat, .inputs = {b.input(), b.Relu(b.input())}};
              node.axis = 1;
              return b.Add(node);
            }),
            (Floats{0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(moved([](GraphBuilder& b) {
              return b.Add({.op = OpType::kReduceMean, .inputs = {b.input()}, .axes = {1}}, {1, 3});
            }),
            (Floats{1.5f, 2.5f, 3.5f}));
}

TEST(ExecuteFloatTest, SoftmaxSumsToOneAlongItsAxisAndDoesNotOverflow) {
  GraphBuilder b({2, 2, 1});
  const Floats y = Evaluate(b.Finish(b.Op(OpType::kSoftmax, {b.input()})), {1000, 0, 1000, 0});
  EXPECT_EQ(y, (Floats{0.5f, 0.5f, 0.5f, 0.5f}));
}

TEST(ExecuteFloatTest, RejectsAnInputOfAnotherShapeOrType) {
  GraphBuilder b({4});
  const Graph graph = b.Finish(b.Relu(b.input()));
  for (const Shape& shape : {Shape{4}, Shape{1, 5}, Shape{0, 4}, Shape{1, 1, 4}}) {
    EXPECT_EQ(ExecuteFloat(graph, Tensor(DType::kF32, shape)).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(ExecuteFloat(graph, Tensor(DType::kU8, {1, 4})).ok());
}

}  // namespace
}  // namespace tern::reference
