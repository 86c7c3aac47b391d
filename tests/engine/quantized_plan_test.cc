#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/str_replace.h"
#include "server/engine/onednn.h"
#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "server/reference/execute.h"
#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"

namespace tern::engine {
namespace {

using namespace testing;  // NOLINT(build/namespaces): the builder's vocabulary

Graph Quantized(const Graph& graph, const QuantizeOptions& options) {
  GraphBuilder random({1}, 3);
  const auto values =
      reference::ExecuteFloat(graph, random.Random(graph.shape(graph.input).WithBatch(4)));
  EXPECT_TRUE(values.ok()) << values.status();
  return QuantizeGraph(graph, RangesOf(*values), options);
}

// How far the engine is from the reference on one value, in codes (u8) or relative to the largest
// real (f32).
struct Difference {
  double worst = 0;
  double share = 0;  // of elements that differ at all
};

Difference Compare(const Value& value, const Tensor& got, const Tensor& wanted) {
  Difference d;
  int64_t different = 0;
  const auto real = got.data<float>();
  if (!value.quant) {
    d.worst = RelativeDifference(real, wanted.data<float>());
    return d;
  }
  for (size_t i = 0; i < real.size(); ++i) {
    const long code = std::lround(real[i] / value.quant->scale) + value.quant->zero_point;
    const double off = std::abs(static_cast<double>(code - wanted.data<uint8_t>()[i]));
    d.worst = std::max(d.worst, off);
    different += off > 0;
  }
  d.share = static_cast<double>(different) / static_cast<double>(real.size());
  return d;
}

struct Case {
  Graph graph;
  PlanOptions options;
  int batch = 2;
  int threads = 1;
};

// Calls check(node, layer, difference) for every node whose value can be fetched.
template <typename Check>
void ForEveryNode(const Case& c, const Tensor& input, Check check) {
  const auto expected = reference::ExecuteQuantized(c.graph, input);
  ASSERT_TRUE(expected.ok()) << expected.status();
  auto plan = Plan::Create(c.graph, c.options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(c.threads);
  ASSERT_TRUE(session.ok()) << session.status();
  const Shape& s = input.shape();
  NchwToNhwc(input.data<float>().data(), s[0], s[1], s[2], s[3], session->input().data());
  for (size_t i = 0; i < c.graph.nodes.size(); ++i) {
    const Node& node = c.graph.nodes[i];
    const auto got = session->RunAndFetch(c.batch, node.output);
    if (got.status().code() == absl::StatusCode::kInvalidArgument) continue;  // fused away
    ASSERT_TRUE(got.ok()) << got.status();
    check(node, (*plan)->layers()[i],
          Compare(c.graph.values[node.output], *got, (*expected)[node.output]));
  }
  const auto logits = session->Run(c.batch);
  ASSERT_TRUE(logits.ok()) << logits.status();
  ASSERT_EQ(static_cast<int64_t>(logits->size()), c.batch * c.graph.classes());
}

Tensor InputFor(const Graph& graph, int batch) {
  GraphBuilder random({1}, 31 + batch);
  return random.Random(graph.shape(graph.input).WithBatch(batch));
}

class QuantizedZooTest : public ::testing::TestWithParam<NamedGraph> {};

// A code that oneDNN rounds otherwise moves later layers, so whole networks are compared with a
// margin; the bound of one code is tested layer by layer below.
TEST_P(QuantizedZooTest, Int8NetworksStayBesideTheReference) {
  for (int batch : {1, 2, 7}) {
    Case c{Quantized(GetParam().graph, {}), {}, batch, batch == 2 ? 3 : 1};
    c.options.max_batch = 7;
    ForEveryNode(c, InputFor(c.graph, batch),
                 [&](const Node& node, const LayerInfo& layer, const Difference& d) {
                   if (c.graph.values[node.output].quant) {
                     EXPECT_LE(d.worst, 2)
                         << node.name << " by " << layer.implementation << ", batch " << batch;
                     EXPECT_LE(d.share, 0.01)
                         << node.name << " by " << layer.implementation << ", batch " << batch;
                   } else {
                     EXPECT_LE(d.worst, 2e-2)
                         << node.name << " by " << layer.implementation << ", batch " << batch;
                   }
                 });
  }
}

// Against the values themselves, fetched one by one.
TEST_P(QuantizedZooTest, CodesAtTheEndsOfTheirRangeAreCounted) {
  constexpr int kBatch = 3;
  Graph graph = Quantized(GetParam().graph, {});
  for (graph::Value& value : graph.values) {
    if (value.quant) value.quant->scale /= 8;  // so that there is something to count
  }
  PlanOptions options;
  options.max_batch = 4;
  auto plan = Plan::Create(graph, options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  ASSERT_TRUE(session.ok()) << session.status();
  const Tensor input = InputFor(graph, kBatch);
  const Shape& s = input.shape();
  NchwToNhwc(input.data<float>().data(), s[0], s[1], s[2], s[3], session->input().data());
  std::vector<CodeCount> counts;
  const auto logits = session->RunCounted(kBatch, counts);
  ASSERT_TRUE(logits.ok()) << logits.status();
  const std::vector<float> counted(logits->begin(), logits->end());
  const auto plain = session->Run(kBatch);
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(counted, std::vector<float>(plain->begin(), plain->end()));
  ASSERT_EQ(counts.size(), graph.nodes.size());
  int64_t all_at_limit = 0, all = 0;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    const auto& quant = graph.values[node.output].quant;
    if ((*plan)->layers()[i].macs == 0 || !quant) {
      EXPECT_EQ(counts[i].total, 0) << node.name;
      continue;
    }
    const auto got = session->RunAndFetch(kBatch, node.output);
    if (!got.ok()) continue;  // fused away
    int64_t at_limit = 0;
    for (const float v : got->data<float>()) {
      const long code = std::lround(v / quant->scale) + quant->zero_point;
      at_limit += code == 255 || (code == 0 && quant->zero_point != 0);
    }
    EXPECT_EQ(counts[i].total, got->elements()) << node.name;
    EXPECT_EQ(counts[i].at_limit, at_limit) << node.name;
    all_at_limit += at_limit;
    all += counts[i].total;
  }
  EXPECT_GE(all_at_limit, all / 100);
}

TEST(ProfiledRunTest, CountsWhatLiesBetweenOperatorsApart) {
  GraphBuilder b({8, 12, 12});
  const ValueId x = b.Conv(b.input(), 16, 3, Strided(1, 1), kReluRange);
  const Graph graph = b.Finish(b.Conv(x, 16, 1));
  auto plan = Plan::Create(Quantized(graph, {}), {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  ASSERT_TRUE(session.ok()) << session.status();
  RunTimes times;
  for (int run = 0; run < 2; ++run) {  // the second starts from nothing, too
    ASSERT_TRUE(session->RunProfiled(2, times).ok());
    ASSERT_EQ(times.layers.size(), 2u);
    absl::Duration parts;
    for (absl::Duration time : times.layers) {
      EXPECT_GT(time, absl::ZeroDuration());
      parts += time;
    }
    for (absl::Duration time : times.conversions) parts += time;
    EXPECT_GT(times.conversions[static_cast<int>(Conversion::kQuantize)], absl::ZeroDuration());
    EXPECT_LE(parts, times.total);
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, QuantizedZooTest, ::testing::ValuesIn(Zoo()),
                         [](const auto& info) { return info.param.name; });

// Networks whose every layer Tern runs itself.
std::vector<NamedGraph> OwnLayers() {
  std::vector<NamedGraph> graphs;
  {
    GraphBuilder b({12, 9, 10});
    ConvAttributes uneven = Strided(2, 1);
    uneven.pad_left = 2;
    ValueId x = b.Conv(b.input(), 20, 3, uneven, kReluRange);
    x = b.Conv(x, 33, 1, {}, kRelu6Range);
    ConvAttributes dilated = Strided(1, 2);
    dilated.dilation_h = dilated.dilation_w = 2;
    x = b.Conv(x, 16, 3, dilated);
    x = b.FullyConnected(b.Flatten(x), 24, kReluRange);
    graphs.push_back({"Chain", b.Finish(b.FullyConnected(x, 10))});
  }
  {
    GraphBuilder b({16, 8, 8});
    const ValueId skip = b.Conv(b.input(), 16, 1, {}, kReluRange);
    ValueId x = b.Conv(skip, 16, 3, Strided(1, 1), kReluRange);
    x = b.Conv(x, 16, 3, Strided(1, 1), kReluRange, skip);
    const ValueId self = b.Conv(x, 16, 3, Strided(1, 1), {}, x);
    x = b.Conv(self, 16, 1, {}, {}, x);
    x = b.Binary(OpType::kAdd, x, self, kReluRange);
    x = b.Pool(OpType::kAveragePool, x, Window(3, 2, 1));
    x = b.GlobalAverage(b.Concat({x, x}));
    x = b.Flatten(x);
    const ValueId flat = b.FullyConnected(x, 16);
    graphs.push_back({"Residuals", b.Finish(b.FullyConnected(flat, 16, {}, flat))});
  }
  {
    // Layers that sum tables may take.
    GraphBuilder b({32, 9, 10});
    const ValueId skip = b.Conv(b.input(), 64, 1, {}, kReluRange);
    ValueId x = b.Conv(skip, 64, 3, Strided(1, 1), kReluRange, skip);
    x = b.Conv(x, 96, 1, {}, kReluRange);
    graphs.push_back({"Wide", b.Finish(b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 10))});
  }
  return graphs;
}

struct OwnCase {
  std::string name;
  Graph graph;
  WeightScheme scheme;
  int cluster_size;
  kernels::Isa isa;
};

std::vector<OwnCase> OwnCases() {
  std::vector<OwnCase> cases;
  for (const NamedGraph& named : OwnLayers()) {
    for (WeightScheme scheme :
         {WeightScheme::kTernaryCluster, WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
      for (int n : {4, 5, 64}) {
        for (kernels::Isa isa : kernels::RunnableIsas()) {
          cases.push_back({absl::StrReplaceAll(absl::StrCat(named.name, "_", Name(scheme), "_", n,
                                                            "_", kernels::IsaName(isa)),
                                               {{"-", "_"}}),
                           named.graph, scheme, n, isa});
        }
      }
    }
  }
  return cases;
}

class OwnKernelsTest : public ::testing::TestWithParam<OwnCase> {};

TEST_P(OwnKernelsTest, AreBitIdenticalToTheReference) {
  for (int batch : {1, 3}) {
    QuantizeOptions quantize;
    quantize.scheme = GetParam().scheme;
    quantize.cluster_size = GetParam().cluster_size;
    Case c{Quantized(GetParam().graph, quantize), {}, batch, batch};
    c.options.isa = GetParam().isa;
    c.options.expand_on_vnni = false;
    c.options.max_batch = 3;
    ForEveryNode(c, InputFor(c.graph, batch),
                 [&](const Node& node, const LayerInfo& layer, const Difference& d) {
                   EXPECT_EQ(d.worst, 0)
                       << node.name << " by " << layer.implementation << ", batch " << batch;
                   if (!node.quantized) return;
                   const bool clustered = IsClustered(node.quantized->scheme);
                   const std::string prefix = clustered ? "tern:" : "";
                   EXPECT_EQ(layer.implementation.substr(0, prefix.size()), prefix);
                   if (GetParam().isa == kernels::Isa::kScalar && clustered) {
                     EXPECT_EQ(layer.implementation, "tern:scalar");
                   }
                 });
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, OwnKernelsTest, ::testing::ValuesIn(OwnCases()),
                         [](const auto& info) { return info.param.name; });

// Nothing but depthwise layers, one of which is the output.
Graph DepthwiseChain() {
  GraphBuilder b({37, 23, 20});
  ConvAttributes dilated = Strided(1, 2, 37);
  dilated.dilation_h = dilated.dilation_w = 2;
  ConvAttributes uneven = Strided(2, 0, 37);
  uneven.pad_bottom = uneven.pad_right = 1;
  const ValueId skip = b.Conv(b.input(), 37, 3, Strided(1, 1, 37), kRelu6Range);
  ValueId x = b.Conv(skip, 37, 5, Strided(1, 2, 37), kReluRange, skip);
  x = b.Conv(x, 37, 3, Strided(1, 1, 37), {}, x);
  x = b.Conv(x, 37, 3, dilated, kReluRange);
  x = b.Conv(x, 37, 3, uneven, kRelu6Range);
  x = b.Conv(x, 37, 5, Strided(2, 2, 37));
  return b.Finish(b.Conv(x, 37, 3, Strided(1, 1, 37), kReluRange));
}

TEST(DepthwisePlanTest, EveryInt8LayerIsOurOwnAndBitIdenticalToTheReference) {
  for (kernels::Isa isa : kernels::RunnableIsas()) {
    for (bool fixed_point : {false, true}) {
      for (bool float_output : {false, true}) {
        for (int threads : {1, 3}) {
          QuantizeOptions quantize;
          quantize.float_output = float_output;
          Case c{Quantized(DepthwiseChain(), quantize), {}, 3, threads};
          if (fixed_point) {
            ASSERT_TRUE(graph::RoundToFixedPoint(c.graph).ok());
          }
          c.options.isa = isa;
          c.options.max_batch = 3;
          int layers = 0;
          ForEveryNode(c, InputFor(c.graph, 3),
                       [&](const Node& node, const LayerInfo& layer, const Difference& d) {
                         ++layers;
                         EXPECT_EQ(d.worst, 0) << node.name << (fixed_point ? " fixed" : "");
                         EXPECT_EQ(layer.implementation,
                                   absl::StrCat("tern:depthwise-", kernels::IsaName(isa)));
                       });
          EXPECT_EQ(layers, 7);
        }
      }
    }
  }
}

TEST(DepthwisePlanTest, SeveralFiltersPerChannelAreNotDepthwise) {
  GraphBuilder b({16, 9, 9});
  const Graph graph = b.Finish(b.Conv(b.input(), 32, 3, Strided(1, 1, 16)));
  const auto plan = Plan::Create(Quantized(graph, {}), {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_NE((*plan)->layers()[0].implementation.substr(0, 14), "tern:depthwise");
}

// One layer between a quantised input and a quantised or float output.
struct LayerCase {
  std::string name;
  std::function<ValueId(GraphBuilder&)> build;
  Shape input;
};

std::vector<LayerCase> LayerCases() {
  const auto conv = [](int outputs, int kernel, ConvAttributes attributes,
                       std::optional<ClipRange> clip = {}, bool residual = false) {
    return [=](GraphBuilder& b) {
      return b.Conv(b.input(), outputs, kernel, attributes, clip, residual ? b.input() : kNoValue);
    };
  };
  ConvAttributes dilated = Strided(1, 2);
  dilated.dilation_h = dilated.dilation_w = 2;
  ConvAttributes uneven = Strided(2, 1);
  uneven.pad_left = 2;
  uneven.pad_bottom = 0;
  return {
      {"Image7x7Stride2", conv(32, 7, Strided(2, 3), kReluRange), {3, 20, 18}},
      {"Pointwise", conv(48, 1, {}), {32, 9, 9}},
      {"PointwiseOddChannels", conv(13, 1, {}, kRelu6Range), {7, 9, 9}},
      {"PointwiseStride2", conv(32, 1, Strided(2, 0)), {16, 9, 9}},
      {"Conv3x3", conv(32, 3, Strided(1, 1), kReluRange), {32, 9, 9}},
      {"Conv3x3Residual", conv(32, 3, Strided(1, 1), kReluRange, true), {32, 9, 9}},
      {"Dilated", conv(16, 3, dilated), {16, 9, 9}},
      {"UnevenPads", conv(16, 3, uneven), {16, 9, 9}},
      {"Depthwise", conv(32, 3, Strided(1, 1, 32), kRelu6Range), {32, 9, 9}},
      {"DepthwiseStride2", conv(24, 5, Strided(2, 2, 24)), {24, 9, 9}},
      {"GroupsOfFour", conv(32, 3, Strided(1, 1, 8)), {32, 9, 9}},
      {"GroupsOfSixteen", conv(32, 3, Strided(1, 1, 2)), {32, 9, 9}},
      {"FullyConnected",
       [](GraphBuilder& b) { return b.FullyConnected(b.Flatten(b.input()), 20); },
       {9, 5, 5}},
      {"FullyConnectedResidual",
       [](GraphBuilder& b) {
         const ValueId x = b.Flatten(b.input());
         return b.FullyConnected(x, 36, kReluRange, x);
       },
       {9, 2, 2}},
  };
}

class OneDnnLayerTest : public ::testing::TestWithParam<LayerCase> {};

void ExpectWithinOneCode(const Case& c, const Tensor& input) {
  ForEveryNode(c, input, [&](const Node& node, const LayerInfo& layer, const Difference& d) {
    if (!c.graph.values[node.output].quant) {
      EXPECT_LE(d.worst, 1e-5) << node.name << " by " << layer.implementation;
      return;
    }
    EXPECT_LE(d.worst, node.quantized ? 1 : 0) << node.name << " by " << layer.implementation;
    EXPECT_LE(d.share, 0.002) << node.name << " by " << layer.implementation;
  });
}

TEST_P(OneDnnLayerTest, Int8IsWithinOneCodeOfTheReference) {
  for (bool float_output : {false, true}) {
    GraphBuilder b(GetParam().input);
    QuantizeOptions quantize;
    quantize.float_output = float_output;
    Case c{Quantized(b.Finish(GetParam().build(b)), quantize), {}, 3, 1};
    c.options.max_batch = 3;
    c.options.own_int8 = false;
    ExpectWithinOneCode(c, InputFor(c.graph, 3));
  }
}

TEST_P(OneDnnLayerTest, Int8OnOurOwnKernelsIsBitIdenticalToTheReference) {
  for (bool float_output : {false, true}) {
    for (int threads : {1, 2}) {
      GraphBuilder b(GetParam().input);
      QuantizeOptions quantize;
      quantize.float_output = float_output;
      Case c{Quantized(b.Finish(GetParam().build(b)), quantize), {}, 3, threads};
      c.options.max_batch = 3;
      c.options.isa = std::min(kernels::DetectIsa(), kernels::Isa::kAvx2);
      // Small codes, so that tiles need few flushes and are chosen.
      for (Node& node : c.graph.nodes) {
        if (!node.quantized) continue;
        for (int8_t& code : node.quantized->codes.data<int8_t>())
          code = static_cast<int8_t>(code / 4);
      }
      ForEveryNode(c, InputFor(c.graph, 3),
                   [&](const Node& node, const LayerInfo& layer, const Difference& d) {
                     if (layer.implementation.substr(0, 5) != "tern:") return;
                     EXPECT_EQ(d.worst, 0) << node.name << " by " << layer.implementation;
                   });
    }
  }
}

TEST_P(OneDnnLayerTest, ClustersExpandedToInt8AreWithinOneCodeOfTheReference) {
  for (WeightScheme scheme :
       {WeightScheme::kTernaryCluster, WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
    for (bool float_output : {false, true}) {
      GraphBuilder b(GetParam().input);
      QuantizeOptions quantize;
      quantize.scheme = scheme;
      quantize.float_output = float_output;
      Case c{Quantized(b.Finish(GetParam().build(b)), quantize), {}, 3, 1};
      c.options.max_batch = 3;
      ExpectWithinOneCode(c, InputFor(c.graph, 3));
      if (kernels::DetectIsa() < kernels::Isa::kAvx512Vnni || !onednn::ExactInt8()) continue;
      const auto plan = Plan::Create(c.graph, c.options);
      ASSERT_TRUE(plan.ok()) << plan.status();
      for (const LayerInfo& layer : (*plan)->layers())
        EXPECT_NE(layer.implementation, "tern:avx512vnni") << layer.name;
    }
  }
}

// The largest activations and weights the contract allows: sums that saturate anywhere would be far
// off.
TEST_P(OneDnnLayerTest, ExtremeCodesDoNotSaturate) {
  for (int sign : {1, -1}) {
    GraphBuilder b(GetParam().input);
    Graph graph = Quantized(b.Finish(GetParam().build(b)), {});
    graph.values[graph.input].quant = QuantParams{1.0f / 255, 0};
    for (Node& node : graph.nodes) {
      if (!node.quantized) continue;
      for (int8_t& code : node.quantized->codes.data<int8_t>())
        code = static_cast<int8_t>(63 * sign);
      node.clip.reset();
    }
    for (Value& value : graph.values) {
      if (value.quant && value.shape.rank() != graph.shape(graph.input).rank())
        value.quant = QuantParams{1.0f / 255, 0};
    }
    Case c{graph, {}, 2, 1};
    c.options.max_batch = 2;
    Tensor input(DType::kF32, graph.shape(graph.input).WithBatch(2));
    for (float& v : input.data<float>()) v = 1.0f;  // code 255
    ForEveryNode(c, input, [&](const Node& node, const LayerInfo& layer, const Difference& d) {
      // f32 results: exact sums, so only the roundings of the epilogue remain.
      if (node.quantized) {
        EXPECT_LE(d.worst, 1e-5) << layer.implementation;
      }
    });
  }
}

// Where ternary layers run as int8, their products reach 127 * 255.
TEST_P(OneDnnLayerTest, ExtremeTernaryScalesDoNotSaturate) {
  GraphBuilder b(GetParam().input);
  QuantizeOptions quantize;
  quantize.scheme = WeightScheme::kTernaryCluster;
  Graph graph = Quantized(b.Finish(GetParam().build(b)), quantize);
  for (Value& value : graph.values) {
    if (value.quant) value.quant = QuantParams{1.0f / 255, 0};
  }
  for (Node& node : graph.nodes) {
    if (!node.quantized || node.quantized->cluster_size == 0) continue;
    for (int8_t& code : node.quantized->codes.data<int8_t>()) code = 1;
    for (int8_t& scale : node.quantized->cluster_scales.data<int8_t>()) scale = 127;
    node.clip.reset();
  }
  Case c{graph, {}, 2, 1};
  c.options.max_batch = 2;
  Tensor input(DType::kF32, graph.shape(graph.input).WithBatch(2));
  for (float& v : input.data<float>()) v = 1.0f;  // code 255
  ForEveryNode(c, input, [&](const Node& node, const LayerInfo& layer, const Difference& d) {
    if (!node.quantized) return;
    EXPECT_LE(d.worst, 1e-5) << layer.implementation;
    const bool capped = std::getenv("ONEDNN_MAX_CPU_ISA") != nullptr;
    if (layer.scheme == "ternary-cluster" && !capped) {
      const bool vnni = kernels::DetectIsa() == kernels::Isa::kAvx512Vnni;
      EXPECT_EQ(layer.implementation.substr(0, vnni ? 7 : 5), vnni ? "onednn:" : "tern:");
    }
  });
}

// Networks that were quantised elsewhere may use all of s8. Without VNNI pairs of such products
// saturate in oneDNN, so our own kernel runs them.
TEST_P(OneDnnLayerTest, EightBitCodesAreExactOnEveryCpu) {
  for (bool float_output : {false, true}) {
    for (bool extreme : {false, true}) {
      GraphBuilder b(GetParam().input);
      QuantizeOptions quantize;
      quantize.float_output = float_output;
      Graph graph = Quantized(b.Finish(GetParam().build(b)), quantize);
      for (Node& node : graph.nodes) {
        if (!node.quantized) continue;
        for (int8_t& code : node.quantized->codes.data<int8_t>()) {
          code = static_cast<int8_t>(extreme ? 127 : 2 * code);
        }
        node.quantized->codes.data<int8_t>()[0] = -127;
        for (float& step : node.quantized->steps) step /= extreme ? 100.0f : 2.0f;
      }
      Case c{std::move(graph), {}, 3, 1};
      c.options.max_batch = 3;
      Tensor input = InputFor(c.graph, 3);
      if (extreme) {
        for (float& v : input.data<float>()) v = 1e6f;  // code 255
      }
      const bool capped = std::getenv("ONEDNN_MAX_CPU_ISA") != nullptr ||
                          kernels::DetectIsa() != kernels::Isa::kAvx512Vnni;
      ForEveryNode(c, input, [&](const Node& node, const LayerInfo& layer, const Difference& d) {
        const bool depthwise = node.conv.groups == c.graph.shape(node.inputs[0])[0];
        if (node.quantized && (capped || depthwise)) {
          EXPECT_EQ(layer.implementation.substr(0, 5), "tern:");
          EXPECT_EQ(d.worst, 0) << node.name << " by " << layer.implementation;
        } else if (c.graph.values[node.output].quant) {
          EXPECT_LE(d.worst, node.quantized ? 1 : 0) << node.name << " by " << layer.implementation;
          EXPECT_LE(d.share, 0.002) << node.name << " by " << layer.implementation;
        } else {
          EXPECT_LE(d.worst, 1e-5) << node.name << " by " << layer.implementation;
        }
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layers, OneDnnLayerTest, ::testing::ValuesIn(LayerCases()),
                         [](const auto& info) { return info.param.name; });

// ---- Fixed point: bit-identical to the integer reference, whatever runs a layer
// ------------------

struct FixedPointCase {
  std::string name;
  Graph graph;
  kernels::Isa isa;
  bool expand = true;
};

void PrintTo(const FixedPointCase& c, std::ostream* out) { *out << c.name; }

Graph FixedPoint(Graph graph) {
  const absl::Status status = graph::RoundToFixedPoint(graph);
  EXPECT_TRUE(status.ok()) << status;
  return graph;
}

// Scales, steps and biases moved by random powers of two: sums that need 64 bits, results that
// saturate or vanish.
Graph Scattered(Graph graph, unsigned seed) {
  std::mt19937 random(seed);
  const auto power = [&](int range) {
    return std::ldexp(1.0f, static_cast<int>(random() % (2 * range + 1)) - range);
  };
  for (Value& value : graph.values) {
    if (value.quant) value.quant->scale *= power(12);
  }
  for (Node& node : graph.nodes) {
    if (!node.quantized) continue;
    const float all = power(16);
    for (float& step : node.quantized->steps) step *= all;
    for (float& bias : node.bias.data<float>()) bias *= power(12);
  }
  return FixedPoint(std::move(graph));
}

std::vector<FixedPointCase> FixedPointCases() {
  std::vector<NamedGraph> graphs = Zoo();
  for (NamedGraph& named : OwnLayers()) graphs.push_back(std::move(named));
  std::vector<FixedPointCase> cases;
  unsigned seed = 1;
  for (const NamedGraph& named : graphs) {
    for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster,
                                WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
      QuantizeOptions options;
      options.scheme = scheme;
      const Graph quantized = Quantized(named.graph, options);
      const Graph regular = FixedPoint(quantized);
      const Graph scattered = Scattered(quantized, seed++);
      for (kernels::Isa isa : kernels::RunnableIsas()) {
        const std::string name = absl::StrReplaceAll(
            absl::StrCat(named.name, "_", Name(scheme), "_", kernels::IsaName(isa)), {{"-", "_"}});
        cases.push_back({name, regular, isa});
        cases.push_back({name + "_scattered", scattered, isa});
        if (scheme == WeightScheme::kTernaryCluster && isa == kernels::Isa::kAvx512Vnni) {
          cases.push_back({name + "_own", regular, isa, false});
        }
      }
    }
  }
  return cases;
}

class FixedPointPlanTest : public ::testing::TestWithParam<FixedPointCase> {};

TEST_P(FixedPointPlanTest, IsBitIdenticalToTheReference) {
  for (int batch : {1, 3, 7}) {
    Case c{GetParam().graph, {}, batch, batch == 3 ? 2 : 1};
    c.options.isa = GetParam().isa;
    c.options.expand_on_vnni = GetParam().expand;
    c.options.max_batch = 7;
    // What follows a float island inherits its rounding.
    std::vector<bool> exact(c.graph.values.size(), true);
    ForEveryNode(c, InputFor(c.graph, batch),
                 [&](const Node& node, const LayerInfo& layer, const Difference& d) {
                   bool integer = true;
                   for (ValueId id : node.inputs) {
                     integer = integer && exact[id] && c.graph.values[id].quant;
                   }
                   integer = integer && node.op != OpType::kSoftmax && node.op != OpType::kSub &&
                             node.op != OpType::kReduceMean && node.op != OpType::kDiv;
                   integer = integer && (node.quantized || c.graph.values[node.output].quant);
                   exact[node.output] = integer;
                   if (!integer) return;
                   EXPECT_EQ(d.worst, 0)
                       << node.name << " by " << layer.implementation << ", batch " << batch;
                   EXPECT_NE(layer.implementation.substr(0, 12), "float-island") << node.name;
                 });
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, FixedPointPlanTest, ::testing::ValuesIn(FixedPointCases()),
                         [](const auto& info) { return info.param.name; });

TEST_P(OneDnnLayerTest, FixedPointIsBitIdenticalToTheReference) {
  for (bool float_output : {false, true}) {
    for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster}) {
      for (bool extreme : {false, true}) {
        GraphBuilder b(GetParam().input);
        QuantizeOptions quantize;
        quantize.scheme = scheme;
        quantize.float_output = float_output;
        Graph graph = Quantized(b.Finish(GetParam().build(b)), quantize);
        for (Node& node : graph.nodes) {
          if (!extreme || !node.quantized) continue;
          const int code = node.quantized->scheme == WeightScheme::kInt8 ? 63 : 1;
          for (int8_t& c : node.quantized->codes.data<int8_t>()) c = static_cast<int8_t>(code);
        }
        Case c{FixedPoint(std::move(graph)), {}, 3, 1};
        c.options.max_batch = 3;
        Tensor input = InputFor(c.graph, 3);
        if (extreme) {
          for (float& v : input.data<float>()) v = 1e6f;  // code 255
        }
        ForEveryNode(c, input, [&](const Node& node, const LayerInfo& layer, const Difference& d) {
          EXPECT_EQ(d.worst, 0) << node.name << " by " << layer.implementation;
        });
      }
    }
  }
}

// Images whose sums exceed the cache are computed in bands of rows, with padding at both ends only.
TEST(FixedPointPlanTest, LargeImagesAreExactBandByBand) {
  ConvAttributes uneven = Strided(2, 1);
  uneven.pad_top = 2;
  uneven.pad_bottom = 0;
  uneven.dilation_h = 2;
  ConvAttributes beyond = Strided(1, 1);  // rows of nothing but padding
  beyond.pad_top = beyond.pad_bottom = 4;
  for (const ClipRange& clip : {kReluRange, ClipRange{-kInfinity, kInfinity}}) {
    GraphBuilder b({3, 101, 90});
    ValueId x = b.Conv(b.input(), 16, 3, Strided(1, 1), clip);
    x = b.Conv(x, 24, 1, {}, clip);
    x = b.Conv(x, 24, 5, Strided(1, 2, 24), clip, x);
    x = b.Conv(x, 24, 3, beyond, clip);
    x = b.Conv(x, 130, 3, uneven, clip);
    x = b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 5);
    Case c{FixedPoint(Quantized(b.Finish(x), {})), {}, 2, 2};
    c.options.max_batch = 2;
    ForEveryNode(c, InputFor(c.graph, 2),
                 [&](const Node& node, const LayerInfo& layer, const Difference& d) {
                   EXPECT_EQ(d.worst, 0) << node.name << " by " << layer.implementation;
                 });
  }
}

// f32, through which oneDNN's sums go, holds integers up to 2^24 only.
TEST(FixedPointPlanTest, SumsBeyondTwentyFourBitsAreExact) {
  GraphBuilder b({3000, 1, 1});
  Graph graph = b.Finish(b.FullyConnected(b.Flatten(b.input()), 21));
  graph = Quantized(graph, {});
  for (Node& node : graph.nodes) {
    if (!node.quantized) continue;
    for (int8_t& code : node.quantized->codes.data<int8_t>()) {
      code = static_cast<int8_t>(std::abs(code));
    }
  }
  Case c{FixedPoint(std::move(graph)), {}, 2, 1};
  Tensor input = InputFor(c.graph, 2);
  for (float& v : input.data<float>()) v = std::abs(v);
  ForEveryNode(c, input, [&](const Node& node, const LayerInfo& layer, const Difference& d) {
    EXPECT_EQ(d.worst, 0) << node.name << " by " << layer.implementation;
    if (node.quantized) {
      EXPECT_EQ(layer.implementation.substr(0, 9), "tern:int8");
    }
  });
}

// The logits of Run, whose values share memory, which those of RunAndFetch do not; NaN if it fails.
std::vector<float> Logits(const Graph& graph, const PlanOptions& options, int threads,
                          const Tensor& input, int runs = 1) {
  const Shape& s = input.shape();
  const int64_t size = s[0] * graph.classes();
  std::vector<float> all(runs * size, std::nanf(""));  // of every run
  const auto plan = Plan::Create(graph, options);
  EXPECT_TRUE(plan.ok()) << plan.status();
  if (!plan.ok()) return all;
  auto session = (*plan)->NewSession(threads);
  EXPECT_TRUE(session.ok()) << session.status();
  if (!session.ok()) return all;
  NchwToNhwc(input.data<float>().data(), s[0], s[1], s[2], s[3], session->input().data());
  for (int run = 0; run < runs; ++run) {
    const auto logits = session->Run(static_cast<int>(s[0]));
    EXPECT_TRUE(logits.ok()) << logits.status();
    if (logits.ok()) std::copy(logits->begin(), logits->end(), all.begin() + run * size);
  }
  return all;
}

// oneDNN's own kernel for these layers races without AVX-512 unless 16 divide the channels.
TEST(StridedPointwiseTest, IsRightOnEveryRunOfSeveralThreads) {
  constexpr int kBatch = 4, kRuns = 10;
  for (const int groups : {1, 2}) {
    for (const int channels : {24, 56, 104, 408}) {
      for (const int size : {8, 14}) {
        for (const bool fixed_point : {false, true}) {
          GraphBuilder b({channels * groups, size, size});
          QuantizeOptions quantize;
          quantize.float_output = false;
          Graph graph =
              Quantized(b.Finish(b.Conv(b.input(), 32, 1, Strided(2, 0, groups))), quantize);
          if (fixed_point) graph = FixedPoint(std::move(graph));
          const Tensor input = InputFor(graph, kBatch);
          const auto expected = reference::ExecuteQuantized(graph, input);
          ASSERT_TRUE(expected.ok()) << expected.status();
          // Logits leave in the order of the reference.
          const auto codes = (*expected)[graph.output].data<uint8_t>();
          const QuantParams params = *graph.values[graph.output].quant;
          PlanOptions options;
          options.max_batch = kBatch;
          options.own_int8 = false;
          const std::vector<float> got = Logits(graph, options, 2, input, kRuns);
          ASSERT_EQ(got.size(), kRuns * codes.size());
          float worst = 0;
          for (size_t i = 0; i < got.size(); ++i) {
            const float d = std::abs(got[i] - params.Dequantize(codes[i % codes.size()]));
            worst = d <= worst ? worst : d;  // NaN wins
          }
          EXPECT_LE(worst / params.scale, fixed_point ? 0.01f : 1.01f)
              << channels << " channels, " << groups << " groups, " << size << " pixels, "
              << (fixed_point ? "fixed point" : "affine");
        }
      }
    }
  }
}

// A step writes parts of its result before it has read all of its input, whose memory must not
// become the result's, under whatever name the step reads it once more.
TEST(InPlaceTest, AResidualMayBeAnotherViewOfTheInput) {
  GraphBuilder pooled({8, 6, 6});
  ValueId x = pooled.Conv(pooled.input(), 64, 3, Strided(1, 1), kReluRange);
  x = pooled.GlobalAverage(x);
  const ValueId first = pooled.Flatten(x), second = pooled.Flatten(x);
  x = pooled.FullyConnected(first, 64, {}, second);
  const Graph fully_connected = pooled.Finish(pooled.FullyConnected(x, 10));

  GraphBuilder flat({8, 6, 6});
  x = flat.Conv(flat.input(), 64, 3, Strided(1, 1), kReluRange);
  x = flat.Flatten(flat.GlobalAverage(x));
  const Shape pixel{64, 1, 1};
  const ValueId left = flat.Reshape(x, pixel), right = flat.Reshape(x, pixel);
  x = flat.Conv(left, 64, 1, {}, {}, right);
  const Graph convolution = flat.Finish(flat.FullyConnected(flat.Flatten(x), 10));

  PlanOptions options;
  options.max_batch = 4;
  for (const Graph& graph : {fully_connected, convolution}) {
    for (const int batch : {1, 4}) {
      const Tensor input = InputFor(graph, batch);
      const auto reals = reference::ExecuteFloat(graph, input);
      ASSERT_TRUE(reals.ok()) << reals.status();
      EXPECT_LE(RelativeDifference(Logits(graph, options, 1, input),
                                   (*reals)[graph.output].data<float>()),
                1e-5);
      for (const WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster,
                                        WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
        for (const bool eight_bits : {false, true}) {
          if (eight_bits && scheme != WeightScheme::kInt8) continue;
          for (const bool fixed_point : {false, true}) {
            QuantizeOptions quantize;
            quantize.scheme = scheme;
            Graph quantized = Quantized(graph, quantize);
            for (Node& node : quantized.nodes) {
              if (!eight_bits || !node.quantized) continue;
              for (int8_t& code : node.quantized->codes.data<int8_t>())
                code = static_cast<int8_t>(2 * code);
              for (float& step : node.quantized->steps) step /= 2;
            }
            if (fixed_point) quantized = FixedPoint(std::move(quantized));
            const auto codes = reference::ExecuteQuantized(quantized, input);
            ASSERT_TRUE(codes.ok()) << codes.status();
            EXPECT_LE(RelativeDifference(Logits(quantized, options, 1, input),
                                         (*codes)[graph.output].data<float>()),
                      fixed_point ? 0 : 2e-2)
                << Name(scheme) << (eight_bits ? ", eight bits" : "")
                << (fixed_point ? ", fixed point" : "") << ", batch " << batch;
          }
        }
      }
    }
  }
}

// Codes of weights alone: the layer runs in float.
TEST(QuantizedPlanTest, WeightsMayBeQuantisedWhereActivationsAreFloat) {
  GraphBuilder b({16, 8, 8});
  ValueId x = b.Conv(b.input(), 24, 3, Strided(1, 1), kReluRange);
  x = b.Conv(x, 24, 1, {}, kReluRange, x);
  const Graph graph = b.Finish(b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 10));
  for (const WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster}) {
    QuantizeOptions quantize;
    quantize.scheme = scheme;
    Graph quantized = Quantized(graph, quantize);
    for (Value& value : quantized.values) value.quant.reset();
    Graph dequantized = quantized;
    for (Node& node : dequantized.nodes) {
      if (!node.quantized) continue;
      node.weight = Dequantize(*node.quantized);
      node.quantized.reset();
    }
    const Tensor input = InputFor(graph, 2);
    const auto reals = reference::ExecuteFloat(dequantized, input);
    ASSERT_TRUE(reals.ok()) << reals.status();
    PlanOptions options;
    options.max_batch = 2;
    EXPECT_LE(RelativeDifference(Logits(quantized, options, 1, input),
                                 (*reals)[graph.output].data<float>()),
              1e-5);
  }
}

TEST(QuantizedPlanTest, KeepsDataIntegerExceptInNamedIslands) {
  GraphBuilder b({16, 8, 8});
  ValueId x = b.Conv(b.input(), 16, 3, Strided(1, 1), kReluRange);
  x = b.Binary(OpType::kSub, x, b.input());
  x = b.Pool(OpType::kMaxPool, x, Window(2, 2));
  x = b.FullyConnected(b.Flatten(x), 10);
  const Graph graph = Quantized(b.Finish(x), {});
  const auto plan = Plan::Create(graph, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  const auto& layers = (*plan)->layers();
  EXPECT_EQ(layers[0].scheme, "int8");
  EXPECT_EQ(layers[1].implementation.substr(0, 12), "float-island");
  EXPECT_EQ(layers[2].scheme, "u8");
  EXPECT_EQ(layers[2].implementation.substr(0, 7), "onednn:");
  EXPECT_EQ(layers[4].scheme, "int8");
}

TEST(QuantizedPlanTest, ASessionMayBeRunByOneThreadAfterAnother) {
  // oneDNN multiplies matrices for a padded 1x1 convolution, in a scratchpad.
  GraphBuilder b({512, 13, 13});
  const ValueId x = b.Conv(b.input(), 100, 1, Strided(1, 1), kReluRange);
  const Graph graph = b.Finish(b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 10));
  for (const bool quantised : {false, true}) {
    PlanOptions options;
    options.max_batch = 1;
    options.own_int8 = false;
    const auto plan = Plan::Create(quantised ? Quantized(graph, {}) : graph, options);
    ASSERT_TRUE(plan.ok()) << plan.status();
    auto session = (*plan)->NewSession(1);
    ASSERT_TRUE(session.ok()) << session.status();
    for (float& v : session->input()) v = 0.5f;
    const auto first = session->Run(1);
    ASSERT_TRUE(first.ok());
    const std::vector<float> expected(first->begin(), first->end());
    std::vector<float> got;
    std::thread([&] {
      const auto second = session->Run(1);
      if (second.ok()) got.assign(second->begin(), second->end());
    }).join();
    EXPECT_EQ(got, expected);
  }
}

TEST(QuantizedPlanTest, RefusesAnInstructionSetTheCpuDoesNotHave) {
  if (kernels::DetectIsa() == kernels::Isa::kAvx512Vnni)
    GTEST_SKIP() << "this CPU has every instruction set";
  GraphBuilder b({16, 8, 8});
  PlanOptions options;
  options.isa = kernels::Isa::kAvx512Vnni;
  EXPECT_EQ(Plan::Create(b.Finish(b.Conv(b.input(), 8, 1)), options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::engine
