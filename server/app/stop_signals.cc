#include "server/app/stop_signals.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "server/base/log_fields.h"

namespace tern {
namespace {

using Steady = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kSameRequest{200};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  bool serving = false;
  int received = 0;
};

// Never destroyed: the thread may outlive main().
State& Shared() {
  static State& state = *new State;
  return state;
}

sigset_t Signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

const char* Name(int signal) { return signal == SIGTERM ? "SIGTERM" : "SIGINT"; }

// From the handler to the thread: a byte for each signal.
int pipe_ends[2] = {-1, -1};

void HandOn(int signal) {
  const int saved = errno;
  const auto byte = static_cast<unsigned char>(signal);
  // A full pipe has 65,536 of them: one more says nothing new.
  [[maybe_unused]] const ssize_t written = ::write(pipe_ends[1], &byte, 1);
  errno = saved;
}

void Watch() {
  const sigset_t signals = Signals();
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  Steady::time_point first;
  while (true) {
    unsigned char signal = 0;
    if (::read(pipe_ends[0], &signal, 1) != 1) continue;  // interrupted by the signal itself
    State& state = Shared();
    std::lock_guard<std::mutex> lock(state.mutex);
    if (!state.serving) {
      TERN_LOG_INFO("{}: ends before it was ready", Name(signal));
      std::_Exit(0);
    }
    if (state.received == 0) {
      state.received = signal;
      state.changed.notify_all();
      first = Steady::now();
      TERN_LOG_INFO("{}: draining", Name(signal));
    } else if (Steady::now() - first > kSameRequest) {
      TERN_LOG_WARN("{} again: ends at once, running calls are lost", Name(signal));
      std::_Exit(StopSignals::kExitBySecondSignal);
    }
  }
}

}  // namespace

void StopSignals::Block() {
  if (::pipe2(pipe_ends, O_CLOEXEC) != 0 || ::fcntl(pipe_ends[1], F_SETFL, O_NONBLOCK) != 0) {
    std::perror("ternd: pipe");
    std::_Exit(1);
  }
  const sigset_t signals = Signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  struct sigaction action = {};
  action.sa_handler = HandOn;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGTERM, SIGINT}) ::sigaction(signal, &action, nullptr);
}

void StopSignals::Start() { std::thread(Watch).detach(); }

void StopSignals::Serve() {
  State& state = Shared();
  std::lock_guard<std::mutex> lock(state.mutex);
  state.serving = true;
}

int StopSignals::Wait() {
  State& state = Shared();
  std::unique_lock<std::mutex> lock(state.mutex);
  state.changed.wait(lock, [&] { return state.received != 0; });
  return state.received;
}

}  // namespace tern
