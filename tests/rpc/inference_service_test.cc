// inference.GRPCInferenceService over real channels; what the calls mean is tested in tests/oip.
#include "server/rpc/inference_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/rpc/server.h"
#include "tests/serving/server_fixture.h"

namespace tern::rpc {
namespace {

using ::grpc::StatusCode;
using Stub = inference::GRPCInferenceService::Stub;

class InferenceServiceTest : public testing::PipelineTest {
 protected:
  void SetUp() override {
    PipelineTest::SetUp();
    inference_ = std::make_unique<oip::Inference>(repository_.get(), classifier_.get(), "0");
    ServerOptions options;
    options.host = options.admin_host = "127.0.0.1";
    options.port = options.admin_port = 0;
    auto server = Server::Start(options, repository_.get(), classifier_.get(), inference_.get(),
                                &labels_, &metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    data_ = StubOf(server_->port());
    admin_ = StubOf(server_->admin_port());
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(absl::ZeroDuration());
    repository_->Shutdown();
    server_.reset();
    PipelineTest::TearDown();
  }
  static std::unique_ptr<Stub> StubOf(int port) {
    return inference::GRPCInferenceService::NewStub(
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials()));
  }
  // An image of colour `channel`, 0 to 2; junk if it is 3.
  static inference::ModelInferRequest Request(int channel, const std::string& id) {
    inference::ModelInferRequest request;
    request.set_model_name("tiny");
    request.set_id(id);
    auto* input = request.add_inputs();
    input->set_name("image");
    input->set_datatype("BYTES");
    input->add_shape(1);
    input->mutable_contents()->add_bytes_contents(
        channel == 3 ? "junk"
                     : testing::SolidBmp(8, 8, channel == 0 ? 255 : 0, channel == 1 ? 255 : 0,
                                         channel == 2 ? 255 : 0));
    return request;
  }
  static int Best(const inference::ModelInferResponse& response) {
    std::vector<float> scores(response.raw_output_contents(0).size() / 4);
    std::memcpy(scores.data(), response.raw_output_contents(0).data(), scores.size() * 4);
    return std::max_element(scores.begin(), scores.end()) - scores.begin();
  }
  template <typename Request, typename Response>
  static grpc::Status Unary(Stub* stub,
                            grpc::Status (Stub::*call)(grpc::ClientContext*, const Request&,
                                                       Response*),
                            const std::type_identity_t<Request>& request, Response* response) {
    grpc::ClientContext context;
    return (stub->*call)(&context, request, response);
  }

  std::unique_ptr<oip::Inference> inference_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Stub> data_, admin_;
};

TEST_F(InferenceServiceTest, InferAnswersAndIsCountedByItsCode) {
  inference::ModelInferResponse response;
  const grpc::Status status = Unary(data_.get(), &Stub::ModelInfer, Request(2, "mine"), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.id(), "mine");
  EXPECT_EQ(Best(response), 2);
  EXPECT_EQ(Unary(data_.get(), &Stub::ModelInfer, Request(3, ""), &response).error_code(),
            StatusCode::INVALID_ARGUMENT);
  const std::string metrics = metrics_.Render();
  for (const char* code : {"OK", "INVALID_ARGUMENT"}) {
    EXPECT_TRUE(absl::StrContains(
        metrics, absl::StrCat("tern_requests_total{code=\"", code, "\",method=\"ModelInfer\"} 1")))
        << metrics;
  }
}

TEST_F(InferenceServiceTest, EveryReadOnlyCallAnswersOnTheDataPort) {
  inference::ServerLiveResponse live;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ServerLive, {}, &live).ok());
  EXPECT_TRUE(live.live());
  inference::ServerMetadataResponse server;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ServerMetadata, {}, &server).ok());
  EXPECT_EQ(server.name(), "tern");
  inference::ModelReadyRequest ready_request;
  ready_request.set_name("tiny");
  inference::ModelReadyResponse model_ready;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ModelReady, ready_request, &model_ready).ok());
  EXPECT_TRUE(model_ready.ready());
  inference::ModelMetadataRequest metadata_request;
  metadata_request.set_name("tiny");
  inference::ModelMetadataResponse metadata;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ModelMetadata, metadata_request, &metadata).ok());
  EXPECT_EQ(metadata.inputs(0).name(), "image");
  inference::ModelConfigRequest config_request;
  config_request.set_name("tiny");
  inference::ModelConfigResponse config;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ModelConfig, config_request, &config).ok());
  EXPECT_EQ(config.config().name(), "tiny");
  inference::ModelStatisticsResponse statistics;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ModelStatistics, {}, &statistics).ok());
  EXPECT_EQ(statistics.model_stats(0).name(), "tiny");
  inference::RepositoryIndexResponse index;
  ASSERT_TRUE(Unary(data_.get(), &Stub::RepositoryIndex, {}, &index).ok());
  EXPECT_EQ(index.models(0).state(), "READY");
  inference::ServerReadyResponse ready;
  ASSERT_TRUE(Unary(data_.get(), &Stub::ServerReady, {}, &ready).ok());
  EXPECT_TRUE(ready.ready());
  server_->SetDraining();
  ASSERT_TRUE(Unary(data_.get(), &Stub::ServerReady, {}, &ready).ok());
  EXPECT_FALSE(ready.ready());
}

TEST_F(InferenceServiceTest, AStreamKeepsItsOrderAndGoesOnAfterARefusedRequest) {
  grpc::ClientContext context;
  auto stream = data_->ModelStreamInfer(&context);
  constexpr int kRequests = 100;
  std::thread writer([&] {
    for (int i = 0; i < kRequests; ++i) stream->Write(Request(i % 4, std::to_string(i)));
    stream->WritesDone();
  });
  inference::ModelStreamInferResponse response;
  int i = 0;
  for (; stream->Read(&response); ++i) {
    EXPECT_EQ(response.infer_response().id(), std::to_string(i));
    EXPECT_TRUE(response.infer_response().parameters().at("triton_final_response").bool_param());
    if (i % 4 == 3) {
      EXPECT_TRUE(absl::StartsWith(response.error_message(), "[INVALID_ARGUMENT] "));
    } else {
      EXPECT_EQ(response.error_message(), "");
      EXPECT_EQ(Best(response.infer_response()), i % 4);
    }
  }
  writer.join();
  EXPECT_EQ(i, kRequests);
  EXPECT_TRUE(stream->Finish().ok());
  const std::string metrics = metrics_.Render();
  for (const auto& [code, count] : {std::pair("OK", 75), std::pair("INVALID_ARGUMENT", 25)}) {
    EXPECT_TRUE(
        absl::StrContains(metrics, absl::StrCat("tern_stream_requests_total{code=\"", code,
                                                "\",method=\"ModelStreamInfer\"} ", count, "\n")));
  }
}

TEST_F(InferenceServiceTest, AnErrorThatQuotesALongRequestFitsIntoTheHeaders) {
  inference::RepositoryModelLoadRequest load;
  load.set_model_name("tiny");
  std::string name;
  for (int i = 0; i < 50'000; ++i) name += "\u00fc";  // sent as %C3%BC
  (*load.mutable_parameters())[name].set_string_param("");
  inference::RepositoryModelLoadResponse loaded;
  const grpc::Status status = Unary(admin_.get(), &Stub::RepositoryModelLoad, load, &loaded);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << status.error_message();
  EXPECT_TRUE(absl::EndsWith(status.error_message(), "\u00fc...")) << status.error_message();
}

TEST_F(InferenceServiceTest, ATensorThatOverflowsTheNetworkIsItsCallersFaultEvenAsLogits) {
  inference::ModelInferRequest request;
  request.set_model_name("tiny");
  auto* input = request.add_inputs();
  input->set_name("image");
  input->set_datatype("FP32");
  for (const int64_t dim : {1, 3, 8, 8}) input->add_shape(dim);
  // The mean of 64 such numbers is beyond the largest float.
  const std::vector<float> planes(3 * 8 * 8, 3e38f);
  request.add_raw_input_contents(planes.data(), planes.size() * sizeof(float));
  request.add_outputs()->set_name("logits");
  inference::ModelInferResponse response;
  const grpc::Status status = Unary(data_.get(), &Stub::ModelInfer, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(absl::StrContains(status.error_message(),
                                "these inputs overflow the network: the network's output is not"))
      << status.error_message();
}

TEST_F(InferenceServiceTest, TheAdminPortSaysWhetherServerAndModelAreReady) {
  inference::ServerLiveResponse live;
  ASSERT_TRUE(Unary(admin_.get(), &Stub::ServerLive, {}, &live).ok());
  EXPECT_TRUE(live.live());
  inference::ServerReadyResponse ready;
  ASSERT_TRUE(Unary(admin_.get(), &Stub::ServerReady, {}, &ready).ok());
  EXPECT_TRUE(ready.ready());
  inference::ModelReadyRequest request;
  request.set_name("tiny");
  inference::ModelReadyResponse model;
  ASSERT_TRUE(Unary(admin_.get(), &Stub::ModelReady, request, &model).ok());
  EXPECT_TRUE(model.ready());
  inference::ServerMetadataResponse metadata;
  ASSERT_TRUE(Unary(admin_.get(), &Stub::ServerMetadata, {}, &metadata).ok());
  EXPECT_EQ(metadata.name(), "tern");
}

TEST_F(InferenceServiceTest, ModelsAreLoadedAndUnloadedOnTheAdminPortOnly) {
  inference::RepositoryModelUnloadRequest unload;
  unload.set_model_name("tiny");
  inference::RepositoryModelUnloadResponse unloaded;
  inference::RepositoryModelLoadRequest load;
  load.set_model_name("tiny");
  inference::RepositoryModelLoadResponse loaded;
  inference::ModelInferResponse answer;
  EXPECT_EQ(Unary(data_.get(), &Stub::RepositoryModelUnload, unload, &unloaded).error_code(),
            StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(Unary(data_.get(), &Stub::RepositoryModelLoad, load, &loaded).error_code(),
            StatusCode::PERMISSION_DENIED);
  ASSERT_TRUE(Unary(data_.get(), &Stub::ModelInfer, Request(0, ""), &answer).ok());

  ASSERT_TRUE(Unary(admin_.get(), &Stub::RepositoryModelUnload, unload, &unloaded).ok());
  EXPECT_EQ(Unary(data_.get(), &Stub::ModelInfer, Request(0, ""), &answer).error_code(),
            StatusCode::UNAVAILABLE);
  ASSERT_TRUE(Unary(admin_.get(), &Stub::RepositoryModelLoad, load, &loaded).ok());
  ASSERT_TRUE(Unary(data_.get(), &Stub::ModelInfer, Request(1, ""), &answer).ok());
  EXPECT_EQ(Best(answer), 1);

  (*load.mutable_parameters())["config"].set_string_param("{}");
  EXPECT_EQ(Unary(admin_.get(), &Stub::RepositoryModelLoad, load, &loaded).error_code(),
            StatusCode::INVALID_ARGUMENT);
  unload.set_model_name("none");
  EXPECT_EQ(Unary(admin_.get(), &Stub::RepositoryModelUnload, unload, &unloaded).error_code(),
            StatusCode::NOT_FOUND);
  EXPECT_EQ(Unary(admin_.get(), &Stub::ModelInfer, Request(0, ""), &answer).error_code(),
            StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace tern::rpc
