#include "server/quant/observe.h"

#include <cmath>

#include "gtest/gtest.h"
#include "tests/quant/networks.h"

namespace tern::quant {
namespace {

QuantParams Choose(const std::vector<float>& values, v1::ActivationType type) {
  Observer observer(static_cast<int64_t>(values.size()));
  observer.Feed(values);
  return observer.Choose(type);
}

bool IsPowerOfTwo(float v) {
  int exponent;
  return std::frexp(v, &exponent) == 0.5f;
}

TEST(ObserverTest, CoversAUniformRangeWithinHalfAStep) {
  for (const auto& [lo, hi] :
       std::vector<std::pair<float, float>>{{-1, 1}, {-0.2f, 5}, {0, 3}, {-4, 0}, {-1e-6f, 7}}) {
    std::vector<float> values;
    for (int i = 0; i <= 10000; ++i)
      values.push_back(lo + (hi - lo) * static_cast<float>(i) / 10000);
    const QuantParams params = Choose(values, v1::AFFINE);
    for (float v : values) {
      // Half a step for rounding, half a step more where the zero point was rounded.
      ASSERT_NEAR(params.Dequantize(params.Quantize(v)), v, 1.01f * params.scale)
          << lo << " " << hi;
    }
    EXPECT_LT(params.scale, (hi - lo) / 250);
  }
}

TEST(ObserverTest, NonNegativeTensorsHaveZeroPointZero) {
  Normal normal(1);
  std::vector<float> values(5000);
  for (float& v : values) v = std::fabs(normal());
  EXPECT_EQ(Choose(values, v1::AFFINE).zero_point, 0);
  EXPECT_EQ(Choose(values, v1::DFP8).zero_point, 0);
}

TEST(ObserverTest, ZeroIsExact) {
  Normal normal(2);
  std::vector<float> values(5000);
  for (float& v : values) v = normal() + 0.7f;
  for (auto type : {v1::AFFINE, v1::DFP8}) {
    const QuantParams params = Choose(values, type);
    EXPECT_EQ(params.Dequantize(params.Quantize(0.0f)), 0.0f);
  }
}

TEST(ObserverTest, DynamicFixedPointScalesArePowersOfTwo) {
  Normal normal(3);
  for (float scale : {1e-4f, 0.3f, 1.0f, 77.0f}) {
    std::vector<float> values(5000);
    for (float& v : values) v = scale * normal();
    const QuantParams params = Choose(values, v1::DFP8);
    EXPECT_TRUE(IsPowerOfTwo(params.scale)) << params.scale;
    EXPECT_EQ(params.zero_point, 128);
  }
}

TEST(ObserverTest, ClipsRareOutliers) {
  Normal normal(4);
  std::vector<float> values(100001);
  for (float& v : values) v = std::fabs(normal());
  values[777] = 10.0f;
  const QuantParams params = Choose(values, v1::AFFINE);
  EXPECT_LT(255 * params.scale, 9.5f);
  const QuantParams full{10.0f / 255, 0};
  EXPECT_LT(QuantizationError(values, params), QuantizationError(values, full));
}

// No range is better than another then.
TEST(ObserverTest, CoversTheWholeRangeWhereAnErrorIsNotANumber) {
  Observer observer(3);
  observer.Feed({0.0f, 1.0f, std::nanf("")});
  EXPECT_EQ(observer.Choose(v1::AFFINE), (QuantParams{1.0f / 255.0f, 0}));
  EXPECT_EQ(observer.Choose(v1::DFP8), (QuantParams{1.0f / 128.0f, 0}));
}

TEST(ObserverTest, AllZeroAndEmptyTensorsGetAUsableScale) {
  EXPECT_EQ(Choose({}, v1::AFFINE), QuantParams{});
  EXPECT_EQ(Choose(std::vector<float>(100, 0.0f), v1::AFFINE), QuantParams{});
  EXPECT_EQ(Choose(std::vector<float>(100, 0.0f), v1::DFP8), QuantParams{});
}

TEST(ObserverTest, FeedingInPiecesGivesTheSameParameters) {
  Normal normal(5);
  std::vector<float> values(450000);
  for (float& v : values) v = normal();
  Observer pieces(static_cast<int64_t>(values.size()));
  for (size_t i = 0; i < values.size(); i += 1000)
    pieces.Feed(absl::MakeConstSpan(values).subspan(i, 1000));
  EXPECT_EQ(pieces.Choose(v1::AFFINE), Choose(values, v1::AFFINE));
}

}  // namespace
}  // namespace tern::quant
