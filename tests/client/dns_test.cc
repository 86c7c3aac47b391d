// A name whose addresses change, as a rolling update of pods changes them.

#include <arpa/inet.h>
#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/tern_client.h"
#include "tern/v1/classifier.grpc.pb.h"

namespace tern::client {
namespace {

// Answers every question for IPv4 addresses with the same list, others with none.
class NameServer {
 public:
  NameServer() : socket_(::socket(AF_INET, SOCK_DGRAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ::bind(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    socklen_t size = sizeof(address);
    ::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Run(); });
  }
  ~NameServer() {
    ::shutdown(socket_, SHUT_RD);  // ends recvfrom
    thread_.join();
    ::close(socket_);
  }

  void Set(std::vector<std::string> addresses) {
    std::lock_guard lock(mutex_);
    addresses_ = std::move(addresses);
  }
  int port() const { return port_; }

 private:
  void Run() {
    std::array<char, 512> query;
    sockaddr_in from = {};
    socklen_t size = sizeof(from);
    ssize_t got;
    // A question: 12 bytes of header, the name's parts with their lengths, 0, two of type, two of
    // class.
    while ((got = ::recvfrom(socket_, query.data(), query.size(), 0,
                             reinterpret_cast<sockaddr*>(&from), &size)) > 0) {
      const std::string text(query.data(), static_cast<size_t>(got));
      const size_t end = text.find('\0', 12) + 5;
      const bool ipv4 = text.substr(end - 4, 2) == std::string("\0\1", 2);
      std::string answers;
      char count = 0;
      std::lock_guard lock(mutex_);
      for (const std::string& address : ipv4 ? addresses_ : std::vector<std::string>()) {
        in_addr binary = {};
        ::inet_pton(AF_INET, address.c_str(), &binary);
        // The question's name, type A, class IN, valid for 1 s, 4 bytes.
        answers += std::string("\xc0\x0c\0\1\0\1\0\0\0\1\0\4", 12);
        answers.append(reinterpret_cast<const char*>(&binary), sizeof(binary));
        ++count;
      }
      std::string reply = text.substr(0, 2);
      reply += std::string("\x85\x80\0\1\0", 5) + count + std::string("\0\0\0\0", 4);
      reply += text.substr(12, end - 12) + answers;
      ::sendto(socket_, reply.data(), reply.size(), 0, reinterpret_cast<sockaddr*>(&from), size);
    }
  }

  const int socket_;
  int port_ = 0;
  std::mutex mutex_;
  std::vector<std::string> addresses_;
  std::thread thread_;
};

// A server at an address of its own.
class Replica : public v1::ImageClassifier::Service {
 public:
  // Port 0: a free one.
  Replica(const std::string& address, int port) : address(address), port(port) {
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort(absl::StrCat(address, ":", port), grpc::InsecureServerCredentials(),
                             &this->port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~Replica() override { Stop(); }
  void Stop() {
    if (server_ != nullptr) server_->Shutdown();
    server_ = nullptr;
  }
  bool runs() const { return server_ != nullptr; }
  grpc::Status Classify(grpc::ServerContext*, const v1::ClassifyRequest*,
                        v1::ClassifyResponse*) override {
    ++calls;
    return grpc::Status::OK;
  }

  const std::string address;
  int port;
  std::atomic<int> calls{0};

 private:
  std::unique_ptr<grpc::Server> server_;
};

TEST(DnsTest, ServersReplacedOneAfterTheOtherAtNewAddressesAreFoundWithoutAFailedCall) {
  grpc::EnableDefaultHealthCheckService(true);
  std::vector<std::unique_ptr<Replica>> replicas;
  const auto start = [&] {
    const int port = replicas.empty() ? 0 : replicas[0]->port;
    replicas.push_back(
        std::make_unique<Replica>(absl::StrCat("127.0.7.", replicas.size() + 1), port));
    return replicas.back()->runs();
  };
  NameServer names;
  const auto publish = [&](size_t first) {
    std::vector<std::string> addresses;
    for (size_t i = first; i < replicas.size(); ++i) addresses.push_back(replicas[i]->address);
    names.Set(std::move(addresses));
  };
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(start());
  publish(0);

  ClientOptions options;
  options.server = absl::StrCat("dns://127.0.0.1:", names.port(), "/tern.test:", replicas[0]->port);
  const auto client = Client::Connect(options);
  ASSERT_TRUE(client.ok()) << client.status();
  std::atomic<bool> stop{false};
  int calls = 0, failed = 0;
  absl::Status last;
  std::thread caller([&] {
    for (; !stop; ++calls) {
      const absl::Status status = (*client)->Classify(v1::ClassifyRequest()).status();
      if (!status.ok()) {
        ++failed;
        last = status;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  });
  // Three are replaced within 9 s: less than the 30 s after which gRPC by itself asks a name server
  // again.
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(std::chrono::seconds(3));
    ASSERT_TRUE(start());
    publish(replicas.size() - 3);
    replicas[static_cast<size_t>(i)]->Stop();
  }
  for (int i = 0; i < 100 && replicas.back()->calls == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  stop = true;
  caller.join();
  EXPECT_EQ(failed, 0) << "of " << calls << ": " << last;
  EXPECT_GT(calls, 100);
  for (size_t i = 3; i < 6; ++i) EXPECT_GT(replicas[i]->calls, 0) << i;
}

}  // namespace
}  // namespace tern::client
