// The Open Inference Protocol against its definition, and against Classify. The model answers 10 x
// mean red, green and blue of an 8x8 image (tiny_model.h), so every score is known.
#include "server/oip/inference.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "server/oip/infer.h"
#include "tests/serving/server_fixture.h"

namespace tern::oip {
namespace {

using absl::StatusCode;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kPixels = 8 * 8;

std::string LittleEndian(uint32_t value) {
  std::string bytes;
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(value >> (8 * i)));
  return bytes;
}

std::string Element(const std::string& bytes) { return LittleEndian(bytes.size()) + bytes; }

std::string Raw(const std::vector<float>& values) {
  std::string bytes(values.size() * 4, '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::vector<float> Floats(const std::string& raw) {
  std::vector<float> values(raw.size() / 4);
  std::memcpy(values.data(), raw.data(), raw.size());
  return values;
}

// The network's input of an image of one colour, planes in the order red, green, blue.
std::vector<float> Planes(float red, float green, float blue) {
  std::vector<float> values;
  for (float colour : {red, green, blue}) values.insert(values.end(), kPixels, colour);
  return values;
}

std::string Interleaved(uint8_t red, uint8_t green, uint8_t blue) {
  std::string pixels;
  for (int i = 0; i < kPixels; ++i) {
    pixels.push_back(static_cast<char>(red));
    pixels.push_back(static_cast<char>(green));
    pixels.push_back(static_cast<char>(blue));
  }
  return pixels;
}

// The elements of a BYTES output.
std::vector<std::string> Elements(const std::string& raw, int count) {
  const auto split = SplitBytes(raw, count);
  EXPECT_TRUE(split.ok()) << split.status();
  return split.ok() ? std::vector<std::string>(split->begin(), split->end())
                    : std::vector<std::string>();
}

class InferenceTest : public tern::testing::PipelineTest {
 protected:
  void SetUp() override {
    PipelineTest::SetUp();
    inference_ = std::make_unique<Inference>(repository_.get(), classifier_.get(), "1.2.3");
  }
  static ModelInferRequest Request(const std::string& datatype, const std::vector<int64_t>& shape) {
    ModelInferRequest request;
    request.set_model_name("tiny");
    auto* input = request.add_inputs();
    input->set_name("image");
    input->set_datatype(datatype);
    for (int64_t dimension : shape) input->add_shape(dimension);
    return request;
  }
  static ModelInferRequest RawRequest(const std::string& datatype,
                                      const std::vector<int64_t>& shape, const std::string& raw) {
    ModelInferRequest request = Request(datatype, shape);
    request.add_raw_input_contents(raw);
    return request;
  }
  static void AskFor(ModelInferRequest& request, const std::string& output, int64_t classes = 0) {
    auto* requested = request.add_outputs();
    requested->set_name(output);
    if (classes > 0) (*requested->mutable_parameters())["classification"].set_int64_param(classes);
  }
  absl::StatusOr<ModelInferResponse> Infer(const ModelInferRequest& request, Caller caller = {}) {
    std::promise<absl::StatusOr<ModelInferResponse>> promise;
    inference_->ModelInfer(request, std::move(caller),
                           [&](auto answer) { promise.set_value(std::move(answer)); });
    return promise.get_future().get();
  }
  // The first output's values; fails the test if there is an error.
  std::vector<float> Scores(const ModelInferRequest& request) {
    const auto answer = Infer(request);
    EXPECT_TRUE(answer.ok()) << answer.status();
    if (!answer.ok()) return {};
    return Floats(answer->raw_output_contents(0));
  }
  void ExpectRefused(const ModelInferRequest& request, StatusCode code, const std::string& words) {
    const auto answer = Infer(request);
    EXPECT_EQ(answer.status().code(), code) << answer.status();
    EXPECT_THAT(std::string(answer.status().message()), HasSubstr(words));
  }
  std::vector<float> Classify(const std::string& image) {
    serving::ClassifyInput input;
    input.image = image;
    input.top_k = 3;
    std::promise<absl::StatusOr<serving::ClassifyOutput>> promise;
    classifier_->Classify("tiny", 0, std::move(input),
                          [&](auto output) { promise.set_value(std::move(output)); });
    const auto output = promise.get_future().get();
    EXPECT_TRUE(output.ok()) << output.status();
    std::vector<float> probabilities(3);
    for (const auto& best : output->classes) probabilities[best.index] = best.probability;
    return probabilities;
  }

  std::unique_ptr<Inference> inference_;
};

TEST_F(InferenceTest, AnEncodedImageGetsClassifysProbabilities) {
  const std::string image = tern::testing::SolidBmp(20, 10, 30, 255, 90);
  EXPECT_EQ(Scores(RawRequest("BYTES", {1}, Element(image))), Classify(image));
  ModelInferRequest typed = Request("BYTES", {1, 1});
  typed.mutable_inputs(0)->mutable_contents()->add_bytes_contents(image);
  EXPECT_EQ(Scores(typed), Classify(image));
}

TEST_F(InferenceTest, AllFormsOfOneImageGetTheSameLogits) {
  const float grey = 51.0f / 255;
  ModelInferRequest encoded =
      RawRequest("BYTES", {1}, Element(tern::testing::SolidBmp(8, 8, 255, 51, 0)));
  ModelInferRequest pixels = RawRequest("UINT8", {1, 8, 8, 3}, Interleaved(255, 51, 0));
  ModelInferRequest tensor = RawRequest("FP32", {1, 3, 8, 8}, Raw(Planes(1, grey, 0)));
  ModelInferRequest typed_pixels = Request("UINT8", {8, 8, 3});
  for (uint8_t value : Interleaved(255, 51, 0))
    typed_pixels.mutable_inputs(0)->mutable_contents()->add_uint_contents(value);
  ModelInferRequest typed_tensor = Request("FP32", {3, 8, 8});
  for (float value : Planes(1, grey, 0))
    typed_tensor.mutable_inputs(0)->mutable_contents()->add_fp32_contents(value);
  for (ModelInferRequest* request : {&encoded, &pixels, &tensor, &typed_pixels, &typed_tensor}) {
    AskFor(*request, "logits");
    const std::vector<float> logits = Scores(*request);
    ASSERT_EQ(logits.size(), 3u);
    EXPECT_NEAR(logits[0], 10, 1e-4);
    EXPECT_NEAR(logits[1], 2, 1e-4);
    EXPECT_NEAR(logits[2], 0, 1e-4);
  }
}

TEST_F(InferenceTest, ABatchIsAnsweredImageByImageInItsOrder) {
  std::string raw;
  for (int i = 0; i < 30; ++i)
    raw += Element(tern::testing::SolidBmp(8, 8, i % 3 == 0 ? 255 : 0, i % 3 == 1 ? 255 : 0, i));
  ModelInferRequest request = RawRequest("BYTES", {30}, raw);
  request.set_id("batch");
  AskFor(request, "logits");
  AskFor(request, "probabilities", 1);
  const auto answer = Infer(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->id(), "batch");
  ASSERT_EQ(answer->raw_output_contents_size(), 2);
  EXPECT_THAT(answer->outputs(0).shape(), ElementsAre(30, 3));
  EXPECT_THAT(answer->outputs(1).shape(), ElementsAre(30, 1));
  const std::vector<float> logits = Floats(answer->raw_output_contents(0));
  ASSERT_EQ(logits.size(), 90u);
  const std::vector<std::string> best = Elements(answer->raw_output_contents(1), 30);
  for (int i = 0; i < 30; ++i) {
    EXPECT_NEAR(logits[3 * i + 2], 10.0 * i / 255, 1e-4);
    const std::string want = i % 3 == 0 ? ":0:red" : i % 3 == 1 ? ":1:green" : ":2:blue";
    EXPECT_THAT(best[i], HasSubstr(want)) << i;
  }
}

TEST_F(InferenceTest, ClassificationIsValueIndexLabelBestFirst) {
  ModelInferRequest request = RawRequest("FP32", {3, 8, 8}, Raw(Planes(0.1f, 0.5f, 0.3f)));
  AskFor(request, "logits", 2);
  AskFor(request, "probabilities", 99);  // more than there are
  const auto answer = Infer(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->outputs(0).datatype(), "BYTES");
  EXPECT_THAT(answer->outputs(0).shape(), ElementsAre(2));
  EXPECT_THAT(Elements(answer->raw_output_contents(0), 2),
              ElementsAre("5.000000:1:green", "3.000000:2:blue"));
  EXPECT_THAT(answer->outputs(1).shape(), ElementsAre(3));
  const double sum = std::exp(-4.0) + 1 + std::exp(-2.0);
  EXPECT_THAT(Elements(answer->raw_output_contents(1), 3),
              ElementsAre(std::to_string(1 / sum) + ":1:green",
                          std::to_string(std::exp(-2.0) / sum) + ":2:blue",
                          std::to_string(std::exp(-4.0) / sum) + ":0:red"));
}

TEST_F(InferenceTest, TheAnswerNamesItsModelAndCarriesTheReceipt) {
  ModelInferRequest request =
      RawRequest("BYTES", {1}, Element(tern::testing::SolidBmp(8, 8, 255, 0, 0)));
  request.set_model_version("1");
  const auto answer = Infer(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->model_name(), "tiny");
  EXPECT_EQ(answer->model_version(), "1");
  EXPECT_EQ(answer->id(), "");
  const auto& parameters = answer->parameters();
  EXPECT_EQ(parameters.at("scheme").string_param(), "fp32");
  EXPECT_FALSE(parameters.at("isa").string_param().empty());
  EXPECT_GE(parameters.at("batch_size").int64_param(), 1);
  for (const char* stage : {"decode_us", "preprocess_us", "queue_us", "inference_us"}) {
    EXPECT_LE(parameters.at(stage).int64_param(), parameters.at("total_us").int64_param()) << stage;
  }
}

TEST_F(InferenceTest, RefusesShapesTypesAndNamesSayingWhatIsWanted) {
  const std::string image = Element(tern::testing::SolidBmp(8, 8, 0, 0, 0));
  const StatusCode bad = StatusCode::kInvalidArgument;
  ExpectRefused(RawRequest("FP64", {1, 3, 8, 8}, ""), bad, "got 'FP64', want FP32, UINT8 or BYTES");
  ExpectRefused(RawRequest("FP32", {1, 3, 8, 9}, ""), bad, "[1,3,8,9] of FP32, want [N,3,8,8]");
  ExpectRefused(RawRequest("UINT8", {1, 3, 8, 8}, ""), bad, "want [N,8,8,3] or [8,8,3]");
  ExpectRefused(RawRequest("FP32", {}, ""), bad, "got [] of FP32");
  ExpectRefused(RawRequest("BYTES", {}, image), bad, "want [N] or [N,1]");
  ExpectRefused(RawRequest("BYTES", {1, 2}, image), bad, "want [N] or [N,1]");
  ExpectRefused(RawRequest("BYTES", {0}, ""), bad, "want dimensions of 1");
  ExpectRefused(RawRequest("BYTES", {-1}, image), bad, "want dimensions of 1");
  ExpectRefused(RawRequest("FP32", {std::numeric_limits<int64_t>::max(), 3, 8, 8}, ""), bad,
                "want dimensions of 1");
  ExpectRefused(RawRequest("BYTES", {65}, image), bad, "65 images, the limit is 64");
  ModelInferRequest request = RawRequest("BYTES", {1}, image);
  request.mutable_inputs(0)->set_name("picture");
  ExpectRefused(request, bad, "inputs: got [picture], want exactly 'image'");
  request.clear_inputs();
  ExpectRefused(request, bad, "inputs: got []");
  request = RawRequest("BYTES", {1}, image);
  AskFor(request, "embedding");
  ExpectRefused(request, bad, "got 'embedding', want probabilities or logits");
  request = RawRequest("BYTES", {1}, image);
  AskFor(request, "logits");
  AskFor(request, "logits", 2);
  ExpectRefused(request, bad, "'logits' twice");
  request = RawRequest("BYTES", {1}, image);
  AskFor(request, "logits", 1);
  (*request.mutable_outputs(0)->mutable_parameters())["classification"].set_string_param("3");
  ExpectRefused(request, bad, "want an int64_param");
}

TEST_F(InferenceTest, WhatIsQuotedIsCutAndWhatIsWantedStaysToBeRead) {
  const std::string image = Element(tern::testing::SolidBmp(8, 8, 0, 0, 0));
  const std::string long_name(1 << 20, 'x');
  const auto expect_refused = [&](const ModelInferRequest& request, const std::string& words) {
    const absl::Status status = Infer(request).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
    EXPECT_LT(status.message().size(), 300u);
  };
  expect_refused(RawRequest(long_name, {1}, image), "want FP32");
  expect_refused(RawRequest("BYTES", std::vector<int64_t>(100000, 7), image), "want [N]");
  ModelInferRequest request = RawRequest("BYTES", {1}, image);
  request.set_model_version(long_name);
  expect_refused(request, "want a positive number");
  request = RawRequest("BYTES", {1}, image);
  request.mutable_inputs(0)->set_name(long_name);
  expect_refused(request, "want exactly 'image'");
  request = RawRequest("BYTES", {1}, image);
  for (int i = 0; i < 100000; ++i) request.add_inputs()->set_name("image");
  expect_refused(request, "want exactly 'image'");
  request = RawRequest("BYTES", {1}, image);
  AskFor(request, long_name);
  expect_refused(request, "want probabilities");
  request = RawRequest("BYTES", {1}, image);
  AskFor(request, "logits", 1);
  (*request.mutable_outputs(0)->mutable_parameters())["classification"].set_string_param(long_name);
  expect_refused(request, "want an int64_param");
  for (const char* parameter : {"timeout", "priority", "max_latency_us", "min_accuracy"}) {
    request = RawRequest("BYTES", {1}, image);
    (*request.mutable_parameters())[parameter].set_string_param(long_name);
    expect_refused(request, absl::StrCat("parameters.", parameter, ": got {string_param: \"xx"));
    expect_refused(request, ", want a ");
  }
}

TEST_F(InferenceTest, RefusesContentsThatAreNotWhatTheShapeSays) {
  const std::string image = tern::testing::SolidBmp(8, 8, 0, 0, 0);
  const StatusCode bad = StatusCode::kInvalidArgument;
  ExpectRefused(RawRequest("FP32", {1, 3, 8, 8}, std::string(767, 'x')), bad,
                "got 767 bytes, want 768");
  ExpectRefused(RawRequest("UINT8", {2, 8, 8, 3}, std::string(383, 'x')), bad,
                "got 383 bytes, want 384");
  ExpectRefused(RawRequest("BYTES", {2}, Element(image)), bad, "got 1 elements, want 2");
  ExpectRefused(RawRequest("BYTES", {1}, Element(image) + Element(image)), bad, "left after 1");
  ExpectRefused(RawRequest("BYTES", {1}, "abc"), bad, "3 bytes left for its length");
  ExpectRefused(RawRequest("BYTES", {1}, LittleEndian(0xffffffff) + "x"), bad,
                "says 4294967295 bytes, 1 are left");
  ModelInferRequest request = RawRequest("BYTES", {1}, Element(image));
  request.mutable_inputs(0)->mutable_contents()->add_bytes_contents(image);
  ExpectRefused(request, bad, "together with raw_input_contents");
  request = RawRequest("BYTES", {1}, Element(image));
  request.add_raw_input_contents("");
  ExpectRefused(request, bad, "got 2 entries, want 1");
  request = Request("FP32", {3, 8, 8});
  ExpectRefused(request, bad, "fp32_contents: got 0 values, want 192");
  request = Request("UINT8", {8, 8, 3});
  for (int i = 0; i < 192; ++i)
    request.mutable_inputs(0)->mutable_contents()->add_uint_contents(256);
  ExpectRefused(request, bad, "got 256, want 0..255");
  std::vector<float> values = Planes(1, 1, 1);
  values[70] = std::numeric_limits<float>::quiet_NaN();
  ExpectRefused(RawRequest("FP32", {3, 8, 8}, Raw(values)), bad, "element 70 is nan");
}

TEST_F(InferenceTest, OneBadImageRefusesItsRequestAndIsNamed) {
  const std::string good = Element(tern::testing::SolidBmp(8, 8, 255, 0, 0));
  ExpectRefused(RawRequest("BYTES", {3}, good + good + Element("junk")),
                StatusCode::kInvalidArgument, "image 2: image: ");
  ExpectRefused(RawRequest("BYTES", {2}, Element(std::string(100001, 'x')) + good),
                StatusCode::kResourceExhausted, "image 0: image: 100001 bytes");
  EXPECT_EQ(Scores(RawRequest("BYTES", {1}, good)).size(), 3u);
}

TEST_F(InferenceTest, ParametersOfOthersAreIgnoredAndTimeoutIsADeadline) {
  const std::string image = Element(tern::testing::SolidBmp(8, 8, 255, 0, 0));
  ModelInferRequest request = RawRequest("BYTES", {1}, image);
  auto& parameters = *request.mutable_parameters();
  parameters["triton_enable_empty_final_response"].set_bool_param(true);
  parameters["headers"].set_string_param("x");
  parameters["priority"].set_uint64_param(1);
  parameters["timeout"].set_int64_param(0);  // none
  EXPECT_EQ(Scores(request).size(), 3u);
  parameters["timeout"].set_int64_param(10'000'000);
  EXPECT_EQ(Scores(request).size(), 3u);
  parameters["timeout"].set_int64_param(-1);
  ExpectRefused(request, StatusCode::kInvalidArgument, "parameters.timeout");
  parameters["timeout"].set_string_param("1");
  ExpectRefused(request, StatusCode::kInvalidArgument, "parameters.timeout");
  parameters.erase("timeout");
  parameters["priority"].set_bool_param(true);
  ExpectRefused(request, StatusCode::kInvalidArgument, "parameters.priority");
  parameters["priority"].set_uint64_param(4);  // of three levels
  ExpectRefused(request, StatusCode::kInvalidArgument, "priority: got 4");
  parameters["priority"].set_uint64_param(~uint64_t{0});
  ExpectRefused(request, StatusCode::kInvalidArgument, "priority: got");
  parameters.erase("priority");
  parameters["sequence_id"].set_int64_param(4);
  ExpectRefused(request, StatusCode::kInvalidArgument, "sequence_id");
  parameters.erase("sequence_id");

  // The earlier of deadline and timeout holds.
  EXPECT_EQ(Infer(request, {absl::Now() - absl::Seconds(1), nullptr}).status().code(),
            StatusCode::kDeadlineExceeded);
  // 64 images take longer than a microsecond.
  std::string many;
  for (int i = 0; i < 64; ++i) many += image;
  request = RawRequest("BYTES", {64}, many);
  (*request.mutable_parameters())["timeout"].set_int64_param(1);
  EXPECT_EQ(Infer(request).status().code(), StatusCode::kDeadlineExceeded);
}

TEST_F(InferenceTest, ACancelledRequestIsNotComputed) {
  const auto answer = Infer(RawRequest("BYTES", {2}, Element("not") + Element("decoded")),
                            {absl::InfiniteFuture(), [] { return true; }});
  EXPECT_EQ(answer.status().code(), StatusCode::kCancelled);
}

TEST_F(InferenceTest, UnknownModelsAndVersionsAreNotFound) {
  ModelInferRequest request = RawRequest("BYTES", {1}, Element("x"));
  request.set_model_name("none");
  ExpectRefused(request, StatusCode::kNotFound, "none");
  request.set_model_name("");
  ExpectRefused(request, StatusCode::kInvalidArgument, "model_name");
  request.set_model_name("tiny");
  request.set_model_version("7");
  ExpectRefused(request, StatusCode::kNotFound, "version 7");
  for (const char* version : {"0", "x", "-1", "99999999999999999999", "1.0"}) {
    request.set_model_version(version);
    ExpectRefused(request, StatusCode::kInvalidArgument, "model version: got");
  }
  request.clear_model_version();
  request.set_id(std::string(129, 'x'));
  ExpectRefused(request, StatusCode::kInvalidArgument, "id: 129 bytes");
  EXPECT_EQ(inference_->ModelMetadata("none", "").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(inference_->ModelConfig("tiny", "2").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(inference_->ModelStatistics("none", "").status().code(), StatusCode::kNotFound);
}

TEST_F(InferenceTest, TheIndexNamesNoFilesOfAVersionThatCannotBeLoaded) {
  ASSERT_TRUE(repository_->UnloadAll("tiny").ok());
  for (const auto& file : std::filesystem::directory_iterator(root_ + "/tiny/1")) {
    std::ofstream(file.path()) << "no network";
  }
  const absl::Status loaded = repository_->Load("tiny", 1).status();
  ASSERT_THAT(loaded.ToString(), ::testing::HasSubstr(root_));  // who may administer is told
  const inference::RepositoryIndexResponse index = inference_->RepositoryIndex(false);
  ASSERT_EQ(index.models_size(), 1);
  EXPECT_EQ(index.models(0).state(), "UNAVAILABLE");
  EXPECT_THAT(index.models(0).reason(), ::testing::HasSubstr("cannot be loaded"));
  EXPECT_THAT(index.models(0).reason(), ::testing::Not(::testing::HasSubstr(root_)));
}

TEST_F(InferenceTest, ReadinessFollowsTheModelAndTheServer) {
  EXPECT_TRUE(*inference_->ModelReady("tiny", ""));
  EXPECT_TRUE(*inference_->ModelReady("tiny", "1"));
  EXPECT_FALSE(*inference_->ModelReady("tiny", "2"));
  EXPECT_FALSE(*inference_->ModelReady("none", ""));
  EXPECT_FALSE(inference_->ModelReady("", "").ok());
  ASSERT_TRUE(repository_->UnloadAll("tiny").ok());
  EXPECT_FALSE(*inference_->ModelReady("tiny", ""));
  EXPECT_EQ(inference_->RepositoryIndex(true).models_size(), 0);
  ASSERT_EQ(inference_->RepositoryIndex(false).models_size(), 1);
  EXPECT_EQ(inference_->RepositoryIndex(false).models(0).state(), "UNAVAILABLE");
  EXPECT_EQ(inference_->RepositoryIndex(false).models(0).reason(), "unloaded");
  ASSERT_TRUE(repository_->Load("tiny", 0).ok());
  EXPECT_TRUE(*inference_->ModelReady("tiny", ""));
  EXPECT_EQ(inference_->RepositoryIndex(true).models(0).state(), "READY");
  EXPECT_TRUE(inference_->ServerReady());
  inference_->SetDraining();
  EXPECT_FALSE(inference_->ServerReady());
  EXPECT_FALSE(*inference_->ModelReady("tiny", ""));
}

TEST_F(InferenceTest, MetadataAndConfigDescribeTheTensors) {
  const auto metadata = inference_->ModelMetadata("tiny", "");
  ASSERT_TRUE(metadata.ok()) << metadata.status();
  EXPECT_THAT(metadata->versions(), ElementsAre("1"));
  ASSERT_EQ(metadata->inputs_size(), 1);
  EXPECT_EQ(metadata->inputs(0).name(), "image");
  EXPECT_EQ(metadata->inputs(0).datatype(), "FP32");
  EXPECT_THAT(metadata->inputs(0).shape(), ElementsAre(-1, 3, 8, 8));
  ASSERT_EQ(metadata->outputs_size(), 1);
  EXPECT_EQ(metadata->outputs(0).name(), "probabilities");
  EXPECT_THAT(metadata->outputs(0).shape(), ElementsAre(-1, 3));

  const auto config = inference_->ModelConfig("tiny", "1");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_batch_size(), kMaxImages);
  EXPECT_EQ(config->input(0).data_type(), inference::TYPE_FP32);
  EXPECT_EQ(config->input(0).format(), inference::ModelInput::FORMAT_NCHW);
  EXPECT_THAT(config->input(0).dims(), ElementsAre(3, 8, 8));
  EXPECT_THAT(config->output(0).dims(), ElementsAre(3));
  EXPECT_EQ(config->output(0).label_filename(), "labels.txt");
  EXPECT_EQ(config->dynamic_batching().max_queue_delay_microseconds(), 200u);
  EXPECT_EQ(inference_->ServerMetadata().version(), "1.2.3");
}

TEST_F(InferenceTest, MaxBatchSizeIsWhatAMessageAndTheQueueTake) {
  const auto max_batch_size = [this] {
    return inference_->ModelConfig("tiny", "")->max_batch_size();
  };
  constexpr uint64_t kImage = 3 * kPixels * sizeof(float), kOthers = 64 << 10;
  inference_->LimitMessageBytes(kOthers + 65 * kImage);
  EXPECT_EQ(max_batch_size(), kMaxImages);
  inference_->LimitMessageBytes(kOthers + 20 * kImage - 1);
  EXPECT_EQ(max_batch_size(), 19);
  inference_->LimitMessageBytes(1 << 30);  // of the other transport
  EXPECT_EQ(max_batch_size(), 19);
  std::ofstream(root_ + "/tiny/config.textproto", std::ios::app) << "batching { max_queue: 7 }\n";
  ASSERT_TRUE(repository_->Load("tiny", 1).ok());
  EXPECT_EQ(max_batch_size(), 7);
  inference_->LimitMessageBytes(1);
  EXPECT_EQ(max_batch_size(), 1);  // encoded it may fit
}

TEST_F(InferenceTest, SharedMemoryIsRefused) {
  const std::string image = Element(tern::testing::SolidBmp(8, 8, 0, 0, 0));
  ModelInferRequest request = RawRequest("BYTES", {1}, image);
  AskFor(request, "logits");
  (*request.mutable_outputs(0)->mutable_parameters())["shared_memory_region"].set_string_param("r");
  ExpectRefused(request, StatusCode::kUnimplemented, "shared memory is not supported");
  request = Request("BYTES", {1});
  (*request.mutable_inputs(0)->mutable_parameters())["shared_memory_region"].set_string_param("r");
  ExpectRefused(request, StatusCode::kUnimplemented, "shared memory is not supported");
}

TEST_F(InferenceTest, MinAccuracyMayBeAWholeNumber) {
  ModelInferRequest request =
      RawRequest("BYTES", {1}, Element(tern::testing::SolidBmp(8, 8, 255, 0, 0)));
  auto& wanted = (*request.mutable_parameters())["min_accuracy"];
  const auto parsed = [&] {
    const auto plan = ParseInfer(request, **repository_->Find("tiny", 0));
    EXPECT_TRUE(plan.ok()) << plan.status();
    return plan.ok() ? plan->wishes.min_accuracy : std::nullopt;
  };
  wanted.set_double_param(0.75);
  EXPECT_EQ(parsed(), 0.75);
  wanted.set_int64_param(1);
  EXPECT_EQ(parsed(), 1.0);
  wanted.set_uint64_param(1);
  EXPECT_EQ(parsed(), 1.0);
}

TEST_F(InferenceTest, StatisticsOfAVersionThatIsNotLoadedAreRefused) {
  ASSERT_TRUE(repository_->UnloadAll("tiny").ok());
  EXPECT_EQ(inference_->ModelStatistics("tiny", "1").status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(inference_->ModelStatistics("tiny", "").status().code(), StatusCode::kUnavailable);
  const auto all = inference_->ModelStatistics("", "");
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->model_stats_size(), 0);
}

TEST_F(InferenceTest, StatisticsCountRequestsImagesAndExecutions) {
  const std::string image = Element(tern::testing::SolidBmp(8, 8, 255, 0, 0));
  std::string five;
  for (int i = 0; i < 5; ++i) five += image;
  ASSERT_TRUE(Infer(RawRequest("BYTES", {1}, image)).ok());
  ASSERT_TRUE(Infer(RawRequest("BYTES", {5}, five)).ok());
  ASSERT_FALSE(Infer(RawRequest("BYTES", {1}, Element("junk"))).ok());
  const auto all = inference_->ModelStatistics("", "");
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->model_stats_size(), 1);
  const inference::ModelStatistics& stats = all->model_stats(0);
  EXPECT_EQ(stats.name(), "tiny");
  EXPECT_EQ(stats.version(), "1");
  EXPECT_EQ(stats.inference_count(), 6u);
  EXPECT_EQ(stats.inference_stats().success().count(), 2u);
  EXPECT_EQ(stats.inference_stats().fail().count(), 1u);
  for (const inference::StatisticDuration* stage :
       {&stats.inference_stats().queue(), &stats.inference_stats().compute_input(),
        &stats.inference_stats().compute_infer(), &stats.inference_stats().compute_output()}) {
    EXPECT_EQ(stage->count(), 2u);
    EXPECT_LE(stage->ns(), stats.inference_stats().success().ns());
  }
  EXPECT_GT(stats.last_inference(), 1'600'000'000'000u);
  uint64_t executions = 0, images = 0;
  for (const inference::InferBatchStatistics& batch : stats.batch_stats()) {
    executions += batch.compute_infer().count();
    images += batch.compute_infer().count() * batch.batch_size();
    EXPECT_EQ(batch.compute_input().count(), batch.compute_infer().count());
    EXPECT_EQ(batch.compute_output().count(), batch.compute_infer().count());
  }
  EXPECT_EQ(executions, stats.execution_count());
  EXPECT_EQ(images, 6u);
}

TEST_F(InferenceTest, ReportedLabelsFindTheImagesOfARequest) {
  ModelInferRequest request = RawRequest("BYTES", {2},
                                         Element(tern::testing::SolidBmp(8, 8, 255, 0, 0)) +
                                             Element(tern::testing::SolidBmp(8, 8, 0, 255, 0)));
  request.set_id("r");
  ASSERT_TRUE(Infer(request).ok());
  EXPECT_TRUE(labels_.Report("r/1", 1)->top1);
  EXPECT_TRUE(labels_.Report("r/0", 0)->top1);
  EXPECT_FALSE(labels_.Report("r", 0).ok());
}

// Every prefix of valid bytes but the whole, and random bytes: never more than the bytes that are
// there.
TEST(SplitBytesTest, OnlyWholeElementsAreTaken) {
  const std::string raw = Element("ab") + Element("") + Element("xyz");
  ASSERT_TRUE(SplitBytes(raw, 3).ok());
  EXPECT_THAT(*SplitBytes(raw, 3), ElementsAre("ab", "", "xyz"));
  for (size_t size = 0; size < raw.size(); ++size)
    EXPECT_FALSE(SplitBytes(absl::string_view(raw).substr(0, size), 3).ok()) << size;
  EXPECT_FALSE(SplitBytes(raw, 2).ok());
  EXPECT_FALSE(SplitBytes(raw, 4).ok());
  EXPECT_TRUE(SplitBytes("", 0).ok());
  uint32_t state = 1;
  for (int run = 0; run < 20000; ++run) {
    std::string bytes;
    for (int i = 0; i < run % 24; ++i) {
      state = state * 1664525 + 1013904223;
      bytes.push_back(state >> 28 == 0 ? static_cast<char>(state >> 20)
                                       : static_cast<char>(state >> 31));
    }
    const auto elements = SplitBytes(bytes, run % 4);
    if (!elements.ok()) continue;
    size_t total = 0;
    for (absl::string_view element : *elements) total += 4 + element.size();
    EXPECT_EQ(total, bytes.size());
  }
}

}  // namespace
}  // namespace tern::oip
