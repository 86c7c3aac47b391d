// A ternd process of its own with the demo model, on loopback ports.
#ifndef TERN_TESTS_TESTING_SERVER_PROCESS_H_
#define TERN_TESTS_TESTING_SERVER_PROCESS_H_

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace tern::testing {

// Waits until `condition` holds, for at most two minutes: a bound for what hangs, not a
// measurement.
template <typename Condition>
bool Eventually(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

// Not thread safe. Kills the process at the end.
class ServerProcess {
 public:
  explicit ServerProcess(std::string program) : program_(std::move(program)) {
    char folder[] = "/tmp/tern-process-XXXXXX";
    folder_ = ::mkdtemp(folder);
  }
  ~ServerProcess() {
    if (pid_ > 0) {
      Signal(SIGKILL);
      Wait();
    }
    std::filesystem::remove_all(folder_);
  }
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  // On the ports of the last start, if there was one.
  void Start(const std::vector<std::string>& more = {}) {
    const std::string ports = folder_ + "/ports.json";
    std::filesystem::remove(ports);
    const auto port = [&](const char* name) {
      return std::string("--") + name + "=" +
             (ports_.empty() ? "0" : std::to_string(ports_[name].get<int>()));
    };
    std::vector<std::string> words = {program_,
                                      "--repository=" + folder_ + "/models",
                                      "--demo",
                                      "--host=127.0.0.1",
                                      "--metrics_host=127.0.0.1",
                                      "--ports_file=" + ports,
                                      port("port"),
                                      port("admin_port"),
                                      port("metrics_port")};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ == 0) {
      if (std::freopen((folder_ + "/log").c_str(), "w", stderr) == nullptr) ::_exit(126);
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ASSERT_TRUE(Eventually([&] { return std::filesystem::exists(ports); })) << Log();
    ports_ = nlohmann::json::parse(std::ifstream(ports));
  }
  void Signal(int signal) { ::kill(pid_, signal); }
  // The exit status; nullopt if a signal ended it.
  std::optional<int> Wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    if (WIFEXITED(status)) return WEXITSTATUS(status);
    return std::nullopt;
  }

  std::string address() const { return "127.0.0.1:" + std::to_string(ports_["port"].get<int>()); }
  std::string admin() const {
    return "127.0.0.1:" + std::to_string(ports_["admin_port"].get<int>());
  }
  std::string Log() const {
    std::ifstream file(folder_ + "/log");
    return std::string(std::istreambuf_iterator<char>(file), {});
  }
  // The value of a series, 0 if there is none.
  double Metric(const std::string& series) const {
    const std::string command =
        "curl -fsS http://127.0.0.1:" + std::to_string(ports_["metrics_port"].get<int>()) +
        "/metrics";
    std::string text;
    if (FILE* pipe = ::popen(command.c_str(), "r")) {
      char buffer[4096];
      while (const size_t got = std::fread(buffer, 1, sizeof(buffer), pipe))
        text.append(buffer, got);
      ::pclose(pipe);
    }
    const size_t at = text.find("\n" + series + " ");
    return at == std::string::npos ? 0 : std::strtod(&text[at + series.size() + 2], nullptr);
  }
  double Classified() const {
    return Metric(R"(tern_requests_total{code="OK",method="Classify"})");
  }

 private:
  const std::string program_;
  std::string folder_;
  nlohmann::json ports_;
  pid_t pid_ = 0;
};

// Bytes of one of the demo model's photographs.
inline std::string DemoPhoto() {
  const char* source = std::getenv("TERN_SOURCE_DIR");
  for (const auto& file : std::filesystem::recursive_directory_iterator(
           std::string(source == nullptr ? "." : source) + "/models/demo/photos")) {
    if (file.path().extension() != ".jpg") continue;
    std::ifstream bytes(file.path(), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(bytes), {});
  }
  return "";
}

}  // namespace tern::testing

#endif  // TERN_TESTS_TESTING_SERVER_PROCESS_H_
