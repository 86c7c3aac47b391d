#include "server/finetune/network.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>

#include "server/base/file.h"
#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "server/graph/passes.h"
#include "server/image/image.h"
#include "server/onnx/import.h"
#include "server/quant/quantize.h"
#include "server/reference/execute.h"
#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"
#include "tests/finetune/demo.h"

namespace tern::finetune {
namespace {

using engine::testing::GraphBuilder;
using engine::testing::kReluRange;
using engine::testing::NamedGraph;
using engine::testing::Strided;
using graph::Graph;
using graph::Node;

at::Tensor ToTorch(const Tensor& tensor) {
  return at::from_blob(const_cast<void*>(tensor.raw()), tensor.shape().dims(), at::kFloat).clone();
}

// Root mean square of a - b, relative to that of b (0 where both are 0).
double Difference(const at::Tensor& a, const at::Tensor& b) {
  const double noise = (a - b).square().mean().item<double>();
  const double signal = b.square().mean().item<double>();
  return noise == 0 ? 0 : std::sqrt(noise / std::max(signal, 1e-12));
}

at::Tensor Real(const Graph& graph, graph::ValueId id, const Tensor& held) {
  if (held.dtype() == DType::kF32) return ToTorch(held);
  Tensor real(DType::kF32, held.shape());
  for (int64_t i = 0; i < held.elements(); ++i) {
    real.data<float>()[i] = graph.values[id].quant->Dequantize(held.data<uint8_t>()[i]);
  }
  return ToTorch(real);
}

class ZooTest : public ::testing::TestWithParam<NamedGraph> {
 protected:
  const Graph& graph_ = GetParam().graph;
  GraphBuilder random_{{1}, 5};
  const Tensor input_ = random_.Random(graph_.shape(graph_.input).WithBatch(3));
};

TEST_P(ZooTest, TheFloatNetworkComputesWhatTheReferenceDoes) {
  const auto network = Network::Float(graph_);
  ASSERT_TRUE(network.ok()) << network.status();
  const auto wanted = reference::ExecuteFloat(graph_, input_);
  ASSERT_TRUE(wanted.ok()) << wanted.status();
  const auto got = network->ForwardAll(ToTorch(input_), nullptr);
  for (const Node& node : graph_.nodes) {
    const at::Tensor expected = ToTorch((*wanted)[node.output]);
    ASSERT_EQ(got[node.output].sizes(), expected.sizes()) << node.name;
    EXPECT_LE(Difference(got[node.output], expected), 1e-5) << node.name;
  }
}

TEST_P(ZooTest, TheQuantisedNetworkComputesWhatTheReferenceDoes) {
  const auto floats = reference::ExecuteFloat(graph_, input_);
  ASSERT_TRUE(floats.ok()) << floats.status();
  for (WeightScheme scheme :
       {WeightScheme::kTernaryCluster, WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
    const Graph start = engine::testing::QuantizeGraph(graph_, engine::testing::RangesOf(*floats),
                                                       {.scheme = scheme});
    const auto network = Network::Quantised(graph_, start);
    ASSERT_TRUE(network.ok()) << network.status();
    const auto wanted = reference::ExecuteQuantized(start, input_);
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    const auto got = network->ForwardAll(ToTorch(input_), nullptr);
    for (const Node& node : graph_.nodes) {
      // A value halfway between two codes may go either way: one code in 255 here and there.
      EXPECT_LE(Difference(got[node.output], Real(start, node.output, (*wanted)[node.output])),
                0.01)
          << node.name << " " << Name(scheme);
    }
  }
}

TEST_P(ZooTest, WithoutASingleStepTheGraphIsTheStartVersion) {
  const auto floats = reference::ExecuteFloat(graph_, input_);
  for (WeightScheme scheme : {WeightScheme::kTernaryCluster, WeightScheme::kInt8}) {
    const Graph start = engine::testing::QuantizeGraph(graph_, engine::testing::RangesOf(*floats),
                                                       {.scheme = scheme});
    auto network = Network::Quantised(graph_, start);
    ASSERT_TRUE(network.ok()) << network.status();
    network->ClampLatents();
    const auto back = network->ToGraph();
    ASSERT_TRUE(back.ok()) << back.status();
    for (size_t i = 0; i < start.nodes.size(); ++i) {
      if (!start.nodes[i].quantized) continue;
      const QuantizedWeights &a = *start.nodes[i].quantized, &b = *back->nodes[i].quantized;
      EXPECT_EQ(a.codes.data<int8_t>(), b.codes.data<int8_t>());
      EXPECT_EQ(a.cluster_scales.data<int8_t>(), b.cluster_scales.data<int8_t>());
      EXPECT_EQ(a.steps, b.steps);
      EXPECT_EQ(start.nodes[i].bias.data<float>(), back->nodes[i].bias.data<float>());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, ZooTest, ::testing::ValuesIn(engine::testing::Zoo()),
                         [](const auto& info) { return info.param.name; });

TEST(DemoNetworkTest, LogitsAreCloseToTheEnginesAndTheBestClassIsTheSame) {
  const Demo demo = LoadDemo(v1::TERNARY_CLUSTER, 64);
  const auto network = Network::Quantised(demo.source, demo.start.graph);
  ASSERT_TRUE(network.ok()) << network.status();
  at::NoGradGuard no_grad;
  const at::Tensor got = network->Forward(ToTorch(demo.images)).contiguous();

  const int64_t n = demo.images.shape()[0];
  engine::PlanOptions options;
  options.max_batch = static_cast<int>(n);
  const auto plan = engine::Plan::Create(demo.start.graph, options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  ASSERT_TRUE(session.ok()) << session.status();
  engine::NchwToNhwc(demo.images.data<float>().data(), n, 3, 32, 32, session->input().data());
  const auto logits = session->Run(static_cast<int>(n));
  ASSERT_TRUE(logits.ok()) << logits.status();
  const at::Tensor wanted =
      at::from_blob(const_cast<float*>(logits->data()), {n, 10}, at::kFloat).clone();
  EXPECT_LE(Difference(got, wanted), 0.03);
  // Near ties may go either way.
  const auto same = (got.argmax(1) == wanted.argmax(1)).sum().item<int64_t>();
  EXPECT_GE(same, n - 1);
}

// One fully connected layer, float result: logits = W x + b.
struct OneLayer {
  explicit OneLayer(WeightScheme scheme) {
    GraphBuilder b({8}, 3);
    source = b.Finish(b.FullyConnected(b.input(), 4));
    start = engine::testing::QuantizeGraph(source, {{-1.0f, 1.0f}, {-3.0f, 3.0f}},
                                           {.scheme = scheme, .cluster_size = 8});
    x = ToTorch(b.Random({5, 8}));
    weigh = ToTorch(b.Random({5, 4}));
  }
  Graph source, start;
  at::Tensor x, weigh;  // loss = sum of weigh * logits
};

TEST(GradientTest, ScalesAndBiasesMatchFiniteDifferences) {
  for (WeightScheme scheme :
       {WeightScheme::kTernaryCluster, WeightScheme::kInt4Cluster, WeightScheme::kInt8}) {
    const OneLayer one(scheme);
    const auto network = Network::Quantised(one.source, one.start);
    ASSERT_TRUE(network.ok()) << network.status();
    const auto loss = [&] { return (network->Forward(one.x) * one.weigh).sum(); };
    loss().backward();
    ASSERT_EQ(network->scales().size(), 1u);
    for (const at::Tensor& parameter : {network->scales()[0], network->biases()[0]}) {
      const at::Tensor gradient = parameter.grad();
      at::NoGradGuard no_grad;
      float* values = parameter.data_ptr<float>();
      for (int64_t i = 0; i < parameter.numel(); ++i) {
        constexpr float kStep = 1.0f / 64;
        const float before = values[i];
        values[i] = before + kStep;
        const double up = loss().item<double>();
        values[i] = before - kStep;
        const double down = loss().item<double>();
        values[i] = before;
        EXPECT_NEAR(gradient.view(-1)[i].item<double>(), (up - down) / (2 * kStep), 2e-3)
            << Name(scheme) << " " << i;
      }
    }
  }
}

TEST(GradientTest, LatentsGetTheGradientOfTheWeightsTheyRoundTo) {
  const OneLayer one(WeightScheme::kTernaryCluster);
  const auto network = Network::Quantised(one.source, one.start);
  ASSERT_TRUE(network.ok()) << network.status();
  (network->Forward(one.x) * one.weigh).sum().backward();
  // d sum(weigh * (x W^T + b)) / dW = weigh^T x, with x as rounded to codes.
  const QuantParams quant = *one.start.values[one.start.input].quant;
  const at::Tensor x =
      at::fake_quantize_per_tensor_affine(one.x, quant.scale, quant.zero_point, 0, 255);
  EXPECT_LE(Difference(network->latents()[0].grad(), one.weigh.t().matmul(x)), 1e-5);
}

TEST(GradientTest, NoneFlowsThroughValuesOutsideTheRangeOfTheCodes) {
  GraphBuilder b({1, 1, 3}, 3);
  Graph source = b.Finish(b.Conv(b.Conv(b.input(), 1, 1, {}, kReluRange), 1, 1));
  for (Node& node : source.nodes) {
    node.weight.data<float>()[0] = 1;
    node.bias.data<float>()[0] = 0;
  }
  Graph start = engine::testing::QuantizeGraph(source, {{-4.0f, 4.0f}, {0.0f, 1.0f}, {-1.0f, 1.0f}},
                                               {.scheme = WeightScheme::kInt8});
  const auto network = Network::Quantised(source, start);
  ASSERT_TRUE(network.ok()) << network.status();
  // Below the activation, inside, above the last code.
  const at::Tensor x = at::tensor({-2.0f, 0.5f, 2.0f}).view({1, 1, 1, 3});
  network->Forward(x).sum().backward();
  EXPECT_NEAR(network->biases()[0].grad().item<double>(), 1.0, 0.02);
}

TEST(LatentsTest, StayWithinHalfACellOfTheOutermostCodes) {
  const OneLayer one(WeightScheme::kTernaryCluster);
  auto network = Network::Quantised(one.source, one.start);
  ASSERT_TRUE(network.ok()) << network.status();
  {
    at::NoGradGuard no_grad;
    network->latents()[0].mul_(100);
  }
  network->ClampLatents();
  const auto graph = network->ToGraph();
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int8_t code : graph->nodes[0].quantized->codes.data<int8_t>()) {
    EXPECT_EQ(std::abs(code), 1);  // none was 0 before
  }
  const auto& weights = *one.start.nodes[0].quantized;
  for (int64_t o = 0; o < 4; ++o) {
    const double scale = weights.steps[o] * weights.cluster_scales.data<int8_t>()[o];
    EXPECT_NEAR(network->latents()[0][o].abs().max().item<double>(), 1.5 * scale, 1e-5);
  }
}

// Networks that were quantised elsewhere may hold the code -128, which has no counterpart.
TEST(LatentsTest, StayBelowTheCodeThatEightBitsDoNotHave) {
  OneLayer one(WeightScheme::kInt8);
  one.start.nodes[0].quantized->codes.data<int8_t>()[0] = -128;
  auto network = Network::Quantised(one.source, one.start);
  ASSERT_TRUE(network.ok()) << network.status();
  {
    at::NoGradGuard no_grad;
    network->latents()[0].fill_(1e6);
  }
  network->ClampLatents();
  const auto graph = network->ToGraph();
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int8_t code : graph->nodes[0].quantized->codes.data<int8_t>()) EXPECT_EQ(code, 127);
}

TEST(NetworkTest, FixedPointNetworksStayOnTheirGrid) {
  OneLayer one(WeightScheme::kTernaryCluster);
  ASSERT_TRUE(graph::RoundToFixedPoint(one.start).ok());
  const QuantizedWeights& weights = *one.start.nodes[0].quantized;
  const auto network = Network::Quantised(one.source, one.start);
  ASSERT_TRUE(network.ok()) << network.status();
  {
    at::NoGradGuard no_grad;
    network->scales()[0].fill_(-0.5);
    network->biases()[0].add_(0.1234567);
  }
  const auto graph = network->ToGraph();  // valid: the bias is on the grid
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->nodes[0].quantized->steps, weights.steps);
  for (int64_t o = 0; o < 4; ++o) {
    EXPECT_EQ(graph->nodes[0].quantized->cluster_scales.data<int8_t>()[o],
              std::lround(weights.cluster_scales.data<int8_t>()[o] * std::exp(-0.5)));
    EXPECT_NEAR(graph->nodes[0].bias.data<float>()[o],
                one.start.nodes[0].bias.data<float>()[o] + 0.1234567, 0.001);
  }
  const OneLayer plain(WeightScheme::kInt8);
  Graph start = plain.start;
  ASSERT_TRUE(graph::RoundToFixedPoint(start).ok());
  const auto int8 = Network::Quantised(plain.source, start);
  ASSERT_TRUE(int8.ok()) << int8.status();
  EXPECT_TRUE(int8->scales().empty());
}

TEST(NetworkTest, RefusesWhatDoesNotBelongTogether) {
  const OneLayer one(WeightScheme::kTernaryCluster);
  GraphBuilder b({8}, 3);
  const Graph other = b.Finish(b.FullyConnected(b.FullyConnected(b.input(), 4), 4));
  EXPECT_EQ(Network::Quantised(other, one.start).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Network::Quantised(one.start, one.start).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Network::Float(one.start).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(NetworkTest, AnOperatorWithoutCounterpartIsNamed) {
  GraphBuilder b({8}, 3);
  Graph graph = b.Finish(b.FullyConnected(b.input(), 4));
  graph.nodes[0].op = static_cast<graph::OpType>(250);
  const absl::Status status = Network::Float(graph).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find(graph.nodes[0].name), absl::string_view::npos);
}

}  // namespace
}  // namespace tern::finetune
