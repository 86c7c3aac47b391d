#include "server/monitoring/version_monitor.h"

#include <cstdlib>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace tern::monitoring {
namespace {

TEST(RollingShareTest, EqualsACountOverAllEventsThatAreYoungAndRecentEnough) {
  std::mt19937 random(7);
  const WindowOptions options{50, absl::Seconds(30)};
  RollingShare window(options);
  struct Event {
    absl::Time at;
    bool hit;
  };
  std::vector<Event> all;
  absl::Time now = absl::UnixEpoch();
  for (int step = 0; step < 2000; ++step) {
    now += absl::Seconds(static_cast<int>(random() % 3));
    if (random() % 4 != 0) {
      all.push_back({now, random() % 3 == 0});
      window.Add(now, all.back().hit);
    }
    if (random() % 100 == 0) now += absl::Seconds(40);
    uint64_t hits = 0, total = 0;
    for (size_t i = all.size() < options.most ? 0 : all.size() - options.most; i < all.size();
         ++i) {
      if (now - all[i].at > options.age) continue;
      ++total;
      hits += all[i].hit;
    }
    const RollingShare::Count count = window.At(now);
    ASSERT_EQ(count.total, total) << step;
    ASSERT_EQ(count.hits, hits) << step;
  }
}

TEST(RollingShareTest, AClockThatIsSetBackLosesNothing) {
  RollingShare window({10, absl::Seconds(30)});
  const absl::Time start = absl::UnixEpoch() + absl::Hours(1);
  window.Add(start, true);
  window.Add(start - absl::Minutes(30), false);
  EXPECT_EQ(window.At(start - absl::Minutes(30)).total, 2u);
  EXPECT_EQ(window.At(start + absl::Seconds(31)).total, 0u);
}

class VersionMonitorTest : public ::testing::Test {
 protected:
  std::optional<double> Value(const std::string& name) {
    const std::string text = metrics_.Render();
    const std::string series =
        absl::StrCat("\n", name, "{model=\"demo\",scheme=\"int8\",version=\"2\"} ");
    const size_t at = text.find(series);
    if (at == std::string::npos) return std::nullopt;
    return std::strtod(text.c_str() + at + series.size(), nullptr);
  }

  FakeClock clock_;
  metrics::Metrics metrics_;
  MonitorOptions options_;
  const metrics::ModelLabels model_{"demo", 2, "int8"};
};

TEST_F(VersionMonitorTest, ShowsTheAccuracyOfTheWindowWithItsWilsonInterval) {
  VersionMonitor monitor(model_, options_, &metrics_, &clock_);
  for (int i = 0; i < 10; ++i) monitor.Labelled(i < 8, i < 9);
  EXPECT_EQ(Value("tern_live_labels"), 10);
  EXPECT_EQ(Value("tern_live_top1_ratio"), 0.8);
  EXPECT_EQ(Value("tern_live_top5_ratio"), 0.9);
  // (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), n = 10, z = 1.959964.
  EXPECT_NEAR(*Value("tern_live_top1_ratio_low"), 0.4901625, 1e-6);
  EXPECT_NEAR(*Value("tern_live_top1_ratio_high"), 0.9433178, 1e-6);
  EXPECT_NEAR(*Value("tern_live_top5_ratio_low"), 0.5958500, 1e-6);
  EXPECT_NEAR(*Value("tern_live_top5_ratio_high"), 0.9821238, 1e-6);
}

TEST_F(VersionMonitorTest, OldLabelsLeaveTheWindowWithoutNewOnes) {
  options_.window.age = absl::Minutes(5);
  VersionMonitor monitor(model_, options_, &metrics_, &clock_);
  monitor.Labelled(true, true);
  clock_.Advance(absl::Minutes(3));
  monitor.Labelled(false, false);
  EXPECT_EQ(Value("tern_live_top1_ratio"), 0.5);
  clock_.Advance(absl::Minutes(3));
  EXPECT_EQ(Value("tern_live_top1_ratio"), 0);
  EXPECT_EQ(Value("tern_live_labels"), 1);
  clock_.Advance(absl::Minutes(3));
  EXPECT_EQ(Value("tern_live_labels"), 0);
  EXPECT_EQ(Value("tern_live_top1_ratio"), std::nullopt);
  EXPECT_EQ(Value("tern_live_top1_ratio_low"), std::nullopt);
}

TEST_F(VersionMonitorTest, ShowsTheAgreementOfShadowComparisonsAndTheirDivergence) {
  VersionMonitor monitor(model_, options_, &metrics_, &clock_);
  EXPECT_EQ(Value("tern_live_comparisons"), 0);
  for (int i = 0; i < 4; ++i) monitor.Compared(i != 0, 0.25 * i);
  EXPECT_EQ(Value("tern_live_comparisons"), 4);
  EXPECT_EQ(Value("tern_live_agreement_ratio"), 0.75);
  EXPECT_NEAR(*Value("tern_live_agreement_ratio_low"), 0.3006418, 1e-6);
  EXPECT_NEAR(*Value("tern_live_agreement_ratio_high"), 0.9544127, 1e-6);
  EXPECT_EQ(Value("tern_shadow_divergence_nats_sum"), 1.5);
  EXPECT_EQ(Value("tern_shadow_divergence_nats_count"), 4);
}

TEST_F(VersionMonitorTest, ARemovedVersionIsNotPublishedAgainByAMonitorThatIsStillHeld) {
  VersionMonitor monitor(model_, options_, &metrics_, &clock_);
  monitor.Labelled(true, true);
  ASSERT_EQ(Value("tern_live_labels"), 1);
  metrics_.ModelRemoved(model_);
  monitor.Labelled(true, true);
  EXPECT_EQ(metrics_.Render().find("version=\"2\""), std::string::npos);
}

}  // namespace
}  // namespace tern::monitoring
