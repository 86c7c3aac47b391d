#include "server/serving/evaluate.h"

#include "absl/strings/match.h"
#include "server/serving/profile.h"
#include "statistics/statistics.h"
#include "tests/image/encode_jpeg.h"
#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

class EvaluatorTest : public testing::PipelineTest {
 protected:
  std::unique_ptr<Evaluator> Make(bool with_reference) {
    const auto model = repository_->Find("tiny", 0);
    EXPECT_TRUE(model.ok());
    auto evaluator = Evaluator::Create((*model)->plan, with_reference ? (*model)->plan : nullptr,
                                       (*model)->preprocessing, image::Limits(), 2);
    EXPECT_TRUE(evaluator.ok()) << evaluator.status();
    return *std::move(evaluator);
  }
};

TEST_F(EvaluatorTest, CountsHitsOfLabelledImagesAndAgreementOfAll) {
  auto evaluator = Make(true);
  // 70 images over more than two batches: 40 red called red, 20 blue called green, 10 without a
  // label.
  for (int i = 0; i < 40; ++i)
    ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 255, 0, 0), 0, "red"}).ok());
  for (int i = 0; i < 20; ++i)
    ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 0, 0, 255), 1, "blue"}).ok());
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 0, 9, 0), std::nullopt, "green"}).ok());
  }
  const auto counts = evaluator->Finish();
  ASSERT_TRUE(counts.ok()) << counts.status();
  EXPECT_EQ(counts->images, 70u);
  EXPECT_EQ(counts->labelled, 60u);
  EXPECT_EQ(counts->top1, 40u);
  EXPECT_EQ(counts->top5, 60u);
  EXPECT_EQ(counts->reference_top1, 40u);
  EXPECT_EQ(counts->agree, 70u);
  EXPECT_EQ(counts->both_right, 40u);
  EXPECT_EQ(counts->both_wrong, 20u);
  EXPECT_EQ(counts->only_reference_right + counts->only_candidate_right, 0u);
  EXPECT_EQ(counts->divergence, 0);
}

TEST_F(EvaluatorTest, OutputsAreTheReferenceForDrift) {
  auto evaluator = Make(false);
  EXPECT_EQ(evaluator->Outputs().images(), 0u);
  // Pure colours: the logits are 10 and two 0, so p = e^10 / (e^10 + 2) and the entropy
  // -p log p - 2 q log q, q = 1 / (e^10 + 2).
  for (int i = 0; i < 3; ++i)
    ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 0, 0, 255), std::nullopt, "blue"}).ok());
  ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 255, 0, 0), std::nullopt, "red"}).ok());
  ASSERT_TRUE(evaluator->Finish().ok());
  const v1::OutputReference outputs = evaluator->Outputs();
  EXPECT_EQ(outputs.images(), 4u);
  EXPECT_NEAR(outputs.confidence(), 0.99990921, 1e-6);
  EXPECT_NEAR(outputs.entropy(), 0.00099867, 1e-6);
  ASSERT_EQ(outputs.best_class_size(), 3);
  EXPECT_EQ(outputs.best_class(0), 1u);
  EXPECT_EQ(outputs.best_class(1), 0u);
  EXPECT_EQ(outputs.best_class(2), 3u);
}

TEST_F(EvaluatorTest, ClassesAreTalliedByWhatTheyAreTakenFor) {
  auto evaluator = Make(false);
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 0, 0, 255), 1, "blue"}).ok());
    ASSERT_TRUE(evaluator->Add({testing::SolidBmp(8, 8, 255, 0, 0), 0, "red"}).ok());
  }
  ASSERT_TRUE(evaluator->Finish().ok());
  const auto worst = evaluator->classes().Worst({"red", "green", "blue"});
  ASSERT_EQ(worst.size(), 1u);
  EXPECT_EQ(worst[0].label(), "green");
  EXPECT_EQ(worst[0].images(), 5u);
  EXPECT_EQ(worst[0].candidate_right(), 0u);
  ASSERT_EQ(worst[0].confused_with_size(), 1);
  EXPECT_EQ(worst[0].confused_with(0).label(), "blue");
  EXPECT_EQ(worst[0].confused_with(0).images(), 5u);
}

TEST(ClassTallyTest, WithAReferenceThoseThatLostMostComeFirst) {
  ClassTally tally;
  const auto add = [&](int times, uint32_t label, uint32_t answer, uint32_t reference) {
    for (int i = 0; i < times; ++i) tally.Add(label, answer, reference);
  };
  add(10, 0, 1, 1);  // wrong in both: nothing lost
  add(3, 1, 2, 1);   // lost 3 ...
  add(1, 1, 1, 0);   // ... and won 1
  add(4, 2, 3, 2);   // lost 4
  add(2, 2, 5, 2);   // lost 2
  add(1, 2, 4, 2), add(1, 2, 0, 2);
  add(5, 3, 3, 0);  // won
  const auto worst = tally.Worst({});
  ASSERT_EQ(worst.size(), 2u);
  EXPECT_EQ(worst[0].class_index(), 2u);
  EXPECT_EQ(worst[0].label(), "");
  EXPECT_EQ(worst[0].images(), 8u);
  EXPECT_EQ(worst[0].reference_right(), 8u);
  EXPECT_EQ(worst[0].candidate_right(), 0u);
  ASSERT_EQ(worst[0].confused_with_size(), 3);  // of 4
  EXPECT_EQ(worst[0].confused_with(0).class_index(), 3u);
  EXPECT_EQ(worst[0].confused_with(1).class_index(), 5u);
  EXPECT_EQ(worst[0].confused_with(2).class_index(), 0u);  // before 4, as rare
  EXPECT_EQ(worst[1].class_index(), 1u);
  EXPECT_EQ(worst[1].candidate_right(), 1u);
}

TEST(ClassTallyTest, ListsAreBounded) {
  ClassTally tally;
  for (uint32_t label = 0; label < 50; ++label) {
    for (uint32_t i = 0; i < 40; ++i) tally.Add(label, i < label ? label : label + 1 + i, {});
  }
  const auto worst = tally.Worst(std::vector<std::string>(3, "x"));
  ASSERT_EQ(worst.size(), 10u);
  for (uint32_t i = 0; i < 10; ++i) {
    EXPECT_EQ(worst[i].class_index(), i);  // lowest accuracy first
    EXPECT_EQ(worst[i].confused_with_size(), 3);
  }
}

// The half width of PairedDifference(30, 20, n) is about 1.96 sqrt(52) / n: 1.4 points of 1000
// images, 0.71 of 2000.
TEST(TooFewTest, ADropIsToldToAPointOrNot) {
  const std::string warning = TooFewForDrop(statistics::MakeComparison(900, 30, 20, 50), {});
  EXPECT_NE(warning.find("-0.41..2.41 points on 1000 labelled images"), std::string::npos)
      << warning;
  EXPECT_NE(warning.find("about 2000 would do"), std::string::npos) << warning;
  EXPECT_EQ(TooFewForDrop(statistics::MakeComparison(1900, 30, 20, 50), {}), "");
}

TEST(TooFewTest, AGateIsDecidedIfTheIntervalLeavesItOut) {
  const v1::PairedComparison drop = statistics::MakeComparison(900, 30, 20, 50);  // -0.41..2.41
  EXPECT_EQ(TooFewForDrop(drop, 0.03), "");                                       // met for sure
  EXPECT_EQ(TooFewForDrop(drop, -0.01), "");                                      // missed for sure
  EXPECT_NE(TooFewForDrop(drop, 0.02), "");
  EXPECT_NE(TooFewForDrop(drop, 0.0), "");
  // Right at the limit no number of images decides.
  EXPECT_EQ(TooFewForDrop(drop, 0.00998).find("would do"), std::string::npos);
  EXPECT_NE(TooFewForDrop(drop, 0.02).find("would do"), std::string::npos);
}

TEST(TooFewTest, AnAccuracyIsToldToAPointOrNot) {
  EXPECT_NE(TooFewForAccuracy(statistics::MakeProportion(800, 1000)), "");
  EXPECT_EQ(TooFewForAccuracy(statistics::MakeProportion(8000, 10000)), "");
}

TEST_F(EvaluatorTest, ABadImageIsNamed) {
  auto evaluator = Make(false);
  ASSERT_TRUE(evaluator->Add({"garbage", 0, "broken.jpg"}).ok());
  const auto counts = evaluator->Finish();
  EXPECT_EQ(counts.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(counts.status().message().find("broken.jpg"), absl::string_view::npos);
  EXPECT_EQ(evaluator->Add({testing::SolidBmp(8, 8, 0, 0, 0), 3, "label"}).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(QuantileTest, IsTheNearestRank) {
  EXPECT_EQ(Quantile({}, 0.5), 0);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0.5), 2);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0.51), 3);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0.99), 4);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0.0), 1);
}

TEST_F(EvaluatorTest, BenchmarkAndProfileRefuseOptionsOutOfRange) {
  const auto plan = (*repository_->Find("tiny", 0))->plan;
  BenchmarkOptions options;
  options.batch = plan->max_batch() + 1;
  EXPECT_EQ(Benchmark(plan, options).status().code(), absl::StatusCode::kInvalidArgument);
  options.batch = 1;
  options.threads = 0;
  EXPECT_EQ(Benchmark(plan, options).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ProfileRuns(plan, 1, 1, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ProfileRuns(plan, 1, 0, 3).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ProfileRuns(plan, plan->max_batch() + 1, 1, 3).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(EvaluatorTest, AProfileHasEveryLayerAndItsPartsFitIntoTheTotal) {
  const auto plan = (*repository_->Find("tiny", 0))->plan;
  for (int runs : {1, 2, 9}) {
    const auto times = ProfileRuns(plan, 2, 1, runs);
    ASSERT_TRUE(times.ok());
    ASSERT_EQ(times->layers.size(), plan->layers().size());
    absl::Duration parts;
    for (absl::Duration time : times->layers) parts += time;
    for (absl::Duration time : times->conversions) parts += time;
    EXPECT_GT(parts, absl::ZeroDuration());
    EXPECT_LE(parts, times->total);
  }
}

TEST_F(EvaluatorTest, AnOutputThatIsNotFiniteIsAnErrorThatNamesItsImage) {
  auto evaluator = Make(true);
  ASSERT_TRUE(evaluator->AddPixels(std::vector<float>(8 * 8 * 3, 0.5f), 0).ok());
  // The mean of 64 such numbers is beyond the largest float.
  ASSERT_TRUE(evaluator->AddPixels(std::vector<float>(8 * 8 * 3, 3e38f), 0).ok());
  const absl::Status status = evaluator->Finish().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StartsWith(status.message(),
                               "image: the network's output is not finite: class 0 of 3 is "))
      << status;
}

TEST_F(EvaluatorTest, AProfileStopsBetweenRunsWhenCancelled) {
  const auto plan = (*repository_->Find("tiny", 0))->plan;
  int asked = 0;
  EXPECT_EQ(ProfileRuns(plan, 1, 1, 1000, [&] { return ++asked == 3; }).status().code(),
            absl::StatusCode::kCancelled);
  EXPECT_EQ(asked, 3);
}

TEST_F(EvaluatorTest, BenchmarkStopsWhenCancelled) {
  BenchmarkOptions options;
  options.duration = absl::Hours(1);
  options.cancelled = [] { return true; };
  EXPECT_EQ(Benchmark((*repository_->Find("tiny", 0))->plan, options).status().code(),
            absl::StatusCode::kCancelled);
}

// Calibration and evaluation prepare their images with this.
TEST(PrepareSampleTest, AJpegIsReducedWhereTheContractSaysSo) {
  v1::Preprocessing contract = testing::TinyPreprocessing();
  contract.set_filter(v1::Preprocessing::BILINEAR);
  for (const bool scaling : {false, true}) {
    contract.set_jpeg_scaling(scaling);
    const auto pixels = PrepareSample({image::testing::StripedJpeg(), std::nullopt, "stripes"},
                                      contract, Shape{3, 8, 8}, image::Limits());
    ASSERT_TRUE(pixels.ok()) << pixels.status();
    for (size_t i = 0; i < pixels->size(); i += 3) {
      EXPECT_NEAR((*pixels)[i], scaling ? 0.25 : 1.0, 0.02) << scaling;
    }
  }
}

}  // namespace
}  // namespace tern::serving
