// Whole fixed-point networks, bit for bit against the integer reference: the demo network, and the
// real ones in $TERN_SHARED_DATA/models where that is set.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "server/engine/ops.h"
#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "server/reference/execute.h"
#include "tests/engine/quantize_graph.h"

namespace tern::engine {
namespace {

using graph::Graph;
using graph::Node;
using graph::ValueId;

Tensor NormalInput(const Graph& graph) {
  Tensor input(DType::kF32, graph.shape(graph.input).WithBatch(1));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& v : input.data<float>()) v = normal(random);
  return input;
}

testing::Ranges Measure(const Graph& graph, const Tensor& input) {
  std::vector<Tensor> values(graph.values.size());
  for (size_t id = 0; id < values.size(); ++id) {
    values[id] = graph.values[id].constant ? *graph.values[id].constant : Tensor(DType::kF32, {1});
  }
  values[graph.input] = input;
  for (const Node& node : graph.nodes) {
    std::vector<const Tensor*> inputs;
    for (ValueId id : node.inputs) inputs.push_back(&values[id]);
    auto result = RunFloatNode(graph, node, inputs, 1);
    EXPECT_TRUE(result.ok()) << result.status();
    if (!result.ok()) return {};
    values[node.output] = *std::move(result);
  }
  return testing::RangesOf(values);
}

// Int8 and ternary with int8 ends, every instruction set, every value that exists in memory.
void CheckNetwork(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  ASSERT_TRUE(file) << path;
  auto imported = onnx::Import(std::string(std::istreambuf_iterator<char>(file), {}));
  ASSERT_TRUE(imported.ok()) << imported.status();
  graph::Optimize(*imported);
  const Tensor input = NormalInput(*imported);
  const testing::Ranges ranges = Measure(*imported, input);
  for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster}) {
    testing::QuantizeOptions options;
    options.scheme = scheme;
    options.first_and_last_int8 = true;
    Graph graph = testing::QuantizeGraph(*imported, ranges, options);
    ASSERT_EQ(graph::RoundToFixedPoint(graph), absl::OkStatus());
    const auto wanted = reference::ExecuteQuantized(graph, input);
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    for (kernels::Isa isa : kernels::RunnableIsas()) {
      PlanOptions plan_options;
      plan_options.isa = isa;
      plan_options.max_batch = 1;
      const auto plan = Plan::Create(graph, plan_options);
      ASSERT_TRUE(plan.ok()) << plan.status();
      auto session = (*plan)->NewSession(1);
      ASSERT_TRUE(session.ok()) << session.status();
      const Shape& s = input.shape();
      NchwToNhwc(input.data<float>().data(), 1, s[1], s[2], s[3], session->input().data());
      for (size_t i = 0; i < graph.nodes.size(); ++i) {
        const graph::Value& value = graph.values[graph.nodes[i].output];
        const LayerInfo& layer = (*plan)->layers()[i];
        // Islands in float (behind the last weighted layer of these networks) are not exact.
        if (!value.quant && !graph.nodes[i].quantized) continue;
        EXPECT_EQ(layer.implementation.find("float-island"), std::string::npos) << layer.name;
        const auto got = session->RunAndFetch(1, graph.nodes[i].output);
        if (!got.ok()) continue;  // fused away
        const Tensor& tensor = (*wanted)[graph.nodes[i].output];
        int64_t different = 0;
        for (int64_t k = 0; k < tensor.elements(); ++k) {
          const float real = value.quant ? value.quant->Dequantize(tensor.data<uint8_t>()[k])
                                         : tensor.data<float>()[k];
          different += got->data<float>()[k] != real;
        }
        ASSERT_EQ(different, 0) << layer.name << " by " << layer.implementation << " on "
                                << kernels::IsaName(isa);
      }
    }
  }
}

TEST(FixedPointNetworksTest, TheDemoNetworkIsBitIdenticalToTheReference) {
  const char* source = std::getenv("TERN_SOURCE_DIR");
  if (source == nullptr) GTEST_SKIP() << "TERN_SOURCE_DIR is not set";
  CheckNetwork(std::string(source) + "/models/demo/model.onnx");
}

TEST(FixedPointNetworksTest, RealNetworksAreBitIdenticalToTheReference) {
  const char* data = std::getenv("TERN_SHARED_DATA");
  if (data == nullptr) GTEST_SKIP() << "TERN_SHARED_DATA is not set";
  int networks = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(data) + "/models")) {
    if (entry.path().extension() != ".onnx") continue;
    SCOPED_TRACE(entry.path().filename().string());
    CheckNetwork(entry.path());
    ++networks;
  }
  EXPECT_GT(networks, 0);
}

}  // namespace
}  // namespace tern::engine
