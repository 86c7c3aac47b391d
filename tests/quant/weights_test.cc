#include "server/quant/weights.h"

#include <cmath>
#include <numeric>

#include "gtest/gtest.h"
#include "server/tensor/cluster.h"
#include "tests/quant/networks.h"

namespace tern::quant {
namespace {

double TernaryError(const std::vector<float>& v, float scale) {
  double error = 0;
  for (float x : v) {
    const double e = x - scale * static_cast<double>(NearestCode(x, scale, 1));
    error += e * e;
  }
  return error;
}

// Over all 3^n codes, each with its least-squares scale.
double BestTernaryError(const std::vector<float>& v) {
  const int n = static_cast<int>(v.size());
  double best = std::inner_product(v.begin(), v.end(), v.begin(), 0.0);
  const int combinations = static_cast<int>(std::pow(3, n));
  for (int code = 0; code < combinations; ++code) {
    double dot = 0, count = 0, square = 0;
    for (int i = 0, rest = code; i < n; ++i, rest /= 3) {
      const int t = rest % 3 - 1;
      dot += t * static_cast<double>(v[i]);
      count += t != 0;
      square += static_cast<double>(v[i]) * v[i];
    }
    if (count > 0 && dot > 0) best = std::min(best, square - dot * dot / count);
  }
  return best;
}

TEST(TernaryScaleTest, IsOptimalOverAllCodesOfRandomClusters) {
  Normal normal(3);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<float> v(1 + normal.bits() % 8);
    for (float& x : v) x = normal() * (trial % 3 == 0 ? 0.01f : 2.0f);
    const double best = BestTernaryError(v);
    EXPECT_NEAR(TernaryError(v, TernaryScale(v)), best, 1e-5 * (best + 1e-3)) << "trial " << trial;
  }
}

TEST(TernaryScaleTest, IsPositiveForZeroWeights) {
  EXPECT_GT(TernaryScale({0.0f, 0.0f, 0.0f}), 0.0f);
  EXPECT_GT(UniformScale({0.0f, 0.0f}, 7), 0.0f);
}

TEST(UniformScaleTest, RepresentsAGridExactly) {
  std::vector<float> v;
  for (int q = -7; q <= 7; ++q) v.push_back(0.125f * static_cast<float>(q));
  EXPECT_FLOAT_EQ(UniformScale(v, 7), 0.125f);
}

TEST(UniformScaleTest, ClipsAnOutlierWhenThatCostsLess) {
  std::vector<float> v(400);
  for (size_t i = 0; i < v.size(); ++i)
    v[i] = (i % 2 ? 1.0f : -1.0f) * (0.05f + 0.0009f * static_cast<float>(i));
  v.push_back(0.8f);
  EXPECT_LT(UniformScale(v, 7), 0.8f / 7);
}

struct Case {
  int channels, taps, n;
};

class ClusterLayoutTest : public ::testing::TestWithParam<Case> {};

TEST_P(ClusterLayoutTest, IsAPermutationWithClusterMapsClustersAsRuns) {
  const auto [channels, taps, n] = GetParam();
  const ClusterLayout layout = MakeClusterLayout(channels, taps, n);
  const ClusterMap map(channels, n == 0 ? channels : n);
  ASSERT_EQ(layout.columns(), channels * taps);
  ASSERT_EQ(layout.clusters(), map.clusters());
  std::vector<int> sorted = layout.column;
  std::sort(sorted.begin(), sorted.end());
  for (int j = 0; j < layout.columns(); ++j) ASSERT_EQ(sorted[j], j);
  for (int g = 0; g < layout.clusters(); ++g) {
    ASSERT_LT(layout.begin[g], layout.begin[g + 1]);
    for (int j = layout.begin[g]; j < layout.begin[g + 1]; ++j) {
      ASSERT_EQ(map.cluster_of(layout.column[j] / taps), g) << "position " << j;
    }
  }
}

TEST_P(ClusterLayoutTest, CodesComeBackToTheirPlaces) {
  const auto [channels, taps, n] = GetParam();
  const ClusterLayout layout = MakeClusterLayout(channels, taps, n);
  constexpr int kOutputs = 3;
  std::vector<float> weights(kOutputs * channels * taps);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i % 127);
  const std::vector<float> rows = ToLayout(layout, weights);
  const std::vector<int8_t> codes(rows.begin(), rows.end());
  const std::vector<int8_t> back = FromLayout(layout, codes);
  for (size_t i = 0; i < weights.size(); ++i)
    ASSERT_EQ(back[i], static_cast<int8_t>(weights[i])) << i;
}

TEST_P(ClusterLayoutTest, DequantizeSeesTheScalesOfTheLayout) {
  const auto [channels, taps, n] = GetParam();
  const ClusterLayout layout = MakeClusterLayout(channels, taps, n);
  Normal normal(5);
  const Shape shape{4, channels, taps, 1};
  const Tensor weight = normal.Fill(shape, 1.0f);
  const CodedWeights coded =
      NearestWeights(layout, 4, ToLayout(layout, weight.data<float>()), 1, ScaleGrid{});
  const int stored_n = n == 0 ? channels : n;
  const Tensor real =
      Dequantize(ToQuantizedWeights(layout, coded, WeightScheme::kTernaryCluster, stored_n, shape));
  for (int o = 0; o < 4; ++o) {
    for (int g = 0; g < layout.clusters(); ++g) {
      for (int j = layout.begin[g]; j < layout.begin[g + 1]; ++j) {
        const float wanted = coded.alpha(layout, o, g) * coded.codes[o * layout.columns() + j];
        ASSERT_NEAR(real.data<float>()[o * layout.columns() + layout.column[j]], wanted, 1e-5f);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ClusterLayoutTest,
                         ::testing::Values(Case{16, 9, 4}, Case{24, 9, 16}, Case{3, 49, 4},
                                           Case{16, 1, 64}, Case{7, 9, 3}, Case{9, 4, 4},
                                           Case{17, 1, 8}, Case{10, 9, 0}, Case{1, 9, 1}));

TEST(ScaleGridTest, KeepsThirtyTwoBitSumsExactForAnyCodes) {
  for (int max_code : {1, 7}) {
    for (int64_t columns : {1, 576, 4608, 9473, 9474, 25088, 66311, 66313, 200000}) {
      const int64_t scale = MaxScaleWithoutOverflow(static_cast<int>(columns), max_code);
      EXPECT_GE(scale, 1);
      EXPECT_LE(scale, 127);
      EXPECT_LT(255 * scale * max_code * columns, int64_t{1} << 31) << max_code << " " << columns;
      EXPECT_TRUE(scale == 127 || 255 * (scale + 1) * max_code * columns >= int64_t{1} << 31);
    }
  }
  EXPECT_EQ(MaxInt8CodeWithoutOverflow(25088), 63);
  EXPECT_LT(255 * int64_t{MaxInt8CodeWithoutOverflow(500000)} * 500000, int64_t{1} << 31);
}

TEST(ScaleGridTest, ScalesAreOneToMaxWithTheLargestAtTheTop) {
  CodedWeights weights;
  weights.outputs = 2;
  const std::vector<float> alpha = {1.0f, 0.5f, 1e-9f, 4.0f, 4.0f, 0.03f};
  RoundScales(ScaleGrid{}, 3, alpha, weights);
  EXPECT_EQ(weights.scales, (std::vector<uint8_t>{127, 64, 1, 127, 127, 1}));
  EXPECT_FLOAT_EQ(weights.steps[0], 1.0f / 127);
  EXPECT_FLOAT_EQ(weights.steps[1], 4.0f / 127);
}

TEST(ScaleGridTest, DynamicFixedPointHasOnePowerOfTwoStepForTheLayer) {
  CodedWeights weights;
  weights.outputs = 2;
  const std::vector<float> alpha = {1.0f, 0.5f, 0.3f, 0.01f};
  RoundScales(ScaleGrid{.power_of_two_step = true}, 2, alpha, weights);
  EXPECT_EQ(weights.steps, (std::vector<float>{0.015625f, 0.015625f}));
  EXPECT_EQ(weights.scales, (std::vector<uint8_t>{64, 32, 19, 1}));
}

// Channels whose magnitudes differ by a factor of 50: the small ones get a coarse multiplier, and
// codes to go with it.
TEST(NearestInt8Test, FixedPointStepsAreMultiplesOfOnePowerOfTwo) {
  constexpr int kOutputs = 12, kColumns = 9;
  std::vector<float> values(kOutputs * kColumns);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = uniform(random) / (1.0f + 50.0f / 11.0f * static_cast<float>(i / kColumns));
  }
  const Tensor weight = Tensor::Of<float>({kOutputs, 1, 3, 3}, values);
  const QuantizedWeights q = NearestInt8(weight, true);
  int exponent = 0;  // the smallest with 127 * 2^exponent above every step
  std::frexp(*std::max_element(q.steps.begin(), q.steps.end()) / 127.0f, &exponent);
  for (float step : q.steps) {
    const float multiplier = std::ldexp(step, -exponent);
    EXPECT_EQ(multiplier, std::nearbyint(multiplier));
    EXPECT_GE(multiplier, 1.0f);
    EXPECT_LE(multiplier, 127.0f);
  }
  const Tensor real = Dequantize(q);
  for (int o = 0; o < kOutputs; ++o) {
    float largest = 0;
    for (int j = 0; j < kColumns; ++j)
      largest = std::max(largest, std::abs(values[o * kColumns + j]));
    for (int j = 0; j < kColumns; ++j) {
      EXPECT_LE(std::abs(real.data<float>()[o * kColumns + j] - values[o * kColumns + j]),
                0.06f * largest)
          << o;
    }
  }
}

TEST(NearestInt8Test, CodesUseSevenBitsAndErrorsStayWithinTheStep) {
  Normal normal(7);
  const Tensor weight = normal.Fill(Shape{6, 5, 3, 3}, 0.3f);
  const QuantizedWeights q = NearestInt8(weight, false);
  EXPECT_EQ(q.scheme, WeightScheme::kInt8);
  EXPECT_TRUE(q.cluster_scales.empty());
  const Tensor real = Dequantize(q);
  double error = 0, energy = 0;
  for (int i = 0; i < 6 * 45; ++i) {
    ASSERT_LE(std::abs(q.codes.data<int8_t>()[i]), 63);
    const double e = real.data<float>()[i] - weight.data<float>()[i];
    error += e * e;
    energy += static_cast<double>(weight.data<float>()[i]) * weight.data<float>()[i];
  }
  // Rounding noise is step^2 / 12 with step = max / 63 and max below 4 standard deviations here: 35
  // dB.
  EXPECT_GT(10 * std::log10(energy / error), 35.0);
}

TEST(StoredBitsTest, CountsCodesAndScales) {
  const ClusterLayout layout = MakeClusterLayout(16, 9, 4);
  Normal normal(9);
  const Tensor weight = normal.Fill(Shape{8, 16, 3, 3}, 1.0f);
  const std::vector<float> rows = ToLayout(layout, weight.data<float>());
  const auto quantise = [&](WeightScheme scheme) {
    return ToQuantizedWeights(layout, NearestWeights(layout, 8, rows, MaxCode(scheme), ScaleGrid{}),
                              scheme, 4, weight.shape());
  };
  const QuantizedWeights ternary = quantise(WeightScheme::kTernaryCluster);
  EXPECT_EQ(StoredBits(ternary), 8 * 231 + 7 * 8 * 4);  // 1152 codes, five to a byte
  EXPECT_DOUBLE_EQ(MultiplicationsRemoved(ternary), 1.0 - 4.0 / 144);
  const QuantizedWeights four = quantise(WeightScheme::kInt4Cluster);
  EXPECT_EQ(StoredBits(four), 4 * 8 * 144 + 7 * 8 * 4);
  EXPECT_EQ(MultiplicationsRemoved(four), 0);
  EXPECT_EQ(StoredBits(quantise(WeightScheme::kInt3Cluster)), 3 * 8 * 144 + 7 * 8 * 4);
  EXPECT_EQ(StoredBits(NearestInt8(weight, false)), 7 * 8 * 144);
}

}  // namespace
}  // namespace tern::quant
