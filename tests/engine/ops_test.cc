#include "server/engine/ops.h"

#include <gtest/gtest.h>

#include "server/reference/execute.h"
#include "tests/engine/graph_builder.h"

namespace tern::engine {
namespace {

using namespace testing;  // NOLINT(build/namespaces): the builder's vocabulary

class RunFloatNodeTest : public ::testing::TestWithParam<NamedGraph> {};

TEST_P(RunFloatNodeTest, AgreesWithTheReferenceNodeByNode) {
  const Graph& graph = GetParam().graph;
  for (int batch : {1, 3}) {
    GraphBuilder random({1}, 5 + batch);
    const auto values =
        reference::ExecuteFloat(graph, random.Random(graph.shape(graph.input).WithBatch(batch)));
    ASSERT_TRUE(values.ok()) << values.status();
    for (const Node& node : graph.nodes) {
      std::vector<const Tensor*> inputs;
      for (ValueId id : node.inputs) inputs.push_back(&(*values)[id]);
      const auto got = RunFloatNode(graph, node, inputs, batch);
      ASSERT_TRUE(got.ok()) << node.name << ": " << got.status();
      ASSERT_EQ(got->shape(), (*values)[node.output].shape()) << node.name;
      EXPECT_LE(RelativeDifference(got->data<float>(), (*values)[node.output].data<float>()), 1e-5f)
          << node.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, RunFloatNodeTest, ::testing::ValuesIn(Zoo()),
                         [](const auto& info) { return info.param.name; });

TEST(RunFloatNodeErrorsTest, NamesANodeWhoseInputDoesNotFit) {
  GraphBuilder b({3, 8, 8});
  const Graph graph = b.Finish(b.Conv(b.input(), 8, 3));
  const Tensor small(DType::kF32, {1, 3, 7, 8});
  const auto result = RunFloatNode(graph, graph.nodes[0], {&small}, 1);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(result.status().message()).find(graph.nodes[0].name), std::string::npos);
  EXPECT_EQ(RunFloatNode(graph, graph.nodes[0], {}, 1).status().code(),
            absl::StatusCode::kInvalidArgument);
  Node weightless = graph.nodes[0];
  weightless.weight = Tensor();
  const Tensor fits(DType::kF32, {1, 3, 8, 8});
  EXPECT_EQ(RunFloatNode(graph, weightless, {&fits}, 1).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(SgemmTest, MultipliesInEveryTransposition) {
  const int64_t m = 5, n = 7, k = 9;
  GraphBuilder b({1});
  for (bool transpose_a : {false, true}) {
    for (bool transpose_b : {false, true}) {
      const Tensor a = b.Random({m * k}), x = b.Random({k * n}), start = b.Random({m * n});
      std::vector<float> c(start.data<float>().begin(), start.data<float>().end());
      Sgemm(transpose_a, transpose_b, m, n, k, 0.5f, a.data<float>().data(), transpose_a ? m : k,
            x.data<float>().data(), transpose_b ? k : n, 2.0f, c.data(), n);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          double sum = 0;
          for (int64_t l = 0; l < k; ++l) {
            sum += static_cast<double>(a.data<float>()[transpose_a ? l * m + i : i * k + l]) *
                   x.data<float>()[transpose_b ? j * k + l : l * n + j];
          }
          EXPECT_NEAR(c[i * n + j], 0.5 * sum + 2.0 * start.data<float>()[i * n + j], 1e-5);
        }
      }
    }
  }
}

}  // namespace
}  // namespace tern::engine
