#include "server/rpc/acceptor.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"

namespace tern::rpc {
namespace {

// A server with nothing but a health service.
class AcceptorTest : public ::testing::Test {
 protected:
  void Start(int max_descriptor) {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    AcceptorOptions options;
    options.host = "127.0.0.1";
    options.credentials = grpc::InsecureServerCredentials();
    options.max_descriptor = max_descriptor;
    options.refused = [this] { ++refused_; };
    auto acceptor = Acceptor::Listen(std::move(options), builder);
    ASSERT_TRUE(acceptor.ok()) << acceptor.status();
    acceptor_ = *std::move(acceptor);
    completions_ = builder.AddCompletionQueue();
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    acceptor_->Start();
  }
  void TearDown() override {
    Close();
    acceptor_->Stop();
    server_->Shutdown(std::chrono::system_clock::now());
    completions_->Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (completions_->Next(&tag, &ok)) {
    }
  }

  int Connect() {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(acceptor_->port()));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd >= 0 && ::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
      clients_.push_back(fd);
      return fd;
    }
    if (fd >= 0) ::close(fd);
    return -1;
  }
  void Close() {
    for (int fd : clients_) ::close(fd);
    clients_.clear();
  }

  // Whether gRPC takes a new connection: its channel gets ready.
  bool Serves() {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    const auto channel = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(acceptor_->port()),
                                                   grpc::InsecureChannelCredentials(), arguments);
    return channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20));
  }

  std::unique_ptr<Acceptor> acceptor_;
  std::unique_ptr<grpc::ServerCompletionQueue> completions_;
  std::unique_ptr<grpc::Server> server_;
  std::vector<int> clients_;
  std::atomic<int> refused_{0};
};

int NextDescriptor() {
  const int fd = ::dup(0);
  ::close(fd);
  return fd;
}

TEST_F(AcceptorTest, HandsConnectionsToTheServer) {
  Start(0);
  EXPECT_GT(acceptor_->port(), 0);
  EXPECT_TRUE(Serves());
  EXPECT_EQ(refused_, 0);
}

TEST_F(AcceptorTest, KeepsDescriptorsForConnectionsWhereThereAreFew) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit low = before;
  low.rlim_cur = 128;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  Start(0);
  EXPECT_TRUE(Serves());
  EXPECT_EQ(refused_, 0);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST_F(AcceptorTest, RefusesConnectionsAboveTheLimitAndTakesThemOnceThereIsRoom) {
  Start(NextDescriptor() + 40);
  while (refused_ == 0) {
    ASSERT_GE(Connect(), 0);
    ASSERT_LT(clients_.size(), 200u);
    absl::SleepFor(absl::Milliseconds(5));  // lets the other side accept, fails nothing
  }
  // A refused client is told at once.
  char byte = 0;
  EXPECT_EQ(::recv(clients_.back(), &byte, 1, 0), 0);
  Close();
  EXPECT_TRUE(Serves());
}

TEST_F(AcceptorTest, AcceptsAgainAfterTheProcessHadNoDescriptorLeft) {
  Start(1 << 20);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  // The client's end of the last connection takes the last descriptor.
  rlimit low = before;
  low.rlim_cur = NextDescriptor() + 21;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  while (Connect() >= 0) absl::SleepFor(absl::Milliseconds(5));
  absl::SleepFor(absl::Milliseconds(200));  // several attempts to accept
  Close();
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_TRUE(Serves());
}

TEST_F(AcceptorTest, AStoppedPortRefusesConnections) {
  Start(0);
  acceptor_->Stop();
  EXPECT_EQ(Connect(), -1);
}

TEST(AcceptorListenTest, AnAddressThatIsTakenOrUnknownIsUnavailable) {
  grpc::ServerBuilder builder;
  AcceptorOptions options;
  options.host = "127.0.0.1";
  options.credentials = grpc::InsecureServerCredentials();
  const auto first = Acceptor::Listen(options, builder);
  ASSERT_TRUE(first.ok()) << first.status();
  options.port = (*first)->port();
  EXPECT_EQ(Acceptor::Listen(options, builder).status().code(), absl::StatusCode::kUnavailable);
  options.host = "256.0.0.1";
  EXPECT_EQ(Acceptor::Listen(options, builder).status().code(), absl::StatusCode::kUnavailable);
}

TEST(DescriptorLimitTest, IsRaisedButNeverLowered) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit low = before;
  low.rlim_cur = 100;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  EXPECT_EQ(RaiseDescriptorLimit(50), 100);
  EXPECT_EQ(RaiseDescriptorLimit(150), 150);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
}

}  // namespace
}  // namespace tern::rpc
