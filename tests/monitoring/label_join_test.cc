#include "server/monitoring/label_join.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tern::monitoring {
namespace {

using ::testing::HasSubstr;

Prediction Of(std::vector<int> top5, int64_t classes = 10) {
  return Prediction{{"demo", 2, "int8"}, std::move(top5), classes};
}

std::string Series(const std::string& result, int count) {
  return absl::StrCat("tern_labelled_predictions_total{model=\"demo\",result=\"", result,
                      "\",scheme=\"int8\",version=\"2\"} ", count, "\n");
}

TEST(LabelJoinTest, CountsALaterLabelAgainstItsOwnPrediction) {
  metrics::Metrics metrics;
  LabelJoin join(10, &metrics);
  join.Remember("a", Of({3, 1, 4, 5, 9}));
  join.Remember("b", Of({1, 3, 4, 5, 9}));
  join.Remember("c", Of({1, 2, 4, 5, 9}));
  const auto a = join.Report("a", 3);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_TRUE(a->top1);
  EXPECT_TRUE(a->top5);
  EXPECT_EQ(a->model.model, "demo");
  EXPECT_EQ(a->model.version, 2u);
  const auto b = join.Report("b", 3);
  EXPECT_FALSE(b->top1);
  EXPECT_TRUE(b->top5);
  const auto c = join.Report("c", 3);
  EXPECT_FALSE(c->top1);
  EXPECT_FALSE(c->top5);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr(Series("top1", 1)));
  EXPECT_THAT(text, HasSubstr(Series("top5", 1)));
  EXPECT_THAT(text, HasSubstr(Series("miss", 1)));
}

TEST(LabelJoinTest, AnUnknownIdIsNotFound) {
  LabelJoin join(10, nullptr);
  EXPECT_EQ(join.Report("nobody", 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(join.Report("", 1).status().code(), absl::StatusCode::kNotFound);
}

TEST(LabelJoinTest, ASecondReportIsRefusedAndNotCounted) {
  metrics::Metrics metrics;
  LabelJoin join(10, &metrics);
  join.Remember("a", Of({3}));
  ASSERT_TRUE(join.Report("a", 3).ok());
  EXPECT_EQ(join.Report("a", 3).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(metrics.Render(), HasSubstr(Series("top1", 1)));
}

TEST(LabelJoinTest, ALabelOutsideTheClassesIsRefusedAndTheRightOneMayFollow) {
  LabelJoin join(10, nullptr);
  join.Remember("a", Of({3}, 10));
  EXPECT_EQ(join.Report("a", 10).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(join.Report("a", 0xffffffffu).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(join.Report("a", 9).ok());
}

TEST(LabelJoinTest, ForgetsTheOldestFirst) {
  LabelJoin join(3, nullptr);
  for (int i = 0; i < 5; ++i) join.Remember(absl::StrCat("id", i), Of({i}));
  EXPECT_EQ(join.Report("id0", 0).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(join.Report("id1", 0).status().code(), absl::StatusCode::kNotFound);
  for (int i = 2; i < 5; ++i) EXPECT_TRUE(join.Report(absl::StrCat("id", i), i)->top1) << i;
}

TEST(LabelJoinTest, ForgetsWhatIsOlderThanItsAge) {
  FakeClock clock;
  LabelJoin join(10, nullptr, absl::Minutes(10), &clock);
  join.Remember("a", Of({1}));
  clock.Advance(absl::Minutes(6));
  join.Remember("b", Of({2}));
  clock.Advance(absl::Minutes(4));  // a is ten minutes old, which is not older
  EXPECT_TRUE(join.Report("a", 1).ok());
  clock.Advance(absl::Seconds(1));
  const absl::Status forgotten = join.Report("a", 1).status();
  EXPECT_EQ(forgotten.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(forgotten.message()), HasSubstr("kept for 10m"));
  EXPECT_TRUE(join.Report("b", 2).ok());
}

TEST(LabelJoinTest, TellsTheMonitorOfTheVersionWhileThatIsThere) {
  metrics::Metrics metrics;
  LabelJoin join(10, &metrics);
  auto monitor = std::make_shared<VersionMonitor>(
      metrics::ModelLabels{"demo", 2, "int8"}, v1::QuantizationReport(), 10,
      std::vector<std::string>(), MonitorOptions(), &metrics, Clock::Real());
  for (const char* id : {"a", "b"}) {
    Prediction prediction = Of({3, 1});
    prediction.monitor = monitor;
    join.Remember(id, std::move(prediction));
  }
  ASSERT_TRUE(join.Report("a", 3).ok());
  const std::string labels = "tern_live_labels{model=\"demo\",scheme=\"int8\",version=\"2\"} 1\n";
  EXPECT_THAT(metrics.Render(), HasSubstr(labels));
  EXPECT_THAT(metrics.Render(), HasSubstr(Series("top1", 1)));
  monitor.reset();
  EXPECT_TRUE(join.Report("b", 3)->top1);
  EXPECT_THAT(metrics.Render(), HasSubstr(labels));
  EXPECT_THAT(metrics.Render(), HasSubstr(Series("top1", 2)));
}

TEST(LabelJoinTest, ARepeatedIdReplacesTheOlderPredictionAndCountsAsNew) {
  LabelJoin join(2, nullptr);
  join.Remember("a", Of({1}));
  ASSERT_TRUE(join.Report("a", 1).ok());
  join.Remember("b", Of({2}));
  join.Remember("a", Of({7}));
  join.Remember("c", Of({3}));  // b is the oldest now
  EXPECT_EQ(join.Report("b", 2).status().code(), absl::StatusCode::kNotFound);
  const auto a = join.Report("a", 7);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_TRUE(a->top1);
}

TEST(LabelJoinTest, LongIdsAreToldApartAndMessagesStayShort) {
  LabelJoin join(4, nullptr);
  const std::string base(1 << 20, 'x');
  join.Remember(base + "1", Of({1}));
  join.Remember(base + "2", Of({2}));
  EXPECT_TRUE(join.Report(base + "2", 2)->top1);
  EXPECT_TRUE(join.Report(base + "1", 1)->top1);
  const absl::Status unknown = join.Report(base + "3", 1).status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kNotFound);
  EXPECT_LT(unknown.message().size(), 300u);
}

TEST(LabelJoinTest, WithoutCapacityNothingIsRemembered) {
  LabelJoin join(0, nullptr);
  join.Remember("a", Of({1}));
  EXPECT_EQ(join.Report("a", 1).status().code(), absl::StatusCode::kNotFound);
}

TEST(LabelJoinTest, CountsALabelThatCameWithItsRequest) {
  metrics::Metrics metrics;
  LabelJoin join(0, &metrics);
  EXPECT_TRUE(join.Count(Of({4, 2}), 4).top1);
  EXPECT_TRUE(join.Count(Of({4, 2}), 2).top5);
  EXPECT_FALSE(join.Count(Of({4, 2}), 77).top5);
  EXPECT_FALSE(join.Count(Of({}), 0).top5);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr(Series("top1", 1)));
  EXPECT_THAT(text, HasSubstr(Series("top5", 1)));
  EXPECT_THAT(text, HasSubstr(Series("miss", 2)));
}

TEST(LabelJoinTest, EachPredictionIsCountedOnceHoweverManyThreadsReportIt) {
  metrics::Metrics metrics;
  constexpr int kIds = 2000, kThreads = 4;
  LabelJoin join(kIds, &metrics);
  for (int i = 0; i < kIds; ++i) join.Remember(absl::StrCat(i), Of({1}));
  std::atomic<int> counted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kIds; ++i) counted += join.Report(absl::StrCat(i), 1).ok();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(counted, kIds);
  EXPECT_THAT(metrics.Render(), HasSubstr(Series("top1", kIds)));
}

}  // namespace
}  // namespace tern::monitoring
