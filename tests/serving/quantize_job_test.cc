#include "server/serving/quantize_job.h"

#include <algorithm>
#include <random>

#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

class QuantizeJobTest : public testing::PipelineTest {
 protected:
  absl::StatusOr<std::unique_ptr<QuantizeJob>> Make(v1::WeightType weights, double gate = -1) {
    QuantizeJobOptions options;
    options.model = "tiny";
    options.recipe.set_weights(weights);
    options.recipe.set_cluster_size(2);
    if (gate >= 0) options.recipe.set_max_top1_drop(gate);
    return QuantizeJob::Create(repository_.get(), &metrics_, options);
  }
  void AddImages(QuantizeJob* job, bool calibration, bool evaluation, bool labelled) {
    std::mt19937 random(3);
    for (int i = 0; i < 30; ++i) {
      const int colour = i % 3;
      uint8_t rgb[3];
      for (uint8_t& x : rgb) x = random() % 100;
      rgb[colour] = 200;
      Sample sample{testing::SolidBmp(8, 8, rgb[0], rgb[1], rgb[2]), std::nullopt, "i"};
      if (labelled) sample.label = colour;
      ASSERT_TRUE(job->AddImage(std::move(sample), calibration, evaluation).ok());
    }
  }
};

TEST_F(QuantizeJobTest, PublishesAVersionThatServesAndReports) {
  auto job = Make(v1::INT8);
  ASSERT_TRUE(job.ok()) << job.status();
  AddImages(job->get(), true, true, true);
  std::vector<std::string> phases;
  const auto outcome = (*job)->Run(
      [&](const JobProgress& p) {
        if (phases.empty() || phases.back() != p.phase) phases.push_back(p.phase);
      },
      nullptr);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_EQ(outcome->version, 2u);
  EXPECT_EQ(outcome->report.top1().value(), 1.0);
  EXPECT_EQ(outcome->report.agreement().total(), 30u);
  EXPECT_EQ(outcome->report.calibration_images(), 30u);
  EXPECT_EQ(phases,
            (std::vector<std::string>{"calibrating", "evaluating", "measuring", "publishing"}));
  const auto served = repository_->Find("tiny", 2);
  ASSERT_TRUE(served.ok()) << served.status();
  EXPECT_EQ((*served)->info.scheme, "int8");
  EXPECT_EQ((*served)->report.bytes(), std::filesystem::file_size(root_ + "/tiny/2/model.tern"));
  // The reference for drift travels with the artifact.
  const v1::OutputReference& outputs = (*served)->report.outputs();
  EXPECT_EQ(outputs.images_of(), "evaluation");
  EXPECT_EQ(outputs.images(), 30u);
  for (const uint32_t images : outputs.best_class()) EXPECT_EQ(images, 10u);
  int counted = 0;
  for (const v1::LayerReport& layer : (*served)->report.layers()) {
    if (!layer.has_output_at_limit()) continue;
    ++counted;
    EXPECT_GE(layer.output_at_limit(), 0);
    EXPECT_LT(layer.output_at_limit(), 0.5);
  }
  EXPECT_EQ(counted, 2);  // the convolutions; the last layer's logits are no codes
  const std::string text = metrics_.Render();
  EXPECT_NE(text.find("tern_activation_at_limit_ratio{"), std::string::npos);
  EXPECT_NE(text.find("tern_drift_reference_info{images_of=\"evaluation\",model=\"tiny\","),
            std::string::npos);
}

TEST_F(QuantizeJobTest, ADryRunReportsAndPublishesNothing) {
  QuantizeJobOptions options;
  options.model = "tiny";
  options.recipe.set_weights(v1::INT8);
  options.dry_run = true;
  auto job = QuantizeJob::Create(repository_.get(), &metrics_, options);
  ASSERT_TRUE(job.ok()) << job.status();
  AddImages(job->get(), true, true, true);
  std::vector<std::string> phases;
  const auto outcome =
      (*job)->Run([&](const JobProgress& p) { phases.push_back(p.phase); }, nullptr);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_EQ(outcome->version, 0u);
  EXPECT_TRUE(outcome->gate_met);
  EXPECT_GT(outcome->report.bytes(), 0u);
  EXPECT_GT(outcome->report.ms_per_image(), 0);
  EXPECT_EQ(outcome->report.top1().total(), 30u);
  EXPECT_EQ(std::count(phases.begin(), phases.end(), "publishing"), 0);
  EXPECT_EQ(repository_->List("tiny").size(), 1u);
  EXPECT_FALSE(std::filesystem::exists(root_ + "/tiny/2"));

  options.set_default = true;
  EXPECT_EQ(QuantizeJob::Create(repository_.get(), &metrics_, options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(QuantizeJobTest, TheReportComparesInPairsAndCountsImagesOfBothUses) {
  auto job = Make(v1::INT8);
  ASSERT_TRUE(job.ok());
  AddImages(job->get(), true, false, false);  // the same 30 images twice, sent apart
  AddImages(job->get(), false, true, true);
  const Sample fresh{testing::SolidBmp(8, 8, 1, 250, 2), 1, "fresh"};
  ASSERT_TRUE((*job)->AddImage(fresh, false, true).ok());
  const auto outcome = (*job)->Run([](const JobProgress&) {}, nullptr);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  const v1::QuantizationReport& report = outcome->report;
  EXPECT_EQ(report.evaluation_images(), 31u);
  EXPECT_EQ(report.overlapping_images(), 30u);
  EXPECT_EQ(report.comparison().both_right(), 31u);
  EXPECT_EQ(report.comparison().drop(), 0);
  EXPECT_GT(report.comparison().drop_high(), 0.05);
  EXPECT_EQ(report.comparison().p_value(), 1);
  EXPECT_EQ(report.worst_classes_size(), 0);
  std::string warnings;
  for (const std::string& warning : report.warnings()) warnings += warning + "\n";
  EXPECT_NE(warnings.find("30 of 31 evaluation images are calibration images too"),
            std::string::npos)
      << warnings;
  EXPECT_NE(warnings.find("too few evaluation images"), std::string::npos) << warnings;
}

TEST_F(QuantizeJobTest, AGateWithoutLabelledImagesIsRefused) {
  auto job = Make(v1::INT8, 0.0);
  ASSERT_TRUE(job.ok());
  AddImages(job->get(), true, false, false);
  const auto no_labels = (*job)->Run([](const JobProgress&) {}, nullptr);
  EXPECT_EQ(no_labels.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(repository_->List("tiny").size(), 1u);
}

TEST_F(QuantizeJobTest, OnlyEvaluationImagesNeedALabelOfTheModel) {
  auto job = Make(v1::INT8);
  ASSERT_TRUE(job.ok());
  const Sample unknown{testing::SolidBmp(8, 8, 1, 250, 2), 1000, "unknown"};
  EXPECT_TRUE((*job)->AddImage(unknown, true, false).ok());
  for (const bool calibration : {false, true}) {
    EXPECT_EQ((*job)->AddImage(unknown, calibration, true).code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(QuantizeJobTest, CancellingPublishesNothing) {
  auto job = Make(v1::TERNARY_CLUSTER);
  ASSERT_TRUE(job.ok());
  AddImages(job->get(), true, true, true);
  std::atomic<bool> cancelled{true};
  EXPECT_EQ((*job)->Run([](const JobProgress&) {}, &cancelled).status().code(),
            absl::StatusCode::kCancelled);
  EXPECT_EQ(repository_->List("tiny").size(), 1u);
}

TEST_F(QuantizeJobTest, AModelThatWasMadeAnewMeanwhileGetsNothingOfTheOldOne) {
  auto job = Make(v1::INT8);
  ASSERT_TRUE(job.ok()) << job.status();
  AddImages(job->get(), true, false, false);
  const auto onnx = repository_->ReadAsOnnx("tiny", 1);
  const v1::Preprocessing contract = (*repository_->Find("tiny", 1))->preprocessing;
  ASSERT_TRUE(repository_->Delete("tiny", 0).ok());
  ASSERT_TRUE(repository_->Import("tiny", *onnx, contract, {}, true).ok());
  const auto outcome = (*job)->Run([](const JobProgress&) {}, nullptr);
  EXPECT_EQ(outcome.status().code(), absl::StatusCode::kFailedPrecondition) << outcome.status();
  EXPECT_NE(outcome.status().message().find("version 1 of 'tiny' was deleted meanwhile"),
            absl::string_view::npos)
      << outcome.status();
  EXPECT_EQ(repository_->List("tiny").size(), 1u);
}

TEST_F(QuantizeJobTest, RefusesWhatItCannotUse) {
  auto unknown_type = Make(v1::WEIGHT_TYPE_UNSPECIFIED);
  EXPECT_EQ(unknown_type.status().code(), absl::StatusCode::kInvalidArgument);
  QuantizeJobOptions options;
  options.model = "nobody";
  options.recipe.set_weights(v1::INT8);
  EXPECT_EQ(QuantizeJob::Create(repository_.get(), &metrics_, options).status().code(),
            absl::StatusCode::kNotFound);
  auto job = Make(v1::INT8);
  ASSERT_TRUE(job.ok());
  EXPECT_EQ((*job)->AddImage({"junk", std::nullopt, "x"}, true, false).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*job)->AddImage({testing::SolidBmp(8, 8, 0, 0, 0), 3, "x"}, false, true).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*job)->Run([](const JobProgress&) {}, nullptr).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace tern::serving
