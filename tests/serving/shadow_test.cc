#include "server/serving/shadow.h"

#include <filesystem>
#include <set>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

class ShadowComparerTest : public testing::PipelineTest {
 protected:
  // A quantised version as Offer sees it; the float one is the tiny model itself.
  repository::LoadedModel Quantised() {
    repository::LoadedModel model = **repository_->Find("tiny", 0);
    model.info.version = 2;
    model.info.scheme = "int8";
    model.metric_labels = {"tiny", 2, "int8"};
    return model;
  }
  // The logits of an image of one colour on the tiny model, and what a quantised version might say.
  static std::vector<float> Logits(int best) {
    std::vector<float> logits(3, 0.0f);
    logits[best] = 10.0f;
    return logits;
  }
  // One colour, NHWC.
  static std::vector<float> Pixels(int colour) {
    std::vector<float> pixels(8 * 8 * 3, 0.0f);
    for (size_t i = colour; i < pixels.size(); i += 3) pixels[i] = 1.0f;
    return pixels;
  }
  double Value(const std::string& series) {
    const std::string text = metrics_.Render();
    const size_t at = text.find(series + " ");
    return at == std::string::npos ? 0 : std::strtod(text.c_str() + at + series.size(), nullptr);
  }
  int Count(const std::string& result) {
    return static_cast<int>(
        Value(absl::StrCat("tern_shadow_comparisons_total{model=\"tiny\",result=\"", result,
                           "\",scheme=\"int8\",version=\"2\"}")));
  }
  int Dropped(const std::string& reason) {
    return static_cast<int>(
        Value(absl::StrCat("tern_shadow_dropped_total{reason=\"", reason, "\"}")));
  }
  const std::shared_ptr<monitoring::VersionMonitor> monitor_ =
      std::make_shared<monitoring::VersionMonitor>(
          metrics::ModelLabels{"tiny", 2, "int8"}, v1::QuantizationReport(), 3,
          std::vector<std::string>(), monitoring::MonitorOptions(), &metrics_, Clock::Real());
  // The work is done by a thread that gets only what no other program wants, which on a busy
  // machine is little: waits for it, ten minutes at most.
  static constexpr int kLooks = 60'000;
  template <typename Condition>
  bool Becomes(Condition condition) {
    for (int i = 0; i < kLooks; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  bool Reaches(int agree, int disagree) {
    return Becomes([&] { return Count("agree") == agree && Count("disagree") == disagree; });
  }
};

TEST_F(ShadowComparerTest, WithoutAFractionThereIsNoThreadThatWaitsForAnIdleCpu) {
  const auto threads = [] {
    std::set<std::string> ids;
    for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task"))
      ids.insert(thread.path().filename());
    return ids;
  };
  // Only those that come are counted: others, that were joined, may still be on their way out.
  const auto new_since = [&](const std::set<std::string>& before) {
    int count = 0;
    for (const std::string& id : threads()) count += !before.contains(id);
    return count;
  };
  const std::set<std::string> before = threads();
  ShadowComparer none(0.0, &metrics_);
  EXPECT_EQ(new_since(before), 0);
  ShadowComparer some(0.5, &metrics_);
  EXPECT_EQ(new_since(before), 1);
}

TEST_F(ShadowComparerTest, ComparesTheBestClassAndTheOutputsWithTheFloatVersions) {
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  const repository::LoadedModel model = Quantised();
  shadow.Offer(model, monitor_, Logits(0), Pixels(0));
  shadow.Offer(model, monitor_, Logits(1), Pixels(1));
  shadow.Offer(model, monitor_, Logits(1), Pixels(2));
  EXPECT_TRUE(Reaches(2, 1));
  // Two are equal; the third's are softmax(0, 0, 10) and softmax(0, 10, 0): sum p log(p / q) is
  // 10 (p_2 - p_1) = 10 (e^10 - 1) / (e^10 + 2).
  const std::string labels = R"({model="tiny",scheme="int8",version="2"})";
  EXPECT_EQ(Value("tern_shadow_divergence_nats_count" + labels), 3);
  EXPECT_NEAR(Value("tern_shadow_divergence_nats_sum" + labels), 9.998638, 1e-5);
  EXPECT_NEAR(Value("tern_live_agreement_ratio" + labels), 2.0 / 3, 1e-6);
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, ComparesWithTheVersionThatItWasQuantisedFrom) {
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  repository::LoadedModel model = Quantised();
  model.report.set_source_model(model.info.model);
  model.report.set_source_version(1);
  shadow.Offer(model, monitor_, Logits(0), Pixels(0));
  EXPECT_TRUE(Reaches(1, 0));
  model.report.set_source_version(7);  // gone, and version 1 is of other weights
  shadow.Offer(model, monitor_, Logits(0), Pixels(0));
  EXPECT_TRUE(Becomes([&] { return Dropped("no_float") == 1; }));
  EXPECT_EQ(Count("agree"), 1);
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, TakesItsShareEvenly) {
  ShadowComparer shadow(0.25, &metrics_);
  shadow.SetRepository(repository_.get());
  const repository::LoadedModel model = Quantised();
  for (int i = 0; i < 12; ++i) shadow.Offer(model, monitor_, Logits(2), Pixels(2));
  EXPECT_TRUE(Reaches(3, 0));
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, NothingStartsWhileAnImageWaitsOrRunsAndTheBacklogIsBounded) {
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  const repository::LoadedModel model = Quantised();
  std::vector<ShadowComparer::Activity> busy;
  busy.push_back(shadow.Begin());
  busy.push_back(shadow.Begin());
  const int kept = ShadowComparer::kMaxWaiting;
  for (int i = 0; i < 100; ++i) shadow.Offer(model, monitor_, Logits(0), Pixels(0));
  EXPECT_EQ(Dropped("backlog") + Dropped("contended"), 100 - kept);
  busy.pop_back();  // one is left
  // Twenty looks of the thread.
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(Count("agree") + Count("disagree"), 0);
  busy.pop_back();
  EXPECT_TRUE(Reaches(kept, 0));
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, RequestsCountAsActivityUntilTheyAreAnswered) {
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  runner_.shadow = &shadow;
  ASSERT_TRUE(
      repository_->Import("tiny", testing::TinyOnnx(), testing::TinyPreprocessing(), {}, true)
          .ok());
  // While the first answer is being delivered, its image counts as running.
  std::atomic<bool> answered{false}, release{false};
  ClassifyInput input;
  input.image = testing::SolidBmp(8, 8, 255, 0, 0);
  classifier_->Classify("tiny", 2, std::move(input), [&](absl::StatusOr<ClassifyOutput> output) {
    EXPECT_TRUE(output.ok()) << output.status();
    answered = true;
    while (!release) std::this_thread::yield();
  });
  while (!answered) std::this_thread::yield();
  shadow.Offer(Quantised(), monitor_, Logits(0), Pixels(0));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(Count("agree"), 0);
  release = true;
  EXPECT_TRUE(Reaches(1, 0));
  repository_->Shutdown();
  shadow.SetRepository(nullptr);
  runner_.shadow = nullptr;
}

TEST_F(ShadowComparerTest, FloatVersionsAreLeftAloneAndAMissingFloatVersionIsCounted) {
  ShadowComparer shadow(1.0, &metrics_);
  repository::LoadedModel model = **repository_->Find("tiny", 0);
  shadow.Offer(model, monitor_, Logits(0), Pixels(0));  // fp32 itself
  model = Quantised();
  model.info.model = "other";
  shadow.SetRepository(repository_.get());
  shadow.Offer(model, monitor_, Logits(0), Pixels(0));
  for (int i = 0; i < kLooks && Dropped("no_float") == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(Dropped("no_float"), 1);
  EXPECT_EQ(Count("agree") + Count("disagree"), 0);
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, AFloatVersionWhoseOutputIsNotFiniteIsNoReference) {
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  // The mean of 64 such numbers is beyond the largest float.
  shadow.Offer(Quantised(), monitor_, Logits(0), std::vector<float>(8 * 8 * 3, 3e38f));
  EXPECT_TRUE(Becomes([&] { return Dropped("failed") == 1; }));
  EXPECT_EQ(Count("agree") + Count("disagree"), 0);
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, AnUnloadedFloatVersionsMemoryIsReleased) {
  ASSERT_TRUE(
      repository_->Import("tiny", testing::TinyOnnx(), testing::TinyPreprocessing(), {}, true)
          .ok());
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  const std::weak_ptr<const repository::LoadedModel> float_version = *repository_->Find("tiny", 1);
  shadow.Offer(Quantised(), monitor_, Logits(0), Pixels(0));
  EXPECT_TRUE(Reaches(1, 0));
  ASSERT_TRUE(repository_->Unload("tiny", 1).ok());
  for (int i = 0; i < kLooks && !float_version.expired(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_TRUE(float_version.expired());
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, ProfiledBatchesShowEveryLayer) {
  runner_.profile_every = 2;
  ASSERT_TRUE(
      repository_->Import("tiny", testing::TinyOnnx(), testing::TinyPreprocessing(), {}, true)
          .ok());
  std::atomic<int> done{0};
  for (int i = 0; i < 8; ++i) {
    ClassifyInput input;
    input.image = testing::SolidBmp(8, 8, 255, 0, 0);
    classifier_->Classify("tiny", 2, std::move(input), [&](absl::StatusOr<ClassifyOutput> output) {
      EXPECT_TRUE(output.ok()) << output.status();
      ++done;
    });
  }
  while (done < 8) std::this_thread::yield();
  const std::string text = metrics_.Render();
  for (const engine::LayerInfo& layer : (*repository_->Find("tiny", 2))->plan->layers()) {
    EXPECT_NE(
        text.find(absl::StrCat("tern_layer_duration_seconds_count{layer=\"", layer.name, "\"")),
        std::string::npos)
        << layer.name;
  }
}

}  // namespace
}  // namespace tern::serving
