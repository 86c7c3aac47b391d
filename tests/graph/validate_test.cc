#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "server/graph/graph.h"
#include "tests/graph/graph_builder.h"

namespace tern::graph {
namespace {

using tern::testing::GraphBuilder;
using ::testing::HasSubstr;

// conv (4 -> 8, 3x3) -> + constant -> max pool -> flatten -> fully connected -> 5 classes.
Graph Good() {
  GraphBuilder b({4, 8, 8});
  ValueId x =
      b.Conv(b.input(), 8, 3, {.pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1});
  x = b.Op(OpType::kAdd, {x, b.Constant(b.Random({8, 1, 1}))});
  x = b.Pool(OpType::kMaxPool, x, {.kernel_h = 2, .kernel_w = 2, .stride_h = 2, .stride_w = 2});
  x = b.Reshape(x, {128});
  return b.Finish(b.FullyConnected(x, 5));
}

// The fully connected layer of Good() in ternary clusters of 4 of its 128 channels.
Graph Quantized() {
  Graph graph = Good();
  Node& node = graph.nodes.back();
  QuantizedWeights q{.scheme = WeightScheme::kTernaryCluster, .cluster_size = 4};
  q.codes = Tensor(DType::kS8, {5, 128});
  q.codes.data<int8_t>()[3] = -1;
  q.cluster_scales = Tensor(DType::kS8, {5, 32});
  for (int8_t& scale : q.cluster_scales.data<int8_t>()) scale = 127;
  q.steps.assign(5, 0.01f);
  node.quantized = q;
  node.weight = Tensor();
  return graph;
}

TEST(ValidateTest, AcceptsAGoodGraph) {
  EXPECT_EQ(Validate(Good()), absl::OkStatus());
  EXPECT_EQ(Validate(Quantized()), absl::OkStatus());
}

struct Damage {
  const char* name;
  std::function<void(Graph&)> apply;
  const char* message;
  bool quantized = false;
};

class ValidateDamageTest : public ::testing::TestWithParam<Damage> {};

TEST_P(ValidateDamageTest, IsFoundAndNamed) {
  Graph graph = GetParam().quantized ? Quantized() : Good();
  GetParam().apply(graph);
  const absl::Status status = Validate(graph);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

constexpr int kHuge = std::numeric_limits<int>::max();

INSTANTIATE_TEST_SUITE_P(
    All, ValidateDamageTest,
    ::testing::Values(
        Damage{"InputIdOutOfRange", [](Graph& g) { g.nodes[0].inputs[0] = 99; }, "does not exist"},
        Damage{"NegativeInputId", [](Graph& g) { g.nodes[0].inputs[0] = -2; }, "does not exist"},
        Damage{"OutputIdOutOfRange", [](Graph& g) { g.nodes[0].output = 99; }, "does not exist"},
        Damage{"NoGraphOutput", [](Graph& g) { g.output = kNoValue; }, "is not one of"},
        Damage{"OutputIsTheInput", [](Graph& g) { g.output = g.input; }, "no node computes"},
        Damage{"WrongOrder", [](Graph& g) { std::swap(g.nodes[0], g.nodes[1]); },
               "before it is computed"},
        Damage{"Cycle", [](Graph& g) { g.nodes[0].inputs[0] = g.nodes[2].output; },
               "before it is computed"},
        Damage{"WrittenTwice", [](Graph& g) { g.nodes.insert(g.nodes.begin(), g.nodes[0]); },
               "already has a value"},
        Damage{"WritesTheInput", [](Graph& g) { g.nodes[0].output = g.input; },
               "already has a value"},
        Damage{"WrongDeclaredShape",
               [](Graph& g) { g.values[g.nodes[0].output].shape = {8, 8, 7}; }, "is declared"},
        Damage{"InfiniteWeight",
               [](Graph& g) { g.nodes[0].weight.data<float>()[5] = HUGE_VALF; },
               "a weight is infinite or not a number"},
        Damage{"BiasThatIsNoNumber", [](Graph& g) { g.nodes.back().bias.data<float>()[0] = NAN; },
               "a bias is infinite or not a number"},
        Damage{"InfiniteBias",
               [](Graph& g) { g.nodes.back().bias.data<float>()[4] = -HUGE_VALF; },
               "a bias is infinite or not a number", true},
        Damage{"InfiniteConstant",
               [](Graph& g) {
                 g.values[g.nodes[1].inputs[1]].constant->data<float>()[3] = HUGE_VALF;
               },
               "constant is infinite or not a number"},
        Damage{"ZeroExtent", [](Graph& g) { g.values[g.input].shape = {4, 0, 8}; }, "below 1"},
        Damage{"NegativeExtent", [](Graph& g) { g.values[g.input].shape = {4, -8, 8}; },
               "below 1"},
        Damage{"ExtentsThatOverflow",
               [](Graph& g) {
                 g.values[g.input].shape = {int64_t{1} << 32, int64_t{1} << 32, 1};
               },
               "exceeds"},
        Damage{"EndlessRank",
               [](Graph& g) { g.values[g.input].shape = Shape(std::vector<int64_t>(40, 1)); },
               "rank"},
        Damage{"ZeroStride", [](Graph& g) { g.nodes[0].conv.stride_h = 0; }, "must be positive"},
        Damage{"NegativeDilation", [](Graph& g) { g.nodes[0].conv.dilation_w = -1; },
               "must be positive"},
        Damage{"HugeDilation", [](Graph& g) { g.nodes[0].conv.dilation_w = kHuge; },
               "wanted at most"},
        Damage{"NegativePad", [](Graph& g) { g.nodes[0].conv.pad_left = -1; },
               "must not be negative"},
        Damage{"HugePads",
               [](Graph& g) { g.nodes[0].conv.pad_left = g.nodes[0].conv.pad_top = kHuge; },
               "wanted at most"},
        Damage{"GroupsThatDoNotDivide", [](Graph& g) { g.nodes[0].conv.groups = 3; },
               "do not divide"},
        Damage{"ZeroGroups", [](Graph& g) { g.nodes[0].conv.groups = 0; }, "do not divide"},
        Damage{"KernelThatDoesNotFit",
               [](Graph& g) { g.nodes[0].weight = Tensor(DType::kF32, {8, 4, 11, 3}); },
               "does not fit"},
        Damage{"NoWeight", [](Graph& g) { g.nodes[0].weight = Tensor(); }, "weight has shape"},
        Damage{"EmptyWeight", [](Graph& g) { g.nodes[0].weight = Tensor(DType::kF32, {8, 4, 0, 3}); },
               "must be positive"},
        Damage{"IntegerWeight", [](Graph& g) { g.nodes[0].weight = Tensor(DType::kS32, {8, 4, 3, 3}); },
               "wanted f32"},
        Damage{"ShortBias", [](Graph& g) { g.nodes[0].bias = Tensor(DType::kF32, {7}); },
               "bias is"},
        Damage{"WeightWhereNoneBelongs",
               [](Graph& g) { g.nodes[2].weight = Tensor(DType::kF32, {1}); }, "has weights"},
        Damage{"ActivationWhereNoneBelongs", [](Graph& g) { g.nodes[2].clip = ClipRange{0, 1}; },
               "fused activation"},
        Damage{"ReversedClip", [](Graph& g) { g.nodes[0].clip = ClipRange{1, 0}; }, "clips to"},
        Damage{"ClipOfNan", [](Graph& g) { g.nodes[0].clip = ClipRange{0, NAN}; }, "clips to"},
        Damage{"PoolPadAsLargeAsTheKernel", [](Graph& g) { g.nodes[2].pool.pad_top = 2; },
               "smaller than the kernel"},
        Damage{"ReshapeOfAnotherSize", [](Graph& g) { g.values[g.nodes[3].output].shape = {127}; },
               "cannot turn"},
        Damage{"ConstantOfAnotherShape",
               [](Graph& g) { g.values[g.nodes[1].inputs[1]].constant = Tensor(DType::kF32, {8}); },
               "its constant is"},
        Damage{"ConstantIntoAConvolution",
               [](Graph& g) { g.values[g.input].constant = Tensor(DType::kF32, {4, 8, 8}); },
               "is a constant"},
        Damage{"OnlyConstants", [](Graph& g) { g.nodes[1].inputs[0] = g.nodes[1].inputs[1]; },
               "only constant inputs"},
        Damage{"TooManyInputs", [](Graph& g) { g.nodes[2].inputs.push_back(g.input); },
               "got 2 inputs"},
        Damage{"NoInputs", [](Graph& g) { g.nodes[2].inputs.clear(); }, "only constant"},
        Damage{"ZeroScale", [](Graph& g) { g.values[g.input].quant = QuantParams{0.0f, 0}; },
               "no quantisation"},
        Damage{"ZeroPointBeyondACode",
               [](Graph& g) { g.values[g.input].quant = QuantParams{1.0f, 256}; },
               "no quantisation"},
        Damage{"UnknownOperator", [](Graph& g) { g.nodes[2].op = static_cast<OpType>(200); },
               "unknown operator"},
        Damage{"CodeBeyondTheScheme",
               [](Graph& g) { g.nodes.back().quantized->codes.data<int8_t>()[5] = 2; },
               "weight code is 2", true},
        Damage{"ZeroClusterScale",
               [](Graph& g) { g.nodes.back().quantized->cluster_scales.data<int8_t>()[5] = 0; },
               "cluster scale is 0", true},
        Damage{"NegativeClusterScale",
               [](Graph& g) { g.nodes.back().quantized->cluster_scales.data<int8_t>()[5] = -3; },
               "cluster scale is -3", true},
        Damage{"MissingClusterScales",
               [](Graph& g) { g.nodes.back().quantized->cluster_scales = Tensor(); },
               "cluster scales are", true},
        Damage{"ZeroClusterSize", [](Graph& g) { g.nodes.back().quantized->cluster_size = 0; },
               "cluster size", true},
        Damage{"MissingSteps", [](Graph& g) { g.nodes.back().quantized->steps.pop_back(); },
               "steps", true},
        Damage{"InfiniteStep",
               [](Graph& g) {
                 g.nodes.back().quantized->steps[0] = std::numeric_limits<float>::infinity();
               },
               "step is", true},
        Damage{"UnknownScheme",
               [](Graph& g) { g.nodes.back().quantized->scheme = static_cast<WeightScheme>(9); },
               "unknown weight scheme", true},
        Damage{"BothKindsOfWeights",
               [](Graph& g) { g.nodes.back().weight = Tensor(DType::kF32, {5, 128}); },
               "both float and quantised", true}),
    [](const auto& info) { return info.param.name; });

// Networks that were quantised elsewhere use 8 bits, those of u8 weights with zero point 128 all of
// them.
TEST(ValidateTest, Int8CodesMayUseEightBits) {
  GraphBuilder b({3});
  Graph graph = b.Finish(b.FullyConnected(b.input(), 1));
  graph.nodes[0].weight = Tensor();
  graph.nodes[0].quantized =
      QuantizedWeights{.codes = Tensor::Of<int8_t>({1, 3}, {127, -127, 5}), .steps = {1.0f}};
  EXPECT_EQ(Validate(graph), absl::OkStatus());
  graph.nodes[0].quantized->codes.data<int8_t>()[2] = -128;
  EXPECT_EQ(Validate(graph), absl::OkStatus());
}

TEST(ValidateTest, RejectsWeightsWhoseSumsOverflow) {
  // 2^31 / 255 / 63 = 133677 products of the largest int8 code are too many.
  GraphBuilder b({133680});
  Graph graph = b.Finish(b.FullyConnected(b.input(), 1));
  QuantizedWeights q{.codes = Tensor(DType::kS8, {1, 133680}), .steps = {1.0f}};
  for (int8_t& code : q.codes.data<int8_t>()) code = 63;
  graph.nodes[0].weight = Tensor();
  graph.nodes[0].quantized = q;
  EXPECT_THAT(std::string(Validate(graph).message()), HasSubstr("overflow"));
  for (int i = 0; i < 10; ++i) graph.nodes[0].quantized->codes.data<int8_t>()[i] = 0;
  EXPECT_EQ(Validate(graph), absl::OkStatus());
}

}  // namespace
}  // namespace tern::graph
