// SIGTERM and SIGINT of ternd.
#pragma once

namespace tern {

// They are blocked in every thread but one, which waits for them:
// - before Wait() is called, while the models load, the process ends at once with status 0: nothing
//   is served yet, and what is in the repository survives any end;
// - in Wait(), it returns;
// - after that, who asks again wants it to end at once: status kExitBySecondSignal. A second one
//   within 200 ms belongs to the first: timeout(1) and some supervisors signal the process and its
//   group.
class StopSignals {
 public:
  static constexpr int kExitBySecondSignal = 3;

  // In main(), before any thread starts: they inherit it.
  static void Block();
  // Once, when the log can be used. The thread ends with the process.
  static void Start();
  // Returns the signal.
  static int Wait();
};

}  // namespace tern
