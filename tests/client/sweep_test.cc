#include "client/sweep.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "client/recipe.h"

namespace tern::client {
namespace {

std::vector<ImageFile> Images(std::vector<int> per_class) {
  std::vector<ImageFile> images;
  for (size_t c = 0; c < per_class.size(); ++c) {
    for (int i = 0; i < per_class[c]; ++i) {
      images.push_back(
          {"c" + std::to_string(c) + "/" + std::to_string(i), static_cast<uint32_t>(c)});
    }
  }
  return images;
}

TEST(SplitFoldsTest, EveryImageIsInOneFoldAndClassesAreSpread) {
  // 5 classes and 5 folds: dealing class after class must not put a class into one fold.
  for (const std::vector<int>& sizes :
       {std::vector<int>{20, 20, 20, 20, 20}, {7, 1, 13, 2}, {3, 3, 3}, {100}}) {
    const std::vector<ImageFile> images = Images(sizes);
    const auto folds = SplitFolds(images, 5, 1);
    ASSERT_EQ(folds.size(), 5u);
    std::set<std::string> seen;
    size_t least = images.size(), most = 0;
    std::map<uint32_t, std::vector<int>> counts;
    for (size_t f = 0; f < folds.size(); ++f) {
      least = std::min(least, folds[f].size());
      most = std::max(most, folds[f].size());
      for (const ImageFile& image : folds[f]) {
        EXPECT_TRUE(seen.insert(image.path).second) << image.path;
        auto& of_class = counts[*image.label];
        of_class.resize(5);
        ++of_class[f];
      }
    }
    EXPECT_EQ(seen.size(), images.size());
    EXPECT_LE(most - least, 1u);
    for (const auto& [label, of_class] : counts) {
      EXPECT_LE(*std::max_element(of_class.begin(), of_class.end()) -
                    *std::min_element(of_class.begin(), of_class.end()),
                1)
          << "class " << label;
    }
  }
}

TEST(SplitFoldsTest, TheSeedDecides) {
  const std::vector<ImageFile> images = Images({20, 20});
  EXPECT_EQ(SplitFolds(images, 4, 1), SplitFolds(images, 4, 1));
  EXPECT_NE(SplitFolds(images, 4, 1), SplitFolds(images, 4, 2));
  const std::vector<ImageFile> unlabelled = {{"a", {}}, {"b", {}}, {"c", {}}};
  EXPECT_EQ(SplitFolds(unlabelled, 3, 0).back().size(), 1u);
}

v1::QuantizationReport Report(uint64_t both, uint64_t lost, uint64_t won, uint64_t neither,
                              double ms) {
  v1::QuantizationReport report;
  const uint64_t total = both + lost + won + neither;
  report.set_evaluation_images(total);
  report.mutable_comparison()->set_both_right(both);
  report.mutable_comparison()->set_only_reference_right(lost);
  report.mutable_comparison()->set_only_candidate_right(won);
  report.mutable_comparison()->set_both_wrong(neither);
  report.mutable_float_top1()->set_hits(both + lost);
  report.mutable_float_top1()->set_total(total);
  report.mutable_top1()->set_hits(both + won);
  report.mutable_top1()->set_total(total);
  report.set_bits_per_weight(ms);
  report.set_ms_per_image(ms);
  report.add_warnings("the same");
  return report;
}

// The figures are those of one evaluation on all images: 25 : 12 of 1000, as statistics_test has
// them.
TEST(PoolTest, AddsCountsAndComputesIntervalsOnce) {
  const SweepFigures figures = Pool({Report(400, 20, 2, 30, 1), Report(500, 5, 10, 33, 3)});
  EXPECT_TRUE(figures.labelled);
  EXPECT_EQ(figures.images, 1000u);
  EXPECT_EQ(figures.top1.hits(), 912u);
  EXPECT_EQ(figures.top1.value(), 0.912);
  EXPECT_EQ(figures.float_top1.value(), 0.925);
  EXPECT_DOUBLE_EQ(figures.comparison.drop(), 0.013);
  EXPECT_NEAR(figures.comparison.drop_low(), 0.0007849546113, 1e-12);
  EXPECT_NEAR(figures.comparison.p_value(), 0.04703102743951604, 1e-12);
  EXPECT_EQ(figures.ms, 2);
  EXPECT_EQ(figures.bits_per_weight, 2);
  EXPECT_EQ(figures.warnings.size(), 1u);
  EXPECT_EQ(Pool({Report(1, 0, 0, 0, 9), Report(1, 0, 0, 0, 1), Report(1, 0, 0, 0, 2)}).ms, 2);
  EXPECT_FALSE(Pool({}).labelled);
  EXPECT_EQ(Pool({}).images, 0u);
}

SweepRow Row(v1::WeightType weights, uint32_t n, uint64_t lost, double bits) {
  SweepRow row;
  row.recipe.set_weights(weights);
  row.recipe.set_cluster_size(n);
  row.reports = {Report(900 - lost, lost, 0, 100, bits)};
  return row;
}

TEST(SweepChartsTest, HaveOneSeriesPerSchemeInTheOrderOfN) {
  std::vector<SweepRow> rows = {Row(v1::TERNARY_CLUSTER, 0, 50, 2.0),
                                Row(v1::TERNARY_CLUSTER, 64, 40, 2.2),
                                Row(v1::TERNARY_CLUSTER, 4, 20, 2.5),
                                Row(v1::INT4_CLUSTER, 4, 5, 4.5), Row(v1::INT8, 0, 0, 8)};
  rows.push_back(Row(v1::INT4_CLUSTER, 64, 7, 4.1));
  rows.back().error = "INTERNAL: failed";
  const Chart chart = LossByClusterSize("demo", rows);
  EXPECT_THAT(chart.categories, testing::ElementsAre("4", "64", "all"));
  ASSERT_EQ(chart.series.size(), 2u);
  ASSERT_EQ(chart.series[0].points.size(), 3u);
  EXPECT_EQ(chart.series[0].name, "ternary");
  EXPECT_EQ(chart.series[0].points[0].x, 0);
  EXPECT_DOUBLE_EQ(chart.series[0].points[0].y, 2);  // 20 of 1000, in points
  EXPECT_LT(chart.series[0].points[0].low, 2);
  EXPECT_GT(chart.series[0].points[0].high, 2);
  EXPECT_DOUBLE_EQ(chart.series[0].points[2].y, 5);
  EXPECT_EQ(chart.series[1].points.size(), 1u);  // not the one that failed
  ASSERT_EQ(chart.levels.size(), 1u);
  EXPECT_EQ(chart.levels[0].name, "int8");

  const Chart bits = AccuracyByBits("demo", rows);
  ASSERT_EQ(bits.series.size(), 3u);
  EXPECT_EQ(bits.series[0].points[0].x, 2.0);
  EXPECT_EQ(bits.series[0].points[0].label, "N=all");
  EXPECT_DOUBLE_EQ(bits.series[0].points[0].y, 85);
  EXPECT_EQ(bits.levels[0].y, 90);
  EXPECT_FALSE(AccuracyByTime("demo", rows).series[0].line);
}

TEST(SweepChartsTest, WithoutLabelsTheLossIsDisagreement) {
  SweepRow row;
  row.recipe.set_weights(v1::TERNARY_CLUSTER);
  row.recipe.set_cluster_size(4);
  v1::QuantizationReport report;
  report.mutable_agreement()->set_hits(90);
  report.mutable_agreement()->set_total(100);
  row.reports = {report};
  const Chart chart = LossByClusterSize("demo", {row});
  EXPECT_NEAR(chart.series[0].points[0].y, 10, 1e-9);
  EXPECT_LT(chart.series[0].points[0].low, 10);
  EXPECT_GT(chart.series[0].points[0].high, 10);
  EXPECT_THAT(chart.y_label, testing::HasSubstr("other top-1 than float"));
}

TEST(SchemeNameTest, SaysOnlyWhatDiffers) {
  std::vector<SweepRow> rows = {Row(v1::TERNARY_CLUSTER, 4, 0, 1),
                                Row(v1::TERNARY_CLUSTER, 4, 0, 1)};
  EXPECT_EQ(SchemeName(rows[0].recipe, rows), "ternary");
  rows[1].recipe.set_activations(v1::DFP8);
  EXPECT_EQ(SchemeName(rows[1].recipe, rows), "ternary, dfp8");
  rows[0].recipe.set_method(v1::DIRECT);
  EXPECT_EQ(SchemeName(rows[0].recipe, rows), "ternary, direct, affine");
}

TEST(ParseLayerChoiceTest, TakesNamesWithAnyCharacters) {
  const auto choice = ParseLayerChoice("/layer1/conv=2:x=ternary:64");
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_EQ(choice->layer(), "/layer1/conv=2:x");
  EXPECT_EQ(choice->cluster_size(), 64u);
  for (const char* bad : {"", "a", "=int8", "a=", "a=int8:4", "a=int4",
                          "a=ternary:", "a=ternary:257", "a=mixed", "a=fp32", "a=ternary:4:4"}) {
    EXPECT_EQ(ParseLayerChoice(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

}  // namespace
}  // namespace tern::client
