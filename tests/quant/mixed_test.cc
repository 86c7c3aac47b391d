#include "server/quant/mixed.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "tests/quant/networks.h"

namespace tern::quant {
namespace {

// Random options: the dearer in bits the better, times at random.
std::vector<LayerOptions> RandomLayers(int count, uint64_t seed) {
  Normal normal(seed);
  std::vector<LayerOptions> layers(count);
  for (int i = 0; i < count; ++i) {
    layers[i].node = i;
    layers[i].weights = 100;
    double bits = 800, divergence = 0;
    for (int k = 0; k < 4; ++k) {
      layers[i].options.push_back(
          {Scheme{k == 0 ? WeightScheme::kInt8 : WeightScheme::kInt4Cluster, k}, divergence, bits,
           1 + std::fabs(normal())});
      bits *= 0.6;
      divergence += 0.01 + 0.02 * std::fabs(normal());
    }
  }
  return layers;
}

// Every assignment in turn.
template <typename Visit>
void ForAll(const std::vector<LayerOptions>& layers, Visit visit) {
  Assignment assignment(layers.size(), 0);
  for (;;) {
    visit(assignment);
    size_t i = 0;
    while (i < layers.size() && ++assignment[i] == static_cast<int>(layers[i].options.size()))
      assignment[i++] = 0;
    if (i == layers.size()) return;
  }
}

TEST(BestAssignmentsTest, FindTheLeastDivergenceThatEverySearchFinds) {
  for (Cost cost : {Cost::kBits, Cost::kMilliseconds}) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      const auto layers = RandomLayers(6, seed);
      double most = 0;
      ForAll(layers, [&](const Assignment& a) {
        const Totals t = Sum(layers, a);
        most = std::max(most, cost == Cost::kBits ? t.bits : t.ms);
      });
      for (double share : {0.35, 0.5, 0.7, 0.9}) {
        const double budget = share * most;
        double wanted = std::numeric_limits<double>::infinity();
        ForAll(layers, [&](const Assignment& a) {
          const Totals t = Sum(layers, a);
          if ((cost == Cost::kBits ? t.bits : t.ms) <= budget)
            wanted = std::min(wanted, t.divergence);
        });
        if (std::isinf(wanted)) continue;
        const Assignment got = BestAssignments(layers, cost, {budget}).front();
        const Totals totals = Sum(layers, got);
        EXPECT_LE(cost == Cost::kBits ? totals.bits : totals.ms, budget);
        // Costs are rounded to 1/4000 of the dearest, and the other cost weighs a little.
        EXPECT_LE(totals.divergence, 1.05 * wanted + 1e-3);
      }
    }
  }
}

TEST(BestAssignmentsTest, GiveTheCheapestWhereNothingFits) {
  const auto layers = RandomLayers(4, 9);
  const Assignment got = BestAssignments(layers, Cost::kBits, {1.0}).front();
  EXPECT_EQ(got, (Assignment{3, 3, 3, 3}));
}

TEST(BestAssignmentsTest, GiveNoDamageWhereEverythingFits) {
  const auto layers = RandomLayers(4, 9);
  EXPECT_EQ(Sum(layers, BestAssignments(layers, Cost::kBits, {1e9}).front()).divergence, 0);
}

class MixedTest : public ::testing::Test {
 protected:
  MixedTest() : graph_(SmallNetwork()), images_(SmoothImages(120, Shape{3, 12, 12}, 5)) {}

  absl::StatusOr<QuantizeResult> Run(const v1::Recipe& recipe) {
    QuantizeOptions options;
    options.recipe = recipe;
    options.recipe.set_weights(v1::MIXED);
    options.recipe.set_distillation(v1::DISTILL_OFF);
    return Quantize(graph_, images_, options);
  }

  static double Bits(const QuantizeResult& result) { return result.report.bits_per_weight(); }

  graph::Graph graph_;
  Tensor images_;
};

TEST_F(MixedTest, KeepsABudgetOfBitsAndReportsWhatWasMeasuredAndChosen) {
  for (double target : {7.0, 5.5}) {
    v1::Recipe recipe;
    recipe.set_target_bits(target);
    const auto result = Run(recipe);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_LE(Bits(*result), target);
    EXPECT_GT(Bits(*result), target - 2);
    const v1::QuantizationReport& report = result->report;
    EXPECT_EQ(report.recipe().weights(), v1::MIXED);
    EXPECT_EQ(report.recipe().layers_size(), report.layers_size());
    EXPECT_GT(report.sensitivity_size(), report.layers_size());
    int chosen = 0;
    for (const auto& point : report.frontier()) {
      if (!point.chosen()) continue;
      ++chosen;
      EXPECT_TRUE(point.measured());
      EXPECT_NEAR(point.bits_per_weight(), Bits(*result), 1e-6);
    }
    EXPECT_EQ(chosen, 1);
    for (int i = 1; i < report.frontier_size(); ++i)
      EXPECT_GE(report.frontier(i).bits_per_weight(), report.frontier(i - 1).bits_per_weight());
  }
}

TEST_F(MixedTest, LeavesTheFirstAndGroupedLayersAtEightBits) {
  v1::Recipe recipe;
  recipe.set_target_bits(4.9);
  const auto result = Run(recipe);
  ASSERT_TRUE(result.ok()) << result.status();
  for (const graph::Node& node : result->graph.nodes) {
    if (node.name == "stem" || node.name == "grouped") {
      EXPECT_EQ(node.quantized->scheme, WeightScheme::kInt8);
    }
    if (node.name == "classifier") {
      EXPECT_NE(node.quantized->scheme, WeightScheme::kTernaryCluster);
    }
  }
}

TEST_F(MixedTest, SpendsAsLittleTimeAsADropAllows) {
  for (double allowed : {1.0, 0.0}) {
    v1::Recipe recipe;
    recipe.set_max_top1_drop(allowed);
    const auto result = Run(recipe);
    ASSERT_TRUE(result.ok()) << result.status();
    // The frontier is in order of predicted time: whatever was tried and is faster than the chosen
    // point loses too much.
    bool found = false;
    for (const auto& point : result->report.frontier()) {
      found |= point.chosen();
      if (!found && point.measured()) {
        EXPECT_GT(point.drop(), allowed);
      }
    }
    EXPECT_TRUE(found);
    if (allowed == 1.0) {
      EXPECT_TRUE(result->report.frontier(0).chosen());
    }
  }
}

TEST_F(MixedTest, FollowsLayersThatTheCallerDecided) {
  v1::Recipe recipe;
  recipe.set_target_bits(7.0);
  v1::LayerChoice& choice = *recipe.add_layers();
  choice.set_layer("mixed");
  choice.set_weights(v1::TERNARY_CLUSTER);
  choice.set_cluster_size(16);
  const auto result = Run(recipe);
  ASSERT_TRUE(result.ok()) << result.status();
  for (const graph::Node& node : result->graph.nodes) {
    if (node.name == "mixed") {
      EXPECT_EQ(node.quantized->scheme, WeightScheme::kTernaryCluster);
    }
  }
}

TEST_F(MixedTest, OffersClustersWhateverTheMethod) {
  for (const v1::Method method : {v1::DIRECT, v1::CORRECTED}) {
    v1::Recipe recipe;
    recipe.set_target_bits(5.5);
    recipe.set_method(method);
    const auto result = Run(recipe);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_LE(Bits(*result), 5.5);
    // Correction is measured, too.
    double worst = 0;
    for (const auto& entry : result->report.sensitivity())
      worst = std::max(worst, entry.divergence());
    EXPECT_GT(worst, 1e-5);
  }
}

// Its second moments would take too much memory, so that it is corrected.
TEST_F(MixedTest, OffersClustersForAWideLayer) {
  Builder b(Shape{3, 40, 40}, 1);
  const auto stem = b.Conv("stem", b.graph().input, 4, 3, true);
  const auto flat = b.Simple("flatten", graph::OpType::kReshape, {stem}, Shape{6400});
  b.FullyConnected("classifier", b.FullyConnected("wide", flat, 32), 5);
  graph_ = b.graph();
  images_ = SmoothImages(60, Shape{3, 40, 40}, 5);
  v1::Recipe recipe;
  recipe.set_target_bits(4.5);
  for (const bool decided : {false, true}) {
    if (decided) {
      v1::LayerChoice& choice = *recipe.add_layers();
      choice.set_layer("wide");
      choice.set_weights(v1::INT4_CLUSTER);
      choice.set_cluster_size(64);
    }
    const auto result = Run(recipe);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_LE(Bits(*result), 4.5);
  }
}

// Where even the most accurate network loses too much, the search has made it already.
TEST_F(MixedTest, MakesNoNetworkTwice) {
  // Answers that differ from image to image.
  graph_ = SmallNetwork(3);
  for (float& w : graph_.nodes.back().weight.data<float>()) w *= 8;
  images_ = SmoothImages(200, Shape{3, 12, 12}, 5);
  QuantizeOptions options;
  options.recipe.set_weights(v1::MIXED);
  options.recipe.set_max_top1_drop(0);
  options.recipe.set_distillation(v1::DISTILL_OFF);
  for (const char* name : {"block.conv1", "block.conv2", "left", "right", "mixed"}) {
    v1::LayerChoice& choice = *options.recipe.add_layers();
    choice.set_layer(name);
    choice.set_weights(v1::TERNARY_CLUSTER);
    choice.set_cluster_size(64);
  }
  int trials = 0, walks = 0;
  options.progress = [&](const Progress& progress) {
    trials += progress.phase == "searching";
    walks += progress.phase == "calibrating" && progress.layer.empty() && progress.layers_done == 0;
  };
  const auto result = Quantize(graph_, images_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->report.warnings(),
              ::testing::Contains(::testing::HasSubstr("no assignment")));
  EXPECT_TRUE(result->report.frontier().rbegin()->chosen());
  EXPECT_EQ(walks, trials + 1);  // one for the sensitivities
}

TEST_F(MixedTest, RunsNetworksUnderTheGivenPlanOptions) {
  if (kernels::DetectIsa() == kernels::Isa::kAvx512Vnni)
    GTEST_SKIP() << "this CPU has every instruction set";
  QuantizeOptions options;
  options.recipe.set_weights(v1::MIXED);
  options.recipe.set_target_bits(6);
  options.recipe.set_distillation(v1::DISTILL_OFF);
  options.plan.isa = kernels::Isa::kAvx512Vnni;
  const auto status = Quantize(graph_, images_, options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(MixedTest, RefusesABudgetThatNothingKeeps) {
  v1::Recipe recipe;
  recipe.set_target_bits(2.0);
  EXPECT_EQ(Run(recipe).status().code(), absl::StatusCode::kFailedPrecondition);
  recipe.clear_target_bits();
  recipe.set_target_ms(1e-7);
  EXPECT_EQ(Run(recipe).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(MixedTest, WantsEnoughImages) {
  QuantizeOptions options;
  options.recipe.set_weights(v1::MIXED);
  options.recipe.set_target_bits(5);
  EXPECT_EQ(Quantize(graph_, SmoothImages(20, Shape{3, 12, 12}, 5), options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::quant
