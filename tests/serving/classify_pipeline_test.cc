#include <atomic>
#include <future>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/retry_after.h"
#include "tests/image/encode_jpeg.h"
#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

class ClassifierTest : public testing::PipelineTest {
 protected:
  absl::StatusOr<ClassifyOutput> Classify(std::string image, ClassifyInput input = {},
                                          const std::string& model = "tiny", uint64_t version = 0) {
    input.image = std::move(image);
    std::promise<absl::StatusOr<ClassifyOutput>> promise;
    classifier_->Classify(
        model, version, std::move(input),
        [&](absl::StatusOr<ClassifyOutput> output) { promise.set_value(std::move(output)); });
    return promise.get_future().get();
  }
};

TEST_F(ClassifierTest, NamesTheDominantColour) {
  const auto green = Classify(testing::SolidBmp(20, 10, 0, 255, 30));
  ASSERT_TRUE(green.ok()) << green.status();
  ASSERT_EQ(green->classes.size(), 3u);
  EXPECT_EQ(green->classes[0].index, 1);
  // softmax(0, 10, 10*30/255) by definition
  const double a = std::exp(-10.0), b = std::exp(10.0 * 30 / 255 - 10);
  EXPECT_NEAR(green->classes[0].probability, 1 / (1 + a + b), 1e-4);
  EXPECT_EQ(green->model->info.version, 1u);
  EXPECT_GE(green->batch_size, 1);
}

TEST_F(ClassifierTest, EveryAnswerBelongsToItsCallerUnderLoad) {
  std::atomic<int> wrong{0}, done{0};
  constexpr int kImages = 300;
  for (int i = 0; i < kImages; ++i) {
    const int colour = i % 3;
    ClassifyInput input;
    input.image = testing::SolidBmp(8, 8, colour == 0 ? 255 : 0, colour == 1 ? 255 : 0,
                                    colour == 2 ? 255 : 0);
    classifier_->Classify("tiny", 0, std::move(input),
                          [&, colour](absl::StatusOr<ClassifyOutput> output) {
                            if (!output.ok() || output->classes[0].index != colour) ++wrong;
                            ++done;
                          });
    // At most the queue's length at once.
    while (i - done > 200) std::this_thread::yield();
  }
  while (done < kImages) std::this_thread::yield();
  EXPECT_EQ(wrong, 0);
}

TEST_F(ClassifierTest, RefusesBadInputWithTheDocumentedCode) {
  EXPECT_EQ(Classify("not an image").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Classify(std::string(100001, 'x')).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Classify(testing::SolidBmp(101, 100, 0, 0, 0)).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), {}, "nobody").status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), {}, "tiny", 7).status().code(),
            absl::StatusCode::kNotFound);
  ClassifyInput label;
  label.label = 3;
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), label).status().code(),
            absl::StatusCode::kInvalidArgument);
  ClassifyInput many;
  many.top_k = 4;
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), many).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(ClassifierTest, AVersionsRequestsAreCountedByOutcome) {
  ASSERT_TRUE(Classify(testing::SolidBmp(8, 8, 255, 0, 0)).ok());
  ClassifyInput label;
  label.label = 3;
  EXPECT_FALSE(Classify(testing::SolidBmp(8, 8, 0, 0, 0), label).ok());
  EXPECT_FALSE(Classify("no image").ok());
  EXPECT_FALSE(Classify(testing::SolidBmp(8, 8, 0, 0, 0), {}, "tiny", 7).ok());
  const std::string text = metrics_.Render();
  const std::string name = "tern_version_requests_total{code=";
  EXPECT_NE(text.find(name + R"("OK",model="tiny",version="1"} 1)"), std::string::npos) << text;
  EXPECT_NE(text.find(name + R"("INVALID_ARGUMENT",model="tiny",version="1"} 2)"),
            std::string::npos);
  EXPECT_NE(text.find(R"(tern_version_request_duration_seconds_count{model="tiny",version="1"} 1)"),
            std::string::npos);
  EXPECT_EQ(text.find(R"(version="7")"), std::string::npos) << "names from outside make no series";
}

TEST_F(ClassifierTest, PrioritiesAreOneToThreeOrNone) {
  for (const uint32_t priority : {0, 1, 3, 4}) {
    ClassifyInput input;
    input.priority = priority;
    EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), input).status().code(),
              priority < 4 ? absl::StatusCode::kOk : absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(ClassifierTest, AJpegIsReducedWhereTheContractSaysSo) {
  v1::Preprocessing contract = testing::TinyPreprocessing();
  contract.set_filter(v1::Preprocessing::BILINEAR);
  for (const bool scaling : {false, true}) {
    const std::string name = scaling ? "scaled" : "whole";
    contract.set_jpeg_scaling(scaling);
    ASSERT_TRUE(repository_->Import(name, testing::TinyOnnx(), contract, {}, true).ok());
    const auto output = Classify(image::testing::StripedJpeg(), {}, name);
    ASSERT_TRUE(output.ok()) << output.status();
    EXPECT_EQ(output->model->preprocessing.jpeg_scaling(), scaling);
    EXPECT_EQ(output->classes[0].index, 0);
    // Logits are ten times the mean red, green and blue: all of the red, or a quarter.
    const double red = std::exp(scaling ? 2.5 : 10.0);
    EXPECT_NEAR(output->classes[0].probability, red / (red + 2), scaling ? 0.02 : 0.001) << name;
  }
}

TEST_F(ClassifierTest, ADeadlineThatHasPassedIsToldBeforeComputing) {
  ClassifyInput input;
  input.deadline = absl::Now() - absl::Seconds(1);
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), input).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClassifierTest, ACallerWhoHasGoneIsNotServed) {
  ClassifyInput input;
  input.cancelled = [] { return true; };
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), input).status().code(),
            absl::StatusCode::kCancelled);
}

TEST_F(ClassifierTest, AnImageThatIsAloneInTheServerMayBeServedByItsCaller) {
  runner_.default_max_delay = absl::ZeroDuration();
  ASSERT_TRUE(
      repository_->Import("prompt", testing::TinyOnnx(), testing::TinyPreprocessing(), {}, true)
          .ok());
  // How long the network takes is not known before.
  ASSERT_TRUE(Classify(testing::SolidBmp(8, 8, 0, 0, 0), {}, "prompt").ok());

  // The thread that served it, and the class that it found.
  const auto serve = [&](ClassifyInput input, int colour) {
    input.image = testing::SolidBmp(8, 8, colour == 0 ? 255 : 0, colour == 1 ? 255 : 0, 0);
    std::promise<std::pair<std::thread::id, int>> promise;
    classifier_->Classify(
        "prompt", 0, std::move(input), [&](const absl::StatusOr<ClassifyOutput>& output) {
          promise.set_value(
              {std::this_thread::get_id(), output.ok() ? output->classes[0].index : -1});
        });
    return promise.get_future().get();
  };
  // The threads that served the last image come to rest a moment after its answer: until then they
  // serve the next one, too.
  const auto serve_at_rest = [&](const ClassifyInput& input, int colour) {
    auto served = serve(input, colour);
    for (int i = 0; i < 1000 && served.first != std::this_thread::get_id(); ++i) {
      absl::SleepFor(absl::Milliseconds(1));
      served = serve(input, colour);
    }
    return served;
  };
  const std::thread::id self = std::this_thread::get_id();
  ClassifyInput allowed;
  allowed.on_this_thread = true;
  EXPECT_EQ(serve_at_rest(allowed, 1), std::pair(self, 1));
  EXPECT_NE(serve({}, 1).first, self) << "was not asked to";

  // The server asks whether an image is still wanted while it holds it.
  std::optional<std::pair<std::thread::id, int>> second;
  ClassifyInput first = allowed;
  first.cancelled = [&] {
    if (std::this_thread::get_id() == self && !second.has_value()) {
      second.emplace();
      second = serve(allowed, 1);
    }
    return false;
  };
  EXPECT_EQ(serve_at_rest(first, 0), std::pair(self, 0));
  EXPECT_NE(second->first, self) << "was not alone";
  EXPECT_EQ(second->second, 1);

  ClassifyInput gone = allowed;
  gone.cancelled = [] { return true; };
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0), gone, "prompt").status().code(),
            absl::StatusCode::kCancelled);
}

TEST_F(ClassifierTest, LabelsSentWithARequestAreCountedAndOthersRemembered) {
  ClassifyInput labelled;
  labelled.label = 0;
  ASSERT_TRUE(Classify(testing::SolidBmp(8, 8, 255, 0, 0), labelled).ok());
  EXPECT_NE(metrics_.Render().find("result=\"top1\""), std::string::npos);
  ClassifyInput later;
  later.request_id = "one";
  ASSERT_TRUE(Classify(testing::SolidBmp(8, 8, 255, 0, 0), later).ok());
  const auto outcome = labels_.Report("one", 2);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_FALSE(outcome->top1);
  EXPECT_TRUE(outcome->top5);
}

TEST_F(ClassifierTest, AnOutputThatIsNotFiniteIsAnErrorOfItsImageAlone) {
  // 3e38 times a bright image's 255 is beyond the largest float.
  v1::Preprocessing contract = testing::TinyPreprocessing();
  contract.set_scale(1);
  runner_.default_max_delay = absl::Milliseconds(200);  // long enough for all to be one batch
  ASSERT_TRUE(repository_->Import("huge", testing::TinyOnnx(3e38f), contract, {}, true).ok());
  const std::vector<float> planes(3 * 8 * 8, 3e38f);
  const std::string tensor(reinterpret_cast<const char*>(planes.data()),
                           planes.size() * sizeof(float));
  std::vector<ClassifyInput> inputs = {
      {.image = testing::SolidBmp(8, 8, 0, 0, 0), .want_logits = true},
      {.image = testing::SolidBmp(8, 8, 255, 0, 0), .want_logits = true},
      {.image = testing::SolidBmp(8, 8, 0, 1, 0), .want_logits = true},
      {.image = tensor, .form = ImageForm::kTensor, .want_logits = true}};
  std::vector<std::future<absl::StatusOr<ClassifyOutput>>> outputs;
  for (ClassifyInput& input : inputs) {
    auto promise = std::make_shared<std::promise<absl::StatusOr<ClassifyOutput>>>();
    outputs.push_back(promise->get_future());
    classifier_->Classify("huge", 0, std::move(input),
                          [promise](absl::StatusOr<ClassifyOutput> output) {
                            promise->set_value(std::move(output));
                          });
  }
  EXPECT_TRUE(outputs[0].get().ok());
  const auto broken = outputs[1].get();
  EXPECT_EQ(broken.status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StartsWith(broken.status().message(),
                               "huge: the network's output is not finite: class 0 of 3 is "))
      << broken.status();
  EXPECT_TRUE(outputs[2].get().ok());
  EXPECT_EQ(outputs[3].get().status().code(), absl::StatusCode::kInvalidArgument)
      << "the caller's numbers";
  const std::string text = metrics_.Render();
  for (const char* code : {"INTERNAL", "INVALID_ARGUMENT"}) {
    EXPECT_NE(text.find(absl::StrCat("tern_version_requests_total{code=\"", code,
                                     "\",model=\"huge\",version=\"1\"} 1")),
              std::string::npos);
  }
  EXPECT_NE(text.find(R"(tern_prediction_confidence_count{model="huge",version="1"} 2)"),
            std::string::npos);
}

// A request that no empty server would take is refused at once, for good, and costs nobody his
// place.
TEST_F(ClassifierTest, MoreImagesThanTheLimitsAllowAreRefusedForGood) {
  runner_.default_max_queue = 2;
  ASSERT_TRUE(
      repository_->Import("narrow", testing::TinyOnnx(), testing::TinyPreprocessing(), {}, true)
          .ok());
  std::promise<void> release, blocked;
  classifier_->Classify("narrow", 0, {.image = "junk"}, [&](const absl::StatusOr<ClassifyOutput>&) {
    blocked.set_value();
    release.get_future().wait();
  });
  blocked.get_future().wait();  // the thread that decodes
  std::promise<absl::Status> waiting;
  const std::string image = testing::SolidBmp(8, 8, 255, 0, 0);
  classifier_->Classify(
      "narrow", 0, {.image = image, .priority = 3},
      [&](const absl::StatusOr<ClassifyOutput>& output) { waiting.set_value(output.status()); });
  const auto all = [&](int images) {
    std::vector<ClassifyInput> inputs(images);
    for (ClassifyInput& input : inputs) {
      input.image = image;
      input.priority = 1;
    }
    auto promise = std::make_shared<std::promise<absl::Status>>();
    classifier_->ClassifyAll("narrow", 0, std::move(inputs),
                             [promise](const absl::StatusOr<std::vector<ClassifyOutput>>& outputs) {
                               promise->set_value(outputs.status());
                             });
    return promise->get_future();
  };
  const absl::Status refused = all(3).get();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.message(),
            "images: got 3 in one request, the queue of narrow takes 2 (max_queue)");
  EXPECT_FALSE(RetryAfterOf(refused).has_value());
  EXPECT_NE(metrics_.Render().find("tern_rejected_total{reason=\"too_large\"} 1"),
            std::string::npos);
  release.set_value();
  EXPECT_TRUE(waiting.get_future().get().ok());
  EXPECT_TRUE(all(2).get().ok());
}

TEST_F(ClassifierTest, AfterShutdownEveryCallIsUnavailable) {
  repository_->Shutdown();
  EXPECT_EQ(Classify(testing::SolidBmp(8, 8, 0, 0, 0)).status().code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace tern::serving
