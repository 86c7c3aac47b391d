#include "server/monitoring/version_monitor.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
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

  std::unique_ptr<VersionMonitor> Make(const v1::QuantizationReport& report = {}) {
    return std::make_unique<VersionMonitor>(model_, report, 3,
                                            std::vector<std::string>{"conv1", "conv2", "fc"},
                                            options_, &metrics_, &clock_);
  }
  // 100 evaluation images, half of them class 0.
  static v1::QuantizationReport Report() {
    v1::QuantizationReport report;
    v1::OutputReference& outputs = *report.mutable_outputs();
    outputs.set_images_of("evaluation");
    outputs.set_images(100);
    outputs.set_confidence(0.9);
    outputs.set_entropy(0.25);
    for (const uint32_t images : {50, 30, 20}) outputs.add_best_class(images);
    for (const auto& [name, share] : {std::pair("conv1", 0.01), std::pair("conv2", 0.2)}) {
      v1::LayerReport& layer = *report.add_layers();
      layer.set_name(name);
      layer.set_output_at_limit(share);
    }
    return report;
  }

  FakeClock clock_;
  metrics::Metrics metrics_;
  MonitorOptions options_;
  const metrics::ModelLabels model_{"demo", 2, "int8"};
};

TEST_F(VersionMonitorTest, ShowsTheAccuracyOfTheWindowWithItsWilsonInterval) {
  const auto monitor = Make();
  for (int i = 0; i < 10; ++i) monitor->Labelled(i < 8, i < 9);
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
  const auto monitor = Make();
  monitor->Labelled(true, true);
  clock_.Advance(absl::Minutes(3));
  monitor->Labelled(false, false);
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
  const auto monitor = Make();
  EXPECT_EQ(Value("tern_live_comparisons"), 0);
  for (int i = 0; i < 4; ++i) monitor->Compared(i != 0, 0.25 * i);
  EXPECT_EQ(Value("tern_live_comparisons"), 4);
  EXPECT_EQ(Value("tern_live_agreement_ratio"), 0.75);
  EXPECT_NEAR(*Value("tern_live_agreement_ratio_low"), 0.3006418, 1e-6);
  EXPECT_NEAR(*Value("tern_live_agreement_ratio_high"), 0.9544127, 1e-6);
  EXPECT_EQ(Value("tern_shadow_divergence_nats_sum"), 1.5);
  EXPECT_EQ(Value("tern_shadow_divergence_nats_count"), 4);
}

TEST_F(VersionMonitorTest, ARemovedVersionIsNotPublishedAgainByAMonitorThatIsStillHeld) {
  const auto monitor = Make();
  monitor->Labelled(true, true);
  ASSERT_EQ(Value("tern_live_labels"), 1);
  metrics_.ModelRemoved(model_);
  monitor->Labelled(true, true);
  EXPECT_EQ(metrics_.Render().find("version=\"2\""), std::string::npos);
}

TEST_F(VersionMonitorTest, ShowsConfidenceEntropyAndClassMixAgainstTheReport) {
  const auto monitor = Make(Report());
  EXPECT_EQ(Value("tern_live_images"), 0);
  EXPECT_EQ(Value("tern_live_confidence_mean"), std::nullopt);
  EXPECT_EQ(Value("tern_live_class_mix_psi"), std::nullopt);
  for (int i = 0; i < 100; ++i) {
    const int best = i < 20 ? 0 : i < 50 ? 1 : 2;
    monitor->Answered(best, best == 0 ? 0.5 : 0.75, best == 0 ? 1.0 : 0.5);
  }
  EXPECT_EQ(Value("tern_live_images"), 100);
  EXPECT_NEAR(*Value("tern_live_confidence_mean"), 0.2 * 0.5 + 0.8 * 0.75, 1e-9);
  EXPECT_NEAR(*Value("tern_live_entropy_mean"), 0.2 * 1.0 + 0.8 * 0.5, 1e-9);
  EXPECT_NEAR(*Value("tern_live_class_mix_psi"), 0.532935044, 1e-6);  // see StabilityIndexTest
  EXPECT_EQ(Value("tern_drift_reference_images"), 100);
  EXPECT_EQ(Value("tern_drift_reference_confidence_mean"), 0.9);
  EXPECT_EQ(Value("tern_drift_reference_entropy_mean"), 0.25);
  EXPECT_NE(
      metrics_.Render().find(R"(tern_drift_reference_info{images_of="evaluation",model="demo",)"),
      std::string::npos);
}

TEST_F(VersionMonitorTest, AnswersLeaveTheWindowByNumberAndByAge) {
  options_.window = {4, absl::Minutes(5)};
  const auto monitor = Make(Report());
  for (int i = 0; i < 10; ++i) monitor->Answered(0, 0.1, 2);
  for (int i = 0; i < 4; ++i) monitor->Answered(2, 0.5, 1);
  EXPECT_EQ(Value("tern_live_images"), 4);
  EXPECT_NEAR(*Value("tern_live_confidence_mean"), 0.5, 1e-6);
  EXPECT_NEAR(*Value("tern_live_entropy_mean"), 1, 1e-6);
  clock_.Advance(absl::Minutes(6));
  monitor->Answered(1, 0.75, 0.5);
  EXPECT_EQ(Value("tern_live_images"), 1);
  EXPECT_NEAR(*Value("tern_live_confidence_mean"), 0.75, 1e-6);
  clock_.Advance(absl::Minutes(6));
  EXPECT_EQ(Value("tern_live_images"), 0);
  EXPECT_EQ(Value("tern_live_class_mix_psi"), std::nullopt);
}

TEST_F(VersionMonitorTest, WithoutAReportTheFirstAnswersAreTheReference) {
  const auto monitor = Make();
  const int reference = static_cast<int>(VersionMonitor::kOwnReference);
  for (int i = 0; i < reference - 1; ++i) monitor->Answered(i % 2, 0.5, 0.75);
  EXPECT_EQ(Value("tern_drift_reference_images"), 0);
  EXPECT_EQ(Value("tern_drift_reference_confidence_mean"), std::nullopt);
  EXPECT_EQ(Value("tern_live_class_mix_psi"), std::nullopt);
  monitor->Answered(1, 0.5, 0.75);
  EXPECT_EQ(Value("tern_drift_reference_images"), reference);
  EXPECT_NEAR(*Value("tern_drift_reference_confidence_mean"), 0.5, 1e-9);
  EXPECT_NEAR(*Value("tern_drift_reference_entropy_mean"), 0.75, 1e-9);
  EXPECT_NEAR(*Value("tern_live_class_mix_psi"), 0, 1e-9);
  EXPECT_NE(metrics_.Render().find(R"(tern_drift_reference_info{images_of="first_answers")"),
            std::string::npos);
  for (int i = 0; i < 1000; ++i) monitor->Answered(2, 0.9, 0.1);
  EXPECT_GT(*Value("tern_live_class_mix_psi"), 0.25);
  EXPECT_EQ(Value("tern_drift_reference_images"), reference);  // stays
}

TEST_F(VersionMonitorTest, AReferenceThatContradictsItselfIsNotUsed) {
  v1::QuantizationReport sum = Report(), classes = Report(), nan = Report();
  sum.mutable_outputs()->set_images(101);
  classes.mutable_outputs()->add_best_class(0);
  nan.mutable_outputs()->set_confidence(std::nan(""));
  for (const v1::QuantizationReport& report : {sum, classes, nan}) {
    const auto monitor = Make(report);
    EXPECT_EQ(Value("tern_drift_reference_images"), 0);
  }
  EXPECT_NE(metrics_.Render().find(R"(tern_fallbacks_total{reason="drift_reference"} 3)"),
            std::string::npos);
}

// The real one, which holds up the thread that reads it after a Hold() until Release().
class HeldClock final : public Clock {
 public:
  absl::Time Now() const override {
    if (hold_.exchange(false)) {
      held_.set_value();
      release_.get_future().wait();
    }
    return Clock::Real()->Now();
  }
  void Hold() { hold_ = true; }
  void WaitUntilHeld() { held_.get_future().wait(); }
  void Release() { release_.set_value(); }

 private:
  mutable std::atomic<bool> hold_{false};
  mutable std::promise<void> held_, release_;
};

TEST_F(VersionMonitorTest, NobodyWhoServesRequestsWaitsForAComparison) {
  HeldClock clock;
  VersionMonitor monitor(model_, Report(), 3, {"conv1"}, options_, &metrics_, &clock);
  clock.Hold();
  std::thread idle([&] { monitor.Compared(true, 0); });
  clock.WaitUntilHeld();
  monitor.Labelled(true, true);
  monitor.Answered(0, 0.9, 0.1);
  monitor.Codes({0.5}, 1);
  clock.Release();
  idle.join();
  EXPECT_EQ(Value("tern_live_comparisons"), 1);
  EXPECT_EQ(Value("tern_live_labels"), 1);
  EXPECT_EQ(Value("tern_live_images"), 1);
}

TEST_F(VersionMonitorTest, AnswersThatAreNoneAreNotCounted) {
  const auto monitor = Make(Report());
  monitor->Answered(-1, 0.5, 1);
  monitor->Answered(3, 0.5, 1);
  monitor->Answered(0, std::nan(""), 1);
  monitor->Answered(0, 0.5, std::numeric_limits<double>::infinity());
  EXPECT_EQ(Value("tern_live_images"), 0);
}

TEST_F(VersionMonitorTest, ShowsTheShareOfCodesAtTheirLimitsAgainstCalibration) {
  const auto monitor = Make(Report());
  EXPECT_EQ(Value("tern_live_at_limit_excess"), std::nullopt);
  const auto layer = [&](const std::string& name) {
    const std::string text = metrics_.Render();
    const std::string series =
        absl::StrCat("tern_live_at_limit_ratio{layer=\"", name, "\",model=\"demo\",");
    const size_t at = text.find(series);
    if (at == std::string::npos) return -1.0;
    return std::strtod(text.c_str() + text.find(' ', at), nullptr);
  };
  // Weighted by images: conv1 (3 * 0.1 + 1 * 0.5) / 4 = 0.2, 0.19 above calibration; conv2 0.25,
  // 0.05 above; fc has no codes.
  monitor->Codes({0.1, 0.25, -1}, 3);
  monitor->Codes({0.5, 0.25, -1}, 1);
  EXPECT_NEAR(layer("conv1"), 0.2, 1e-6);
  EXPECT_NEAR(layer("conv2"), 0.25, 1e-6);
  EXPECT_EQ(layer("fc"), -1);
  EXPECT_NEAR(*Value("tern_live_at_limit_excess"), 0.19, 1e-6);
  for (size_t i = 0; i < VersionMonitor::kMostBatches; ++i) monitor->Codes({0.01, 0.1, -1}, 2);
  EXPECT_NEAR(layer("conv2"), 0.1, 1e-6);
  EXPECT_NEAR(*Value("tern_live_at_limit_excess"), 0, 1e-6);
  clock_.Advance(absl::Hours(2));
  EXPECT_EQ(layer("conv1"), -1);
  EXPECT_EQ(Value("tern_live_at_limit_excess"), std::nullopt);
}

}  // namespace
}  // namespace tern::monitoring
