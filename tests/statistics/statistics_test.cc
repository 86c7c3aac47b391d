#include "statistics/statistics.h"

#include <gtest/gtest.h>

#include <utility>

namespace tern::statistics {
namespace {

// Reference values: Wilson (1927) by its closed form in extended precision.
TEST(WilsonIntervalTest, HasTheKnownValues) {
  const Interval none = WilsonInterval(0, 0);
  EXPECT_EQ(none.value, 0);
  EXPECT_EQ(none.low, 0);
  EXPECT_EQ(none.high, 1);
  const Interval half = WilsonInterval(5, 10);
  EXPECT_DOUBLE_EQ(half.value, 0.5);
  EXPECT_NEAR(half.low, 0.236593, 1e-6);
  EXPECT_NEAR(half.high, 0.763407, 1e-6);
  const Interval zero = WilsonInterval(0, 10);
  EXPECT_EQ(zero.low, 0);
  EXPECT_NEAR(zero.high, 0.277533, 1e-6);
  const Interval all = WilsonInterval(10, 10);
  EXPECT_NEAR(all.low, 0.722467, 1e-6);
  EXPECT_EQ(all.high, 1);
  const Interval many = WilsonInterval(9123, 10000);
  EXPECT_NEAR(many.low, 0.906594, 1e-5);
  EXPECT_NEAR(many.high, 0.917687, 1e-5);
}

// Bonett and Price (2012), equation for the adjusted Wald interval, evaluated in double elsewhere.
TEST(PairedDifferenceTest, HasTheKnownValues) {
  const Interval lost = PairedDifference(25, 12, 1000);
  EXPECT_DOUBLE_EQ(lost.value, 0.013);
  EXPECT_NEAR(lost.low, 0.0007849546113, 1e-12);
  EXPECT_NEAR(lost.high, 0.0251631491814, 1e-12);
  const Interval few = PairedDifference(12, 2, 50);
  EXPECT_DOUBLE_EQ(few.value, 0.2);
  EXPECT_NEAR(few.low, 0.0508916704312, 1e-12);
  EXPECT_NEAR(few.high, 0.3337237141842, 1e-12);
}

TEST(PairedDifferenceTest, NoDifferenceOnFewPairsIsNoProofOfNone) {
  const Interval same = PairedDifference(0, 0, 300);
  EXPECT_EQ(same.value, 0);
  EXPECT_NEAR(same.low, -0.0091781710222, 1e-12);
  EXPECT_NEAR(same.high, 0.0091781710222, 1e-12);
  const Interval nothing = PairedDifference(0, 0, 0);
  EXPECT_EQ(nothing.low, -1);
  EXPECT_EQ(nothing.high, 1);
}

TEST(PairedDifferenceTest, StaysWithinOneAndHoldsItsValue) {
  for (uint64_t n : {1, 2, 3, 10, 1000, 1000000}) {
    for (const auto& [b, c] : {std::pair<uint64_t, uint64_t>{n, 0}, {0, n}, {n / 2, n - n / 2}}) {
      const Interval drop = PairedDifference(b, c, n);
      EXPECT_GE(drop.low, -1) << n;
      EXPECT_LE(drop.high, 1) << n;
      EXPECT_LE(drop.low, drop.value) << n;
      EXPECT_GE(drop.high, drop.value) << n;
    }
  }
}

// Exact sums of binomial coefficients as fractions of integers.
TEST(McNemarExactTest, IsTheTwoSidedBinomialTest) {
  EXPECT_EQ(McNemarExact(0, 0), 1);
  EXPECT_EQ(McNemarExact(7, 7), 1);
  EXPECT_DOUBLE_EQ(McNemarExact(0, 1), 1);
  EXPECT_NEAR(McNemarExact(0, 5), 0.0625, 1e-15);
  EXPECT_NEAR(McNemarExact(10, 2), 0.03857421875, 1e-14);
  EXPECT_NEAR(McNemarExact(2, 10), 0.03857421875, 1e-14);
  EXPECT_NEAR(McNemarExact(25, 12), 0.04703102743951604, 1e-13);
  EXPECT_NEAR(McNemarExact(1000, 900), 0.02310884510890107, 1e-12);
}

// scipy 1.10: 2 betainc(n - k, k + 1, 1/2).
TEST(McNemarExactTest, LargeCountsNeitherOverflowNorVanish) {
  EXPECT_NEAR(McNemarExact(500'000, 502'500), 0.012564397194129972, 1e-10);
  EXPECT_NEAR(McNemarExact(500'000'000, 500'060'000), 0.057791314204377026, 1e-6);
  EXPECT_EQ(McNemarExact(0, 2000), 0);  // 2^-1999 is below the smallest double
}

TEST(MakeComparisonTest, FillsTheMessage) {
  const v1::PairedComparison comparison = MakeComparison(900, 25, 12, 63);
  EXPECT_EQ(comparison.both_right(), 900u);
  EXPECT_EQ(comparison.only_reference_right(), 25u);
  EXPECT_EQ(comparison.only_candidate_right(), 12u);
  EXPECT_EQ(comparison.both_wrong(), 63u);
  EXPECT_DOUBLE_EQ(comparison.drop(), 0.013);
  EXPECT_NEAR(comparison.drop_low(), 0.0007849546113, 1e-12);
  EXPECT_NEAR(comparison.drop_high(), 0.0251631491814, 1e-12);
  EXPECT_NEAR(comparison.p_value(), 0.04703102743951604, 1e-13);
}

}  // namespace
}  // namespace tern::statistics
