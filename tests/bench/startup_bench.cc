// From exec to serving: how long ternd takes to start with one model in its repository, and how
// much memory it then holds.
//
//   startup_bench --onnx FILE --ternd BIN [--schemes float,int8,ternary:4,ternary:64,int4:64]
//                 [--rounds 15] [--keep FOLDER] [-- FLAGS OF ternd]
//
// Each scheme's artifact (the ONNX file itself for float) is written to a repository of its own,
// whose pages are then in the cache. A start is timed from fork to the first answer SERVING of
// grpc.health.v1.Health/Check for the model, asked every half millisecond once the port takes
// connections; schemes take turns. Memory is VmRSS right after that, and the part of it that no
// file backs. --keep leaves the repositories in FOLDER/<n>, to be looked at with other tools.
#include <arpa/inet.h>
#include <fcntl.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "server/base/file.h"
#include "server/image/image.h"
#include "server/quant/self_test.h"
#include "tests/bench/networks.h"

namespace tern::engine {
namespace {

using Clock = std::chrono::steady_clock;
constexpr char kHost[] = "127.0.0.1";

void CheckOk(const absl::Status& status) {
  if (!status.ok()) Fail(status.ToString());
}

double MillisecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// A port that nobody listens on.
int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    Fail("no free port");
  }
  close(fd);
  return ntohs(address.sin_port);
}

bool Accepts(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const bool accepted = connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  close(fd);
  return accepted;
}

// Whether grpc.health.v1 calls `service` SERVING. The two messages have one field each.
bool Serves(grpc::GenericStub& stub, const std::string& service) {
  const std::string request =
      absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  grpc::Slice slice(request);
  grpc::ByteBuffer bytes(&slice, 1), reply;
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", bytes, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&reply, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (!status.ok() || !reply.Dump(&slices).ok() || slices.empty()) return false;
  return slices[0].size() == 2 && slices[0].begin()[0] == 0x08 && slices[0].begin()[1] == 1;
}

// A field of /proc/<pid>/status, in MiB.
double MemoryOf(pid_t pid, const std::string& field) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(file, line);) {
    if (absl::StartsWith(line, field + ":"))
      return std::strtod(&line[field.size() + 1], nullptr) / 1024;
  }
  return 0;
}

struct Start {
  double milliseconds = 0;
  double resident = 0, anonymous = 0;  // MiB
};

Start StartOnce(const std::string& ternd, const std::vector<std::string>& more,
                const std::string& repository) {
  const int port = FreePort();
  std::vector<std::string> words{ternd,
                                 "--repository=" + repository,
                                 absl::StrCat("--port=", port),
                                 "--admin_port=0",
                                 "--metrics_port=0",
                                 absl::StrCat("--host=", kHost),
                                 absl::StrCat("--admin_host=", kHost),
                                 absl::StrCat("--metrics_host=", kHost),
                                 "--log_level=warn"};
  words.insert(words.end(), more.begin(), more.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const Clock::time_point begin = Clock::now();
  // fork would copy the page tables of this process, which holds the network.
  pid_t pid = 0;
  if (posix_spawn(&pid, argv[0], nullptr, nullptr, argv.data(), environ) != 0) Fail("cannot run " + ternd);
  const auto alive = [&] {
    if (waitpid(pid, nullptr, WNOHANG) != 0) Fail(ternd + " ended");
    if (MillisecondsSince(begin) > 60e3) Fail(ternd + " does not serve after a minute");
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  };
  while (!Accepts(port)) alive();
  grpc::GenericStub stub(
      grpc::CreateChannel(absl::StrCat(kHost, ":", port), grpc::InsecureChannelCredentials()));
  while (!Serves(stub, "m")) alive();
  Start start{MillisecondsSince(begin), MemoryOf(pid, "VmRSS"), MemoryOf(pid, "RssAnon")};
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  return start;
}

// A repository with version 1 of model "m".
std::string MakeRepository(const std::string& root, const std::string& onnx,
                           const graph::Graph& graph, const testing::Ranges& ranges,
                           const std::string& scheme) {
  const std::string version = root + "/m/1";
  std::filesystem::create_directories(version);
  const v1::Preprocessing contract = Check(image::NamedPreprocessing("imagenet"));
  v1::ModelConfig config;
  *config.mutable_preprocessing() = contract;
  CheckOk(WriteFileAtomically(root + "/m/config.textproto", {config.DebugString()}));
  if (scheme == "float") {
    std::filesystem::copy_file(onnx, version + "/model.onnx");
    return version + "/model.onnx";
  }
  artifact::Artifact artifact;
  artifact.graph = InScheme(graph, ranges, scheme);
  artifact.preprocessing = contract;
  const auto plan = Check(Plan::Create(artifact.graph, {}));
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> images(8);
  for (std::vector<float>& image : images) {
    image.resize(plan->input_shape().elements());
    for (float& v : image) v = normal(random);
  }
  CheckOk(quant::AddSelfTest(*plan, 1, images, artifact));
  CheckOk(artifact::Write(artifact, version + "/model.tern"));
  return version + "/model.tern";
}

int Main(int argc, char** argv) {
  std::string onnx, ternd, keep;
  std::vector<std::string> schemes{"float", "int8", "int4:64", "ternary:4", "ternary:64"}, more;
  int rounds = 15;
  CLI::App app("From exec to serving, and the memory of it, for one network in several schemes");
  app.add_option("--onnx", onnx, "The network")->required()->check(CLI::ExistingFile);
  app.add_option("--ternd", ternd, "The server's program")->required()->check(CLI::ExistingFile);
  app.add_option("--schemes", schemes, "float, int8, ternary:N, int4:N")->delimiter(',');
  app.add_option("--keep", keep, "A folder for the repositories, which stays");
  app.add_option("--rounds", rounds, "Starts of each scheme")->check(CLI::PositiveNumber);
  app.add_option("flags", more, "After --: more flags of ternd");
  CLI11_PARSE(app, argc, argv);
  const graph::Graph graph = ReadNetwork(onnx);
  const testing::Ranges ranges = Measure(graph);
  std::string folder = keep.empty() ? "/tmp/startup_bench.XXXXXX" : keep;
  if (keep.empty() && mkdtemp(folder.data()) == nullptr) Fail("no temporary folder");
  std::vector<std::string> roots;
  std::vector<double> file_mib;
  for (const std::string& scheme : schemes) {
    roots.push_back(absl::StrCat(folder, "/", roots.size()));
    const std::string file = MakeRepository(roots.back(), onnx, graph, ranges, scheme);
    file_mib.push_back(static_cast<double>(std::filesystem::file_size(file)) / (1 << 20));
  }
  std::vector<std::vector<Start>> starts(schemes.size());
  for (int round = -1; round < rounds; ++round) {
    for (size_t s = 0; s < schemes.size(); ++s) {
      const Start start = StartOnce(ternd, more, roots[s]);
      if (round >= 0) starts[s].push_back(start);
    }
  }
  if (keep.empty()) std::filesystem::remove_all(folder);
  std::printf("%-12s %9s %9s %9s %9s %11s %13s\n", "scheme", "file MiB", "min ms", "median ms",
              "RSS MiB", "anon. MiB", "anon. / file");
  for (size_t s = 0; s < schemes.size(); ++s) {
    std::vector<Start>& all = starts[s];
    std::sort(all.begin(), all.end(),
              [](const Start& a, const Start& b) { return a.milliseconds < b.milliseconds; });
    const Start& middle = all[all.size() / 2];
    std::printf("%-12s %9.1f %9.1f %9.1f %9.1f %11.1f %13.2f\n", schemes[s].c_str(), file_mib[s],
                all[0].milliseconds, middle.milliseconds, middle.resident, middle.anonymous,
                middle.anonymous / file_mib[s]);
  }
  return 0;
}

}  // namespace
}  // namespace tern::engine

int main(int argc, char** argv) { return tern::engine::Main(argc, argv); }
