#include "server/metrics/metrics.h"

#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/metrics/access_metrics.h"

namespace tern::metrics {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

const ModelLabels kModel{"demo", 3, "int8"};

// One metric as an outsider sees it.
struct Seen {
  std::string type;
  std::string help;
  std::set<std::string> labels;
};

// A small reader of the Prometheus text format, independent of prometheus-cpp: series -> value,
// with `le` removed from the label names.
struct Scrape {
  std::map<std::string, Seen> metrics;
  std::map<std::string, double> values;  // "name{labels}" as printed

  explicit Scrape(const std::string& text) {
    for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
      if (absl::ConsumePrefix(&line, "# HELP ")) {
        const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(' ', 1));
        metrics[parts[0]].help = parts[1];
      } else if (absl::ConsumePrefix(&line, "# TYPE ")) {
        const std::vector<std::string> parts = absl::StrSplit(line, ' ');
        metrics[parts[0]].type = parts[1];
      } else {
        const size_t space = line.rfind(' ');
        const absl::string_view series = line.substr(0, space);
        values[std::string(series)] =
            std::strtod(std::string(line.substr(space + 1)).c_str(), nullptr);
        const size_t brace = series.find('{');
        std::string name(series.substr(0, brace));
        for (const char* suffix : {"_bucket", "_sum", "_count"}) {
          const std::string base(absl::StripSuffix(name, suffix));
          if (base != name && metrics.count(base) > 0) name = base;
        }
        if (brace == absl::string_view::npos) continue;
        const absl::string_view inside = series.substr(brace + 1, series.size() - brace - 2);
        for (absl::string_view pair : absl::StrSplit(inside, "\",", absl::SkipEmpty())) {
          const std::string label(pair.substr(0, pair.find('=')));
          if (label != "le") metrics[name].labels.insert(label);
        }
      }
    }
  }
  double Value(const std::string& series) const {
    const auto it = values.find(series);
    return it == values.end() ? -1 : it->second;
  }
};

ReportGauges Report() {
  ReportGauges report;
  report.top1_ratio = 0.99;
  report.top1_agreement = 0.97;
  report.top1_agreement_low = 0.95;
  report.top1 = 0.9;
  report.top1_low = 0.88;
  report.layer_sqnr_db = {{"conv1", 31.5}, {"fc", 40.25}};
  report.layer_clipped = {{"conv1", 0.001}, {"fc", 0}};
  report.layer_at_limit = {{"conv1", 0.002}};
  return report;
}

// Calls every function that makes a series of a version, as its requests do.
void TouchVersion(Metrics& metrics, const ModelLabels& model) {
  metrics.StageTime(Stage::kDecode, model, absl::Milliseconds(1));
  metrics.LayerTime(model, "conv1", absl::Microseconds(30));
  metrics.Batch(model, 4);
  metrics.BatchLearned(model, 4, absl::Milliseconds(9), 8, absl::ZeroDuration());
  metrics.VersionRequest(model, "OK", absl::Milliseconds(5));
  metrics.Degraded(model.model, 1, model.version);
  metrics.QueueDepth(model, 7);
  metrics.Labelled(model, true, true);
  metrics.Shadow(model, true, 0.02);
  for (int i = 0; i < static_cast<int>(LiveFigure::kCount); ++i) {
    metrics.Live(model, static_cast<LiveFigure>(i), 0.5);
  }
  metrics.LiveAtLimit(model, "conv1", 0.01);
  metrics.DriftReference(model, "evaluation");
  metrics.Confidence(model, 0.8);
}

// Calls every function that makes a series.
void TouchEverything(Metrics& metrics) {
  TouchVersion(metrics, kModel);
  metrics.Request("Classify", "OK", absl::Milliseconds(3));
  metrics.StreamRequest("ClassifyStream", "OK");
  metrics.InFlight("Classify", 1);
  metrics.DecodeQueueDepth(1);
  metrics.Waiting(1000, 2, 1);
  metrics.BrownoutLevel("demo", 1);
  metrics.Rejected("queue_full");
  metrics.RefusedConnection("data");
  metrics.ShadowDropped("backlog");
  metrics.WatchEvent("loaded");
  metrics.Fallback("float_island");
  metrics.ModelLoaded(kModel, "avx2", 1000, true, Report());
  metrics.ModelSelfTest(kModel, "avx2", true);
  metrics.QuantizeJob("published", absl::Seconds(3));
  metrics.Machine(2, "0.1.0", "avx2", "2.6.3");
  AccessMetrics access(metrics);
  access.Failure("data", "missing");
  access.CertificateExpiry("data", absl::UnixEpoch());
}

TEST(MetricsTest, DocumentationEqualsWhatIsServed) {
  Metrics metrics;
  TouchEverything(metrics);
  const Scrape scrape(metrics.Render());

  const char* root = std::getenv("TERN_SOURCE_DIR");
  ASSERT_NE(root, nullptr) << "run by ctest, or set TERN_SOURCE_DIR to the source tree";
  std::ifstream in(absl::StrCat(root, "/docs/metrics.md"));
  ASSERT_TRUE(in.good()) << "docs/metrics.md under " << root;
  std::map<std::string, Seen> documented;
  std::string line;
  while (std::getline(in, line)) {
    if (!absl::StartsWith(line, "| `")) continue;
    std::vector<std::string> cells;
    for (absl::string_view cell : absl::StrSplit(line, '|')) {
      cells.emplace_back(absl::StripAsciiWhitespace(cell));
    }
    ASSERT_EQ(cells.size(), 7u) << line;  // five columns between two empty ends
    const std::string name = cells[1].substr(1, cells[1].size() - 2);
    EXPECT_EQ(documented.count(name), 0u) << name << " is documented twice";
    Seen& row = documented[name];
    row.type = cells[2];
    for (absl::string_view label : absl::StrSplit(cells[3], ", ", absl::SkipEmpty())) {
      row.labels.emplace(label);
    }
    row.help = cells[4];
    EXPECT_THAT(cells[5], HasSubstr(name)) << "the example does not use the metric";
  }

  for (const auto& [name, seen] : scrape.metrics) {
    ASSERT_EQ(documented.count(name), 1u) << name << " is served and not documented";
    const Seen& row = documented[name];
    EXPECT_EQ(row.type, seen.type) << name;
    EXPECT_EQ(row.help, seen.help) << name;
    EXPECT_EQ(absl::StrJoin(row.labels, ","), absl::StrJoin(seen.labels, ",")) << name;
  }
  for (const auto& [name, row] : documented) {
    EXPECT_EQ(scrape.metrics.count(name), 1u) << name << " is documented and not served";
  }
}

TEST(MetricsTest, CatalogueListsEveryServedMetricWithItsHelp) {
  Metrics metrics;
  TouchEverything(metrics);
  const Scrape scrape(metrics.Render());
  std::set<std::string> listed;
  for (const auto& [name, help] : Metrics::Catalogue()) {
    EXPECT_TRUE(listed.insert(name).second) << name << " twice";
    ASSERT_EQ(scrape.metrics.count(name), 1u) << name;
    EXPECT_EQ(scrape.metrics.at(name).help, help);
  }
  EXPECT_EQ(listed.size(), scrape.metrics.size());
}

TEST(MetricsTest, CountsRequestsByMethodAndCode) {
  Metrics metrics;
  metrics.Request("Classify", "OK", absl::Milliseconds(3));
  metrics.Request("Classify", "OK", absl::Milliseconds(30));
  metrics.Request("Classify", "NOT_FOUND", absl::Microseconds(100));
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(scrape.Value(R"(tern_requests_total{code="OK",method="Classify"})"), 2);
  EXPECT_EQ(scrape.Value(R"(tern_requests_total{code="NOT_FOUND",method="Classify"})"), 1);
  EXPECT_EQ(scrape.Value(R"(tern_request_duration_seconds_count{method="Classify"})"), 3);
  EXPECT_NEAR(scrape.Value(R"(tern_request_duration_seconds_sum{method="Classify"})"), 0.0331,
              1e-12);
  EXPECT_EQ(scrape.Value(R"(tern_request_duration_seconds_bucket{method="Classify",le="0.00025"})"),
            1);
  EXPECT_EQ(scrape.Value(R"(tern_request_duration_seconds_bucket{method="Classify",le="0.004"})"),
            2);
  EXPECT_EQ(scrape.Value(R"(tern_request_duration_seconds_bucket{method="Classify",le="+Inf"})"),
            3);
}

TEST(MetricsTest, AVersionsRequestsCountByCodeAndItsLatencyIsThatOfAnswers) {
  Metrics metrics;
  metrics.VersionRequest(kModel, "OK", absl::Milliseconds(5));
  metrics.VersionRequest(kModel, "OK", absl::Milliseconds(300));
  metrics.VersionRequest(kModel, "RESOURCE_EXHAUSTED", absl::Microseconds(20));
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(scrape.Value(R"(tern_version_requests_total{code="OK",model="demo",version="3"})"), 2);
  EXPECT_EQ(
      scrape.Value(
          R"(tern_version_requests_total{code="RESOURCE_EXHAUSTED",model="demo",version="3"})"),
      1);
  // A refusal is quick, and must not make the answers look so.
  const std::string buckets =
      "tern_version_request_duration_seconds_bucket{model=\"demo\",version=";
  EXPECT_EQ(scrape.Value(buckets + R"("3",le="0.25"})"), 1);
  EXPECT_EQ(scrape.Value(buckets + R"("3",le="+Inf"})"), 2);
}

TEST(MetricsTest, LatencyBucketsCoverAQuarterMillisecondToTwoAndAHalfSecondsByEqualSteps) {
  Metrics metrics;
  metrics.Request("Classify", "OK", absl::Milliseconds(3));
  std::set<double> bounds;
  for (absl::string_view line : absl::StrSplit(metrics.Render(), '\n')) {
    if (!absl::StartsWith(line, "tern_request_duration_seconds_bucket")) continue;
    const size_t le = line.find("le=\"") + 4;
    const double bound = std::strtod(std::string(line.substr(le)).c_str(), nullptr);
    if (std::isfinite(bound)) bounds.insert(bound);
  }
  ASSERT_FALSE(bounds.empty());
  EXPECT_EQ(*bounds.begin(), 0.00025);
  EXPECT_EQ(*bounds.rbegin(), 2.5);
  for (auto it = bounds.begin(); std::next(it) != bounds.end(); ++it) {
    EXPECT_NEAR(*std::next(it) / *it, 1.6, 0.05);
  }
}

TEST(MetricsTest, GaugesFollowTheirLastValue) {
  Metrics metrics;
  metrics.InFlight("Classify", 1);
  metrics.InFlight("Classify", 1);
  metrics.InFlight("Classify", -1);
  metrics.QueueDepth(kModel, 9);
  metrics.QueueDepth(kModel, 2);
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(scrape.Value(R"(tern_inflight_requests{method="Classify"})"), 1);
  EXPECT_EQ(scrape.Value(R"(tern_queue_depth{model="demo",version="3"})"), 2);
}

TEST(MetricsTest, LabelledPredictionsFallIntoThreeExclusiveResults) {
  Metrics metrics;
  metrics.Labelled(kModel, true, true);
  metrics.Labelled(kModel, true, false);
  metrics.Labelled(kModel, false, true);
  metrics.Labelled(kModel, false, false);
  const Scrape scrape(metrics.Render());
  const auto value = [&](const std::string& result) {
    return scrape.Value("tern_labelled_predictions_total{model=\"demo\",result=\"" + result +
                        "\",scheme=\"int8\",version=\"3\"}");
  };
  EXPECT_EQ(value("top1"), 2);
  EXPECT_EQ(value("top5"), 1);
  EXPECT_EQ(value("miss"), 1);
}

TEST(MetricsTest, DivergencesStayFiniteSoThatTheirSumDoes) {
  Metrics metrics;
  metrics.Shadow(kModel, true, 0.02);
  metrics.Shadow(kModel, false, std::numeric_limits<double>::infinity());
  metrics.Shadow(kModel, false, std::nan(""));
  const Scrape scrape(metrics.Render());
  const std::string labels = R"({model="demo",scheme="int8",version="3"})";
  EXPECT_EQ(scrape.Value("tern_shadow_divergence_nats_count" + labels), 3);
  EXPECT_NEAR(scrape.Value("tern_shadow_divergence_nats_sum" + labels), 200.02, 1e-9);
}

TEST(MetricsTest, RefreshesRunAtEveryCollectionUntilTheyAreRemoved) {
  Metrics metrics;
  int runs = 0;
  const int id = metrics.AddRefresh([&] { metrics.Live(kModel, LiveFigure::kTop1, 0.1 * ++runs); });
  const std::string series = R"(tern_live_top1_ratio{model="demo",scheme="int8",version="3"})";
  EXPECT_DOUBLE_EQ(Scrape(metrics.Render()).Value(series), 0.1);
  EXPECT_DOUBLE_EQ(Scrape(metrics.Render()).Value(series), 0.2);
  metrics.RemoveRefresh(id);
  metrics.Live(kModel, LiveFigure::kTop1, std::nullopt);
  EXPECT_EQ(Scrape(metrics.Render()).Value(series), -1);
  EXPECT_EQ(runs, 2);
}

TEST(MetricsTest, KnownReasonsArePresentBeforeTheFirstEvent) {
  Metrics metrics;
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(scrape.Value(R"(tern_rejected_total{reason="deadline"})"), 0);
  EXPECT_EQ(scrape.Value(R"(tern_refused_connections_total{port="data"})"), 0);
  EXPECT_EQ(scrape.Value(R"(tern_quantize_jobs_total{outcome="cancelled"})"), 0);
}

TEST(MetricsTest, CountersOfALoadedVersionStartAtZeroAndReloadingKeepsThem) {
  Metrics metrics;
  metrics.ModelLoaded(kModel, "avx2", 1, true, Report());
  const std::vector<std::string> series = {
      R"(tern_images_total{model="demo",scheme="int8",version="3"})",
      R"(tern_version_requests_total{code="OK",model="demo",version="3"})",
      R"(tern_labelled_predictions_total{model="demo",result="top1",scheme="int8",version="3"})",
      R"(tern_labelled_predictions_total{model="demo",result="top5",scheme="int8",version="3"})",
      R"(tern_labelled_predictions_total{model="demo",result="miss",scheme="int8",version="3"})",
      R"(tern_shadow_comparisons_total{model="demo",result="agree",scheme="int8",version="3"})",
      R"(tern_shadow_comparisons_total{model="demo",result="disagree",scheme="int8",version="3"})"};
  const Scrape loaded(metrics.Render());
  for (const std::string& name : series) EXPECT_EQ(loaded.Value(name), 0) << name;
  metrics.Labelled(kModel, true, true);
  metrics.ModelLoaded(kModel, "avx2", 1, true, Report());
  EXPECT_EQ(Scrape(metrics.Render()).Value(series[2]), 1);
}

TEST(MetricsTest, LoadedModelShowsItsIdentityAndReport) {
  Metrics metrics;
  metrics.ModelLoaded(kModel, "avx2", 4096, true, Report());
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(
      scrape.Value(
          R"(tern_model_info{default="true",isa="avx2",model="demo",scheme="int8",version="3"})"),
      1);
  EXPECT_EQ(scrape.Value(R"(tern_model_ready{model="demo",version="3"})"), 1);
  EXPECT_EQ(scrape.Value(R"(tern_model_bytes{model="demo",scheme="int8",version="3"})"), 4096);
  EXPECT_EQ(scrape.Value(R"(tern_quantization_top1_ratio{model="demo",scheme="int8",version="3"})"),
            0.99);
  EXPECT_EQ(
      scrape.Value(
          R"(tern_quantization_sqnr_db{layer="conv1",model="demo",scheme="int8",version="3"})"),
      31.5);
}

TEST(MetricsTest, WhatWasNotMeasuredHasNoSeries) {
  Metrics metrics;
  metrics.ModelLoaded({"demo", 1, "fp32"}, "avx2", 1, true, ReportGauges());
  const std::string text = metrics.Render();
  EXPECT_THAT(text, Not(HasSubstr("tern_quantization_top1_ratio")));
  EXPECT_THAT(text, Not(HasSubstr("tern_quantization_top1_agreement")));
}

TEST(MetricsTest, DefaultMovesWithoutLeavingTheOldSeries) {
  Metrics metrics;
  metrics.ModelLoaded(kModel, "avx2", 1, true, ReportGauges());
  metrics.ModelDefault(kModel, false);
  metrics.ModelDefault({"demo", 9, "fp32"}, true);  // not loaded: no effect
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr(R"(tern_model_info{default="false",isa="avx2",model="demo",)"
                              R"(scheme="int8",version="3"} 1)"));
  EXPECT_THAT(text, Not(HasSubstr(R"(default="true")")));
}

TEST(MetricsTest, ReloadingReplacesTheOldGauges) {
  Metrics metrics;
  metrics.ModelLoaded(kModel, "avx2", 1, true, Report());
  ReportGauges changed;
  changed.layer_sqnr_db = {{"conv9", 1.0}};
  metrics.ModelLoaded(kModel, "scalar", 1, true, changed);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, Not(HasSubstr("conv1")));
  EXPECT_THAT(text, HasSubstr("conv9"));
  EXPECT_THAT(text, Not(HasSubstr(R"(isa="avx2")")));
}

TEST(MetricsTest, AnUnavailableModelIsNotReadyAndHasNoOtherGauge) {
  Metrics metrics;
  metrics.ModelLoaded(kModel, "avx2", 1, true, Report());
  metrics.ModelSelfTest(kModel, "avx2", true);
  metrics.ModelUnavailable(kModel);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr(R"(tern_model_ready{model="demo",version="3"} 0)"));
  EXPECT_THAT(text, Not(HasSubstr("tern_model_info{")));
  EXPECT_THAT(text, Not(HasSubstr("tern_quantization_sqnr_db{")));
  EXPECT_THAT(text, Not(HasSubstr("tern_model_self_test{")));
  metrics.ModelSelfTest(kModel, "avx2", false);
  EXPECT_THAT(metrics.Render(),
              HasSubstr(R"(tern_model_self_test{isa="avx2",model="demo",version="3"} 0)"));
}

TEST(MetricsTest, ARemovedModelLeavesNoSeriesAndOthersStay) {
  Metrics metrics;
  TouchEverything(metrics);
  const ModelLabels longer{"demo", 31, "int8"};  // its version starts with the same digit
  metrics.ModelLoaded(longer, "avx2", 1, false, Report());
  metrics.Batch(longer, 2);
  metrics.ModelRemoved(kModel);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, Not(HasSubstr(R"(version="3")")));
  EXPECT_THAT(text, Not(HasSubstr("tern_degraded_total{")));
  EXPECT_THAT(text, HasSubstr(R"(tern_model_ready{model="demo",version="31"} 1)"));
  EXPECT_THAT(text, HasSubstr(R"(tern_images_total{model="demo",scheme="int8",version="31"} 2)"));
  // What was still under way when it went does not bring its series back.
  TouchVersion(metrics, kModel);
  EXPECT_THAT(metrics.Render(), Not(HasSubstr(R"(version="3")")));
  metrics.ModelLoaded(kModel, "avx2", 1, true, Report());
  metrics.Batch(kModel, 5);  // loaded again: a fresh counter
  EXPECT_EQ(Scrape(metrics.Render())
                .Value(R"(tern_images_total{model="demo",scheme="int8",version="3"})"),
            5);
}

TEST(MetricsTest, LabelValuesFromOutsideCannotBreakTheFormat) {
  Metrics metrics;
  ReportGauges report;
  report.layer_sqnr_db = {
      {"a\"b\\c\nd", 1.0}, {"bad\xff\xc0utf8", 2.0}, {"gut\xc3\xa4", 3.0}, {"\xed\xa0\x80", 4.0}};
  metrics.ModelLoaded(kModel, "avx2", 1, true, report);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("layer=\"a\\\"b\\\\c\\nd\""));
  EXPECT_THAT(text, HasSubstr("layer=\"bad??utf8\""));
  EXPECT_THAT(text, HasSubstr("layer=\"gut\xc3\xa4\""));
  EXPECT_THAT(text, HasSubstr("layer=\"???\""));
}

TEST(MetricsTest, LayersWhoseNamesRenderAlikeAreRemovedOnce) {
  Metrics metrics;
  ReportGauges report;
  report.layer_sqnr_db = {{"x\xff", 1.0}, {"x\xfe", 2.0}};
  metrics.ModelLoaded(kModel, "avx2", 1, true, report);
  metrics.ModelRemoved(kModel);
  EXPECT_THAT(metrics.Render(), Not(HasSubstr("layer=")));
}

TEST(MetricsTest, AReportOfAMillionLayersMakesABoundedNumberOfSeries) {
  Metrics metrics;
  ReportGauges report;
  for (int i = 0; i < 5000; ++i) report.layer_sqnr_db.emplace_back(absl::StrCat("l", i), 1.0);
  metrics.ModelLoaded(kModel, "avx2", 1, true, report);
  EXPECT_LE(Scrape(metrics.Render()).values.size(), 1200u);
}

TEST(MetricsTest, OneInfiniteOrNegativeMeasurementDoesNotSpoilASum) {
  Metrics metrics;
  metrics.StageTime(Stage::kQueue, kModel, absl::InfiniteDuration());
  metrics.StageTime(Stage::kQueue, kModel, -absl::Seconds(5));
  metrics.Confidence(kModel, std::nan(""));
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(
      scrape.Value(R"(tern_stage_duration_seconds_sum{model="demo",stage="queue",version="3"})"),
      1e6);
  EXPECT_EQ(scrape.values.count(R"(tern_prediction_confidence_sum{model="demo",version="3"})"), 0u);
}

TEST(MetricsTest, EveryScrapeShowsCurrentProcessFigures) {
  Metrics metrics;
  const double before = Scrape(metrics.Render()).Value("process_cpu_seconds_total");
  volatile uint64_t work = 0;
  double after = before;
  for (int round = 0; round < 1000 && after <= before; ++round) {
    for (int i = 0; i < 1000000; ++i) work = work + i;
    after = Scrape(metrics.Render()).Value("process_cpu_seconds_total");
  }
  EXPECT_GT(after, before);
  EXPECT_GT(Scrape(metrics.Render()).Value("process_resident_memory_bytes"), 1e6);
  const Scrape scrape(metrics.Render());
  EXPECT_GE(scrape.Value("process_open_fds"), 3);
  EXPECT_GT(scrape.Value("process_max_fds"), scrape.Value("process_open_fds"));
  EXPECT_GT(scrape.Value("tern_memory_limit_bytes"), scrape.Value("process_resident_memory_bytes"));
  const double now = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
  EXPECT_LE(scrape.Value("process_start_time_seconds"), now);
  EXPECT_GT(scrape.Value("process_start_time_seconds"), now - 3600);
}

TEST(MetricsTest, NoCountIsLostBetweenThreadsWhileModelsComeAndGo) {
  Metrics metrics;
  constexpr int kThreads = 4, kRounds = 5000;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const ModelLabels own{"own", static_cast<uint64_t>(t), "fp32"};
      for (int i = 0; i < kRounds; ++i) {
        metrics.Batch(kModel, 2);
        metrics.StageTime(Stage::kInference, own, absl::Milliseconds(1));
        metrics.Request("Classify", "OK", absl::Milliseconds(1));
        if (i % 50 == 0) {
          metrics.ModelLoaded(own, "avx2", 1, i % 100 == 0, Report());
          metrics.ModelDefault(own, i % 100 != 0);
        }
        if (i % 50 == 25) metrics.ModelRemoved(own);
        if (i % 500 == 0) metrics.Render();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Scrape scrape(metrics.Render());
  EXPECT_EQ(scrape.Value(R"(tern_images_total{model="demo",scheme="int8",version="3"})"),
            2.0 * kThreads * kRounds);
  EXPECT_EQ(scrape.Value(R"(tern_requests_total{code="OK",method="Classify"})"),
            1.0 * kThreads * kRounds);
}

TEST(MetricsTest, TheRegistryOutlivesTheMetrics) {
  auto metrics = std::make_unique<Metrics>();
  const std::shared_ptr<prometheus::Registry> registry = metrics->registry();
  metrics.reset();
  EXPECT_NE(registry, nullptr);  // its destruction after the Metrics is what is tested
}

}  // namespace
}  // namespace tern::metrics
