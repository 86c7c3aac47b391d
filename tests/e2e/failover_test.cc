// Two servers behind one client under load.
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "client/tern_client.h"
#include "tests/testing/server_process.h"

namespace tern::client {
namespace {

using testing::Eventually;
using testing::ServerProcess;

class FailoverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    a_.Start();
    b_.Start();
    if (HasFatalFailure()) return;
    ClientOptions options;
    options.server = a_.address() + "," + b_.address();
    options.deadline = absl::Minutes(1);
    auto client = Client::Connect(options);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    request_.set_model("demo");
    request_.set_image(testing::DemoPhoto());
    for (int i = 0; i < 8; ++i) load_.emplace_back([this] { Load(); });
    ASSERT_TRUE(Eventually([&] { return a_.Classified() > 20 && b_.Classified() > 20; }));
  }
  void TearDown() override {
    stop_ = true;
    for (std::thread& thread : load_) thread.join();
    EXPECT_EQ(failed_, 0) << first_failure_ << ", " << answered_ << " answered";
  }
  void Load() {
    while (!stop_) {
      const absl::Status status = client_->Classify(request_).status();
      if (status.ok()) {
        ++answered_;
        continue;
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (failed_++ == 0) first_failure_ = status;
    }
  }
  bool MoreAnswers(int count) {
    const int before = answered_;
    return Eventually([&] { return answered_ >= before + count; });
  }

  ServerProcess a_{TERND_PATH}, b_{TERND_PATH};
  std::unique_ptr<Client> client_;
  v1::ClassifyRequest request_;
  std::vector<std::thread> load_;
  std::atomic<bool> stop_{false};
  std::atomic<int> answered_{0};
  std::mutex mutex_;
  int failed_ = 0;
  absl::Status first_failure_;
};

TEST_F(FailoverTest, AKilledServerFailsNoCallAndGetsCallsAgainWhenItIsBack) {
  a_.Signal(SIGKILL);
  EXPECT_FALSE(a_.Wait().has_value());
  EXPECT_TRUE(MoreAnswers(200));
  a_.Start();
  EXPECT_TRUE(Eventually([&] { return a_.Classified() > 20; }));
  EXPECT_TRUE(MoreAnswers(100));
}

TEST_F(FailoverTest, AServerThatIsToldToStopFailsNoCall) {
  a_.Signal(SIGTERM);
  EXPECT_EQ(a_.Wait(), 0) << a_.Log();
  EXPECT_TRUE(MoreAnswers(100));
  a_.Start();
  EXPECT_TRUE(Eventually([&] { return a_.Classified() > 20; }));
}

}  // namespace
}  // namespace tern::client
