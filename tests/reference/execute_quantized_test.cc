#include <gtest/gtest.h>

#include <cmath>

#include "server/reference/execute.h"
#include "server/tensor/cluster.h"
#include "tests/graph/graph_builder.h"

namespace tern::reference {
namespace {

using graph::ClipRange;
using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::ValueId;
using tern::testing::GraphBuilder;

using Codes = std::vector<int>;

// Runs and returns the output's codes; the input's quantisation is (1, zero), so its codes
// are the given reals plus zero.
Codes Evaluate(const Graph& graph, const std::vector<float>& input) {
  EXPECT_EQ(graph::Validate(graph), absl::OkStatus());
  const auto values =
      ExecuteQuantized(graph, Tensor::Of(graph.shape(graph.input).WithBatch(1), input));
  EXPECT_TRUE(values.ok()) << values.status();
  const Tensor& y = (*values)[graph.output];
  EXPECT_EQ(y.dtype(), DType::kU8);
  return {y.data<uint8_t>().begin(), y.data<uint8_t>().end()};
}

Node Int8Conv(ValueId x, Shape shape, const std::vector<int8_t>& codes, std::vector<float> steps,
              const std::vector<float>& bias) {
  Node node{.op = OpType::kConv, .inputs = {x}};
  QuantizedWeights q{.codes = Tensor::Of(shape, codes)};
  q.steps = std::move(steps);
  node.quantized = q;
  node.bias = Tensor::Of<float>({shape[0]}, bias);
  return node;
}

TEST(ExecuteQuantizedTest, ConvolutionPadsWithTheZeroPointAndRoundsTiesToEven) {
  GraphBuilder b({1, 1, 2});
  b.graph().values[b.input()].quant = QuantParams{1.0f, 10};
  Node conv = Int8Conv(b.input(), {1, 1, 1, 3}, {1, 2, 3}, {0.5f}, {0.0f});
  conv.conv = {.pad_left = 1, .pad_right = 1};
  const ValueId y = b.Add(conv);
  b.graph().values[y].quant = QuantParams{1.0f, 100};
  // Reals 3 -1 under 1 2 3: (0*1 + 3*2 - 1*3) / 2 = 1.5 and (3*1 - 1*2 + 0) / 2 = 0.5, so
  // 101.5 -> 102 (even) and 100.5 -> 100 (even).
  EXPECT_EQ(Evaluate(b.Finish(y), {3, -1}), (Codes{102, 100}));
}

TEST(ExecuteQuantizedTest, ClusterScalesMultiplyTheirChannels) {
  // N = 2 of 5 channels: blocks of 4 with clusters {0,1} and {2,3}, and {4} alone.
  const ClusterMap map(5, 2);
  ASSERT_EQ(map.clusters(), 3);
  GraphBuilder b({5, 1, 1});
  b.graph().values[b.input()].quant = QuantParams{1.0f, 0};
  Node conv{.op = OpType::kConv, .inputs = {b.input()}};
  QuantizedWeights q{.scheme = WeightScheme::kTernaryCluster, .cluster_size = 2};
  q.codes = Tensor::Of<int8_t>({1, 5, 1, 1}, {1, 1, -1, 0, 1});
  q.cluster_scales = Tensor::Of<int8_t>({1, 3}, {10, 20, 30});
  q.steps = {0.1f};
  conv.quantized = q;
  conv.bias = Tensor::Of<float>({1}, {3.0f});
  const ValueId y = b.Add(conv);
  b.graph().values[y].quant = QuantParams{1.0f, 0};
  // 0.1 * (10*1 + 10*2 - 20*3 + 30*5) + 3 = 15
  EXPECT_EQ(Evaluate(b.Finish(y), {1, 2, 3, 4, 5}), (Codes{15}));
}

TEST(ExecuteQuantizedTest, ResidualAndClipFollowTheDefinition) {
  GraphBuilder b({1, 1, 3});
  b.graph().values[b.input()].quant = QuantParams{1.0f, 5};
  Node conv = Int8Conv(b.input(), {1, 1, 1, 1}, {2}, {1.0f}, {1.0f});
  conv.inputs.push_back(b.input());
  conv.clip = ClipRange{-4.0f, 20.0f};
  const ValueId y = b.Add(conv);
  b.graph().values[y].quant = QuantParams{2.0f, 3};
  // 2x + 1 + x: 10, -8, 34 -> clipped 10, -4, 20 -> / 2 + 3.
  EXPECT_EQ(Evaluate(b.Finish(y), {3, -3, 11}), (Codes{8, 1, 13}));
}

TEST(ExecuteQuantizedTest, LogitsStayFloat) {
  GraphBuilder b({2});
  b.graph().values[b.input()].quant = QuantParams{0.5f, 100};
  Node fc{.op = OpType::kFullyConnected, .inputs = {b.input()}};
  fc.quantized =
      QuantizedWeights{.codes = Tensor::Of<int8_t>({2, 2}, {1, -2, 3, 4}), .steps = {0.25f, 0.5f}};
  fc.bias = Tensor::Of<float>({2}, {0.125f, -1.0f});
  const Graph graph = b.Finish(b.Add(fc));
  const auto values = ExecuteQuantized(graph, Tensor::Of<float>({1, 2}, {1.0f, -2.5f}));
  ASSERT_TRUE(values.ok());
  const Tensor& y = (*values)[graph.output];
  ASSERT_EQ(y.dtype(), DType::kF32);
  // 0.25 * (1 + 5) + 0.125; 0.5 * (3 - 10) - 1: exact in binary.
  EXPECT_EQ(y.data<float>()[0], 1.625f);
  EXPECT_EQ(y.data<float>()[1], -4.5f);
}

TEST(ExecuteQuantizedTest, OperatorsBetweenConvolutionsFollowTheirRows) {
  const QuantParams x{1.0f, 10}, wide{2.0f, 20};
  const auto run = [&](auto make, QuantParams y, std::vector<float> input) {
    GraphBuilder b({2, 1, 2});
    b.graph().values[b.input()].quant = x;
    const ValueId out = make(b);
    b.graph().values[out].quant = y;
    return Evaluate(b.Finish(out), input);
  };
  const std::vector<float> in = {-3, 5, 8, -10};  // codes 7 15 18 0
  EXPECT_EQ(run(
                [](auto& b) {
                  return b.Op(OpType::kAdd, {b.input(), b.input()});
                },
                wide, in),
            (Codes{17, 25, 28, 10}));
  EXPECT_EQ(run(
                [](auto& b) {
                  return b.Op(OpType::kMul, {b.input(), b.input()});
                },
                wide, in),
            (Codes{24, 32, 52, 70}));  // 9/2 -> 4.5 + 20 -> 24 (even); 25/2 + 20 = 32.5 -> 32
  EXPECT_EQ(run(
                [](auto& b) {
                  return b.Concat({b.input(), b.input()});
                },
                wide, in),
            (Codes{18, 22, 24, 15, 18, 22, 24, 15}));  // 18.5 -> 18, 22.5 -> 22
  EXPECT_EQ(run([](auto& b) { return b.Reshape(b.input(), {4}); }, x, in), (Codes{7, 15, 18, 0}));
  EXPECT_EQ(run([](auto& b) { return b.Slice(b.input(), 2, 1, 2); }, wide, in), (Codes{22, 15}));
  EXPECT_EQ(run(
                [](auto& b) {
                  return b.Pad(b.input(), {1, 0, 0}, {0, 0, 0});
                },
                x, in),
            (Codes{10, 10, 7, 15, 18, 0}));
  EXPECT_EQ(run([](auto& b) { return b.Relu(b.input()); }, wide, in), (Codes{20, 22, 24, 20}));
  EXPECT_EQ(run(
                [](auto& b) {
                  return b.Pool(OpType::kMaxPool, b.input(), {.kernel_h = 1, .kernel_w = 2});
                },
                x, in),
            (Codes{15, 18}));
  EXPECT_EQ(run([](auto& b) { return b.Op(OpType::kGlobalAveragePool, {b.input()}); }, x, in),
            (Codes{11, 9}));
  // Mean of 0 (pad), -3 and of 5, 0; of 0, 8 and -10, 0: the pads count.
  EXPECT_EQ(run(
                [](auto& b) {
                  return b.Pool(OpType::kAveragePool, b.input(),
                                {.kernel_h = 1,
                                 .kernel_w = 2,
                                 .stride_w = 2,
                                 .pad_left = 1,
                                 .pad_right = 1,
                                 .count_include_pad = true});
                },
                x, {-4, 6, 8, -10}),
            (Codes{8, 13, 14, 5}));
}

TEST(ExecuteQuantizedTest, FallsBackToFloatWhereNoRuleExists) {
  GraphBuilder b({2, 1, 1});
  b.graph().values[b.input()].quant = QuantParams{1.0f, 10};
  const ValueId y = b.Op(OpType::kDiv, {b.input(), b.Scalar(4.0f)});
  b.graph().values[y].quant = QuantParams{0.5f, 1};
  EXPECT_EQ(Evaluate(b.Finish(y), {8, -10}), (Codes{5, 0}));
}

// A quantised convolution differs from the float one on the same (dequantised) operands only
// by the rounding of its result: half a code, and what single precision adds.
TEST(ExecuteQuantizedTest, StaysWithinHalfACodeOfFloat) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    for (const WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kInt4Cluster,
                                      WeightScheme::kInt3Cluster, WeightScheme::kTernaryCluster}) {
      GraphBuilder b({6, 7, 5}, seed + 1);
      const QuantParams x{0.03f, b.Below(256)}, r{0.05f, b.Below(256)}, y{0.5f, b.Below(256)};
      const ValueId skip = b.Relu(b.input());
      graph::ConvAttributes attributes{
          .pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1};
      const ValueId out = b.Conv(b.input(), 6, 3, attributes);
      Graph graph = b.Finish(out);
      graph.nodes.back().inputs.push_back(skip);

      Graph quantized = graph;
      Node& node = quantized.nodes.back();
      QuantizedWeights q{.scheme = scheme, .codes = Tensor(DType::kS8, node.weight.shape())};
      const int limit = scheme == WeightScheme::kInt8          ? 63
                        : scheme == WeightScheme::kInt4Cluster ? 7
                        : scheme == WeightScheme::kInt3Cluster ? 3
                                                               : 1;
      for (int8_t& code : q.codes.data<int8_t>()) {
        code = static_cast<int8_t>(b.Below(2 * limit + 1) - limit);
      }
      if (scheme != WeightScheme::kInt8) {
        q.cluster_size = 2;
        q.cluster_scales = Tensor(DType::kS8, {6, ClusterMap(6, 2).clusters()});
        for (int8_t& scale : q.cluster_scales.data<int8_t>()) {
          scale = static_cast<int8_t>(1 + b.Below(127));
        }
      }
      for (int o = 0; o < 6; ++o) q.steps.push_back(0.001f * static_cast<float>(1 + b.Below(9)));
      node.quantized = q;
      node.weight = Tensor();
      quantized.values[quantized.input].quant = x;
      quantized.values[skip].quant = r;
      quantized.values[out].quant = y;
      ASSERT_EQ(graph::Validate(quantized), absl::OkStatus());

      const Tensor input = b.Random({2, 6, 7, 5}, -4.0f, 4.0f);
      const auto got = ExecuteQuantized(quantized, input);
      ASSERT_TRUE(got.ok());
      // The float graph on exactly the reals that the codes stand for.
      graph.nodes.back().weight = Dequantize(q);
      const auto reals = [&](ValueId id, QuantParams params) {
        Tensor real(DType::kF32, (*got)[id].shape());
        for (int64_t i = 0; i < real.elements(); ++i) {
          real.data<float>()[i] = params.Dequantize((*got)[id].data<uint8_t>()[i]);
        }
        return real;
      };
      const Tensor skip_reals = reals(skip, r);
      Graph plain = graph;
      plain.nodes.back().inputs.pop_back();
      const auto wanted = ExecuteFloat(plain, reals(quantized.input, x));
      ASSERT_TRUE(wanted.ok());
      for (int64_t i = 0; i < (*got)[out].elements(); ++i) {
        const double real = (*wanted)[out].data<float>()[i] + skip_reals.data<float>()[i];
        const double code = std::min(255.0, std::max(0.0, real / y.scale + y.zero_point));
        ASSERT_NEAR((*got)[out].data<uint8_t>()[i], code, 0.5 + 1e-3) << seed << " " << i;
      }
    }
  }
}

TEST(ExecuteQuantizedTest, RejectsAnInputOfAnotherShape) {
  GraphBuilder b({4});
  EXPECT_FALSE(ExecuteQuantized(b.Finish(b.Relu(b.input())), Tensor(DType::kF32, {1, 5})).ok());
}

}  // namespace
}  // namespace tern::reference
