#include "server/graph/passes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "server/reference/execute.h"
#include "tests/graph/graph_builder.h"

namespace tern::graph {
namespace {

using tern::testing::GraphBuilder;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int Count(const Graph& graph, OpType op) {
  int count = 0;
  for (const Node& node : graph.nodes) count += node.op == op;
  return count;
}

// Runs `pass` and checks that the graph stays valid and computes the same to rounding.
// Returns what the pass returns.
template <typename Pass>
int Apply(Graph& graph, Pass pass) {
  EXPECT_EQ(Validate(graph), absl::OkStatus());
  GraphBuilder random(Shape{1}, 7);
  const Tensor input = random.Random(graph.shape(graph.input).WithBatch(2), -4.0f, 4.0f);
  const auto before = reference::ExecuteFloat(graph, input);
  EXPECT_TRUE(before.ok());
  const Tensor wanted = (*before)[graph.output];
  const int changed = pass(graph);
  EXPECT_EQ(Validate(graph), absl::OkStatus());
  const auto after = reference::ExecuteFloat(graph, input);
  EXPECT_TRUE(after.ok());
  const Tensor& got = (*after)[graph.output];
  EXPECT_EQ(got.shape(), wanted.shape());
  float largest = 1e-3f;
  for (float v : wanted.data<float>()) largest = std::max(largest, std::fabs(v));
  for (int64_t i = 0; i < got.elements(); ++i) {
    // Not EXPECT_NEAR: a NaN must fail and one message is enough.
    if (!(std::fabs(got.data<float>()[i] - wanted.data<float>()[i]) <= 1e-4f * largest)) {
      ADD_FAILURE() << "element " << i << ": " << got.data<float>()[i] << ", wanted "
                    << wanted.data<float>()[i];
      break;
    }
  }
  return changed;
}

// ---- FoldBatchNorm ----

TEST(FoldBatchNormTest, FoldsIntoPlainAndGroupedConvolutionsAndFullyConnectedLayers) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.BatchNorm(b.Conv(b.input(), 8, 3));
  x = b.BatchNorm(b.Conv(b.Relu(x), 8, 3, {.groups = 4}));
  x = b.BatchNorm(b.FullyConnected(b.Reshape(x, {32}), 5));
  Graph graph = b.Finish(x);
  EXPECT_EQ(Apply(graph, FoldBatchNorm), 3);
  EXPECT_EQ(Count(graph, OpType::kBatchNorm), 0);
}

TEST(FoldBatchNormTest, FoldsAChainOfConstantArithmetic) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.BatchNorm(b.Conv(b.input(), 3));
  x = b.Op(OpType::kMul, {b.Constant(b.Random({3, 1, 1})), x});
  x = b.Op(OpType::kSub, {b.Scalar(2.0f), x});
  x = b.Op(OpType::kDiv, {x, b.Constant(b.Random({3, 1, 1}, 1.0f, 2.0f))});
  x = b.Op(OpType::kAdd, {x, b.Constant(b.Random({1, 1, 1}))});
  x = b.Op(OpType::kSub, {x, b.Scalar(0.5f)});
  Graph graph = b.Finish(x);
  EXPECT_EQ(Apply(graph, FoldBatchNorm), 6);
  EXPECT_EQ(graph.nodes.size(), 1u);
}

TEST(FoldBatchNormTest, KeepsWhatIsNotPerChannelOfOnePrivateLayer) {
  GraphBuilder b({4, 3, 3});
  const ValueId shared = b.Conv(b.input(), 4);
  const ValueId concat = b.Concat({b.Conv(b.input(), 2), b.BatchNorm(shared)});
  ValueId x = b.BatchNorm(concat);                                          // DenseNet
  x = b.Op(OpType::kMul, {b.Conv(x, 4), b.Constant(b.Random({1, 3, 3}))});  // per pixel
  x = b.Op(OpType::kAdd, {x, b.Conv(b.input(), 4)});                        // no constant
  x = b.Op(OpType::kDiv, {b.Scalar(1.0f), b.Op(OpType::kSigmoid, {x})});
  Graph graph = b.Finish(b.Op(OpType::kAdd, {x, shared}));
  EXPECT_EQ(Apply(graph, FoldBatchNorm), 0);
}

TEST(FoldBatchNormTest, KeepsAConstantThatEnlargesTheResult) {
  GraphBuilder b({4, 1, 1});
  Graph graph =
      b.Finish(b.Op(OpType::kMul, {b.Conv(b.input(), 1), b.Constant(b.Random({5, 1, 1}))}));
  EXPECT_EQ(Apply(graph, FoldBatchNorm), 0);
}

TEST(FoldBatchNormTest, DoesNotReachBehindAnActivation) {
  GraphBuilder b({4, 3, 3});
  Graph graph = b.Finish(b.BatchNorm(b.Relu(b.Conv(b.input(), 4))));
  EXPECT_EQ(Apply(graph, FuseActivations), 1);
  EXPECT_EQ(Apply(graph, FoldBatchNorm), 0);
}

// ---- RecogniseSwish ----

TEST(HardSwishTest, RecognisesEveryForm) {
  const auto gate = [](GraphBuilder& b, ValueId x) {
    return b.Clip(b.Op(OpType::kAdd, {b.Scalar(3.0f), x}), 0.0f, 6.0f);
  };
  for (int form = 0; form < 5; ++form) {
    GraphBuilder b({4, 3, 3});
    const ValueId x = b.Conv(b.input(), 4);
    ValueId y = kNoValue;
    switch (form) {
      case 0: {
        Node node{.op = OpType::kHardSigmoid, .inputs = {x}, .alpha = 1.0f / 6.0f, .beta = 0.5f};
        y = b.Op(OpType::kMul, {x, b.Add(node)});
        break;
      }
      case 1:
        y = b.Op(OpType::kDiv, {b.Op(OpType::kMul, {x, gate(b, x)}), b.Scalar(6.0f)});
        break;
      case 2:
        y = b.Op(OpType::kMul, {b.Op(OpType::kDiv, {gate(b, x), b.Scalar(6.0f)}), x});
        break;
      case 3:
        y = b.Op(OpType::kMul, {b.Scalar(1.0f / 6.0f), b.Op(OpType::kMul, {gate(b, x), x})});
        break;
      case 4: {
        // The clip already fused into the addition.
        Node add{.op = OpType::kAdd, .inputs = {x, b.Scalar(3.0f)}, .clip = ClipRange{0.0f, 6.0f}};
        y = b.Op(OpType::kDiv, {b.Op(OpType::kMul, {x, b.Add(add)}), b.Scalar(6.0f)});
        break;
      }
    }
    Graph graph = b.Finish(y);
    EXPECT_GE(Apply(graph, RecogniseSwish), 1) << form;
    EXPECT_EQ(graph.nodes.size(), 2u) << form;
    EXPECT_EQ(graph.nodes[1].op, OpType::kHardSwish) << form;
  }
}

TEST(HardSwishTest, LeavesOtherConstantsAlone) {
  GraphBuilder b({4, 3, 3});
  const ValueId x = b.Conv(b.input(), 4);
  const ValueId gate = b.Clip(b.Op(OpType::kAdd, {x, b.Scalar(2.0f)}), 0.0f, 6.0f);
  Graph graph = b.Finish(b.Op(OpType::kDiv, {b.Op(OpType::kMul, {x, gate}), b.Scalar(6.0f)}));
  EXPECT_EQ(Apply(graph, RecogniseSwish), 0);
}

TEST(HardSwishTest, RecognisesTheGateOfAnotherValueAsHardSigmoid) {
  GraphBuilder b({4, 3, 3});
  const ValueId x = b.Conv(b.input(), 4), z = b.Conv(b.input(), 4);
  const ValueId gate = b.Clip(b.Op(OpType::kAdd, {z, b.Scalar(3.0f)}), 0.0f, 6.0f);
  Graph graph = b.Finish(b.Op(OpType::kMul, {x, b.Op(OpType::kDiv, {gate, b.Scalar(6.0f)})}));
  EXPECT_EQ(Apply(graph, RecogniseSwish), 1);
  EXPECT_EQ(Count(graph, OpType::kHardSigmoid), 1);
  EXPECT_EQ(Count(graph, OpType::kHardSwish), 0);
}

TEST(SiluTest, IsAValueTimesItsOwnSigmoid) {
  for (bool swapped : {false, true}) {
    GraphBuilder b({4, 3, 3});
    const ValueId x = b.Conv(b.input(), 4), gate = b.Op(OpType::kSigmoid, {x});
    Graph graph = b.Finish(swapped ? b.Op(OpType::kMul, {gate, x}) : b.Op(OpType::kMul, {x, gate}));
    EXPECT_EQ(Apply(graph, RecogniseSwish), 1);
    ASSERT_EQ(graph.nodes.size(), 2u);
    EXPECT_EQ(graph.nodes[1].op, OpType::kSilu);
    EXPECT_EQ(graph.nodes[1].inputs, std::vector<ValueId>{x});
  }
}

TEST(SiluTest, NeedsItsOwnSigmoidForItselfAlone) {
  GraphBuilder b({4, 3, 3});
  const ValueId x = b.Conv(b.input(), 4), z = b.Conv(b.input(), 4);
  Graph other = b.Finish(b.Op(OpType::kMul, {x, b.Op(OpType::kSigmoid, {z})}));
  EXPECT_EQ(Apply(other, RecogniseSwish), 0);
  GraphBuilder c({4, 3, 3});
  const ValueId y = c.Conv(c.input(), 4), gate = c.Op(OpType::kSigmoid, {y});
  Graph shared = c.Finish(c.Op(OpType::kAdd, {c.Op(OpType::kMul, {y, gate}), gate}));
  EXPECT_EQ(Apply(shared, RecogniseSwish), 0);
}

// ---- FuseActivations ----

TEST(FuseActivationsTest, ComposesAChainOfClips) {
  GraphBuilder b({4, 3, 3});
  Graph graph = b.Finish(b.Clip(b.Clip(b.Relu(b.Conv(b.input(), 4)), -1.0f, 0.75f), 0.25f, 2.0f));
  EXPECT_EQ(Apply(graph, FuseActivations), 3);
  ASSERT_EQ(graph.nodes.size(), 1u);
  EXPECT_EQ(graph.nodes[0].clip, (ClipRange{0.25f, 0.75f}));
}

TEST(FuseActivationsTest, FusesIntoAddAndBatchNormButNotWhereOthersRead) {
  GraphBuilder b({4, 3, 3});
  const ValueId conv = b.Conv(b.input(), 4);
  const ValueId relu = b.Relu(conv);  // conv is read below too
  const ValueId sum = b.Relu(b.Op(OpType::kAdd, {relu, conv}));
  const ValueId pooled = b.Relu(b.Op(OpType::kGlobalAveragePool, {b.Relu(b.BatchNorm(sum))}));
  Graph graph = b.Finish(pooled);
  EXPECT_EQ(Apply(graph, FuseActivations), 2);
  EXPECT_EQ(Count(graph, OpType::kRelu), 2);
  EXPECT_EQ(graph.nodes[2].clip, (ClipRange{0.0f, kInfinity}));
}

// ---- FusePads ----

TEST(FusePadsTest, GivesZeroPaddingToConvolutionsAndAveragePools) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.Conv(b.Pad(b.input(), {0, 1, 2}, {0, 0, 1}), 4, 3, {.pad_top = 1});
  x = b.Pool(OpType::kAveragePool, b.Pad(x, {0, 1, 1}, {0, 1, 1}), {.kernel_h = 3, .kernel_w = 3});
  Graph graph = b.Finish(x);
  EXPECT_EQ(Apply(graph, FusePads), 2);
  EXPECT_EQ(graph.nodes[0].conv.pad_top, 2);
  EXPECT_EQ(graph.nodes[0].conv.pad_left, 2);
  EXPECT_EQ(graph.nodes[0].conv.pad_bottom, 0);
  EXPECT_EQ(graph.nodes[0].conv.pad_right, 1);
  EXPECT_TRUE(graph.nodes[1].pool.count_include_pad);
}

TEST(FusePadsTest, KeepsPadsThatAreNotZerosOfRowsAndColumns) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.Conv(b.Pad(b.input(), {1, 0, 0}, {0, 0, 0}), 4, 3);
  x = b.Conv(b.Pad(x, {0, 1, 1}, {0, 1, 1}, 0.5f), 4, 3);
  x = b.Pool(OpType::kMaxPool, b.Pad(x, {0, 1, 1}, {0, 1, 1}), {.kernel_h = 3, .kernel_w = 3});
  x = b.Pool(OpType::kAveragePool, b.Pad(x, {0, 1, 1}, {0, 1, 1}),
             {.kernel_h = 3, .kernel_w = 3, .pad_top = 1});
  x = b.Pool(OpType::kAveragePool, b.Pad(x, {0, 3, 3}, {0, 3, 3}), {.kernel_h = 3, .kernel_w = 3});
  Graph graph = b.Finish(x);
  EXPECT_EQ(Apply(graph, FusePads), 0);
}

// ---- FuseResidualAdds ----

TEST(FuseResidualAddsTest, MovesTheConvolutionBehindASkipThatIsComputedLater) {
  GraphBuilder b({4, 6, 6});
  const ValueId main = b.Conv(b.input(), 4);
  const ValueId skip = b.Op(OpType::kSigmoid, {b.input()});
  Graph graph = b.Finish(b.Relu(b.Op(OpType::kAdd, {main, skip})));
  Apply(graph, FuseActivations);
  EXPECT_EQ(Apply(graph, FuseResidualAdds), 1);
  ASSERT_EQ(graph.nodes.size(), 2u);
  EXPECT_EQ(graph.nodes[0].op, OpType::kSigmoid);
  EXPECT_TRUE(graph.nodes[1].has_residual());
  EXPECT_EQ(graph.nodes[1].clip, (ClipRange{0.0f, kInfinity}));
}

TEST(FuseResidualAddsTest, TheLaterOfTwoConvolutionsTakesTheOther) {
  for (bool swapped : {false, true}) {
    GraphBuilder b({4, 6, 6});
    const ValueId first = b.Conv(b.input(), 4), second = b.Conv(b.input(), 4);
    Graph graph = b.Finish(swapped ? b.Op(OpType::kAdd, {second, first})
                                   : b.Op(OpType::kAdd, {first, second}));
    EXPECT_EQ(Apply(graph, FuseResidualAdds), 1);
    ASSERT_EQ(graph.nodes.size(), 2u);
    EXPECT_EQ(graph.nodes[0].name, "Conv_0");
    EXPECT_EQ(graph.nodes[1].name, "Conv_1");
    EXPECT_TRUE(graph.nodes[1].has_residual());
  }
}

TEST(FuseResidualAddsTest, FusesAChainOfBlocks) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.Conv(b.input(), 4);
  for (int block = 0; block < 3; ++block) {
    const ValueId main = b.Conv(b.Relu(b.Conv(x, 4)), 4);
    x = b.Relu(b.Op(OpType::kAdd, {block == 1 ? b.Conv(x, 4) : x, main}));
  }
  Graph graph = b.Finish(x);
  Apply(graph, FuseActivations);
  EXPECT_EQ(Apply(graph, FuseResidualAdds), 3);
  EXPECT_EQ(Count(graph, OpType::kAdd), 0);
}

TEST(FuseResidualAddsTest, OneConvolutionTakesOneResidual) {
  GraphBuilder b({4, 6, 6});
  const ValueId inner = b.Op(OpType::kAdd, {b.Conv(b.input(), 4), b.input()});
  Graph graph = b.Finish(b.Op(OpType::kAdd, {inner, b.Relu(b.input())}));
  EXPECT_EQ(Apply(graph, FuseResidualAdds), 1);
  EXPECT_EQ(Count(graph, OpType::kAdd), 1);
}

TEST(FuseResidualAddsTest, KeepsAddsThatDoNotFit) {
  GraphBuilder b({4, 6, 6});
  const ValueId x = b.input();
  ValueId y = b.Op(OpType::kAdd, {b.Relu(b.Conv(x, 4)), x});                      // own activation
  y = b.Op(OpType::kAdd, {y, b.Conv(b.Op(OpType::kGlobalAveragePool, {x}), 4)});  // broadcast
  const ValueId twice = b.Conv(x, 4);
  y = b.Op(OpType::kAdd, {b.Op(OpType::kAdd, {twice, twice}), y});
  y = b.Op(OpType::kAdd, {b.Conv(y, 4), b.Constant(b.Random({4, 6, 6}))});  // constant
  Graph graph = b.Finish(y);
  Apply(graph, FuseActivations);
  EXPECT_EQ(Apply(graph, FuseResidualAdds), 0);
}

// ---- RemoveDeadCode ----

TEST(RemoveDeadCodeTest, RemovesIdentitiesDeadBranchesAndUnusedValues) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.Conv(b.Reshape(b.input(), {4, 6, 6}), 4);
  b.Relu(b.Conv(x, 7));  // nobody reads it
  b.Scalar(1.0f);
  x = b.Add({.op = OpType::kTranspose, .inputs = {x}, .perm = {0, 1, 2}});
  x = b.Pool(OpType::kAveragePool, x, {});
  Graph graph = b.Finish(b.Reshape(x, {4, 6, 6}));
  const std::string name = graph.values[graph.output].name;
  EXPECT_EQ(Apply(graph, RemoveDeadCode), 6);
  EXPECT_EQ(graph.nodes.size(), 1u);
  EXPECT_EQ(graph.values.size(), 2u);
  EXPECT_EQ(graph.values[graph.output].name, name);
}

TEST(RemoveDeadCodeTest, KeepsAnIdentityOfTheInputThatIsTheOutput) {
  GraphBuilder b({4});
  Graph graph = b.Finish(b.Reshape(b.input(), {4}));
  EXPECT_EQ(Apply(graph, RemoveDeadCode), 0);
  EXPECT_EQ(graph.nodes.size(), 1u);
}

TEST(RemoveDeadCodeTest, KeepsTransposesAndReshapesThatChangeSomething) {
  GraphBuilder b({4, 6, 6});
  ValueId x = b.Add({.op = OpType::kTranspose, .inputs = {b.input()}, .perm = {0, 2, 1}});
  Graph graph = b.Finish(b.Reshape(x, {6, 4, 6}));
  EXPECT_EQ(Apply(graph, RemoveDeadCode), 0);
}

// ---- Optimize ----

// A random network of the kinds of layers that the passes rewrite.
Graph RandomGraph(uint32_t seed) {
  GraphBuilder b({4, 5, 5}, seed);
  std::vector<ValueId> images = {b.input()};  // all [4,5,5]
  const int layers = 4 + b.Below(10);
  for (int i = 0; i < layers; ++i) {
    const ValueId x = images[images.size() - 1 - b.Below(std::min<int>(3, images.size()))];
    const ValueId z = images[b.Below(static_cast<int>(images.size()))];
    ValueId y = kNoValue;
    switch (b.Below(12)) {
      case 0:
        y = b.Conv(x, 4, 3,
                   {.pad_top = 1,
                    .pad_left = 1,
                    .pad_bottom = 1,
                    .pad_right = 1,
                    .groups = 1 << b.Below(3)});
        break;
      case 1:
        y = b.BatchNorm(b.Conv(x, 4));
        break;
      case 2:
        y = b.BatchNorm(x);
        break;
      case 3:
        y = b.Relu(x);
        break;
      case 4:
        y = b.Clip(x, -1.0f, 2.0f);
        break;
      case 5:
        y = b.Op(OpType::kAdd, {x, z});
        break;
      case 6:
        y = b.Op(OpType::kAdd, {z, b.Conv(x, 4)});
        break;
      case 7:
        y = b.Op(OpType::kMul, {b.Constant(b.Random({4, 1, 1})), x});
        break;
      case 8:
        y = b.Conv(b.Pad(x, {0, 1, 0}, {0, 1, 2}), 4, 3);
        break;
      case 9:
        y = b.Conv(b.Concat({x, z}), 4);
        break;
      case 10: {
        const ValueId gate = b.Clip(b.Op(OpType::kAdd, {x, b.Scalar(3.0f)}), 0.0f, 6.0f);
        y = b.Op(OpType::kDiv, {b.Op(OpType::kMul, {x, gate}), b.Scalar(6.0f)});
        break;
      }
      default:
        y = b.Reshape(b.Reshape(x, {100}), {4, 5, 5});
    }
    // Keeps magnitudes bounded, so that rounding stays far below the tolerance.
    if (b.Below(3) == 0) y = b.Clip(y, -8.0f, 8.0f);
    images.push_back(y);
  }
  ValueId out = b.Op(OpType::kGlobalAveragePool, {images.back()});
  return b.Finish(b.FullyConnected(b.Reshape(out, {4}), 3));
}

TEST(OptimizeTest, KeepsTheFunctionOfRandomNetworks) {
  int residuals = 0, folded = 0, swishes = 0;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    SCOPED_TRACE(seed);
    Graph graph = RandomGraph(seed);
    RemoveDeadCode(graph);
    const int norms = Count(graph, OpType::kBatchNorm);
    Apply(graph, [](Graph& g) {
      Optimize(g);
      return 0;
    });
    if (::testing::Test::HasFailure()) return;
    for (const Node& node : graph.nodes) residuals += node.has_residual();
    folded += norms - Count(graph, OpType::kBatchNorm);
    swishes += Count(graph, OpType::kHardSwish);
  }
  // The networks did contain what the passes look for.
  EXPECT_GT(residuals, 50);
  EXPECT_GT(folded, 50);
  EXPECT_GT(swishes, 20);
}

}  // namespace
}  // namespace tern::graph
