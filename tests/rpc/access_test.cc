// Who may call what, over real connections.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "server/base/log_fields.h"
#include "tests/rpc/access_fixture.h"

namespace tern::rpc {
namespace {

using ::grpc::StatusCode;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kAdminToken[] = "admin-admin-admin-admin";
constexpr char kDataToken[] = "data-data-data-data-data";

class AccessTest : public testing::AccessFixture {
 protected:
  void Start(bool admin_tokens, bool data_tokens) {
    if (admin_tokens) {
      options_.admin_token_file = root_ + "/.admin-tokens";
      std::ofstream(options_.admin_token_file) << "ops:" << kAdminToken << "\n";
    }
    if (data_tokens) {
      options_.data_token_file = root_ + "/.data-tokens";
      std::ofstream(options_.data_token_file) << "app:" << kDataToken << "\n";
    }
    AccessFixture::Start();
    data_ = Connect(server_->port());
    admin_ = Connect(server_->admin_port());
  }
  bool Counted(const std::string& port, const std::string& reason, int times) {
    return Measured(
        absl::StrCat("tern_auth_failures_total{port=\"", port, "\",reason=\"", reason, "\"}"),
        absl::StrCat(times));
  }

  std::shared_ptr<grpc::Channel> data_, admin_;
};

const std::string kAdmin = absl::StrCat("Bearer ", kAdminToken);
const std::string kData = absl::StrCat("Bearer ", kDataToken);

TEST_F(AccessTest, WithoutTokenFilesBothPortsAreOpen) {
  Start(false, false);
  EXPECT_TRUE(Classify(data_, {}).ok());
  EXPECT_TRUE(Classify(data_, {"Bearer whatever"}).ok());
  EXPECT_TRUE(Get(admin_, {}).ok());
}

TEST_F(AccessTest, TheAdminPortWantsItsTokenAndSaysWhy) {
  Start(true, true);
  EXPECT_TRUE(Get(admin_, {kAdmin}).ok());
  EXPECT_EQ(Get(admin_, {}).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Counted("admin", "missing", 1));
  EXPECT_EQ(Get(admin_, {"Basic YWRtaW4="}).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Get(admin_, {kAdmin, kAdmin}).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Counted("admin", "malformed", 2));
  EXPECT_EQ(Get(admin_, {kAdmin + "x"}).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Counted("admin", "unknown", 1));
  const grpc::Status forbidden = Get(admin_, {kData});
  EXPECT_EQ(forbidden.error_code(), StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(forbidden.error_message(), "token \"app\" is not for the admin port");
  EXPECT_TRUE(Counted("admin", "forbidden", 1));
}

TEST_F(AccessTest, TheDataPortTakesBothKindsOfTokens) {
  Start(true, true);
  EXPECT_TRUE(Classify(data_, {kData}).ok());
  EXPECT_TRUE(Classify(data_, {kAdmin}).ok());
  EXPECT_EQ(Classify(data_, {}).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Classify(data_, {kData + "x"}).error_code(), StatusCode::UNAUTHENTICATED);
}

TEST_F(AccessTest, CallsThatComeAnotherWayAreAskedForTheSameTokensAndNamedByThem) {
  Start(false, true);
  const auto check = [this](std::vector<absl::string_view> authorization) {
    return server_->CheckDataCall("/inference.GRPCInferenceService/ModelInfer", authorization);
  };
  const absl::StatusOr<std::string> caller = check({kData});
  ASSERT_TRUE(caller.ok()) << caller.status();
  EXPECT_EQ(*caller, "token:app");
  EXPECT_TRUE(absl::IsUnauthenticated(check({}).status()));
  EXPECT_TRUE(absl::IsUnauthenticated(check({kData + "x"}).status()));
}

TEST_F(AccessTest, AnAdminTokenLeavesTheDataPortOpen) {
  Start(true, false);
  EXPECT_TRUE(Classify(data_, {}).ok());
  EXPECT_EQ(Get(admin_, {}).error_code(), StatusCode::UNAUTHENTICATED);
}

TEST_F(AccessTest, HealthStaysOpenAndReflectionDoesNot) {
  Start(true, true);
  for (const auto& channel : {data_, admin_}) {
    EXPECT_TRUE(Raw(channel, "/grpc.health.v1.Health/Check").ok());
    EXPECT_TRUE(Raw(channel, "/inference.GRPCInferenceService/ServerLive").ok());
    EXPECT_TRUE(Raw(channel, "/inference.GRPCInferenceService/ServerReady").ok());
    EXPECT_EQ(Raw(channel, "/inference.GRPCInferenceService/ModelReady").error_code(),
              StatusCode::INVALID_ARGUMENT);  // it got there, without a name
    EXPECT_EQ(Raw(channel, "/inference.GRPCInferenceService/ServerMetadata").error_code(),
              StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(
        Raw(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo").error_code(),
        StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(Raw(channel, "/no.such.Service/Method").error_code(), StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(Raw(channel, "/grpc.health.v1.HealthX/Check").error_code(),
              StatusCode::UNAUTHENTICATED);
  }
}

TEST_F(AccessTest, EachAdminCallIsAuditedWithoutSecrets) {
  ::testing::internal::CaptureStderr();
  ASSERT_TRUE(InitLog("error", LogFormat::kJson).ok());
  Start(true, true);
  EXPECT_TRUE(Get(admin_, {kAdmin}).ok());
  EXPECT_FALSE(Get(admin_, {kAdmin}, "a\nb\"c").ok());
  EXPECT_FALSE(Get(admin_, {kAdmin + "x"}).ok());
  EXPECT_TRUE(Classify(data_, {kData}).ok());
  server_->Shutdown(absl::Seconds(5));
  const std::string text = ::testing::internal::GetCapturedStderr();
  ASSERT_TRUE(InitLog("info").ok());
  EXPECT_THAT(text, Not(HasSubstr(kAdminToken)));
  EXPECT_THAT(text, Not(HasSubstr(kDataToken)));
  std::vector<nlohmann::json> lines;
  for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    lines.push_back(nlohmann::json::parse(line.begin(), line.end()));
  }
  ASSERT_EQ(lines.size(), 3u) << text;
  for (const nlohmann::json& line : lines) EXPECT_EQ(line["logger"], "audit");
  EXPECT_EQ(lines[0]["message"], "call");
  EXPECT_EQ(lines[0]["caller"], "token:ops");
  EXPECT_THAT(lines[0]["peer"].get<std::string>(), HasSubstr("127.0.0.1"));
  EXPECT_EQ(lines[0]["method"], "/tern.v1.ModelRegistry/Get");
  EXPECT_EQ(lines[0]["request"], "model: \"tiny\" version: 1");
  EXPECT_EQ(lines[0]["result"], "OK");
  EXPECT_GT(std::stod(lines[0]["seconds"].get<std::string>()), 0);
  EXPECT_EQ(lines[1]["request"], "model: \"a\\nb\\\"c\" version: 1");
  EXPECT_EQ(lines[1]["result"], "NOT_FOUND");
  EXPECT_THAT(lines[1]["error"].get<std::string>(), HasSubstr("does not exist"));
  EXPECT_EQ(lines[2]["message"], "refused");
  EXPECT_EQ(lines[2]["reason"], "unknown");
}

TEST_F(AccessTest, TraceAndRequestIdComeBackAndAreLogged) {
  constexpr char kTrace[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  ::testing::internal::CaptureStderr();
  ASSERT_TRUE(InitLog("debug", LogFormat::kJson).ok());
  Start(false, false);
  const auto call = [&](const std::string& trace, const std::string& header,
                        const std::string& field) {
    grpc::ClientContext context;
    context.AddMetadata("traceparent", trace);
    if (!header.empty()) context.AddMetadata("x-request-id", header);
    v1::ClassifyRequest request;
    request.set_model("tiny");
    request.set_image(testing::SolidBmp(8, 8, 1, 2, 3));
    request.set_request_id(field);
    v1::ClassifyResponse response;
    EXPECT_TRUE(v1::ImageClassifier::NewStub(data_)->Classify(&context, request, &response).ok());
    std::map<std::string, std::string> headers;
    for (const auto& [key, value] : context.GetServerInitialMetadata()) {
      headers.emplace(std::string(key.data(), key.size()), std::string(value.data(), value.size()));
    }
    headers["field"] = response.request_id();
    return headers;
  };
  auto headers = call(kTrace, "", "mine");
  EXPECT_EQ(headers["traceparent"], kTrace);
  EXPECT_EQ(headers["x-request-id"], "mine");
  EXPECT_EQ(headers["field"], "mine");
  headers = call("00-junk", "from-header", "");
  EXPECT_EQ(headers.count("traceparent"), 0u);
  EXPECT_EQ(headers["x-request-id"], "from-header");
  EXPECT_EQ(headers["field"], "from-header");
  headers = call(kTrace, "bad header", "not\nfor a header");
  EXPECT_EQ(headers.count("x-request-id"), 0u);
  EXPECT_EQ(headers["field"], "not\nfor a header");
  headers = call(kTrace, "", "");
  EXPECT_EQ(headers["x-request-id"], headers["field"]);
  EXPECT_EQ(headers["field"].size(), 32u);
  server_->Shutdown(absl::Seconds(5));
  const std::string text = ::testing::internal::GetCapturedStderr();
  ASSERT_TRUE(InitLog("info").ok());
  EXPECT_THAT(text,
              HasSubstr(R"("request_id":"mine","trace_id":"4bf92f3577b34da6a3ce929d0e0e4736"})"));
  EXPECT_THAT(text, HasSubstr("4 calls answered, 0 given up"));
}

TEST_F(AccessTest, AStreamThatIsCancelledIsLoggedWithItsCaller) {
  ::testing::internal::CaptureStderr();
  ASSERT_TRUE(InitLog("debug", LogFormat::kJson).ok());
  Start(false, false);
  {
    grpc::ClientContext context;
    const auto stub = v1::ImageClassifier::NewStub(data_);
    const auto stream = stub->ClassifyStream(&context);
    v1::ClassifyRequest request;
    request.set_image(std::string(options_.limits.max_bytes + (1 << 20), 'x'));  // gRPC cancels
    stream->Write(request);
    v1::ClassifyStreamResponse response;
    EXPECT_FALSE(stream->Read(&response));
    EXPECT_EQ(stream->Finish().error_code(), StatusCode::RESOURCE_EXHAUSTED);
    const auto ended = [this] {
      return Measured(R"(tern_requests_total{code="RESOURCE_EXHAUSTED",method="ClassifyStream"})",
                      "1");
    };
    for (int i = 0; i < 10'000 && !ended(); ++i) absl::SleepFor(absl::Milliseconds(1));
  }
  server_->Shutdown(absl::Seconds(5));
  const std::string text = ::testing::internal::GetCapturedStderr();
  ASSERT_TRUE(InitLog("info").ok());
  EXPECT_THAT(text, HasSubstr(R"("caller":"address:ipv4:127.0.0.1","peer":"ipv4:127.0.0.1:)"));
}

TEST_F(AccessTest, ClientsAreToldNotToRetryAnImageThatIsTooLarge) {
  Start(false, false);
  grpc::ClientContext context;
  v1::ClassifyRequest request;
  request.set_model("tiny");
  request.set_image(std::string(200'000, 'x'));  // the fixture's limit is 100,000
  v1::ClassifyResponse response;
  const grpc::Status status =
      v1::ImageClassifier::NewStub(data_)->Classify(&context, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  const auto& trailers = context.GetServerTrailingMetadata();
  const auto pushback = trailers.find("grpc-retry-pushback-ms");
  ASSERT_NE(pushback, trailers.end());
  EXPECT_EQ(pushback->second, "-1");
}

TEST_F(AccessTest, AWrongTokenFileStopsTheStart) {
  options_.admin_token_file = root_ + "/absent";
  EXPECT_TRUE(absl::IsNotFound(TryStart()));
}

}  // namespace
}  // namespace tern::rpc
