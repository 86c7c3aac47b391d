#include "server/app/stop_signals.h"

#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <thread>

#include "absl/base/const_init.h"
#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/base/log_fields.h"

namespace tern {
namespace {

using Steady = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kSameRequest{200};

absl::Mutex mutex(absl::kConstInit);
bool serving ABSL_GUARDED_BY(mutex) = false;
int received ABSL_GUARDED_BY(mutex) = 0;

sigset_t Signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

const char* Name(int signal) { return signal == SIGTERM ? "SIGTERM" : "SIGINT"; }

void Watch() {
  const sigset_t signals = Signals();
  Steady::time_point first;
  while (true) {
    int signal = 0;
    sigwait(&signals, &signal);
    absl::MutexLock lock(&mutex);
    if (!serving) {
      TERN_LOG_INFO("{}: ends before it was ready", Name(signal));
      std::_Exit(0);
    }
    if (received == 0) {
      received = signal;
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
  const sigset_t signals = Signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

void StopSignals::Start() { std::thread(Watch).detach(); }

int StopSignals::Wait() {
  absl::MutexLock lock(&mutex);
  serving = true;
  mutex.Await(absl::Condition(+[](int* signal) { return *signal != 0; }, &received));
  return received;
}

}  // namespace tern
