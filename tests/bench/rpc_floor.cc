// What gRPC itself costs: a call of BYTES to a server in another process that does nothing but keep
// a thread busy for BUSY microseconds, as decoding does. Prints the median, in milliseconds, of the
// time at the client less BUSY. The pause matters: the longer a CPU sleeps between two messages,
// the longer it takes to wake up.
//
//   rpc_floor BYTES BUSY CALLS
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <iostream>
#include <mutex>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

class Busy final : public grpc::CallbackGenericService {
 public:
  explicit Busy(std::chrono::microseconds busy) : busy_(busy) {}

 private:
  class Call final : public grpc::ServerGenericBidiReactor {
   public:
    explicit Call(std::chrono::microseconds busy) : busy_(busy) { StartRead(&request_); }
    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::CANCELLED);
      for (const auto end = Clock::now() + busy_; Clock::now() < end;) {
      }
      const grpc::Slice slice("an answer");
      answer_ = grpc::ByteBuffer(&slice, 1);
      StartWriteAndFinish(&answer_, {}, grpc::Status::OK);
    }
    void OnDone() override { delete this; }

   private:
    const std::chrono::microseconds busy_;
    grpc::ByteBuffer request_, answer_;
  };
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override {
    return new Call(busy_);
  }

  const std::chrono::microseconds busy_;
};

int Serve(int port_pipe, std::chrono::microseconds busy) {
  Busy service(busy);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || write(port_pipe, &port, sizeof(port)) != sizeof(port)) return 1;
  server->Wait();  // for SIGTERM
  return 0;
}

// Milliseconds; negative if the call failed.
double Call(grpc::GenericStub& stub, const grpc::ByteBuffer& request) {
  grpc::ClientContext context;
  grpc::ByteBuffer answer;
  std::mutex mutex;
  std::condition_variable wake;
  bool done = false;
  grpc::Status result;
  const auto start = Clock::now();
  stub.UnaryCall(&context, "/bench.Floor/Call", {}, &request, &answer, [&](grpc::Status status) {
    std::lock_guard lock(mutex);
    result = std::move(status);
    done = true;
    wake.notify_one();
  });
  std::unique_lock lock(mutex);
  wake.wait(lock, [&] { return done; });
  const std::chrono::duration<double, std::milli> time = Clock::now() - start;
  return result.ok() ? time.count() : -1;
}

}  // namespace

int main(int argc, char** argv) {
  size_t bytes = 0;
  int64_t busy_us = 0;
  int calls = 0;
  CLI::App app("What gRPC alone costs: see the source");
  app.add_option("bytes", bytes, "Of a request")->required();
  app.add_option("busy", busy_us, "Microseconds that the server works")
      ->required()
      ->check(CLI::NonNegativeNumber);
  app.add_option("calls", calls, "How many")->required()->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  const std::chrono::microseconds busy(busy_us);
  int pipes[2];
  if (pipe(pipes) != 0) return 1;
  // Before gRPC has threads.
  const pid_t server = fork();
  if (server == 0) return Serve(pipes[1], busy);
  close(pipes[1]);
  int port = 0;
  std::vector<double> times;
  if (server > 0 && read(pipes[0], &port, sizeof(port)) == sizeof(port)) {
    grpc::GenericStub stub(grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                                               grpc::InsecureChannelCredentials()));
    const grpc::Slice slice(std::string(bytes, 'x'));
    const grpc::ByteBuffer request(&slice, 1);
    for (int i = 0; i < calls; ++i) {
      if (const double time = Call(stub, request); time >= 0) times.push_back(time);
    }
  }
  kill(server, SIGTERM);
  waitpid(server, nullptr, 0);
  if (times.empty()) {
    std::cerr << "rpc_floor: no call succeeded\n";
    return 1;
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  std::cout << times[times.size() / 2] - busy.count() / 1e3 << "\n";
  return 0;
}
