// Dynamic batching: a bounded queue of tasks and a few workers that take them in batches. A template on the
// task; knows no tensors.
//
// Latency contract. A task that Submit() accepted is handed to `run`, or finished through `reject`, no
// later than max_delay + (time of one batch) * ceil(max_queue / (max_batch * instances)).
// Every accepted task ends in exactly one of the two, once. Tasks of one batch were submitted in
// that order; batches may overtake each other when instances > 1.
#ifndef TERN_SERVER_SCHEDULER_BATCHER_H_
#define TERN_SERVER_SCHEDULER_BATCHER_H_

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/base/clock.h"

namespace tern::scheduler {

struct BatcherOptions {
  int max_batch = 8;                                   // >= 1
  absl::Duration max_delay = absl::Microseconds(500);  // wait for company, from the oldest task's arrival; 0 = none
  int max_queue = 1024;                                // waiting tasks; >= 1
  int instances = 1;                                   // worker threads; >= 1
  const Clock* clock = Clock::Real();
};

// A waiting task. T is movable.
template <typename T>
struct Queued {
  T task;
  absl::Time deadline = absl::InfiniteFuture();
  absl::Time enqueued;
};

// Thread safe.
template <typename T>
class Batcher {
 public:
  // `run(instance, batch)`: called on worker thread `instance` (0..instances-1) with 1..max_batch tasks.
  // `reject(task, status)`: DEADLINE_EXCEEDED (its deadline passed, or would pass before the estimated end of its
  //   batch), CANCELLED (`cancelled(task)` said so) or UNAVAILABLE (draining). Called without the lock.
  // `depth(n)`: the queue's length changed (may be empty).
  struct Callbacks {
    std::function<void(int instance, std::vector<Queued<T>> batch)> run;
    std::function<void(Queued<T> task, absl::Status status)> reject;
    std::function<bool(const T& task)> cancelled;
    std::function<void(int n)> depth;
  };
  Batcher(BatcherOptions options, Callbacks callbacks);
  // Drain() and join.
  ~Batcher();

  // Accepts the task or leaves it untouched: RESOURCE_EXHAUSTED (queue full, with the limit),
  // DEADLINE_EXCEEDED (passed already, or the estimated wait exceeds it), UNAVAILABLE (draining).
  absl::Status Submit(T& task, absl::Time deadline);

  // Accepts nothing more, runs what is queued, returns when the last batch is done. Idempotent.
  void Drain();

  int depth() const;
  // Exponentially smoothed wall time of one batch; 0 until the first.
  absl::Duration batch_time() const;
};

}  // namespace tern::scheduler

#endif  // TERN_SERVER_SCHEDULER_BATCHER_H_
