// Export is checked against our own importer and reference executor here, and against onnxruntime
// in tests/interop/onnxruntime.
#include "server/onnx/export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <onnx/onnx_pb.h>

#include <cmath>
#include <map>
#include <set>

#include "server/graph/fixed_point.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "server/reference/execute.h"
#include "tests/onnx/export_zoo.h"

namespace tern::onnx {
namespace {

using engine::testing::GraphBuilder;
using engine::testing::NamedGraph;
using engine::testing::QuantizeOptions;
using graph::Graph;
using graph::OpType;
using graph::ValueId;
using ::testing::ElementsAre;
using testing::Flattened;
using ::testing::HasSubstr;
using testing::Quantised;
using testing::RandomInput;

std::vector<float> Logits(const Graph& graph, const Tensor& input) {
  const auto values = graph.values[graph.input].quant ? reference::ExecuteQuantized(graph, input)
                                                      : reference::ExecuteFloat(graph, input);
  EXPECT_TRUE(values.ok()) << values.status();
  const Tensor& y = (*values)[graph.output];
  EXPECT_EQ(y.dtype(), DType::kF32);
  return {y.data<float>().begin(), y.data<float>().end()};
}

absl::StatusOr<Graph> RoundTrip(const Graph& graph) {
  const auto bytes = Export(graph, {});
  if (!bytes.ok()) return bytes.status();
  auto again = Import(*bytes);
  if (again.ok()) graph::Optimize(*again);
  return again;
}

::onnx::ModelProto Parsed(const Graph& graph) {
  const auto bytes = Export(graph, {});
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  ::onnx::ModelProto model;
  EXPECT_TRUE(model.ParseFromString(*bytes));
  return model;
}

TEST(ExportTest, AFloatNetworkOfEveryOperatorComesBackWithItsResults) {
  std::set<OpType> seen;
  for (const NamedGraph& named : testing::ExportZoo()) {
    SCOPED_TRACE(named.name);
    const Graph graph = Flattened(named.graph);
    for (const graph::Node& node : graph.nodes) seen.insert(node.op);
    const Tensor input = RandomInput(graph, 2);
    const auto again = RoundTrip(graph);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_LE(engine::testing::RelativeDifference(Logits(*again, input), Logits(graph, input)),
              1e-5f);
  }
  for (int op = 0; op <= static_cast<int>(OpType::kSilu); ++op) {
    EXPECT_EQ(seen.count(static_cast<OpType>(op)), 1u) << graph::Name(static_cast<OpType>(op));
  }
}

TEST(ExportTest, AQuantisedNetworkComesBackWithTheSameCodesWeightsAndLogits) {
  for (const WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kInt4Cluster,
                                    WeightScheme::kInt3Cluster, WeightScheme::kTernaryCluster}) {
    for (const NamedGraph& named : testing::ExportZoo()) {
      SCOPED_TRACE(absl::StrCat(named.name, " ", Name(scheme)));
      const Graph plain = Flattened(named.graph);
      const Tensor input = RandomInput(plain, 2);
      const Graph graph = Quantised(plain, input, scheme);
      const auto again = RoundTrip(graph);
      ASSERT_TRUE(again.ok()) << again.status();
      std::map<std::string, const graph::Node*> nodes;
      for (const graph::Node& node : again->nodes) nodes[node.name] = &node;
      for (const graph::Node& node : graph.nodes) {
        if (node.op != OpType::kConv && node.op != OpType::kFullyConnected) continue;
        ASSERT_EQ(nodes.count(node.name), 1u) << node.name;
        const graph::Node& other = *nodes[node.name];
        ASSERT_TRUE(other.quantized) << node.name;
        EXPECT_EQ(other.quantized->scheme,
                  LargestCode(scheme) > 1 ? node.quantized->scheme : WeightScheme::kInt8);
        EXPECT_EQ(other.quantized->steps, node.quantized->steps);
        EXPECT_EQ(other.has_residual(), node.has_residual());
        EXPECT_EQ(other.clip, node.clip);
        EXPECT_EQ(again->values[other.output].quant, graph.values[node.output].quant);
        EXPECT_EQ(Dequantize(*other.quantized).data<float>(),
                  Dequantize(*node.quantized).data<float>());
      }
      const std::vector<float> wanted = Logits(graph, input);
      if (named.name == "ReduceMeanSoftmax") {
        // A mean over rows and columns comes back as a global pool, which has an integer rule.
        EXPECT_LE(engine::testing::RelativeDifference(Logits(*again, input), wanted), 0.05f);
      } else {
        EXPECT_EQ(Logits(*again, input), wanted);
      }
    }
  }
}

TEST(ExportTest, AFixedPointNetworkComesBackWithItsTiesRoundedUp) {
  GraphBuilder b({8, 32, 32});
  ValueId x = b.Conv(b.input(), 16, 3, {}, graph::ClipRange{0.0f, engine::testing::kInfinity});
  x = b.Conv(x, 16, 1, {}, {}, x);
  const Graph plain = b.Finish(b.Flatten(b.Conv(b.Conv(x, 16, 3), 8, 1)));
  const Tensor input = RandomInput(plain, 2);
  for (const WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster}) {
    SCOPED_TRACE(Name(scheme));
    Graph graph = Quantised(plain, input, scheme);
    ASSERT_TRUE(graph::RoundToFixedPoint(graph).ok());
    const auto again = RoundTrip(graph);
    ASSERT_TRUE(again.ok()) << again.status();
    // Left to QuantizeLinear's ties to even, about one code in a thousand differs by one.
    EXPECT_EQ(Logits(*again, input), Logits(graph, input));
  }
}

TEST(ExportTest, FourBitProductsThatFitBecomeInt8) {
  const Graph plain = Flattened(testing::ExportZoo()[0].graph);
  const Tensor input = RandomInput(plain, 1);
  const Graph graph = Quantised(plain, input, WeightScheme::kInt4Cluster, 18);
  const auto again = RoundTrip(graph);
  ASSERT_TRUE(again.ok()) << again.status();
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (!graph.nodes[i].quantized) continue;
    EXPECT_EQ(again->nodes[i].quantized->scheme, WeightScheme::kInt8);
    EXPECT_EQ(Dequantize(*again->nodes[i].quantized).data<float>(),
              Dequantize(*graph.nodes[i].quantized).data<float>());
  }
  EXPECT_EQ(Logits(*again, input), Logits(graph, input));
}

TEST(ExportTest, FourBitProductsBeyondInt8KeepTheirClusterScalesBeside) {
  const Graph plain = Flattened(testing::ExportZoo()[0].graph);
  const Tensor input = RandomInput(plain, 1);
  const Graph graph = Quantised(plain, input, WeightScheme::kInt4Cluster);
  const auto again = RoundTrip(graph);
  ASSERT_TRUE(again.ok()) << again.status();
  int clustered = 0;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (!graph.nodes[i].quantized) continue;
    ASSERT_EQ(again->nodes[i].name, graph.nodes[i].name);
    const QuantizedWeights &wanted = *graph.nodes[i].quantized, &got = *again->nodes[i].quantized;
    EXPECT_EQ(got.scheme, WeightScheme::kInt4Cluster);
    EXPECT_EQ(got.codes.data<int8_t>(), wanted.codes.data<int8_t>());
    if (wanted.cluster_size < wanted.codes.shape()[1]) {
      EXPECT_EQ(got.cluster_size, wanted.cluster_size);
      EXPECT_EQ(got.cluster_scales.data<int8_t>(), wanted.cluster_scales.data<int8_t>());
      ++clustered;
    }
  }
  EXPECT_GT(clustered, 0);
  EXPECT_EQ(Logits(*again, input), Logits(graph, input));
}

TEST(ExportTest, NamesMetadataAndShapesAreTheGraphsOwn) {
  GraphBuilder b({3, 4, 4});
  const Graph graph = b.Finish(b.GlobalAverage(b.Conv(b.input(), 5, 3)));
  const auto bytes = Export(graph, {{"tern.scheme", "fp32"}, {"tern.report", "none"}});
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(*bytes, *Export(graph, {{"tern.scheme", "fp32"}, {"tern.report", "none"}}));
  ::onnx::ModelProto model;
  ASSERT_TRUE(model.ParseFromString(*bytes));
  EXPECT_EQ(model.producer_name(), "tern");
  ASSERT_EQ(model.metadata_props_size(), 2);
  EXPECT_EQ(model.metadata_props(0).key(), "tern.scheme");
  EXPECT_EQ(model.metadata_props(1).value(), "none");
  EXPECT_EQ(model.opset_import(0).version(), 13);
  const auto extents = [](const ::onnx::ValueInfoProto& info) {
    std::vector<std::string> result;
    for (const auto& dim : info.type().tensor_type().shape().dim()) {
      result.push_back(dim.has_dim_param() ? dim.dim_param() : std::to_string(dim.dim_value()));
    }
    return result;
  };
  ASSERT_EQ(model.graph().input_size(), 1);
  EXPECT_EQ(model.graph().input(0).name(), "input");
  EXPECT_THAT(extents(model.graph().input(0)), ElementsAre("N", "3", "4", "4"));
  EXPECT_EQ(model.graph().output(0).name(), graph.values[graph.output].name);
  EXPECT_THAT(extents(model.graph().output(0)), ElementsAre("N", "5", "1", "1"));
}

TEST(ExportTest, EqualNamesAreToldApart) {
  GraphBuilder b({3, 4, 4});
  const ValueId x = b.Conv(b.input(), 3, 1);
  Graph graph = b.Finish(b.Binary(OpType::kAdd, b.Conv(x, 3, 1), b.input()));
  for (graph::Value& value : graph.values) value.name = "same";
  for (graph::Node& node : graph.nodes) node.name = "same";
  std::set<std::string> names;
  const ::onnx::ModelProto model = Parsed(graph);
  for (const auto& tensor : model.graph().initializer()) {
    EXPECT_TRUE(names.insert(tensor.name()).second) << tensor.name();
  }
  EXPECT_TRUE(names.insert(model.graph().input(0).name()).second);
  for (const auto& node : model.graph().node()) {
    for (const auto& output : node.output()) EXPECT_TRUE(names.insert(output).second) << output;
  }
  const Graph flat = Flattened(graph);
  const auto again = RoundTrip(flat);
  ASSERT_TRUE(again.ok()) << again.status();
  const Tensor input = RandomInput(flat, 1);
  EXPECT_LE(engine::testing::RelativeDifference(Logits(*again, input), Logits(flat, input)), 1e-5f);
}

// What QuantizeLinear says of 1.3 with scale 0.5 and zero point 3: code 6, real 1.5.
TEST(ExportTest, EveryQuantisedValuePassesOneQuantizeAndOneDequantize) {
  GraphBuilder b({1, 2, 2});
  Graph graph = Flattened(b.Finish(b.Unary(OpType::kRelu, b.input())));
  graph.values[graph.input].quant = QuantParams{0.5f, 3};
  const ::onnx::ModelProto model = Parsed(graph);
  std::vector<std::string> types;
  for (const auto& node : model.graph().node()) types.push_back(node.op_type());
  EXPECT_THAT(types, ElementsAre("QuantizeLinear", "DequantizeLinear", "Relu", "Reshape"));
  EXPECT_EQ(model.graph().node(2).input(0), model.graph().node(1).output(0));
  const auto again = RoundTrip(graph);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->values[again->input].quant, (QuantParams{0.5f, 3}));
  EXPECT_EQ(again->values[again->input].name, "input");
  EXPECT_EQ(Logits(*again, Tensor::Of<float>({1, 1, 2, 2}, {1.3f, -9, 0.2f, 0})),
            (std::vector<float>{1.5f, 0, 0, 0}));
}

TEST(ExportTest, AQuantisedOutputIsDeclaredAsReals) {
  GraphBuilder b({4, 1, 1});
  Graph graph = b.Finish(b.FullyConnected(b.Flatten(b.input()), 3));
  const Tensor input = RandomInput(graph, 1);
  const auto values = reference::ExecuteFloat(graph, input);
  ASSERT_TRUE(values.ok());
  QuantizeOptions options;
  options.float_output = false;
  graph = QuantizeGraph(graph, engine::testing::RangesOf(*values), options);
  const std::string name = graph.values[graph.output].name;
  const ::onnx::ModelProto model = Parsed(graph);
  EXPECT_EQ(model.graph().output(0).name(), name);
  EXPECT_EQ(model.graph().node(model.graph().node_size() - 1).op_type(), "DequantizeLinear");
  EXPECT_EQ(model.graph().node(model.graph().node_size() - 1).output(0), name);
  const auto again = RoundTrip(graph);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->values[again->output].quant, graph.values[graph.output].quant);
}

TEST(ExportTest, RefusesAGraphThatIsNotValid) {
  GraphBuilder b({3, 4, 4});
  Graph graph = b.Finish(b.Conv(b.input(), 5, 3));
  graph.nodes[0].bias = Tensor();
  EXPECT_EQ(Export(graph, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::onnx
