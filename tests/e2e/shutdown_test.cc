// How ternd ends: its signals, its exit status, and the calls that it had taken.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <mutex>
#include <regex>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tern/v1/classifier.grpc.pb.h"
#include "tern/v1/profiler.grpc.pb.h"
#include "tests/testing/server_process.h"

namespace tern {
namespace {

using grpc::StatusCode;
using testing::Eventually;

class ShutdownTest : public ::testing::Test {
 protected:
  // "stopped: N calls answered, M given up" of the log.
  std::pair<int, int> Counts() const {
    const std::string log = server_.Log();
    std::smatch match;
    if (!std::regex_search(log, match, std::regex(R"((\d+) calls answered, (\d+) given up)"))) {
      ADD_FAILURE() << log;
      return {-1, -1};
    }
    return {std::stoi(match[1]), std::stoi(match[2])};
  }
  // A call that goes on until it is cancelled (a minute at most).
  void StartLongCall() {
    long_call_ = std::thread([this] {
      auto stub = v1::Profiler::NewStub(
          grpc::CreateChannel(server_.admin(), grpc::InsecureChannelCredentials()));
      grpc::ClientContext context;
      v1::BenchmarkRequest request;
      request.set_model("demo");
      request.set_seconds(60);
      v1::BenchmarkResponse response;
      long_status_ = stub->Benchmark(&context, request, &response);
    });
    ASSERT_TRUE(Eventually(
        [&] { return server_.Metric(R"(tern_inflight_requests{method="Benchmark"})") == 1; }));
  }

  testing::ServerProcess server_{TERND_PATH};
  std::thread long_call_;
  grpc::Status long_status_;
};

TEST_F(ShutdownTest, EveryCallThatWasTakenIsAnswered) {
  server_.Start({"--drain=1s"});
  v1::ClassifyRequest request;
  request.set_model("demo");
  request.set_image(testing::DemoPhoto());
  std::mutex mutex;
  std::map<StatusCode, int> codes;
  std::atomic<int> answered{0};
  std::vector<std::thread> load;
  for (int i = 0; i < 8; ++i) {
    load.emplace_back([&] {
      grpc::ChannelArguments own;
      own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      own.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
      auto stub = v1::ImageClassifier::NewStub(
          grpc::CreateCustomChannel(server_.address(), grpc::InsecureChannelCredentials(), own));
      grpc::Status status;
      while (status.ok()) {
        grpc::ClientContext context;
        v1::ClassifyResponse response;
        status = stub->Classify(&context, request, &response);
        if (status.ok()) ++answered;
        std::lock_guard<std::mutex> lock(mutex);
        ++codes[status.error_code()];
      }
    });
  }
  ASSERT_TRUE(Eventually([&] { return answered > 50; }));
  server_.Signal(SIGTERM);
  EXPECT_EQ(server_.Wait(), 0) << server_.Log();
  for (std::thread& thread : load) thread.join();
  const auto [server_answered, given_up] = Counts();
  EXPECT_EQ(given_up, 0);
  EXPECT_EQ(server_answered, answered);
  // The calls that came too late, one of each thread.
  EXPECT_EQ(codes[StatusCode::UNAVAILABLE] + codes[StatusCode::CANCELLED], 8);
  EXPECT_EQ(codes[StatusCode::OK], answered);
}

TEST_F(ShutdownTest, ACallThatOutlastsTheGraceIsCancelledAndCounted) {
  server_.Start({"--grace=200ms"});
  StartLongCall();
  server_.Signal(SIGTERM);
  EXPECT_EQ(server_.Wait(), 0) << server_.Log();
  long_call_.join();
  EXPECT_FALSE(long_status_.ok());
  EXPECT_EQ(Counts().second, 1);
}

TEST_F(ShutdownTest, ASecondSignalEndsItAtOnceWithAStatusOfItsOwn) {
  for (const int second : {SIGTERM, SIGINT}) {
    server_.Start({"--grace=10m"});
    StartLongCall();
    server_.Signal(SIGTERM);
    ASSERT_TRUE(Eventually([&] { return server_.Log().find("draining") != std::string::npos; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(300));  // what comes earlier is the same request
    server_.Signal(second);
    EXPECT_EQ(server_.Wait(), 3) << server_.Log();
    long_call_.join();
    EXPECT_EQ(long_status_.error_code(), StatusCode::UNAVAILABLE);
  }
}

// timeout(1) signals its child and then the child's group.
TEST_F(ShutdownTest, TheSameSignalTwiceInARowIsOneRequest) {
  server_.Start({"--drain=1s"});
  server_.Signal(SIGTERM);
  ASSERT_TRUE(Eventually([&] { return server_.Log().find("draining") != std::string::npos; }));
  server_.Signal(SIGTERM);
  EXPECT_EQ(server_.Wait(), 0) << server_.Log();
}

// A client that balances by name finds new replicas only when it looks the name up again, which gRPC
// does when a connection ends.
#ifdef EARLY_THREAD_PATH
TEST_F(ShutdownTest, ALibrarysThreadFromBeforeMainDoesNotTakeItsSignals) {
  for (const int signal : {SIGTERM, SIGINT}) {
    ::setenv("LD_PRELOAD", EARLY_THREAD_PATH, 1);
    server_.Start();
    ::unsetenv("LD_PRELOAD");
    server_.Signal(signal);
    EXPECT_EQ(server_.Wait(), 0) << server_.Log();
    EXPECT_NE(server_.Log().find("draining"), std::string::npos) << server_.Log();
  }
}
#endif

TEST_F(ShutdownTest, AConnectionEndsWithItsAgeAndTheCallsGoOnOverANewOne) {
  server_.Start({"--max_connection_age=1s"});
  const auto channel = grpc::CreateChannel(server_.address(), grpc::InsecureChannelCredentials());
  auto stub = v1::ImageClassifier::NewStub(channel);
  v1::ClassifyRequest request;
  request.set_model("demo");
  request.set_image(testing::DemoPhoto());
  for (int connection = 0; connection < 3; ++connection) {
    grpc::ClientContext context;
    v1::ClassifyResponse response;
    const grpc::Status status = stub->Classify(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_TRUE(channel->WaitForStateChange(
        GRPC_CHANNEL_READY, std::chrono::system_clock::now() + std::chrono::minutes(1)));
  }
}

}  // namespace
}  // namespace tern
