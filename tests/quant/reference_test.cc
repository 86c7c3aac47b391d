// What the quantiser simulated while it chose codes is what the integer definition computes.
#include <cmath>

#include "gtest/gtest.h"
#include "server/quant/quantize.h"
#include "server/reference/execute.h"
#include "tests/quant/networks.h"
#include "tests/quant/simulate.h"

namespace tern::quant {
namespace {

class QuantReferenceTest
    : public ::testing::TestWithParam<std::pair<v1::WeightType, v1::ActivationType>> {};

TEST_P(QuantReferenceTest, IntegerExecutionEqualsTheSimulationUpToRareTies) {
  const graph::Graph graph = SmallNetwork();
  const Shape sample = graph.shape(graph.input);
  QuantizeOptions options;
  options.recipe.set_weights(GetParam().first);
  options.recipe.set_activations(GetParam().second);
  options.recipe.set_cluster_size(4);
  auto quantised = Quantize(graph, SmoothImages(64, sample, 2), options);
  ASSERT_TRUE(quantised.ok()) << quantised.status();
  const Tensor images = SmoothImages(16, sample, 3);
  auto values = reference::ExecuteQuantized(quantised->graph, images);
  ASSERT_TRUE(values.ok()) << values.status();
  const Tensor simulated = Simulate(quantised->graph, images);
  const auto got = (*values)[quantised->graph.output].data<float>();
  const auto wanted = simulated.data<float>();
  ASSERT_EQ(got.size(), wanted.size());
  double signal = 0, noise = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    signal += static_cast<double>(wanted[i]) * wanted[i];
    noise += (static_cast<double>(got[i]) - wanted[i]) * (static_cast<double>(got[i]) - wanted[i]);
  }
  // Codes differ by one where f32 sums round across a tie, in well under a thousandth of the
  // values; a wrong rule costs far more than rounding itself does (about 30 dB).
  EXPECT_GT(10 * std::log10(signal / (noise + 1e-30)), 50.0);
}

INSTANTIATE_TEST_SUITE_P(Recipes, QuantReferenceTest,
                         ::testing::Values(std::pair{v1::INT8, v1::AFFINE},
                                           std::pair{v1::TERNARY_CLUSTER, v1::AFFINE},
                                           std::pair{v1::INT4_CLUSTER, v1::AFFINE},
                                           std::pair{v1::INT3_CLUSTER, v1::AFFINE},
                                           std::pair{v1::INT3_CLUSTER, v1::DFP8},
                                           std::pair{v1::INT8, v1::DFP8},
                                           std::pair{v1::INT4_CLUSTER, v1::DFP8},
                                           std::pair{v1::TERNARY_CLUSTER, v1::DFP8}));

}  // namespace
}  // namespace tern::quant
