#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/graph/graph.h"
#include "tests/graph/graph_builder.h"

namespace tern::graph {
namespace {

using tern::testing::GraphBuilder;
using ::testing::HasSubstr;

TEST(InferShapeTest, ConvolutionFollowsStridePadsAndDilation) {
  GraphBuilder b({3, 11, 13});
  // (11 + 1 + 2 - (2*2+1)) / 2 + 1 = 5; (13 + 0 + 3 - (3*2+1)) / 3 + 1 = 4.
  const ValueId y = b.Conv(b.input(), 8, 3,
                           {.stride_h = 2,
                            .stride_w = 3,
                            .pad_top = 1,
                            .pad_left = 0,
                            .pad_bottom = 2,
                            .pad_right = 3,
                            .dilation_h = 2,
                            .dilation_w = 3});
  EXPECT_EQ(b.shape(y), (Shape{8, 5, 4}));
}

TEST(InferShapeTest, CeilModeDropsTheWindowThatStartsBeyondTheInput) {
  const auto pooled = [](int64_t side, PoolAttributes pool) {
    GraphBuilder b({1, side, side});
    return b.shape(b.Pool(OpType::kMaxPool, b.input(), pool))[1];
  };
  PoolAttributes pool{.kernel_h = 3, .kernel_w = 3, .stride_h = 2, .stride_w = 2};
  EXPECT_EQ(pooled(6, pool), 2);
  pool.ceil_mode = true;
  EXPECT_EQ(pooled(6, pool), 3);
  EXPECT_EQ(pooled(7, pool), 3);
  // ceil((4 - 1) / 2) + 1 = 3 windows; the third would start at 4 = the input's end.
  EXPECT_EQ(
      pooled(4, {.kernel_h = 1, .kernel_w = 1, .stride_h = 2, .stride_w = 2, .ceil_mode = true}),
      2);
  // A kernel one larger than the input still has its cut window.
  EXPECT_EQ(pooled(2, pool), 1);
}

TEST(InferShapeTest, CoversTheOtherOperators) {
  GraphBuilder b({4, 6, 8});
  const ValueId x = b.input();
  EXPECT_EQ(b.shape(b.Op(OpType::kGlobalAveragePool, {x})), (Shape{4, 1, 1}));
  EXPECT_EQ(b.shape(b.Concat({x, x, x})), (Shape{12, 6, 8}));
  EXPECT_EQ(b.shape(b.Slice(x, 2, 1, 8, 3)), (Shape{4, 6, 3}));
  EXPECT_EQ(b.shape(b.Pad(x, {1, 0, 2}, {0, 3, 0})), (Shape{5, 9, 10}));
  EXPECT_EQ(b.shape(b.Add({.op = OpType::kTranspose, .inputs = {x}, .perm = {2, 0, 1}})),
            (Shape{8, 4, 6}));
  EXPECT_EQ(b.shape(b.Op(OpType::kAdd, {x, b.Constant(b.Random({4, 1, 1}))})), (Shape{4, 6, 8}));
  EXPECT_EQ(b.shape(b.Add({.op = OpType::kReduceMean, .inputs = {x}, .axes = {0}}, {6, 8})),
            (Shape{6, 8}));
  EXPECT_EQ(b.shape(b.FullyConnected(b.Reshape(x, {192}), 10)), (Shape{10}));
}

TEST(InferShapeTest, WindowsBeyondAnyNetworksAreRefused) {
  constexpr int kHuge = 1 << 30;
  GraphBuilder b({1, 4, 4});
  Node node{.name = "p", .op = OpType::kMaxPool, .inputs = {b.input()}};
  node.pool = {.kernel_h = kHuge, .kernel_w = 1, .stride_h = kHuge, .pad_top = kHuge - 1};
  node.pool.pad_bottom = kHuge - 1;
  const auto kernel = InferShape(b.graph(), node);
  EXPECT_EQ(kernel.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(kernel.status().message(), HasSubstr("wanted at most 65536"));
  node.pool = {.kernel_h = 2, .kernel_w = 2, .stride_h = kHuge};
  EXPECT_EQ(InferShape(b.graph(), node).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(InferShapeTest, NamesNodeGotAndWanted) {
  GraphBuilder b({3, 4, 4});
  Graph graph = b.Finish(b.Conv(b.input(), 2, 3));
  graph.nodes[0].weight = Tensor(DType::kF32, {2, 5, 3, 3});
  const absl::Status status = InferShape(graph, graph.nodes[0]).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("Conv_0"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("takes 5 channels"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("has 3"));
}

TEST(InferShapeTest, CountsMultiplyAccumulatesPerImage) {
  GraphBuilder b({8, 10, 10});
  const ValueId y = b.Conv(b.input(), 16, 3, {.stride_h = 2, .stride_w = 2, .groups = 4});
  const ValueId z = b.FullyConnected(b.Reshape(b.Op(OpType::kGlobalAveragePool, {y}), {16}), 10);
  const Graph graph = b.Finish(z);
  EXPECT_EQ(MultiplyAccumulates(graph, graph.nodes[0]), 16 * (8 / 4) * 9 * 4 * 4);
  EXPECT_EQ(MultiplyAccumulates(graph, graph.nodes[1]), 0);
  EXPECT_EQ(MultiplyAccumulates(graph, graph.nodes.back()), 160);
}

}  // namespace
}  // namespace tern::graph
