#include "server/graph/fixed_point.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"

namespace tern::graph {
namespace {

using engine::testing::GraphBuilder;
using engine::testing::NamedGraph;
using engine::testing::QuantizeOptions;
using ::testing::HasSubstr;

// conv, conv with residual, addition, fully connected; values in -1..1 or so.
Graph Quantized(WeightScheme scheme) {
  GraphBuilder b({8, 6, 6});
  const ValueId x = b.Conv(b.input(), 8, 3, engine::testing::Strided(1, 1));
  const ValueId y = b.Conv(x, 8, 1, {}, engine::testing::kReluRange, x);
  const ValueId z = b.Binary(OpType::kAdd, x, y);
  Graph graph = b.Finish(b.FullyConnected(b.Flatten(z), 5));
  engine::testing::Ranges ranges(graph.values.size(), {-1.3f, 0.9f});
  QuantizeOptions options;
  options.scheme = scheme;
  return QuantizeGraph(std::move(graph), ranges, options);
}

Graph FixedPoint(WeightScheme scheme = WeightScheme::kInt8) {
  Graph graph = Quantized(scheme);
  EXPECT_EQ(RoundToFixedPoint(graph), absl::OkStatus());
  return graph;
}

TEST(FixedPointTest, AnyQuantisedNetworkGoesOnTheGridOnce) {
  for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kInt4Cluster,
                              WeightScheme::kInt3Cluster, WeightScheme::kTernaryCluster}) {
    const Graph before = Quantized(scheme);
    Graph graph = FixedPoint(scheme);
    EXPECT_EQ(graph.arithmetic, Arithmetic::kFixedPoint);
    EXPECT_EQ(Validate(graph), absl::OkStatus());
    const Graph once = graph;
    ASSERT_EQ(RoundToFixedPoint(graph), absl::OkStatus());
    for (size_t id = 0; id < graph.values.size(); ++id) {
      EXPECT_EQ(graph.values[id].quant, once.values[id].quant);
    }
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      if (!graph.nodes[i].quantized) continue;
      const QuantizedWeights& w = *graph.nodes[i].quantized;
      EXPECT_EQ(w.steps, once.nodes[i].quantized->steps);
      const auto bias = std::as_const(graph).nodes[i].bias.data<float>();
      const auto first = once.nodes[i].bias.data<float>();
      EXPECT_TRUE(std::equal(bias.begin(), bias.end(), first.begin()));
      // Near what they were: at most half of the smallest step, or of the smallest scale.
      const Tensor real = Dequantize(w), was = Dequantize(*before.nodes[i].quantized);
      for (int64_t k = 0; k < real.elements(); ++k) {
        EXPECT_NEAR(real.data<float>()[k], was.data<float>()[k],
                    0.1f + 0.3f * std::abs(was.data<float>()[k]));
      }
    }
  }
}

TEST(FixedPointTest, ScalesGoUpToPowersOfTwoThatCoverTheRange) {
  Graph graph = Quantized(WeightScheme::kInt8);
  graph.values[graph.input].quant = QuantParams{0.3f, 0};
  const ValueId x = graph.nodes[0].output;
  graph.values[x].quant = QuantParams{0.25f, 30};  // -7.5 .. 56.25
  ASSERT_EQ(RoundToFixedPoint(graph), absl::OkStatus());
  EXPECT_EQ(graph.values[graph.input].quant, (QuantParams{0.5f, 0}));
  EXPECT_EQ(graph.values[x].quant, (QuantParams{0.5f, 128}));
}

// Scales that cannot stand side by side are brought together, whatever they are.
TEST(FixedPointTest, ScalesFarApartAreRaised) {
  Graph graph = Quantized(WeightScheme::kTernaryCluster);
  graph.values[graph.nodes[0].output].quant = QuantParams{1e-25f, 0};
  graph.values[graph.nodes[1].output].quant = QuantParams{1e20f, 0};
  for (float& step : graph.nodes[1].quantized->steps) step = 1e-28f;
  ASSERT_EQ(RoundToFixedPoint(graph), absl::OkStatus());
  EXPECT_EQ(Validate(graph), absl::OkStatus());
  EXPECT_EQ(graph.values[graph.nodes[1].output].quant->scale, std::ldexp(1.0f, 67));
}

TEST(FixedPointTest, ALayerInFloatIsRefused) {
  Graph graph = Quantized(WeightScheme::kInt8);
  graph.values[graph.nodes[0].output].quant.reset();
  EXPECT_EQ(RoundToFixedPoint(graph).code(), absl::StatusCode::kFailedPrecondition);
}

struct Damage {
  const char* name;
  std::function<void(Graph&)> apply;
  const char* message;
};

class FixedPointDamageTest : public ::testing::TestWithParam<Damage> {};

TEST_P(FixedPointDamageTest, IsFoundAndNamed) {
  Graph graph = FixedPoint();
  GetParam().apply(graph);
  const absl::Status status = Validate(graph);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

float& Scale(Graph& graph, int node) { return graph.values[graph.nodes[node].output].quant->scale; }

INSTANTIATE_TEST_SUITE_P(
    All, FixedPointDamageTest,
    ::testing::Values(
        Damage{"ScaleNoPowerOfTwo", [](Graph& g) { Scale(g, 0) *= 1.5f; }, "power of two"},
        Damage{"ScaleOutOfRange", [](Graph& g) { Scale(g, 0) = 0x1p101f; }, "power of two"},
        Damage{"DenormalScale", [](Graph& g) { Scale(g, 0) = 0x1p-140f; }, "power of two"},
        Damage{"ZeroPoint", [](Graph& g) { g.values[g.input].quant->zero_point = 127; },
               "0 or 128"},
        Damage{"FloatWeights",
               [](Graph& g) {
                 g.nodes[0].weight = Dequantize(*g.nodes[0].quantized);
                 g.nodes[0].quantized.reset();
               },
               "weights are float"},
        Damage{"FloatInput", [](Graph& g) { g.values[g.nodes[0].output].quant.reset(); },
               "is float"},
        Damage{"StepOffTheGrid", [](Graph& g) { g.nodes[0].quantized->steps[1] *= 1.0001f; },
               "times one power of two"},
        Damage{"StepBeyondTheMultipliers",
               [](Graph& g) {
                 auto& steps = g.nodes[0].quantized->steps;
                 steps[0] = 256 * steps[1];
                 steps[1] *= 1;
                 steps[2] = steps[1] / 2;
               },
               "times one power of two"},
        Damage{"BiasOffTheGrid", [](Graph& g) { g.nodes[0].bias.data<float>()[2] = 1e-9f; },
               "whole multiple"},
        Damage{"BiasTooLarge", [](Graph& g) { g.nodes[0].bias.data<float>()[2] = 0x1p60f; },
               "whole multiple"},
        Damage{"BiasNoNumber",
               [](Graph& g) {
                 g.nodes[0].bias.data<float>()[2] = std::numeric_limits<float>::quiet_NaN();
               },
               "not a number"},
        Damage{"ResultTooCoarse", [](Graph& g) { Scale(g, 0) = 0x1p60f; }, "more than 2^40"},
        Damage{"ResultTooFine", [](Graph& g) { Scale(g, 0) = 0x1p-60f; }, "more than 2^24"},
        Damage{"OperandsOfAnAdditionFarApart",
               [](Graph& g) {
                 for (Node& node : g.nodes) node.inputs.resize(1 + (node.op == OpType::kAdd));
                 Scale(g, 1) = 0x1p24f;
                 Scale(g, 2) = 0x1p24f;
                 Scale(g, 3) = 0x1p24f;
                 Scale(g, 0) = 0x1p-20f;
                 for (int i : {0, 1}) {
                   for (float& step : g.nodes[i].quantized->steps) step = i == 0 ? 1.0f : 16.0f;
                   for (float& bias : g.nodes[i].bias.data<float>()) bias = 0;
                 }
               },
               "apart"},
        Damage{"UnknownArithmetic", [](Graph& g) { g.arithmetic = static_cast<Arithmetic>(2); },
               "unknown arithmetic"}),
    [](const auto& info) { return info.param.name; });

// The worst that Validate lets through: every partial sum in any order stays below 2^63.
TEST(FixedPointTest, TheLargestConstantsDoNotOverflow) {
  GraphBuilder b({66000});
  Graph graph = b.Finish(b.FullyConnected(b.input(), 1));
  Node& node = graph.nodes[0];
  QuantizedWeights q;
  q.scheme = WeightScheme::kTernaryCluster;
  q.cluster_size = 1;
  q.codes = Tensor(DType::kS8, {1, 66000});
  q.cluster_scales = Tensor(DType::kS8, {1, 66000});
  for (int8_t& code : q.codes.data<int8_t>()) code = -1;
  for (int8_t& scale : q.cluster_scales.data<int8_t>()) scale = 127;
  q.steps = {127.0f};
  node.quantized = q;
  node.weight = Tensor();
  graph.values[graph.input].quant = QuantParams{1.0f, 128};
  graph.values[graph.output].quant = QuantParams{0x1p-24f, 128};
  node.bias.data<float>()[0] = 0x1p32f;  // 2^56 units
  graph.arithmetic = Arithmetic::kFixedPoint;
  ASSERT_EQ(Validate(graph), absl::OkStatus());
  const FixedPointLayer layer = FixedPointOf(graph, node);
  EXPECT_EQ(layer.multiplier[0], 127 << 24);
  EXPECT_FALSE(layer.narrow());
  const __int128 product = __int128{255} * 127 * 66000 * layer.multiplier[0];
  const __int128 offset =
      __int128{128} * 127 * 66000 * layer.multiplier[0] + (__int128{1} << 56) + 128;
  EXPECT_EQ(static_cast<__int128>(layer.offset[0]) == offset, true);
  EXPECT_TRUE(product + offset + (__int128{1} << 48) <= std::numeric_limits<int64_t>::max());
}

// 1 / count to 31 bits: the mean of any codes is within a thousandth of a code.
TEST(FixedPointTest, MeansAreExactToAThousandthOfACode) {
  const QuantParams x{0.5f, 0};
  for (int64_t count : {1, 2, 3, 7, 49, 196, 50176, 1 << 20, 1 << 23}) {
    const FixedPointMap map = FixedPointMean(x, x, count);
    for (int64_t code : {1, 100, 254}) {
      // Just below and above the point where the result changes.
      const double at = (static_cast<double>(code) + 0.5) * static_cast<double>(count);
      const double margin = 0.001 * static_cast<double>(count);
      EXPECT_EQ(map(static_cast<int64_t>(std::floor(at - margin))), code) << count;
      EXPECT_EQ(map(static_cast<int64_t>(std::ceil(at + margin))), code + 1) << count;
    }
  }
}

}  // namespace
}  // namespace tern::graph
