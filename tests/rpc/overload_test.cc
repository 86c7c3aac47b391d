// What callers see of limits, priorities, deadlines and cancellation, through the gRPC server.
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <future>
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

  // Keeps the only thread that decodes busy, in the answer to an image that is none, until the
  // promise is kept.
  void BlockDecoding(std::promise<void>& release) {
    std::promise<void> blocked;
    serving::ClassifyInput junk;
    junk.image = "junk";
    classifier_->Classify("tiny", 0, std::move(junk),
                          [&](const absl::StatusOr<serving::ClassifyOutput>&) {
                            std::future<void> released = release.get_future();
                            blocked.set_value();
                            released.wait();
                          });
    blocked.get_future().wait();
  }
  bool Shows(const std::string& series) {
    return metrics_.Render().find("\n" + series + "\n") != std::string::npos;
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
  // An image is 246 bytes, and its copy, and 768 as the network's input: there is room for one.
  classifier_options_.admission.max_bytes = 2000;
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto stub = Stub();
  std::promise<void> release;
  BlockDecoding(release);
  grpc::ClientContext waiting_context;
  auto waiting = stub->ClassifyStream(&waiting_context);
  waiting->Write(Request(1, 2, 3));
  while (!Shows("tern_waiting_images 1")) std::this_thread::yield();
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
  release.set_value();
  ASSERT_TRUE(waiting->Read(&answer));
  EXPECT_TRUE(answer.has_response());
  waiting->WritesDone();
  EXPECT_TRUE(waiting->Finish().ok());
  EXPECT_NE(metrics_.Render().find("tern_rejected_total{reason=\"waiting_bytes\"} 2"),
            std::string::npos);
}

TEST_F(OverloadTest, WhoAsksForMoreThanThereIsAltogetherIsNotToTryAgain) {
  classifier_options_.admission.max_bytes = 1000;
  ASSERT_NO_FATAL_FAILURE(Start());
  grpc::ClientContext context;
  v1::ClassifyResponse response;
  const grpc::Status status = Stub()->Classify(&context, Request(1, 2, 3), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(status.error_message().find("--max_waiting_bytes"), std::string::npos);
  EXPECT_EQ(status.error_details(), "");
  const auto& trailers = context.GetServerTrailingMetadata();
  const auto pushback = trailers.find("grpc-retry-pushback-ms");
  ASSERT_NE(pushback, trailers.end());
  EXPECT_EQ(pushback->second, "-1");
}

TEST_F(OverloadTest, RequestsThatEndWithTheirStreamAreCountedOnce) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto stub = Stub();
  std::promise<void> release;
  BlockDecoding(release);
  {
    grpc::ClientContext context;
    auto stream = stub->ClassifyStream(&context);
    for (int i = 0; i < 3; ++i) stream->Write(Request(1, 2, 3));
    while (!Shows("tern_waiting_images 3")) std::this_thread::yield();
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  release.set_value();
  while (!Shows("tern_inflight_requests{method=\"ClassifyStream\"} 0")) std::this_thread::yield();
  // The server may hear of the cancellation after it has answered some.
  const std::string text = metrics_.Render();
  int counted = 0;
  for (const std::string code : {"OK", "CANCELLED"}) {
    const std::string series =
        "tern_stream_requests_total{code=\"" + code + "\",method=\"ClassifyStream\"} ";
    if (const size_t at = text.find(series); at != std::string::npos) {
      counted += std::stoi(text.substr(at + series.size()));
    }
  }
  EXPECT_EQ(counted, 3);
}

TEST_F(OverloadTest, ImagesThatWaitForDecodingGiveTheirPlacesToMoreUrgentOnes) {
  runner_.default_max_queue = 4;
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto stub = Stub();
  std::promise<void> release;
  BlockDecoding(release);
  grpc::ClientContext low_context, high_context;
  const auto send = [&](grpc::ClientContext& context, int priority, int images) {
    auto stream = stub->ClassifyStream(&context);
    v1::ClassifyRequest request = Request(1, 2, 3);
    request.set_priority(priority);
    for (int i = 0; i < images; ++i) stream->Write(request);
    stream->WritesDone();
    return stream;
  };
  auto low = send(low_context, 3, 4);
  while (!Shows("tern_waiting_images 4")) std::this_thread::yield();
  auto high = send(high_context, 1, 5);
  while (!Shows("tern_waiting_images 8")) std::this_thread::yield();
  release.set_value();
  const auto answers = [](auto& stream) {
    int ok = 0, refused = 0;
    v1::ClassifyStreamResponse answer;
    while (stream->Read(&answer)) {
      ok += answer.has_response();
      refused += answer.error().code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
    }
    EXPECT_TRUE(stream->Finish().ok());
    return std::pair(ok, refused);
  };
  EXPECT_EQ(answers(high), std::pair(4, 1)) << "as many as there are places";
  const auto [ok, refused] = answers(low);
  EXPECT_EQ(ok + refused, 4);
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
