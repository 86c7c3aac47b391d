// What becomes of open calls when the server stops.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/rpc/access_fixture.h"

namespace tern::rpc {
namespace {

using ::grpc::StatusCode;
using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

class StopTest : public testing::AccessFixture {
 protected:
  void SetUp() override {
    AccessFixture::SetUp();
    options_.health_port = 0;
    Start();
    data_ = Connect(server_->port());
    classify_ = v1::ImageClassifier::NewStub(data_);
  }
  static v1::ClassifyRequest Request(int id) {
    v1::ClassifyRequest request;
    request.set_model("tiny");
    request.set_image(testing::SolidBmp(8, 8, 1, 2, 3));
    request.set_request_id(absl::StrCat(id));
    return request;
  }
  // How long a stop with a grace of ten minutes takes.
  absl::Duration Stop() {
    const absl::Time start = absl::Now();
    server_->Shutdown(absl::Minutes(10));
    return absl::Now() - start;
  }

  std::shared_ptr<grpc::Channel> data_;
  std::unique_ptr<v1::ImageClassifier::Stub> classify_;
};

TEST_F(StopTest, ABusyStreamGetsAnAnswerToAllThatWasTakenAndThenUnavailable) {
  grpc::ClientContext context;
  const auto stream = classify_->ClassifyStream(&context);
  std::thread writer([&] {
    for (int i = 0; stream->Write(Request(i)); ++i) {
    }
  });
  v1::ClassifyStreamResponse response;
  int answers = 0;
  for (; answers < 50; ++answers) ASSERT_TRUE(stream->Read(&response));
  std::thread stop([&] { EXPECT_LT(Stop(), absl::Seconds(30)); });
  for (; stream->Read(&response); ++answers) {
    EXPECT_EQ(response.request_id(), absl::StrCat(answers));
    EXPECT_FALSE(response.has_error()) << response.error().message();
  }
  writer.join();
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the server is stopping");
  stop.join();
  EXPECT_TRUE(Measured(R"(tern_stream_requests_total{code="OK",method="ClassifyStream"})",
                       absl::StrCat(answers)));
  EXPECT_TRUE(Measured(R"(tern_requests_total{code="UNAVAILABLE",method="ClassifyStream"})", "1"));
}

TEST_F(StopTest, IdleStreamsAndHealthWatchesDoNotHoldItUp) {
  grpc::ClientContext context;
  const auto stream = classify_->ClassifyStream(&context);
  v1::ClassifyStreamResponse response;
  ASSERT_TRUE(stream->Write(Request(0)));
  ASSERT_TRUE(stream->Read(&response));
  grpc::ClientContext watches[3];
  std::vector<std::unique_ptr<grpc::ClientReader<HealthCheckResponse>>> readers;
  HealthCheckResponse health;
  int i = 0;
  for (const int port : {server_->port(), server_->admin_port(), server_->health_port()}) {
    const auto stub = Health::NewStub(Connect(port));
    readers.push_back(stub->Watch(&watches[i++], HealthCheckRequest()));
    ASSERT_TRUE(readers.back()->Read(&health));
  }
  EXPECT_LT(Stop(), absl::Seconds(30));
  EXPECT_FALSE(stream->Read(&response));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the server is stopping");
  for (const auto& reader : readers) {
    while (reader->Read(&health)) {
    }
    EXPECT_FALSE(reader->Finish().ok());
  }
}

TEST_F(StopTest, HealthKnowsTheServicesOfTheDataPort) {
  for (const char* name :
       {"", "tiny", "tern.v1.ImageClassifier", "inference.GRPCInferenceService"}) {
    HealthCheckRequest request;
    request.set_service(name);
    HealthCheckResponse response;
    grpc::ClientContext context;
    ASSERT_TRUE(Health::NewStub(data_)->Check(&context, request, &response).ok()) << name;
    EXPECT_EQ(response.status(), HealthCheckResponse::SERVING) << name;
  }
}

}  // namespace
}  // namespace tern::rpc
