#include "server/serving/evaluate.h"

#include "server/serving/profile.h"
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
  EXPECT_EQ(ProfileLayers(plan, 1, 1, 0).status().code(), absl::StatusCode::kInvalidArgument);
  const auto times = ProfileLayers(plan, 2, 1, 3);
  ASSERT_TRUE(times.ok());
  EXPECT_EQ(times->size(), plan->layers().size());
}

TEST_F(EvaluatorTest, BenchmarkStopsWhenCancelled) {
  BenchmarkOptions options;
  options.duration = absl::Hours(1);
  options.cancelled = [] { return true; };
  EXPECT_EQ(Benchmark((*repository_->Find("tiny", 0))->plan, options).status().code(),
            absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace tern::serving
