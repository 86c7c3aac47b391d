#include "server/serving/shadow.h"

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
  // One colour, NHWC.
  static std::vector<float> Pixels(int colour) {
    std::vector<float> pixels(8 * 8 * 3, 0.0f);
    for (size_t i = colour; i < pixels.size(); i += 3) pixels[i] = 1.0f;
    return pixels;
  }
  int Count(const std::string& result) {
    const std::string text = metrics_.Render();
    const std::string series =
        absl::StrCat("tern_shadow_comparisons_total{model=\"tiny\",result=\"", result,
                     "\",scheme=\"int8\",version=\"2\"} ");
    const size_t at = text.find(series);
    return at == std::string::npos ? 0 : std::atoi(text.c_str() + at + series.size());
  }
  // The work is done by another thread: waits for it, at most ten seconds.
  bool Reaches(int agree, int disagree) {
    for (int i = 0; i < 1000; ++i) {
      if (Count("agree") == agree && Count("disagree") == disagree) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
};

TEST_F(ShadowComparerTest, ComparesTheBestClassWithTheFloatVersions) {
  ShadowComparer shadow(1.0, &metrics_);
  shadow.SetRepository(repository_.get());
  const repository::LoadedModel model = Quantised();
  shadow.Offer(model, 0, Pixels(0));
  shadow.Offer(model, 1, Pixels(1));
  shadow.Offer(model, 1, Pixels(2));
  EXPECT_TRUE(Reaches(2, 1));
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, TakesItsShareEvenly) {
  ShadowComparer shadow(0.25, &metrics_);
  shadow.SetRepository(repository_.get());
  const repository::LoadedModel model = Quantised();
  for (int i = 0; i < 12; ++i) shadow.Offer(model, 2, Pixels(2));
  EXPECT_TRUE(Reaches(3, 0));
  shadow.SetRepository(nullptr);
}

TEST_F(ShadowComparerTest, FloatVersionsAndAFullQueueAreLeftAlone) {
  ShadowComparer shadow(1.0, &metrics_);
  repository::LoadedModel model = **repository_->Find("tiny", 0);
  shadow.Offer(model, 0, Pixels(0));  // fp32 itself
  model = Quantised();
  for (int i = 0; i < 1000; ++i)
    shadow.Offer(model, 0, Pixels(0));  // no repository: nothing is compared
  EXPECT_EQ(Count("agree") + Count("disagree"), 0);
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
