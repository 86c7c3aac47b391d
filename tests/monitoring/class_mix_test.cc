#include "server/monitoring/class_mix.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace tern::monitoring {
namespace {

TEST(StabilityIndexTest, EqualsTheSumOverTheShares) {
  // Shares of (50.5, 30.5, 20.5) / 101.5 and (20.5, 30.5, 50.5) / 101.5: twice
  // (30 / 101.5) ln(50.5 / 20.5).
  EXPECT_NEAR(StabilityIndex({50, 30, 20}, {20, 30, 50}), 0.532935044, 1e-9);
  // Other totals: (6.5, 2.5, 2.5) / 11.5 and (10.5, 0.5, 0.5) / 11.5 would be infinite unsmoothed.
  EXPECT_NEAR(StabilityIndex({600, 200, 200}, {10, 0, 0}), 0.6104532154, 1e-9);
  EXPECT_NEAR(StabilityIndex({6, 2, 2}, {0, 1, 3}), 1.3292822974, 1e-9);
}

TEST(StabilityIndexTest, IsNothingForTheSameMixAndSymmetric) {
  EXPECT_EQ(StabilityIndex({10, 20, 30}, {10, 20, 30}), 0);
  EXPECT_LT(StabilityIndex({1000, 3000}, {10, 30}), 0.001);
  EXPECT_EQ(StabilityIndex({6, 2}, {1, 9}), StabilityIndex({1, 9}, {6, 2}));
  EXPECT_EQ(StabilityIndex({}, {}), 0);
}

TEST(StabilityIndexTest, GroupsWithoutImagesCountForNothing) {
  // With the smoothing of four groups: (50.5, 30.5, 20.5) / 102.
  EXPECT_NEAR(StabilityIndex({50, 30, 20, 0}, {20, 30, 50, 0}), 0.5303226177, 1e-9);
}

// The reason for grouping: sampling noise alone is about (groups - 1) (1/m + 1/n).
TEST(StabilityIndexTest, StaysBelowATenthForSamplesOfOneMixOverAThousandClasses) {
  std::mt19937 random(5);
  std::vector<double> weights(1000);
  for (double& w : weights) w = 0.2 + random() % 1000 / 1000.0;
  std::discrete_distribution<int> mix(weights.begin(), weights.end());
  std::vector<uint32_t> reference(1000, 0);
  for (int i = 0; i < 1000; ++i) ++reference[mix(random)];
  const std::vector<int> group = GroupClasses(reference);
  std::vector<uint64_t> before(kMostGroups, 0), same(kMostGroups, 0), shifted(kMostGroups, 0);
  for (size_t c = 0; c < reference.size(); ++c) before[group[c]] += reference[c];
  for (int i = 0; i < 1000; ++i) ++same[group[mix(random)]];
  // Twice as many of the classes 150 to 269, neighbours, as of the rest.
  for (int c = 150; c < 270; ++c) weights[c] *= 4;
  std::discrete_distribution<int> other(weights.begin(), weights.end());
  for (int i = 0; i < 1000; ++i) ++shifted[group[other(random)]];
  EXPECT_LT(StabilityIndex(before, same), 0.1);
  EXPECT_GT(StabilityIndex(before, shifted), 0.25);
}

TEST(GroupClassesTest, FewClassesHaveAGroupEach) {
  EXPECT_EQ(GroupClasses({5, 0, 7}), (std::vector<int>{0, 1, 2}));
  EXPECT_TRUE(GroupClasses({}).empty());
}

TEST(GroupClassesTest, ManyClassesFormRangesOfAboutEqualShares) {
  const std::vector<uint32_t> even(1000, 3);
  const std::vector<int> group = GroupClasses(even);
  for (int c = 0; c < 1000; ++c) EXPECT_EQ(group[c], c / 50) << c;
  std::vector<uint32_t> heavy(100, 0);
  heavy[10] = 1000;  // almost everything
  const std::vector<int> uneven = GroupClasses(heavy);
  EXPECT_TRUE(std::is_sorted(uneven.begin(), uneven.end()));
  EXPECT_GE(uneven.front(), 0);
  EXPECT_LT(uneven.back(), kMostGroups);
}

}  // namespace
}  // namespace tern::monitoring
