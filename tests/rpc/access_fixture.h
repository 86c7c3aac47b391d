// A server on free loopback ports, and calls to it with chosen credentials.
#ifndef TERN_TESTS_RPC_ACCESS_FIXTURE_H_
#define TERN_TESTS_RPC_ACCESS_FIXTURE_H_

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/oip/inference.h"
#include "server/rpc/server.h"
#include "tern/v1/classifier.grpc.pb.h"
#include "tern/v1/registry.grpc.pb.h"
#include "tests/serving/server_fixture.h"

namespace tern::testing {

class AccessFixture : public PipelineTest {
 protected:
  using Credentials = std::shared_ptr<grpc::ChannelCredentials>;

  void SetUp() override {
    PipelineTest::SetUp();
    options_.host = options_.admin_host = "127.0.0.1";
    options_.port = options_.admin_port = 0;
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(absl::ZeroDuration());
    repository_->Shutdown();
    server_.reset();
    inference_.reset();
    PipelineTest::TearDown();
  }
  absl::Status TryStart() {
    inference_ = std::make_unique<oip::Inference>(repository_.get(), classifier_.get(), "0");
    auto server = rpc::Server::Start(options_, repository_.get(), classifier_.get(),
                                     inference_.get(), &labels_, &metrics_);
    if (server.ok()) server_ = *std::move(server);
    return server.status();
  }
  void Start() {
    const absl::Status status = TryStart();
    ASSERT_TRUE(status.ok()) << status;
  }

  // A connection of its own.
  static std::shared_ptr<grpc::Channel> Connect(
      int port, Credentials credentials = grpc::InsecureChannelCredentials()) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port), std::move(credentials),
                                     arguments);
  }
  // Each value is sent as one `authorization` header.
  static grpc::Status Classify(const std::shared_ptr<grpc::Channel>& channel,
                               const std::vector<std::string>& authorization = {}) {
    grpc::ClientContext context;
    for (const std::string& value : authorization) context.AddMetadata("authorization", value);
    v1::ClassifyRequest request;
    request.set_model("tiny");
    request.set_image(SolidBmp(8, 8, 1, 2, 3));
    v1::ClassifyResponse response;
    return v1::ImageClassifier::NewStub(channel)->Classify(&context, request, &response);
  }
  static grpc::Status Get(const std::shared_ptr<grpc::Channel>& channel,
                          const std::vector<std::string>& authorization = {},
                          const std::string& model = "tiny") {
    grpc::ClientContext context;
    for (const std::string& value : authorization) context.AddMetadata("authorization", value);
    v1::GetRequest request;
    request.set_model(model);
    request.set_version(1);
    v1::ModelVersion response;
    return v1::ModelRegistry::NewStub(channel)->Get(&context, request, &response);
  }
  // A call of any method with an empty request, from a client that does not know the service.
  static grpc::Status Raw(const std::shared_ptr<grpc::Channel>& channel,
                          const std::string& method) {
    grpc::ClientContext context;
    const grpc::Slice empty("");
    const grpc::ByteBuffer request(&empty, 1);
    grpc::ByteBuffer response;
    std::promise<grpc::Status> done;
    grpc::GenericStub stub(channel);
    stub.UnaryCall(&context, method, {}, &request, &response,
                   [&](grpc::Status status) { done.set_value(status); });
    return done.get_future().get();
  }
  // `series` is a name with its labels.
  bool Measured(const std::string& series, const std::string& value) {
    return absl::StrContains(metrics_.Render(), absl::StrCat("\n", series, " ", value, "\n"));
  }

  rpc::ServerOptions options_;
  std::unique_ptr<oip::Inference> inference_;
  std::unique_ptr<rpc::Server> server_;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_RPC_ACCESS_FIXTURE_H_
