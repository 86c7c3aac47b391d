// The fixed-point executor against real arithmetic: every operator of a network is repeated in
// double on the real numbers of its operands, which for powers of two is exact, and rounded once.
#include "server/graph/fixed_point.h"

#include <gtest/gtest.h>

#include <cmath>

#include "server/reference/execute.h"
#include "server/reference/ops.h"
#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"

namespace tern::reference {
namespace {

using engine::testing::GraphBuilder;
using engine::testing::NamedGraph;
using graph::Graph;
using graph::Node;
using graph::OpType;

Tensor Reals(const graph::Value& value, const Tensor& codes) {
  if (codes.dtype() == DType::kF32) return codes;
  Tensor reals(DType::kF32, codes.shape());
  for (int64_t i = 0; i < codes.elements(); ++i) {
    reals.data<float>()[i] = value.quant->Dequantize(codes.data<uint8_t>()[i]);
  }
  return reals;
}

// Operators that the fixed-point rules do not cover, or (the unary ones) that are tables of codes.
bool IsChecked(const Graph& graph, const Node& node) {
  for (graph::ValueId id : node.inputs) {
    if (!graph.values[id].quant) return false;
  }
  switch (node.op) {
    case OpType::kSub:
    case OpType::kDiv:
    case OpType::kSoftmax:
    case OpType::kReduceMean:
      return false;
    default:
      return !IsUnary(node.op);
  }
}

struct Case {
  std::string name;
  Graph graph;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const NamedGraph& named : engine::testing::Zoo()) {
    for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster}) {
      GraphBuilder random({1}, 3);
      const auto values = ExecuteFloat(
          named.graph, random.Random(named.graph.shape(named.graph.input).WithBatch(4)));
      EXPECT_TRUE(values.ok()) << values.status();
      engine::testing::QuantizeOptions options;
      options.scheme = scheme;
      Graph graph = QuantizeGraph(named.graph, engine::testing::RangesOf(*values), options);
      const absl::Status status = graph::RoundToFixedPoint(graph);
      EXPECT_TRUE(status.ok()) << status;
      cases.push_back(
          {named.name + (scheme == WeightScheme::kInt8 ? "Int8" : "Ternary"), std::move(graph)});
    }
  }
  return cases;
}

class FixedPointReferenceTest : public ::testing::TestWithParam<Case> {};

TEST_P(FixedPointReferenceTest, RoundsTheExactResultOnceTiesUpwards) {
  const Graph& graph = GetParam().graph;
  GraphBuilder random({1}, 8);
  const auto run = ExecuteQuantized(graph, random.Random(graph.shape(graph.input).WithBatch(2)));
  ASSERT_TRUE(run.ok()) << run.status();
  for (const Node& node : graph.nodes) {
    if (!IsChecked(graph, node)) continue;
    const graph::Value& value = graph.values[node.output];
    std::vector<Tensor> reals;
    for (graph::ValueId id : node.inputs) reals.push_back(Reals(graph.values[id], (*run)[id]));
    std::vector<const Tensor*> inputs;
    for (const Tensor& tensor : reals) inputs.push_back(&tensor);
    // Sums in double; the f32 results hold the 24 bits that decide about a code.
    const Tensor exact = EvaluateFloat(graph, node, inputs, 2);
    const Tensor& got = (*run)[node.output];
    // Reciprocals and the constants of a batch normalisation are rounded to integers before.
    const bool rounded = node.op == OpType::kBatchNorm || node.op == OpType::kAveragePool ||
                         node.op == OpType::kGlobalAveragePool;
    for (int64_t i = 0; i < exact.elements(); ++i) {
      const float real = exact.data<float>()[i];
      if (!value.quant) {
        ASSERT_EQ(got.data<float>()[i], real) << node.name;
        continue;
      }
      const double code = double{real} / value.quant->scale + value.quant->zero_point;
      const double wanted = std::clamp(std::floor(code + 0.5), 0.0, 255.0);
      const bool near_tie = std::abs(code + 0.5 - std::round(code + 0.5)) < 0.01;
      if (rounded && near_tie) {
        ASSERT_NEAR(got.data<uint8_t>()[i], wanted, 1) << node.name << " " << code;
      } else {
        ASSERT_EQ(got.data<uint8_t>()[i], wanted) << node.name << " " << code;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, FixedPointReferenceTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace tern::reference
