// What callers see of limits, priorities, deadlines and cancellation, through the gRPC server.
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "server/oip/inference.h"
#include "server/rpc/identity.h"
#include "server/rpc/server.h"
#include "tern/v1/classifier.grpc.pb.h"
#include "tests/serving/server_fixture.h"

namespace tern::rpc {
namespace {

class OverloadTest : public testing::PipelineTest {
 protected:
  void SetUp() override {}
  void Start() {
    PipelineTest::SetUp();
    ServerOptions options;
    options.host = options.admin_host = "127.0.0.1";
    options.port = options.admin_port = 0;
    options.limits.max_bytes = 100000;
    inference_ = std::make_unique<oip::Inference>(repository_.get(), classifier_.get(), "0");
    auto server = Server::Start(options, repository_.get(), classifier_.get(), inference_.get(),
                                &labels_, &metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(absl::ZeroDuration());
    if (repository_ != nullptr) repository_->Shutdown();
    server_.reset();
    PipelineTest::TearDown();
  }
  std::unique_ptr<v1::ImageClassifier::Stub> Stub() const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return v1::ImageClassifier::NewStub(
        grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server_->port()),
                                  grpc::InsecureChannelCredentials(), arguments));
  }

  std::unique_ptr<oip::Inference> inference_;
  std::unique_ptr<Server> server_;
};

v1::ClassifyRequest Request(int red, int green, int blue) {
  v1::ClassifyRequest request;
  request.set_model("tiny");
  request.set_image(testing::SolidBmp(8, 8, red, green, blue));
  return request;
}

// Images and answers that tell each other apart: the number is the colour, and the tiny model's
// logits are ten times red, green and blue in 0..1, so the colour can be read off the answer.
constexpr int kDistinct = 256 * 256;
v1::ClassifyRequest Numbered(int number) { return Request(number >> 8, number & 255, 0); }
int NumberOf(const v1::ClassifyResponse& response) {
  double log_probability[3] = {0, 0, 0};
  for (const v1::ClassScore& score : response.classes()) {
    if (score.index() < 3) log_probability[score.index()] = std::log(score.probability());
  }
  const auto channel = [&](int c) {
    return static_cast<int>(std::lround(25.5 * (log_probability[c] - log_probability[2])));
  };
  return channel(0) << 8 | channel(1);
}

TEST_F(OverloadTest, ARefusalForWantOfRoomSaysWhenToTryAgain) {
  classifier_options_.admission.max_bytes = 1;
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto stub = Stub();
  grpc::ClientContext context;
  v1::ClassifyResponse response;
  const grpc::Status status = stub->Classify(&context, Request(1, 2, 3), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(status.error_message().find("try again in 100ms"), std::string::npos);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), 8);
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.RetryInfo");
  google::rpc::RetryInfo info;
  ASSERT_TRUE(details.details(0).UnpackTo(&info));
  EXPECT_EQ(info.retry_delay().seconds(), 0);
  EXPECT_EQ(info.retry_delay().nanos(), 100'000'000);

  grpc::ClientContext stream_context;
  auto stream = stub->ClassifyStream(&stream_context);
  stream->Write(Request(1, 2, 3));
  stream->WritesDone();
  v1::ClassifyStreamResponse answer;
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.error().code(), 8);
  EXPECT_EQ(answer.error().retry_after_us(), 100'000u);
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_NE(metrics_.Render().find("tern_rejected_total{reason=\"waiting_bytes\"} 2"),
            std::string::npos);
}

TEST_F(OverloadTest, AnUnknownPriorityIsRefused) {
  ASSERT_NO_FATAL_FAILURE(Start());
  grpc::ClientContext context;
  v1::ClassifyRequest request = Request(1, 2, 3);
  request.set_priority(4);
  v1::ClassifyResponse response;
  EXPECT_EQ(Stub()->Classify(&context, request, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

// Streams and single calls side by side, with priorities, deadlines and cancellations, more than
// the server can take at once.
TEST_F(OverloadTest, EveryAnswerGoesToItsCaller) {
  runner_.default_max_queue = 64;
  classifier_options_.decode_threads = 2;
  ASSERT_NO_FATAL_FAILURE(Start());
  constexpr int kStreams = 3, kPerStream = 4000, kCallers = 3, kPerCaller = 3000, kInFlight = 40;
  std::atomic<int> wrong{0}, answered{0}, refused{0};
  const auto count = [&](bool ok, int code) {
    // Refusals that this load may meet.
    const bool expected = code == grpc::StatusCode::RESOURCE_EXHAUSTED ||
                          code == grpc::StatusCode::DEADLINE_EXCEEDED ||
                          code == grpc::StatusCode::CANCELLED;
    (ok ? answered : refused) += 1;
    wrong += !ok && !expected;
  };
  std::vector<std::thread> threads;
  for (int s = 0; s < kStreams; ++s) {
    threads.emplace_back([&, s] {
      const auto stub = Stub();
      grpc::ClientContext context;
      auto stream = stub->ClassifyStream(&context);
      std::thread writer([&] {
        for (int i = 0; i < kPerStream; ++i) {
          v1::ClassifyRequest request = Numbered((i * 7919 + s * 31) % kDistinct);
          request.set_priority(i % 4);
          stream->Write(request);
        }
        stream->WritesDone();
      });
      v1::ClassifyStreamResponse answer;
      int i = 0;
      for (; stream->Read(&answer); ++i) {
        count(answer.has_response(), answer.error().code());
        wrong +=
            answer.has_response() && NumberOf(answer.response()) != (i * 7919 + s * 31) % kDistinct;
      }
      writer.join();
      wrong += i != kPerStream || !stream->Finish().ok();
    });
  }
  for (int c = 0; c < kCallers; ++c) {
    threads.emplace_back([&, c] {
      const auto stub = Stub();
      struct Call {
        grpc::ClientContext context;
        v1::ClassifyRequest request;
        v1::ClassifyResponse response;
      };
      std::mutex mutex;
      std::condition_variable changed;
      int in_flight = 0;
      for (int i = 0; i < kPerCaller; ++i) {
        {
          std::unique_lock<std::mutex> lock(mutex);
          changed.wait(lock, [&] { return in_flight < kInFlight; });
          ++in_flight;
        }
        const int number = (i * 104729 + c * 77) % kDistinct;
        auto call = std::make_shared<Call>();
        call->request = Numbered(number);
        call->request.set_priority(i % 4);
        if (i % 5 == 0) {
          call->context.set_deadline(std::chrono::system_clock::now() +
                                     std::chrono::microseconds(i % 3 * 3000));
        }
        stub->async()->Classify(&call->context, &call->request, &call->response,
                                [&, call, number](const grpc::Status& status) {
                                  count(status.ok(), status.error_code());
                                  wrong += status.ok() && NumberOf(call->response) != number;
                                  std::lock_guard<std::mutex> lock(mutex);
                                  --in_flight;
                                  changed.notify_one();
                                });
        if (i % 7 == 0) call->context.TryCancel();
      }
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [&] { return in_flight == 0; });
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(answered + refused, kStreams * kPerStream + kCallers * kPerCaller);
  EXPECT_GT(answered, kStreams * kPerStream / 4);
  // Nothing is left behind.
  v1::ClassifyResponse response;
  grpc::ClientContext context;
  EXPECT_TRUE(Stub()->Classify(&context, Numbered(5), &response).ok());
  EXPECT_NE(metrics_.Render().find("\ntern_waiting_bytes 0\n"), std::string::npos);
  EXPECT_NE(metrics_.Render().find("\ntern_clients 0\n"), std::string::npos);
}

TEST(ClientIdentityTest, AnAddressIsKnownWithoutItsPort) {
  EXPECT_EQ(AddressOf("ipv4:10.0.0.7:5123"), "ipv4:10.0.0.7");
  EXPECT_EQ(AddressOf("ipv6:%5B::1%5D:5123"), "ipv6:%5B::1%5D");
  EXPECT_EQ(AddressOf("unix:/run/tern.sock"), "unix:/run/tern.sock");
  EXPECT_EQ(AddressOf("ipv4:"), "ipv4:");
  EXPECT_EQ(AddressOf(""), "");
}

}  // namespace
}  // namespace tern::rpc
