#include "server/classify/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>

namespace tern::classify {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(TopKTest, ProbabilitiesAreTheSoftmaxOverAllClasses) {
  // e^0, e^1, e^2 over their sum, by hand.
  const std::vector<float> logits = {0.0f, 2.0f, 1.0f};
  const auto top = TopK(logits, 2);
  ASSERT_EQ(top.size(), 2u);
  EXPECT_EQ(top[0].index, 1);
  EXPECT_NEAR(top[0].probability, 0.665241, 1e-6);
  EXPECT_EQ(top[1].index, 2);
  EXPECT_NEAR(top[1].probability, 0.244728, 1e-6);
}

TEST(TopKTest, KIsClampedToTheClasses) {
  const std::vector<float> logits = {3, 1, 2};
  EXPECT_EQ(TopK(logits, 0).size(), 1u);
  EXPECT_EQ(TopK(logits, -5).size(), 1u);
  EXPECT_EQ(TopK(logits, 100).size(), 3u);
  EXPECT_TRUE(TopK({}, 5).empty());
}

TEST(TopKTest, EqualLogitsComeInIndexOrder) {
  const std::vector<float> logits = {1, 5, 5, 1, 5};
  const auto top = TopK(logits, 5);
  const int want[] = {1, 2, 4, 0, 3};
  for (int i = 0; i < 5; ++i) EXPECT_EQ(top[i].index, want[i]) << i;
}

TEST(TopKTest, HugeLogitsDoNotOverflow) {
  const std::vector<float> logits = {3e38f, -3e38f, 3e38f};
  const auto top = TopK(logits, 3);
  EXPECT_EQ(top[0].index, 0);
  EXPECT_FLOAT_EQ(top[0].probability, 0.5f);
  EXPECT_FLOAT_EQ(top[1].probability, 0.5f);
  EXPECT_EQ(top[2].probability, 0.0f);
}

TEST(TopKTest, NonFiniteLogitsAreTheLowest) {
  const std::vector<float> logits = {kNan, -100.0f, kInfinity, -kInfinity, -101.0f};
  const auto top = TopK(logits, 5);
  const int want[] = {1, 4, 0, 2, 3};
  double sum = 0;
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(top[i].index, want[i]) << i;
    sum += top[i].probability;
  }
  EXPECT_NEAR(sum, 1.0, 1e-6);
  EXPECT_EQ(top[2].probability, 0.0f);

  const std::vector<float> none = {kNan, kInfinity, kNan, -kInfinity};
  for (const Prediction& p : TopK(none, 4)) EXPECT_EQ(p.probability, 0.25f);
}

TEST(CheckFiniteTest, NamesTheFirstClassWithoutANumber) {
  EXPECT_TRUE(CheckFinite({}).ok());
  EXPECT_TRUE(CheckFinite({3e38f, -3e38f, 0.0f, 1e-45f}).ok());
  for (const auto& [value, name] :
       {std::pair(kNan, "nan"), std::pair(kInfinity, "inf"), std::pair(-kInfinity, "-inf")}) {
    const absl::Status status = CheckFinite({1.0f, value, kNan});
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(status.message(),
              std::string("the network's output is not finite: class 1 of 3 is ") + name);
  }
}

TEST(TopKTest, AgreesWithSortingEverything) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    const int classes = 1 + static_cast<int>(random() % 40);
    std::vector<float> logits(classes);
    for (float& logit : logits) logit = static_cast<float>(random() % 10);  // many ties
    std::vector<int> order(classes);
    for (int i = 0; i < classes; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits[a] > logits[b]; });
    const int k = 1 + static_cast<int>(random() % classes);
    const auto top = TopK(logits, k);
    const std::set<int> best(order.begin(), order.begin() + k);
    for (int i = 0; i < k; ++i) ASSERT_EQ(top[i].index, order[i]);
    for (int label = 0; label < classes; ++label)
      ASSERT_EQ(InTopK(logits, label, k), best.count(label) == 1);
  }
}

TEST(InTopKTest, ALabelOutsideTheClassesIsNeverAmongThem) {
  const std::vector<float> logits = {1, 2};
  EXPECT_FALSE(InTopK(logits, -1, 5));
  EXPECT_FALSE(InTopK(logits, 2, 5));
  EXPECT_TRUE(InTopK(logits, 0, 5));
  EXPECT_FALSE(InTopK(logits, 0, 1));
}

TEST(KlDivergenceTest, IsTheDefinition) {
  // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): sum p log(p / q) = log(2) / 2 - log(2) / 4. Adding a
  // constant to logits changes nothing.
  const float l = std::log(2.0f);
  const std::vector<float> p = {l, 0, 0}, q = {1000, 1000 + l, 1000};
  EXPECT_NEAR(KlDivergence(p, q), std::log(2.0) / 4, 1e-4);
  EXPECT_EQ(KlDivergence(p, p), 0);
  EXPECT_GE(KlDivergence(std::vector<float>{1e30f, 0}, std::vector<float>{1e30f, 1}), 0);
}

TEST(KlDivergenceTest, NonFiniteLogitsHaveNoProbability) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  EXPECT_NEAR(KlDivergence(std::vector<float>{0, 0, nan}, std::vector<float>{0, 0, 0}),
              std::log(1.5), 1e-12);
  EXPECT_EQ(KlDivergence(std::vector<float>{0, 0}, std::vector<float>{0, inf}),
            std::numeric_limits<double>::infinity());
  EXPECT_NEAR(KlDivergence(std::vector<float>{nan, inf}, std::vector<float>{0, 0}), 0, 1e-12);
}

TEST(ParseLabelsTest, ReadsOneNamePerLine) {
  const auto labels = ParseLabels("cat\r\ndog\r\n\nK\xc3\xa4se, sheep\n\n \r\n", 0);
  ASSERT_TRUE(labels.ok());
  EXPECT_EQ(*labels, (std::vector<std::string>{"cat", "dog", "", "K\xc3\xa4se, sheep"}));
  EXPECT_EQ(ParseLabels("\xef\xbb\xbf"
                        "cat",
                        1)
                ->front(),
            "cat");
  EXPECT_TRUE(ParseLabels("", 0)->empty());
}

TEST(ParseLabelsTest, TheNumberMustFitTheClasses) {
  EXPECT_TRUE(ParseLabels("a\nb\n", 2).ok());
  const auto wrong = ParseLabels("a\nb\n", 3);
  EXPECT_EQ(wrong.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(wrong.status().message().find("got 2 names, want 3"), std::string::npos)
      << wrong.status();
}

TEST(ParseLabelsTest, RejectsWhatIsNotUtf8) {
  for (const char* bad : {"a\n\xff", "\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80",
                          "\xe2\x28\xa1", "\x80"}) {
    EXPECT_EQ(ParseLabels(bad, 0).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_NE(ParseLabels("a\n\xff", 0).status().message().find("line 2"), std::string::npos);
  for (const char* good :
       {"\xf0\x9f\x90\x88", "\xe2\x82\xac", "\xf4\x8f\xbf\xbf", "\xed\x9f\xbf"}) {
    EXPECT_TRUE(ParseLabels(good, 1).ok()) << good;
  }
}

TEST(EntropyTest, IsThatOfTheSoftmax) {
  // p = (0.09003057, 0.24472847, 0.66524096): - sum p log p.
  EXPECT_NEAR(Entropy({1, 2, 3}), 0.8323955818, 1e-9);
  EXPECT_NEAR(Entropy({1001, 1002, 1003}), 0.8323955818, 1e-9);
  EXPECT_NEAR(Entropy({7, 7, 7, 7}), std::log(4.0), 1e-12);
  EXPECT_EQ(Entropy({1000, 0}), 0);
  EXPECT_EQ(Entropy({5}), 0);
  EXPECT_EQ(Entropy({}), 0);
}

TEST(EntropyTest, NumbersThatAreNoneCountAsProbabilityZero) {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  EXPECT_NEAR(Entropy({3, nan, 3, infinity, -infinity}), std::log(2.0), 1e-12);
  EXPECT_NEAR(Entropy({nan, infinity}), std::log(2.0), 1e-12);  // all equally probable
}

}  // namespace
}  // namespace tern::classify
