// SIGTERM and SIGINT of ternd.
#pragma once

namespace tern {

// One thread acts on them:
// - before Serve() is called, while the models load, the process ends at once with status 0: nothing
//   is served yet, and what is in the repository survives any end;
// - then Wait() returns;
// - after that, who asks again wants it to end at once: status kExitBySecondSignal. A second one
//   within 200 ms belongs to the first: timeout(1) and some supervisors signal the process and its
//   group.
class StopSignals {
 public:
  static constexpr int kExitBySecondSignal = 3;

  // In main(), before it starts a thread: those inherit that the signals are blocked, so that no call
  // of theirs is interrupted. Threads that a library started before main() (OpenBLAS does) may get
  // them all the same, and hand them on. Ends the process if there is no descriptor for a pipe.
  static void Block();
  // Once, when the log can be used; what came since Block() counts. The thread ends with the process.
  static void Start();
  // Calls may be taken from now on: the first signal has them answered.
  static void Serve();
  // Returns the signal, also one that came since Serve().
  static int Wait();
};

}  // namespace tern
