#include "client/child_process.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

extern char** environ;

namespace tern::client {
namespace {

std::atomic<pid_t> child{0};  // 0: not yet started, or over
std::atomic<int> waiting{0};  // a signal that the child has still to get

void Deliver() {
  const pid_t pid = child;
  if (pid == 0) return;
  if (const int signal = waiting.exchange(0)) kill(pid, signal);
}

// A signal may come before the child's number is known, on any thread. It is noted first and the
// number read afterwards, RunInForeground does it the other way round: one of the two delivers it.
void PassOn(int signal) {
  waiting = signal;
  Deliver();
}

// Sets a handler; the destructor puts the former one back.
class ScopedHandler {
 public:
  ScopedHandler(int signal, void (*handler)(int)) : signal_(signal) {
    struct sigaction action = {};
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    sigaction(signal_, &action, &before_);
  }
  ~ScopedHandler() { sigaction(signal_, &before_, nullptr); }
  ScopedHandler(const ScopedHandler&) = delete;
  ScopedHandler& operator=(const ScopedHandler&) = delete;

 private:
  const int signal_;
  struct sigaction before_ = {};
};

}  // namespace

absl::StatusOr<std::string> FindProgram(const std::string& name) {
  std::vector<std::string> folders;
  std::error_code code;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", code);
  if (!code) folders.push_back(self.parent_path().string());
  if (const char* path = std::getenv("PATH")) {
    for (absl::string_view folder : absl::StrSplit(path, ':', absl::SkipEmpty())) {
      folders.emplace_back(folder);
    }
  }
  for (const std::string& folder : folders) {
    const std::string candidate = absl::StrCat(folder, "/", name);
    if (std::filesystem::is_regular_file(candidate, code) && access(candidate.c_str(), X_OK) == 0) {
      return candidate;
    }
  }
  return absl::NotFoundError(absl::StrCat(name, " is neither beside this program nor in PATH"));
}

absl::StatusOr<int> RunInForeground(const std::vector<std::string>& arguments) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) {
    argv.push_back(const_cast<char*>(argument.c_str()));
  }
  argv.push_back(nullptr);
  waiting = 0;
  const ScopedHandler interrupt(SIGINT, SIG_IGN), quit(SIGQUIT, SIG_IGN);
  const ScopedHandler terminate(SIGTERM, PassOn), hangup(SIGHUP, PassOn);
  // Ignored signals would stay ignored in the child.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t defaults;
  sigemptyset(&defaults);
  for (int signal : {SIGINT, SIGQUIT, SIGTERM, SIGHUP}) sigaddset(&defaults, signal);
  posix_spawnattr_setsigdefault(&attributes, &defaults);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
  pid_t pid = 0;
  const int error = posix_spawn(&pid, argv[0], nullptr, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) {
    const std::string message = absl::StrCat(arguments[0], ": ", std::strerror(error));
    return error == EACCES ? absl::PermissionDeniedError(message) : absl::NotFoundError(message);
  }
  child = pid;
  Deliver();
  // The number stays the child's until waitpid: no signal can reach another process.
  siginfo_t info;
  int status = 0, result = 0;
  while ((result = waitid(P_PID, pid, &info, WEXITED | WNOWAIT)) < 0 && errno == EINTR) {
  }
  child = 0;
  if (result < 0 || waitpid(pid, &status, 0) < 0) {
    return absl::InternalError(
        absl::StrCat("waiting for ", arguments[0], ": ", std::strerror(errno)));
  }
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace tern::client
