#include "server/serving/brownout.h"

#include <future>

#include "gmock/gmock.h"
#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/serving/quantize_job.h"
#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

using ::testing::ElementsAre;

std::shared_ptr<const repository::LoadedModel> Version(uint64_t number,
                                                       const v1::QuantizationReport& report = {}) {
  auto model = std::make_shared<repository::LoadedModel>();
  model->info.model = "m";
  model->info.version = number;
  model->report = report;
  return model;
}

// Of a version made from `source`: 1000 labelled images, the drop's upper end, top-1's lower end,
// milliseconds.
v1::QuantizationReport Report(uint64_t source, double drop_high, double top1_low, double ms) {
  v1::QuantizationReport report;
  report.set_source_model("m");
  report.set_source_version(source);
  report.set_evaluation_images(1000);
  report.mutable_comparison()->set_both_right(1000);
  report.mutable_comparison()->set_drop_high(drop_high);
  report.mutable_top1()->set_low(top1_low);
  report.mutable_top1()->set_total(1000);
  report.mutable_float_top1()->set_low(0.90);
  report.mutable_float_top1()->set_total(1000);
  report.set_ms_per_image(ms);
  report.set_float_ms_per_image(10);
  return report;
}

std::vector<uint64_t> Numbers(const std::vector<Rung>& ladder) {
  std::vector<uint64_t> numbers;
  for (const Rung& rung : ladder) numbers.push_back(rung.version);
  return numbers;
}

TEST(LadderTest, HoldsTheVersionsOfOneFloatVersionByTheAccuracyTheyPublish) {
  const auto ladder = MakeLadder(
      1, {Version(1), Version(2, Report(1, 0.05, 0.84, 2)), Version(3, Report(1, 0.01, 0.88, 5)),
          Version(4, Report(9, 0.0, 0.9, 1)), Version(5), Version(6, [] {  // measured nothing
            v1::QuantizationReport report;
            report.set_source_model("m");
            report.set_source_version(1);
            return report;
          }())});
  EXPECT_THAT(Numbers(ladder), ElementsAre(1, 3, 2));
  EXPECT_EQ(ladder[0].drop_high, 0);
  EXPECT_EQ(ladder[0].top1_low, 0.90);  // from the reports of the others
  EXPECT_EQ(ladder[0].cost, absl::Milliseconds(10));
  EXPECT_EQ(ladder[2].top1_low, 0.84);
  EXPECT_EQ(ladder[2].cost, absl::Milliseconds(2));
}

TEST(LadderTest, WithoutLabelsEachDisagreementCountsAsLost) {
  v1::QuantizationReport report;
  report.set_source_model("m");
  report.set_source_version(1);
  report.mutable_agreement()->set_low(0.97);
  report.mutable_agreement()->set_total(500);
  const auto ladder = MakeLadder(2, {Version(1), Version(2, report)});
  ASSERT_EQ(ladder.size(), 2u);
  EXPECT_NEAR(ladder[1].drop_high, 0.03, 1e-12);
  EXPECT_LT(ladder[1].top1_low, 0);
}

TEST(LadderTest, AReportWithImpossibleFiguresIsNoRung) {
  EXPECT_THAT(Numbers(MakeLadder(1, {Version(1), Version(2, Report(1, std::nan(""), 0.9, 1)),
                                     Version(3, Report(1, 7, 0.9, 1))})),
              ElementsAre(1));
}

// Float, int8, 4-bit, a ternary one that is not faster, and a fast one.
const std::vector<Rung> kLadder = {{1, 0.90, 0.00, absl::Milliseconds(10)},
                                   {2, 0.89, 0.01, absl::Milliseconds(5)},
                                   {3, 0.87, 0.03, absl::Milliseconds(4)},
                                   {4, 0.85, 0.05, absl::Milliseconds(4)},
                                   {5, 0.80, 0.10, absl::Milliseconds(1)}};

absl::StatusOr<Brownout::Choice> Choose(uint64_t from, int level, double max_drop,
                                        Wishes wishes = {}, double ms_of_default = 0) {
  return ChooseRung(kLadder, from, level, max_drop, wishes, [=](uint64_t version) {
    return absl::Milliseconds(ms_of_default / static_cast<double>(version));
  });
}

TEST(ChooseRungTest, OverloadStepsDownWithinTheBoundToFasterVersionsOnly) {
  EXPECT_EQ(Choose(1, 0, 0.2)->version, 0u);
  EXPECT_EQ(Choose(1, 1, 0.2)->version, 2u);
  EXPECT_EQ(Choose(1, 1, 0.2)->degradation, Degradation::kOverload);
  EXPECT_EQ(Choose(1, 1, 0.2)->degraded_from, 1u);
  EXPECT_EQ(Choose(1, 2, 0.2)->version, 3u);
  EXPECT_EQ(Choose(1, 3, 0.2)->version, 5u);  // 4 is no faster than 3
  EXPECT_EQ(Choose(1, 9, 0.2)->version, 5u);
  EXPECT_EQ(Choose(1, 9, 0.03)->version, 3u);
  EXPECT_EQ(Choose(1, 9, 0.005)->version, 0u);
  EXPECT_EQ(Choose(1, 9, 0)->version, 0u);  // did not opt in
  EXPECT_EQ(Choose(3, 1, 0.2)->version, 5u);
  EXPECT_EQ(Choose(8, 1, 0.2)->version, 0u);  // a default that is on no ladder
  EXPECT_EQ(StepsDown(kLadder, 1, 0.2), 3);
  EXPECT_EQ(StepsDown(kLadder, 1, 0.03), 2);
  EXPECT_EQ(StepsDown(kLadder, 1, 0), 0);
  EXPECT_EQ(StepsDown(kLadder, 8, 0.2), 0);
}

TEST(ChooseRungTest, AMinAccuracyBoundsTheStepsAndCanWantAMoreAccurateVersion) {
  EXPECT_EQ(Choose(2, 0, 0, {.min_accuracy = 0.80})->version, 0u);
  EXPECT_EQ(Choose(2, 9, 0, {.min_accuracy = 0.80})->version, 5u);
  EXPECT_EQ(Choose(2, 9, 0.2, {.min_accuracy = 0.86})->version, 3u);
  const auto up = Choose(3, 0, 0, {.min_accuracy = 0.88});
  EXPECT_EQ(up->version, 2u);
  EXPECT_EQ(up->degradation, Degradation::kMinAccuracy);
  EXPECT_EQ(up->degraded_from, 3u);
  const auto none = Choose(2, 0, 0, {.min_accuracy = 0.95});
  EXPECT_EQ(none.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(none.status().message()), ::testing::HasSubstr("0.9 (lower end"));
}

TEST(ChooseRungTest, AMaxLatencyTakesTheMostAccurateVersionThatKeepsIt) {
  // Version n is expected to answer in 100 ms / n.
  const auto choose = [](double ms, double max_drop) {
    return Choose(1, 0, max_drop, {.max_latency = absl::Milliseconds(ms)}, 100);
  };
  EXPECT_EQ(choose(100, 0)->version, 0u);
  EXPECT_EQ(choose(60, 0)->version, 2u);
  EXPECT_EQ(choose(60, 0)->degradation, Degradation::kMaxLatency);
  EXPECT_EQ(choose(40, 0)->version, 3u);
  EXPECT_EQ(choose(1, 0)->version, 5u);     // none keeps it: the fastest
  EXPECT_EQ(choose(1, 0.03)->version, 3u);  // within the model's bound
}

class OverloadControllerTest : public ::testing::Test {
 protected:
  // Images every 10 ms for `seconds`, each after `wait`; the level at the end.
  int Run(double seconds, absl::Duration wait) {
    int level = 0;
    for (int i = 0; i < seconds * 100; ++i) {
      now_ += absl::Milliseconds(10);
      controller_.Observe(wait, now_);
      level = controller_.Level(now_, 3);
    }
    return level;
  }
  absl::Time now_ = absl::UnixEpoch();
  OverloadController controller_{absl::Milliseconds(20)};
};

TEST_F(OverloadControllerTest, OnlyAStandingQueueIsOverload) {
  EXPECT_EQ(Run(0.4, absl::Milliseconds(100)), 0);  // a burst
  EXPECT_EQ(Run(0.01, absl::Milliseconds(20)), 0);  // and one image in time
  EXPECT_EQ(Run(0.4, absl::Milliseconds(100)), 0);
  EXPECT_EQ(Run(0.12, absl::Milliseconds(100)), 1);
}

TEST_F(OverloadControllerTest, StepsFollowWhileItLastsUpToTheirNumber) {
  EXPECT_EQ(Run(1.1, absl::Milliseconds(100)), 2);
  EXPECT_EQ(Run(10, absl::InfiniteDuration()), 3);
}

TEST_F(OverloadControllerTest, CalmForFiveSecondsTakesAStepBackAndBetweenTheThresholdsItStays) {
  EXPECT_EQ(Run(1.1, absl::Milliseconds(100)), 2);
  EXPECT_EQ(Run(60, absl::Milliseconds(15)), 2);  // neither overload nor calm
  EXPECT_EQ(Run(4.9, absl::Milliseconds(5)), 2);
  EXPECT_EQ(Run(0.2, absl::Milliseconds(5)), 1);
  EXPECT_EQ(Run(4.9, absl::Milliseconds(5)), 0);
}

TEST_F(OverloadControllerTest, WithoutImagesItCalmsDownToo) {
  EXPECT_EQ(Run(0.6, absl::Milliseconds(100)), 1);
  now_ += absl::Seconds(6);
  EXPECT_EQ(controller_.Level(now_, 3), 0);
}

TEST_F(OverloadControllerTest, AStepBackThatWasTooEarlyMakesTheNextOneWaitTwiceAsLong) {
  EXPECT_EQ(Run(0.6, absl::Milliseconds(100)), 1);
  EXPECT_EQ(Run(5.1, absl::Milliseconds(5)), 0);
  EXPECT_EQ(Run(0.6, absl::Milliseconds(100)), 1);  // back at once
  EXPECT_EQ(Run(9.5, absl::Milliseconds(5)), 1);
  EXPECT_EQ(Run(0.6, absl::Milliseconds(5)), 0);
  EXPECT_EQ(Run(30, absl::Milliseconds(5)), 0);  // a long calm forgets that
  EXPECT_EQ(Run(0.6, absl::Milliseconds(100)), 1);
  EXPECT_EQ(Run(5.1, absl::Milliseconds(5)), 0);
}

TEST_F(OverloadControllerTest, FewerVersionsMeanFewerSteps) {
  EXPECT_EQ(Run(2, absl::Milliseconds(100)), 3);
  EXPECT_EQ(controller_.Level(now_, 1), 1);
}

// The whole way: a model with a float version (1, default) and an int8 version that its report
// calls faster (3), through the classifier.
class BrownoutPipelineTest : public testing::PipelineTest {
 protected:
  void SetUp() override {
    PipelineTest::SetUp();
    QuantizeJobOptions options;
    options.model = "tiny";
    options.recipe.set_weights(v1::INT8);
    auto job = QuantizeJob::Create(repository_.get(), &metrics_, options);
    ASSERT_TRUE(job.ok()) << job.status();
    for (int i = 0; i < 30; ++i) {
      const int colour = i % 3;
      Sample sample{testing::SolidBmp(8, 8, colour == 0 ? 200 : i, colour == 1 ? 200 : i,
                                      colour == 2 ? 200 : i),
                    colour, "i"};
      ASSERT_TRUE((*job)->AddImage(std::move(sample), true, true).ok());
    }
    ASSERT_TRUE((*job)->Run([](const JobProgress&) {}, nullptr).ok());
    // Times as on a machine where the difference is plain.
    auto artifact = artifact::Read(root_ + "/tiny/2/model.tern");
    ASSERT_TRUE(artifact.ok()) << artifact.status();
    artifact->report.set_float_ms_per_image(10);
    artifact->report.set_ms_per_image(2);
    ASSERT_TRUE(repository_->Publish("tiny", *artifact, false).ok());
    ASSERT_TRUE(repository_->Delete("tiny", 2).ok());
  }
  // Every wait counts as overload.
  void OptIn(const std::string& brownout) {
    const std::string path = root_ + "/tiny/config.textproto";
    auto config = ReadFile(path);
    ASSERT_TRUE(config.ok()) << config.status();
    ASSERT_TRUE(WriteFileAtomically(path, {*config + "brownout { " + brownout + " }\n"}).ok());
    ASSERT_TRUE(repository_->Load("tiny", 1).ok());
  }
  absl::StatusOr<ClassifyOutput> Classify(uint64_t version = 0, Wishes wishes = {}) {
    ClassifyInput input;
    input.image = testing::SolidBmp(8, 8, 0, 255, 0);
    input.wishes = wishes;
    std::promise<absl::StatusOr<ClassifyOutput>> promise;
    classifier_->Classify(
        "tiny", version, std::move(input),
        [&](absl::StatusOr<ClassifyOutput> output) { promise.set_value(std::move(output)); });
    return promise.get_future().get();
  }
  // Sends until an answer comes from another version.
  ClassifyOutput UntilDegraded() {
    for (;;) {
      auto output = Classify();
      EXPECT_TRUE(output.ok()) << output.status();
      if (!output.ok() || output->degradation != Degradation::kNone) return *std::move(output);
    }
  }
};

TEST_F(BrownoutPipelineTest, UnderOverloadRequestsThatNameNoVersionAreStepped) {
  ASSERT_NO_FATAL_FAILURE(OptIn("max_top1_drop: 0.5 queue_wait_us: 1"));
  const ClassifyOutput output = UntilDegraded();
  EXPECT_EQ(output.model->info.version, 3u);
  EXPECT_EQ(output.degradation, Degradation::kOverload);
  EXPECT_EQ(output.degraded_from, 1u);
  EXPECT_EQ(output.classes[0].index, 1);
  const std::string text = metrics_.Render();
  EXPECT_NE(text.find("tern_brownout_level{model=\"tiny\"} 1"), std::string::npos);
  EXPECT_NE(text.find("tern_degraded_total{from=\"1\",model=\"tiny\",to=\"3\"} 1"),
            std::string::npos);
  // A named version answers itself.
  const auto named = Classify(1);
  ASSERT_TRUE(named.ok()) << named.status();
  EXPECT_EQ(named->model->info.version, 1u);
  EXPECT_EQ(named->degradation, Degradation::kNone);
  // The faster version goes: the default answers again.
  ASSERT_TRUE(repository_->Unload("tiny", 3).ok());
  const auto back = Classify();
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->model->info.version, 1u);
  EXPECT_EQ(back->degradation, Degradation::kNone);
}

TEST_F(BrownoutPipelineTest, AMinAccuracyIsKeptOrRefused) {
  // 30 of 30 images right: the lower end is 0.886 for both.
  ASSERT_TRUE(Classify(0, {.min_accuracy = 0.88}).ok());
  EXPECT_EQ(Classify(0, {.min_accuracy = 0.9}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(Classify(3, {.min_accuracy = 0.88}).ok());
  EXPECT_EQ(Classify(3, {.min_accuracy = 0.9}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Classify(0, {.min_accuracy = 1.5}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Classify(0, {.min_accuracy = std::nan("")}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(BrownoutPipelineTest, AMaxLatencyThatCannotBeKeptIsAnsweredByTheFastest) {
  ASSERT_TRUE(Classify().ok());  // something has been learned
  const auto output = Classify(0, {.max_latency = absl::ZeroDuration()});
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(output->model->info.version, 3u);
  EXPECT_EQ(output->degradation, Degradation::kMaxLatency);
  const auto patient = Classify(0, {.max_latency = absl::Hours(1)});
  ASSERT_TRUE(patient.ok());
  EXPECT_EQ(patient->model->info.version, 1u);
}

TEST_F(BrownoutPipelineTest, WithoutABoundOfItsOwnAModelIsNotStepped) {
  ASSERT_NO_FATAL_FAILURE(OptIn("queue_wait_us: 1"));
  const absl::Time end = absl::Now() + absl::Milliseconds(1200);
  while (absl::Now() < end) {
    const auto output = Classify();
    ASSERT_TRUE(output.ok());
    ASSERT_EQ(output->model->info.version, 1u);
  }
}

}  // namespace
}  // namespace tern::serving
