#include "client/channel.h"

#include <gmock/gmock.h>
#include <grpcpp/support/validate_service_config.h>
#include <gtest/gtest.h>

#include <fstream>

#include "tern/v1/classifier.grpc.pb.h"
#include "tests/client/folder.h"

namespace tern::client {
namespace {

using ::testing::HasSubstr;

TEST(ParseTargetTest, OneEndpointIsLeftToGrpc) {
  for (const char* target : {"127.0.0.1:8500", "localhost:8500", "[::1]:65535",
                             "unix:/run/tern.sock", "ipv4:127.0.0.1:8500"}) {
    const auto parsed = ParseTarget(target);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->uri, target);
    EXPECT_FALSE(parsed->balanced);
  }
  for (const char* target :
       {"dns:///tern-headless:8500", "dns:tern:8500", "dns://127.0.0.1:53/tern:8500"}) {
    const auto parsed = ParseTarget(target);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->uri, target);
    EXPECT_TRUE(parsed->balanced);
  }
}

// gRPC takes these, and connects to another port than was meant.
TEST(ParseTargetTest, AnEndpointNeedsAHostAndAPortThatExists) {
  for (const char* bad :
       {"127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:99999", ":8500",
        "127.0.0.1:+80", "127.0.0.1: 80", "::1", "::1:8500", "http://127.0.0.1:8500", "tern",
        "dns:///tern", "dns:tern", "dns:///tern:99999", "dns://127.0.0.1:53/tern"}) {
    const absl::Status status = ParseTarget(bad).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << bad;
    EXPECT_THAT(std::string(status.message()), HasSubstr("want HOST:PORT")) << bad;
  }
}

TEST(ParseTargetTest, AListBecomesNumericAddresses) {
  const auto v4 = ParseTarget("127.0.0.1:1, 127.0.0.2:2");
  ASSERT_TRUE(v4.ok()) << v4.status();
  EXPECT_EQ(v4->uri, "ipv4:127.0.0.1:1,127.0.0.2:2");
  EXPECT_EQ(v4->authority, "127.0.0.1:1");
  EXPECT_TRUE(v4->balanced);
  const auto v6 = ParseTarget("[::1]:1,[::1]:2");
  ASSERT_TRUE(v6.ok()) << v6.status();
  EXPECT_EQ(v6->uri, "ipv6:[::1]:1,[::1]:2");
  EXPECT_TRUE(absl::IsUnavailable(ParseTarget("127.0.0.1:1,[::1]:2").status()));
  for (const char* bad : {"", "a:1,", ",a:1", "127.0.0.1:1,127.0.0.1", "127.0.0.1:1,127.0.0.1:x"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseTarget(bad).status())) << bad;
  }
  EXPECT_TRUE(absl::IsUnavailable(ParseTarget("127.0.0.1:1,no.such.name.invalid:1").status()));
}

// gRPC drops a service config that it cannot read, without a word to the caller.
TEST(ServiceConfigTest, GrpcAcceptsIt) {
  RetryOptions none;
  none.max_attempts = 1;
  RetryOptions most;
  most.budget = 1000;
  most.initial_backoff = absl::Milliseconds(1);
  for (const RetryOptions& retry : {RetryOptions(), none, most}) {
    for (const bool balanced : {false, true}) {
      const std::string config = ServiceConfig(retry, balanced);
      EXPECT_EQ(grpc::experimental::ValidateServiceConfigJSON(config), "") << config;
    }
  }
}

// Refuses `refusals` calls, then answers.
class Busy : public v1::ImageClassifier::Service {
 public:
  grpc::Status Classify(grpc::ServerContext* context, const v1::ClassifyRequest*,
                        v1::ClassifyResponse*) override {
    if (calls++ >= refusals) return grpc::Status::OK;
    if (!pushback.empty()) context->AddTrailingMetadata("grpc-retry-pushback-ms", pushback);
    return {code, "busy"};
  }
  grpc::Status ReportLabel(grpc::ServerContext*, const v1::ReportLabelRequest*,
                           v1::ReportLabelResponse*) override {
    ++calls;
    return {code, "busy"};
  }
  std::atomic<int> calls{0};
  int refusals = 0;
  grpc::StatusCode code = grpc::StatusCode::RESOURCE_EXHAUSTED;
  std::string pushback;
};

class RetryTest : public ::testing::Test {
 protected:
  RetryTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.SetMaxReceiveMessageSize(64 << 20);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&busy_);
    server_ = builder.BuildAndStart();
    options_.server = absl::StrCat("127.0.0.1:", port);
    options_.retry.initial_backoff = absl::Milliseconds(1);
  }
  ~RetryTest() override { server_->Shutdown(std::chrono::system_clock::now()); }
  absl::Status Classify(size_t bytes = 10) {
    v1::ClassifyRequest request;
    request.set_image(std::string(bytes, 'x'));
    return (*Client::Connect(options_))->Classify(request).status();
  }

  Busy busy_;
  std::unique_ptr<grpc::Server> server_;
  ClientOptions options_;
};

TEST_F(RetryTest, WhatMayBetterItselfIsRetriedUpToTheLimit) {
  for (const auto code : {grpc::StatusCode::UNAVAILABLE, grpc::StatusCode::RESOURCE_EXHAUSTED}) {
    busy_.code = code;
    busy_.calls = 0;
    busy_.refusals = 4;
    EXPECT_TRUE(Classify().ok());
    EXPECT_EQ(busy_.calls, 5);
    busy_.calls = 0;
    busy_.refusals = 5;
    EXPECT_FALSE(Classify().ok());
    EXPECT_EQ(busy_.calls, 5);
  }
}

TEST_F(RetryTest, WhatCannotBetterItselfIsNot) {
  busy_.refusals = 100;
  busy_.code = grpc::StatusCode::INVALID_ARGUMENT;
  EXPECT_TRUE(absl::IsInvalidArgument(Classify()));
  EXPECT_EQ(busy_.calls, 1);
}

TEST_F(RetryTest, TheServersHintIsObeyed) {
  busy_.refusals = 1;
  busy_.pushback = "-1";
  EXPECT_TRUE(absl::IsResourceExhausted(Classify()));
  EXPECT_EQ(busy_.calls, 1);

  busy_.calls = 0;
  busy_.pushback = "300";
  const absl::Time start = absl::Now();
  EXPECT_TRUE(Classify().ok());
  EXPECT_EQ(busy_.calls, 2);
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(290));
}

TEST_F(RetryTest, LargeRequestsAreRetriedToo) {
  busy_.refusals = 2;
  EXPECT_TRUE(Classify(20 << 20).ok());
  EXPECT_EQ(busy_.calls, 3);
}

TEST_F(RetryTest, NothingIsRetriedWithoutPermissionOrWhenItChangesSomething) {
  busy_.refusals = 1;
  EXPECT_FALSE((*Client::Connect(options_))->ReportLabel("id", 1).ok());
  EXPECT_EQ(busy_.calls, 1);
  busy_.calls = 0;
  options_.retry.max_attempts = 1;
  EXPECT_FALSE(Classify().ok());
  EXPECT_EQ(busy_.calls, 1);
}

TEST_F(RetryTest, AnEmptyBudgetEndsRetries) {
  options_.retry.budget = 2;  // the second failure leaves less than half of it
  busy_.refusals = 100;
  EXPECT_FALSE(Classify().ok());
  EXPECT_LT(busy_.calls, 5);
}

TEST(TokenSourceTest, TakesTheFirstTokenAndRefusesWhatIsNone) {
  const Folder folder;
  const auto open = [&](const std::string& text) {
    std::ofstream(folder.path() + "/token") << text;
    return TokenSource::Open(folder.path() + "/token");
  };
  EXPECT_EQ((*open("# mine\n\nops:abc+/=\nother"))->Token(), "abc+/=");
  EXPECT_EQ((*open("  abc \r\n"))->Token(), "abc");
  for (const char* bad : {"# only\n", "a b", "a\x01", "name:"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(open(bad).status())) << bad;
  }
  EXPECT_TRUE(absl::IsNotFound(TokenSource::Open(folder.path() + "/absent").status()));
}

TEST(CredentialsTest, HalvesAreRefused) {
  TlsOptions tls;
  EXPECT_TRUE(MakeCredentials(tls).ok());
  tls.certificate = "a";
  EXPECT_TRUE(absl::IsInvalidArgument(MakeCredentials(tls).status()));
  tls.system_roots = true;
  EXPECT_TRUE(absl::IsInvalidArgument(MakeCredentials(tls).status()));
  tls.key = "b";
  EXPECT_TRUE(absl::IsNotFound(MakeCredentials(tls).status()));
}

}  // namespace
}  // namespace tern::client
