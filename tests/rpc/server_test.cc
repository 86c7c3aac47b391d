#include "server/rpc/server.h"

#include <grpcpp/grpcpp.h>

#include <functional>
#include <set>
#include <string>
#include <thread>

#include "absl/strings/match.h"
#include "tern/v1/classifier.grpc.pb.h"
#include "tern/v1/profiler.grpc.pb.h"
#include "tern/v1/quantizer.grpc.pb.h"
#include "tern/v1/registry.grpc.pb.h"
#include "tests/serving/server_fixture.h"

namespace tern::rpc {
namespace {

using ::grpc::StatusCode;

class ServerTest : public testing::PipelineTest {
 protected:
  void SetUp() override {
    PipelineTest::SetUp();
    inference_ = std::make_unique<oip::Inference>(repository_.get(), classifier_.get(), "0");
    ServerOptions options;
    options.host = options.admin_host = "127.0.0.1";
    options.port = options.admin_port = 0;
    options.cpu_threads = 2;
    options.limits.max_bytes = 100000;
    options.max_onnx_bytes = 100000;
    auto server = Server::Start(options, repository_.get(), classifier_.get(), inference_.get(),
                                &labels_, &metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    data_ = Channel(server_->port());
    admin_ = Channel(server_->admin_port());
    classify_ = v1::ImageClassifier::NewStub(data_);
    registry_ = v1::ModelRegistry::NewStub(admin_);
    quantizer_ = v1::Quantizer::NewStub(admin_);
    profiler_ = v1::Profiler::NewStub(admin_);
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(absl::ZeroDuration());
    repository_->Shutdown();
    server_.reset();
    PipelineTest::TearDown();
  }
  static std::shared_ptr<grpc::Channel> Channel(int port) {
    return grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                               grpc::InsecureChannelCredentials());
  }
  struct Quantized {
    grpc::Status status;
    int progress = 0;  // messages
    v1::QuantizeResult result;
  };
  // Model `tiny`, int8, from `images` (none: only the start is sent).
  Quantized Quantize(const std::vector<v1::SampleImage>& images, bool dry_run = false) {
    grpc::ClientContext context;
    auto stream = quantizer_->Quantize(&context);
    v1::QuantizeRequest request;
    request.mutable_start()->set_model("tiny");
    request.mutable_start()->set_dry_run(dry_run);
    request.mutable_start()->mutable_recipe()->set_weights(v1::INT8);
    stream->Write(request);
    for (const v1::SampleImage& image : images) {
      *request.mutable_image() = image;
      stream->Write(request);
    }
    stream->WritesDone();
    Quantized quantized;
    v1::QuantizeResponse response;
    while (stream->Read(&response)) {
      if (response.has_progress()) ++quantized.progress;
      if (response.has_result()) quantized.result = response.result();
    }
    quantized.status = stream->Finish();
    return quantized;
  }
  static v1::SampleImage CalibrationImage(uint8_t r, uint8_t g, uint8_t b) {
    v1::SampleImage image;
    image.set_image(testing::SolidBmp(8, 8, r, g, b));
    image.set_calibration(true);
    return image;
  }

  grpc::Status Classify(const v1::ClassifyRequest& request, v1::ClassifyResponse* response) {
    grpc::ClientContext context;
    return classify_->Classify(&context, request, response);
  }
  static v1::ClassifyRequest Request(uint8_t r, uint8_t g, uint8_t b) {
    v1::ClassifyRequest request;
    request.set_model("tiny");
    request.set_image(testing::SolidBmp(8, 8, r, g, b));
    return request;
  }
  grpc::Status Import(const std::string& name, const std::string& onnx,
                      v1::ImportResponse* response) {
    grpc::ClientContext context;
    auto writer = registry_->Import(&context, response);
    v1::ImportRequest request;
    request.mutable_start()->set_name(name);
    *request.mutable_start()->mutable_preprocessing() = testing::TinyPreprocessing();
    writer->Write(request);
    request.set_chunk(onnx);
    writer->Write(request);
    writer->WritesDone();
    return writer->Finish();
  }

  // Whether /metrics shows this series with this value.
  bool Shows(const std::string& series) {
    return absl::StrContains(metrics_.Render(), "\n" + series + "\n");
  }
  static bool Becomes(const std::function<bool()>& condition) {
    for (int i = 0; i < 10'000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  std::unique_ptr<oip::Inference> inference_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> data_, admin_;
  std::unique_ptr<v1::ImageClassifier::Stub> classify_;
  std::unique_ptr<v1::ModelRegistry::Stub> registry_;
  std::unique_ptr<v1::Quantizer::Stub> quantizer_;
  std::unique_ptr<v1::Profiler::Stub> profiler_;
};

TEST_F(ServerTest, ClassifyAnswersWithLabelsAndAReceipt) {
  v1::ClassifyRequest request = Request(0, 0, 255);
  request.set_top_k(2);
  request.set_request_id("mine");
  v1::ClassifyResponse response;
  const grpc::Status status = Classify(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.request_id(), "mine");
  ASSERT_EQ(response.classes_size(), 2);
  EXPECT_EQ(response.classes(0).label(), "blue");
  EXPECT_EQ(response.receipt().model(), "tiny");
  EXPECT_EQ(response.receipt().version(), 1u);
  EXPECT_EQ(response.receipt().scheme(), "fp32");
  EXPECT_GE(response.receipt().timing().total_us(), response.receipt().timing().inference_us());
}

TEST_F(ServerTest, ClassifyErrorsCarryTheDocumentedCodes) {
  v1::ClassifyResponse response;
  v1::ClassifyRequest request = Request(0, 0, 0);
  request.clear_model();
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::INVALID_ARGUMENT);
  request = Request(0, 0, 0);
  request.clear_image();
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::INVALID_ARGUMENT);
  request.set_image("junk");
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::INVALID_ARGUMENT);
  request.set_image(std::string(100001, 'x'));
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::RESOURCE_EXHAUSTED);
  request.set_image(std::string(5 << 20, 'x'));  // over gRPC's own limit
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::RESOURCE_EXHAUSTED);
  request = Request(0, 0, 0);
  request.set_version(9);
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::NOT_FOUND);
  request = Request(0, 0, 0);
  request.set_request_id(std::string(129, 'x'));
  EXPECT_EQ(Classify(request, &response).error_code(), StatusCode::INVALID_ARGUMENT);
  ASSERT_TRUE(Classify(Request(255, 0, 0), &response).ok());
}

TEST_F(ServerTest, AStreamKeepsItsOrderAndGoesOnAfterABadImage) {
  grpc::ClientContext context;
  auto stream = classify_->ClassifyStream(&context);
  constexpr int kImages = 200;
  std::thread writer([&] {
    for (int i = 0; i < kImages; ++i) {
      v1::ClassifyRequest request =
          Request(i % 3 == 0 ? 255 : 0, i % 3 == 1 ? 255 : 0, i % 3 == 2 ? 255 : 0);
      if (i % 50 == 7) request.set_image("junk");
      request.set_request_id(std::to_string(i));
      stream->Write(request);
    }
    stream->WritesDone();
  });
  v1::ClassifyStreamResponse response;
  int i = 0;
  for (; stream->Read(&response); ++i) {
    EXPECT_EQ(response.request_id(), std::to_string(i));
    if (i % 50 == 7) {
      EXPECT_EQ(response.error().code(), int(StatusCode::INVALID_ARGUMENT));
    } else {
      EXPECT_EQ(int(response.response().classes(0).index()), i % 3);
    }
  }
  writer.join();
  EXPECT_EQ(i, kImages);
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(Shows(R"(tern_stream_requests_total{code="OK",method="ClassifyStream"} 196)"));
  EXPECT_TRUE(
      Shows(R"(tern_stream_requests_total{code="INVALID_ARGUMENT",method="ClassifyStream"} 4)"));
}

TEST_F(ServerTest, AStreamThatIsCancelledEndsAndTheServerGoesOn) {
  {
    grpc::ClientContext context;
    auto stream = classify_->ClassifyStream(&context);
    for (int i = 0; i < 20; ++i) stream->Write(Request(255, 0, 0));
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), StatusCode::CANCELLED);
  }
  v1::ClassifyResponse response;
  EXPECT_TRUE(Classify(Request(255, 0, 0), &response).ok());
}

TEST_F(ServerTest, AStreamIsCountedWithTheCodeThatItsClientGot) {
  const auto counted = [this](const std::string& code) {
    const std::string series =
        "tern_requests_total{code=\"" + code + "\",method=\"ClassifyStream\"} 1";
    return Becomes([&] { return Shows(series); });
  };
  v1::ClassifyStreamResponse response;
  {
    grpc::ClientContext context;
    auto stream = classify_->ClassifyStream(&context);
    stream->Write(Request(255, 0, 0));
    stream->WritesDone();
    while (stream->Read(&response)) {
    }
    EXPECT_TRUE(stream->Finish().ok());
    EXPECT_TRUE(counted("OK"));
  }
  {
    grpc::ClientContext context;
    auto stream = classify_->ClassifyStream(&context);
    stream->Write(Request(255, 0, 0));
    EXPECT_TRUE(stream->Read(&response));
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), StatusCode::CANCELLED);
    EXPECT_TRUE(counted("CANCELLED"));
  }
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    auto stream = classify_->ClassifyStream(&context);
    EXPECT_FALSE(stream->Read(&response));
    EXPECT_EQ(stream->Finish().error_code(), StatusCode::DEADLINE_EXCEEDED);
    EXPECT_TRUE(counted("DEADLINE_EXCEEDED"));
  }
  {
    grpc::ClientContext context;
    auto stream = classify_->ClassifyStream(&context);
    v1::ClassifyRequest request = Request(0, 0, 0);
    request.set_image(std::string(5 << 20, 'x'));
    stream->Write(request);
    EXPECT_FALSE(stream->Read(&response));
    EXPECT_EQ(stream->Finish().error_code(), StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_TRUE(counted("RESOURCE_EXHAUSTED"));
  }
}

TEST_F(ServerTest, ReportedLabelsAreJoinedOnce) {
  v1::ClassifyRequest request = Request(255, 0, 0);
  request.set_request_id("r1");
  v1::ClassifyResponse response;
  ASSERT_TRUE(Classify(request, &response).ok());
  v1::ReportLabelRequest label;
  label.set_request_id("r1");
  label.set_label(0);
  v1::ReportLabelResponse outcome;
  grpc::ClientContext first, second, third;
  ASSERT_TRUE(classify_->ReportLabel(&first, label, &outcome).ok());
  EXPECT_TRUE(outcome.top1());
  EXPECT_EQ(classify_->ReportLabel(&second, label, &outcome).error_code(),
            StatusCode::ALREADY_EXISTS);
  label.set_request_id("r2");
  EXPECT_EQ(classify_->ReportLabel(&third, label, &outcome).error_code(), StatusCode::NOT_FOUND);
}

TEST_F(ServerTest, ImportListGetDefaultUnloadLoadDelete) {
  v1::ImportResponse imported;
  ASSERT_TRUE(Import("other", testing::TinyOnnx(), &imported).ok());
  EXPECT_EQ(imported.version().version(), 1u);
  EXPECT_EQ(imported.version().state(), v1::READY);
  ASSERT_TRUE(Import("other", testing::TinyOnnx(), &imported).ok());
  EXPECT_EQ(imported.version().version(), 2u);
  EXPECT_FALSE(imported.version().is_default());

  v1::VersionRequest version;
  version.set_model("other");
  version.set_version(2);
  v1::ModelVersion info;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(registry_->SetDefault(&context, version, &info).ok());
    EXPECT_TRUE(info.is_default());
  }
  {
    grpc::ClientContext context;
    EXPECT_EQ(registry_->Unload(&context, version, &info).error_code(),
              StatusCode::FAILED_PRECONDITION);
  }
  version.set_version(1);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(registry_->Unload(&context, version, &info).ok());
    EXPECT_EQ(info.state(), v1::UNLOADED);
  }
  {
    grpc::ClientContext context;
    ASSERT_TRUE(registry_->Load(&context, version, &info).ok());
    EXPECT_EQ(info.state(), v1::READY);
  }
  {
    grpc::ClientContext context;
    v1::DeleteResponse removed;
    ASSERT_TRUE(registry_->Delete(&context, version, &removed).ok());
    EXPECT_EQ(removed.versions_removed(), 1u);
  }
  {
    grpc::ClientContext context;
    v1::GetRequest get;
    get.set_model("other");
    get.set_version(1);
    EXPECT_EQ(registry_->Get(&context, get, &info).error_code(), StatusCode::NOT_FOUND);
  }
  grpc::ClientContext context;
  v1::ListResponse list;
  ASSERT_TRUE(registry_->List(&context, v1::ListRequest(), &list).ok());
  EXPECT_EQ(list.versions_size(), 2);
}

TEST_F(ServerTest, ImportRefusesBadNamesBytesAndOversize) {
  v1::ImportResponse response;
  EXPECT_EQ(Import("../etc", testing::TinyOnnx(), &response).error_code(),
            StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Import("ok", "not onnx", &response).error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Import("ok", std::string(100001, 'x'), &response).error_code(),
            StatusCode::RESOURCE_EXHAUSTED);
  grpc::ClientContext context;
  auto writer = registry_->Import(&context, &response);
  v1::ImportRequest chunk;
  chunk.set_chunk("x");
  writer->Write(chunk);
  writer->WritesDone();
  EXPECT_EQ(writer->Finish().error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(repository_->List("").size(), 1u);
}

TEST_F(ServerTest, AnImportWhoseClientGoesAwayPublishesNothing) {
  for (int i = 0; i < 10; ++i) {
    grpc::ClientContext context;
    v1::ImportResponse response;
    auto writer = registry_->Import(&context, &response);
    v1::ImportRequest request;
    request.mutable_start()->set_name("partial");
    request.mutable_start()->set_set_default(true);
    *request.mutable_start()->mutable_preprocessing() = testing::TinyPreprocessing();
    ASSERT_TRUE(writer->Write(request));
    request.set_chunk(testing::TinyOnnx());  // complete, but the client does not say so
    ASSERT_TRUE(writer->Write(request));
    ASSERT_TRUE(Becomes([&] { return Shows(R"(tern_inflight_requests{method="Import"} 1)"); }));
    context.TryCancel();
    EXPECT_EQ(writer->Finish().error_code(), StatusCode::CANCELLED);
    ASSERT_TRUE(Becomes([&] { return Shows(R"(tern_inflight_requests{method="Import"} 0)"); }));
  }
  EXPECT_TRUE(repository_->List("partial").empty());
}

TEST_F(ServerTest, ExportSendsTheStoredBytes) {
  grpc::ClientContext context;
  v1::ExportRequest request;
  request.set_model("tiny");
  auto reader = registry_->Export(&context, request);
  v1::ExportResponse response;
  std::string bytes, name;
  while (reader->Read(&response)) {
    if (!response.file_name().empty()) name = response.file_name();
    bytes += response.chunk();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(name, "model.onnx");
  EXPECT_EQ(bytes, testing::TinyOnnx());
}

TEST_F(ServerTest, ExportAsOnnxSendsAnOnnxModelAndRefusesUnknownFormats) {
  for (const int format : {static_cast<int>(v1::ExportRequest::ONNX), 7}) {
    grpc::ClientContext context;
    v1::ExportRequest request;
    request.set_model("tiny");
    request.set_format(static_cast<v1::ExportRequest::Format>(format));
    auto reader = registry_->Export(&context, request);
    v1::ExportResponse response;
    std::string bytes, name;
    while (reader->Read(&response)) {
      if (!response.file_name().empty()) name = response.file_name();
      bytes += response.chunk();
    }
    const grpc::Status status = reader->Finish();
    if (format == 7) {
      EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
      continue;
    }
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(name, "model.onnx");
    EXPECT_EQ(bytes, testing::TinyOnnx());
  }
}

TEST_F(ServerTest, QuantizeStreamsProgressThenAResult) {
  std::vector<v1::SampleImage> images;
  for (int i = 0; i < 12; ++i) {
    images.push_back(
        CalibrationImage(i % 3 == 0 ? 200 : 10, i % 3 == 1 ? 200 : i, i % 3 == 2 ? 200 : 5));
    images.back().set_label(i % 3);
    images.back().set_evaluation(true);
  }
  const Quantized quantized = Quantize(images);
  ASSERT_TRUE(quantized.status.ok()) << quantized.status.error_message();
  EXPECT_GT(quantized.progress, 0);
  EXPECT_TRUE(quantized.result.published());
  EXPECT_EQ(quantized.result.version(), 2u);
  EXPECT_EQ(quantized.result.report().top1().value(), 1.0);
}

TEST_F(ServerTest, AnExportedArtifactImportsAgain) {
  std::vector<v1::SampleImage> images;
  for (int i = 0; i < 3; ++i) images.push_back(CalibrationImage(i == 0 ? 200 : 10, 90, 20));
  ASSERT_TRUE(Quantize(images).status.ok());
  std::string bytes;
  {
    grpc::ClientContext context;
    v1::ExportRequest request;
    request.set_model("tiny");
    request.set_version(2);
    auto reader = registry_->Export(&context, request);
    v1::ExportResponse response;
    while (reader->Read(&response)) bytes += response.chunk();
    ASSERT_TRUE(reader->Finish().ok());
  }
  v1::ImportRequest start;
  start.mutable_start()->set_artifact(true);
  v1::ImportResponse response;
  const auto import = [&](const std::string& name, const std::string& content) {
    grpc::ClientContext context;
    auto writer = registry_->Import(&context, &response);
    start.mutable_start()->set_name(name);
    writer->Write(start);
    v1::ImportRequest chunk;
    chunk.set_chunk(content.substr(0, content.size() / 2));
    writer->Write(chunk);
    chunk.set_chunk(content.substr(content.size() / 2));
    writer->Write(chunk);
    writer->WritesDone();
    return writer->Finish();
  };
  ASSERT_TRUE(import("tiny", bytes).ok());
  EXPECT_EQ(response.version().version(), 3u);
  EXPECT_EQ(response.version().scheme(), "int8");
  ASSERT_TRUE(import("moved", bytes).ok());
  EXPECT_EQ(response.version().version(), 1u);
  EXPECT_TRUE(response.version().is_default());
  v1::ClassifyRequest classify = Request(0, 0, 255);
  classify.set_model("moved");
  v1::ClassifyResponse answer;
  ASSERT_TRUE(Classify(classify, &answer).ok());
  EXPECT_EQ(answer.classes(0).label(), "blue");

  std::string damaged = bytes;
  damaged[damaged.size() / 2] ^= 1;
  EXPECT_EQ(import("tiny", damaged).error_code(), StatusCode::DATA_LOSS);
  EXPECT_EQ(import("Bad Name", bytes).error_code(), StatusCode::INVALID_ARGUMENT);
  start.mutable_start()->add_labels("red");
  EXPECT_EQ(import("tiny", bytes).error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(repository_->List("tiny").size(), 3u);
}

TEST_F(ServerTest, QuantizeWithoutImagesOrStartIsRefused) {
  EXPECT_EQ(Quantize({}).status.error_code(), StatusCode::FAILED_PRECONDITION);
  v1::QuantizeRequest request;
  grpc::ClientContext context;
  auto stream = quantizer_->Quantize(&context);
  request.mutable_image()->set_image("x");
  stream->Write(request);
  stream->WritesDone();
  EXPECT_EQ(stream->Finish().error_code(), StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServerTest, EvaluateCountsLabelledImages) {
  grpc::ClientContext context;
  auto stream = quantizer_->Evaluate(&context);
  v1::EvaluateRequest request;
  request.mutable_start()->set_model("tiny");
  request.mutable_start()->set_reference_version(1);
  stream->Write(request);
  for (int i = 0; i < 4; ++i) {
    request.mutable_image()->set_image(testing::SolidBmp(8, 8, 255, 0, 0));
    request.mutable_image()->set_label(i < 3 ? 0 : 1);
    stream->Write(request);
  }
  stream->WritesDone();
  v1::EvaluateResponse response;
  v1::EvaluateResult result;
  while (stream->Read(&response)) {
    if (response.has_result()) result = response.result();
  }
  ASSERT_TRUE(stream->Finish().ok());
  EXPECT_EQ(result.images(), 4u);
  EXPECT_EQ(result.top1().value(), 0.75);
  EXPECT_EQ(result.agreement().value(), 1.0);
  EXPECT_EQ(result.divergence(), 0);
  EXPECT_EQ(result.comparison().both_right(), 3u);
  EXPECT_EQ(result.comparison().both_wrong(), 1u);
  EXPECT_EQ(result.worst_classes_size(), 0);  // nothing is lost to itself
  ASSERT_EQ(result.warnings_size(), 1);
  EXPECT_NE(result.warnings(0).find("too few evaluation images"), std::string::npos);
}

TEST_F(ServerTest, ADryRunIsOkAndPublishesNothing) {
  const Quantized quantized = Quantize({CalibrationImage(255, 0, 0)}, /*dry_run=*/true);
  ASSERT_TRUE(quantized.status.ok()) << quantized.status.error_message();
  EXPECT_FALSE(quantized.result.published());
  EXPECT_EQ(quantized.result.version(), 0u);
  EXPECT_GT(quantized.result.report().bytes(), 0u);
}

TEST_F(ServerTest, BenchmarkAndProfileAnswer) {
  v1::BenchmarkRequest request;
  request.set_model("tiny");
  request.set_seconds(0.1);
  v1::BenchmarkResponse response;
  grpc::ClientContext first, second, third;
  ASSERT_TRUE(profiler_->Benchmark(&first, request, &response).ok());
  EXPECT_GT(response.images_per_second(), 0);
  request.set_seconds(61);
  EXPECT_EQ(profiler_->Benchmark(&second, request, &response).error_code(),
            StatusCode::INVALID_ARGUMENT);
  v1::ProfileRequest profile;
  profile.set_model("tiny");
  profile.set_runs(2);
  v1::ProfileResponse layers;
  ASSERT_TRUE(profiler_->Profile(&third, profile, &layers).ok());
  EXPECT_GT(layers.layers_size(), 0);
  EXPECT_GT(layers.total_ms(), 0);
  double sum = 0, weighted = 0, shares = 0;
  std::set<std::string> kinds;
  for (const v1::WorkTime& work : layers.work()) {
    sum += work.ms();
    shares += work.share();
    if (work.kind() == "Conv" || work.kind() == "FullyConnected") weighted += work.share();
    EXPECT_TRUE(kinds.insert(work.kind()).second) << work.kind();
  }
  EXPECT_NEAR(sum, layers.total_ms(), 1e-6 * layers.total_ms());
  EXPECT_NEAR(shares, 1, 1e-6);
  EXPECT_NEAR(layers.outside_share(), 1 - weighted, 1e-6);
  EXPECT_EQ(kinds.count("between steps"), 1u);
}

TEST_F(ServerTest, AProfileEndsWhenItsClientGoes) {
  v1::ProfileRequest request;
  request.set_model("tiny");
  request.set_batch((*repository_->Find("tiny", 0))->plan->max_batch());
  request.set_runs(1000);
  const auto cancelled = [&] {
    return absl::StrContains(metrics_.Render(),
                             R"(tern_requests_total{code="CANCELLED",method="Profile"})");
  };
  // The tiny model's runs may be over before the server hears of it.
  for (int i = 0; i < 50 && !cancelled(); ++i) {
    grpc::ClientContext context;
    v1::ProfileResponse response;
    std::thread client([&] { profiler_->Profile(&context, request, &response); });
    Becomes([&] { return Shows(R"(tern_inflight_requests{method="Profile"} 1)"); });
    context.TryCancel();
    client.join();
    Becomes([&] { return Shows(R"(tern_inflight_requests{method="Profile"} 0)"); });
  }
  EXPECT_TRUE(cancelled());
}

TEST_F(ServerTest, ATakenPortIsToldByNumber) {
  ServerOptions options;
  options.host = options.admin_host = "127.0.0.1";
  options.port = server_->port();
  options.admin_port = 0;
  const auto second = Server::Start(options, repository_.get(), classifier_.get(), inference_.get(),
                                    &labels_, &metrics_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(second.status().message().find(std::to_string(server_->port())),
            absl::string_view::npos);
}

}  // namespace
}  // namespace tern::rpc
