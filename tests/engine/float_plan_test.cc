#include <gtest/gtest.h>

#include <thread>

#include "server/engine/plan.h"
#include "server/reference/execute.h"
#include "tests/engine/graph_builder.h"

namespace tern::engine {
namespace {

using namespace testing;  // NOLINT(build/namespaces): the builder's vocabulary

void FillInput(Session& session, const Tensor& nchw) {
  const Shape& s = nchw.shape();
  NchwToNhwc(nchw.data<float>().data(), s[0], s[1], s[2], s[3], session.input().data());
}

class FloatPlanTest : public ::testing::TestWithParam<NamedGraph> {};

TEST_P(FloatPlanTest, AgreesWithTheReferenceOnEveryValueAtEveryBatch) {
  const Graph& graph = GetParam().graph;
  PlanOptions options;
  options.max_batch = 7;
  auto plan = Plan::Create(graph, options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ((*plan)->classes(), graph.classes());
  for (int threads : {1, 3}) {
    auto session = (*plan)->NewSession(threads);
    ASSERT_TRUE(session.ok()) << session.status();
    for (int batch : {1, 2, 7}) {
      GraphBuilder random({1}, 77 + batch);
      const Tensor input = random.Random(graph.shape(graph.input).WithBatch(batch));
      const auto expected = reference::ExecuteFloat(graph, input);
      ASSERT_TRUE(expected.ok()) << expected.status();
      FillInput(*session, input);
      const auto logits = session->Run(batch);
      ASSERT_TRUE(logits.ok()) << logits.status();
      ASSERT_EQ(static_cast<int64_t>(logits->size()), batch * graph.classes());
      EXPECT_LE(RelativeDifference(*logits, (*expected)[graph.output].data<float>()), 2e-5f);
      for (const Node& node : graph.nodes) {
        const auto got = session->RunAndFetch(batch, node.output);
        if (got.status().code() == absl::StatusCode::kInvalidArgument) continue;  // fused away
        ASSERT_TRUE(got.ok()) << got.status();
        const Tensor& wanted = (*expected)[node.output];
        ASSERT_EQ(got->shape(), wanted.shape()) << node.name;
        EXPECT_LE(RelativeDifference(got->data<float>(), wanted.data<float>()), 2e-5f)
            << node.name << " batch " << batch << " threads " << threads;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, FloatPlanTest, ::testing::ValuesIn(Zoo()),
                         [](const auto& info) { return info.param.name; });

TEST(PlanTest, NamesEveryLayer) {
  GraphBuilder b({3, 8, 8});
  const ValueId x = b.Conv(b.input(), 16, 3, Strided(1, 1), kReluRange);
  const auto plan = Plan::Create(b.Finish(b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 10)), {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  const auto& layers = (*plan)->layers();
  ASSERT_EQ(layers.size(), 4u);
  for (const LayerInfo& layer : layers) EXPECT_FALSE(layer.implementation.empty()) << layer.name;
  EXPECT_EQ(layers[0].op, "Conv");
  EXPECT_EQ(layers[0].scheme, "fp32");
  EXPECT_EQ(layers[0].macs, 16 * 3 * 9 * 64);
  EXPECT_EQ(layers[0].implementation.substr(0, 7), "onednn:");
  EXPECT_EQ(layers[2].implementation, "view");
  EXPECT_GE((*plan)->weight_bytes(), (16 * 27 + 16 + 160 + 10) * sizeof(float));
  EXPECT_GT((*plan)->activation_bytes(), 0u);
}

TEST(PlanTest, RejectsBatchesOutsideItsRange) {
  GraphBuilder b({3, 8, 8});
  PlanOptions options;
  options.max_batch = 2;
  auto plan = Plan::Create(b.Finish(b.Conv(b.input(), 8, 1)), options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(session->Run(0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(session->Run(3).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(session->Run(2).ok());
  EXPECT_EQ((*plan)->NewSession(0).status().code(), absl::StatusCode::kInvalidArgument);
  options.max_batch = 0;
  EXPECT_EQ(Plan::Create(b.Finish(1), options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PlanTest, RejectsAnInvalidGraph) {
  GraphBuilder b({3, 8, 8});
  Graph graph = b.Finish(b.Conv(b.input(), 8, 1));
  graph.nodes[0].inputs[0] = 99;
  EXPECT_EQ(Plan::Create(graph, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PlanTest, ReusesTheMemoryOfDeadValues) {
  GraphBuilder b({16, 32, 32});
  ValueId x = b.input();
  for (int i = 0; i < 10; ++i) x = b.Conv(x, 16, 3, Strided(1, 1));
  PlanOptions options;
  options.max_batch = 4;
  const auto plan = Plan::Create(b.Finish(x), options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  // Input, output and the two live values of a chain, not twelve.
  EXPECT_LE((*plan)->activation_bytes(), 5u * 4 * 16 * 32 * 32 * sizeof(float));
}

TEST(PlanTest, AddsAResidualWithoutACopyWhereItDies) {
  GraphBuilder b({16, 32, 32});
  const ValueId skip = b.Conv(b.input(), 16, 1);
  const ValueId inner = b.Conv(skip, 16, 3, Strided(1, 1));
  ValueId x = b.Conv(inner, 16, 3, Strided(1, 1), {}, skip);
  x = b.Conv(x, 16, 1);
  PlanOptions options;
  options.max_batch = 1;
  const auto plan = Plan::Create(b.Finish(x), options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  // Input, skip (= sum), inner, output; a blocked network has the input or output in two orders.
  EXPECT_LE((*plan)->activation_bytes(), 4u * 16 * 32 * 32 * sizeof(float));
}

TEST(PlanTest, ManyBatchSizesKeepWorking) {
  GraphBuilder b({8, 4, 4});
  const Graph graph = b.Finish(b.FullyConnected(b.Flatten(b.Conv(b.input(), 8, 3)), 5));
  auto plan = Plan::Create(graph, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  ASSERT_TRUE(session.ok()) << session.status();
  const Tensor input = b.Random({32, 8, 4, 4});
  FillInput(*session, input);
  const auto first = session->Run(32);
  ASSERT_TRUE(first.ok()) << first.status();
  const std::vector<float> wanted(first->begin(), first->end());
  for (int round = 0; round < 2; ++round) {
    for (int batch = 1; batch <= 32; ++batch) {
      const auto got = session->Run(batch);
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_LE(RelativeDifference(*got, absl::MakeConstSpan(wanted).subspan(0, batch * 5)), 1e-5f)
          << batch;
    }
  }
}

TEST(PlanTest, SessionsOfOnePlanRunAtOnce) {
  GraphBuilder b({16, 12, 12});
  ValueId x = b.Conv(b.input(), 16, 3, Strided(1, 1), kReluRange);
  x = b.Conv(x, 16, 3, Strided(1, 1), kReluRange, x);
  const Graph graph = b.Finish(b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 10));
  const auto plan = Plan::Create(graph, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  const Tensor input = b.Random({4, 16, 12, 12});
  const auto expected = reference::ExecuteFloat(graph, input);
  ASSERT_TRUE(expected.ok()) << expected.status();
  const absl::Span<const float> wanted = (*expected)[graph.output].data<float>();
  std::vector<std::thread> callers;
  std::vector<float> differences(4, 1.0f);
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      auto session = (*plan)->NewSession(1 + caller % 2);
      if (!session.ok()) return;
      FillInput(*session, input);
      float worst = 0;
      for (int run = 0; run < 20; ++run) {
        const int batch = 1 + (run + caller) % 4;
        const auto logits = session->Run(batch);
        worst = !logits.ok()
                    ? 1.0f
                    : std::max(worst, RelativeDifference(*logits, wanted.subspan(0, batch * 10)));
      }
      differences[caller] = worst;
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (float difference : differences) EXPECT_LE(difference, 2e-5f);
}

TEST(PlanTest, SessionsOutliveThePlanPointer) {
  GraphBuilder b({8, 4, 4});
  auto plan = Plan::Create(b.Finish(b.Conv(b.input(), 8, 1)), {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  ASSERT_TRUE(session.ok()) << session.status();
  plan->reset();
  Session moved = std::move(*session);
  std::fill(moved.input().begin(), moved.input().end(), 0.5f);
  EXPECT_TRUE(moved.Run(1).ok());
}

TEST(NchwToNhwcTest, PutsChannelsLast) {
  const std::vector<float> nchw{0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23};  // [1,3,2,2]
  std::vector<float> nhwc(12);
  NchwToNhwc(nchw.data(), 1, 3, 2, 2, nhwc.data());
  EXPECT_EQ(nhwc, (std::vector<float>{0, 10, 20, 1, 11, 21, 2, 12, 22, 3, 13, 23}));
}

}  // namespace
}  // namespace tern::engine
