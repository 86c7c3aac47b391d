// The decisions of dynamic batching, without threads, locks or waiting: what is accepted, what is
// taken now, when to look again. Time comes in as an argument, so every decision can be tested
// exactly.
#ifndef TERN_SERVER_SCHEDULER_BATCH_QUEUE_H_
#define TERN_SERVER_SCHEDULER_BATCH_QUEUE_H_

#include <algorithm>
#include <deque>
#include <functional>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/base/clock.h"

namespace tern::scheduler {

struct BatcherOptions {
  int max_batch = 8;  // >= 1
  // How long a batch that is not full waits for company, from its oldest task's arrival; 0 = not at
  // all. A task whose deadline is too near for that sends the batch off at once.
  absl::Duration max_delay = absl::Microseconds(500);
  int max_queue = 1024;  // waiting tasks; >= 1
  int instances = 1;     // worker threads; >= 1
  const Clock* clock = Clock::Real();
};

// A waiting task. T is movable.
template <typename T>
struct Queued {
  T task;
  absl::Time deadline = absl::InfiniteFuture();
  absl::Time enqueued;
};

// Not thread safe. `now` must not run backwards by more than the clock does; nothing breaks if it
// does.
template <typename T>
class BatchQueue {
 public:
  struct Rejection {
    Queued<T> task;
    absl::Status status;
  };

  // What a worker does next. Exactly one of: run `batch`; wait until `wake_at`; leave.
  // `rejections` are delivered in every case.
  struct Step {
    std::vector<Queued<T>> batch;
    std::vector<Rejection> rejections;
    absl::Time wake_at = absl::InfiniteFuture();  // infinite: until something is submitted
    bool leave = false;                           // draining and empty
  };

  // `cancelled` may be null.
  BatchQueue(const BatcherOptions& options, std::function<bool(const T&)> cancelled)
      : options_(options), cancelled_(std::move(cancelled)) {
    options_.max_batch = std::max(1, options_.max_batch);
    options_.max_queue = std::max(1, options_.max_queue);
    options_.instances = std::max(1, options_.instances);
    options_.max_delay = std::max(absl::ZeroDuration(), options_.max_delay);
  }

  // Takes `task` or leaves it untouched with the reason (see Batcher::Submit). Dead tasks that were
  // dropped to make room are appended to `rejections`, whatever the outcome.
  absl::Status Submit(T& task, absl::Time deadline, absl::Time now,
                      std::vector<Rejection>& rejections) {
    if (draining_)
      return absl::UnavailableError(
          "the queue is draining: the model is being unloaded or replaced");
    if (deadline <= now) {
      return absl::DeadlineExceededError(absl::StrCat("the deadline passed ",
                                                      absl::FormatDuration(now - deadline),
                                                      " before the image was queued"));
    }
    if (size() >= options_.max_queue) DropDead(now, rejections);
    if (size() >= options_.max_queue) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "the queue is full: ", size(), " images wait, the limit is ", options_.max_queue));
    }
    const absl::Duration estimate = EstimatedTimeToEnd(now);
    if (now + estimate > deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "the deadline is in ", absl::FormatDuration(deadline - now), ", ", size(),
          " images wait and the result is expected in ", absl::FormatDuration(estimate)));
    }
    queue_.push_back(Queued<T>{std::move(task), deadline, now});
    return absl::OkStatus();
  }

  // When the batch at the front leaves even if it is not full; infinite if the queue is empty.
  // Looks at max_batch tasks.
  absl::Time LeaveAt() const {
    if (queue_.empty()) return absl::InfiniteFuture();
    const absl::Time at = queue_.front().enqueued + options_.max_delay;
    const int count = std::min(size(), options_.max_batch);
    for (int i = 0; i < count; ++i) {
      // One more max_delay of slack: waiting until the last moment would turn a late wake-up into a
      // miss.
      if (queue_[i].deadline < at + batch_time_ + options_.max_delay)
        return std::min(at, queue_[i].enqueued);
    }
    return at;
  }

  // Called by a worker that is free. A returned batch counts as running until Finished().
  Step Next(absl::Time now) {
    Step step;
    if (!draining_ && size() < options_.max_batch && !queue_.empty()) {
      const absl::Time wake_at = LeaveAt();
      if (now < wake_at) {
        step.wake_at = wake_at;
        return step;
      }
    }
    Take(now, step);
    if (!step.batch.empty()) {
      running_.push_back(now);
    } else {
      step.leave = draining_;  // Take() emptied the queue
    }
    return step;
  }

  // The batch that Next() returned at `started` has ended.
  void Finished(absl::Time started, absl::Time now) {
    const auto it = std::find(running_.begin(), running_.end(), started);
    if (it != running_.end()) running_.erase(it);
    const absl::Duration time = std::max(absl::ZeroDuration(), now - started);
    // A quarter of each new batch: follows a change of load within a few batches, forgets one
    // hiccup as fast.
    batch_time_ = measured_ ? batch_time_ + (time - batch_time_) / 4 : time;
    measured_ = true;
  }

  void Drain() { draining_ = true; }
  bool draining() const { return draining_; }
  int size() const { return static_cast<int>(queue_.size()); }
  int running() const { return static_cast<int>(running_.size()); }
  absl::Duration batch_time() const { return batch_time_; }
  const BatcherOptions& options() const { return options_; }

 private:
  // Expected time from `now` to the end of the batch of a task queued now. 0 while a worker is
  // free to take it: an estimate alone never keeps work from an idle worker (so a wrong estimate
  // corrects itself).
  absl::Duration EstimatedTimeToEnd(absl::Time now) const {
    const int free = options_.instances - running();
    const int batches_ahead = size() / options_.max_batch;
    if (batches_ahead < free) return absl::ZeroDuration();
    absl::Duration first_free = absl::ZeroDuration();
    if (free <= 0) {
      const absl::Time oldest = *std::min_element(running_.begin(), running_.end());
      first_free = std::max(absl::ZeroDuration(), oldest + batch_time_ - now);
    }
    const int rounds = batches_ahead / options_.instances;
    return first_free + batch_time_ * (rounds + 1);
  }

  bool IsCancelled(const Queued<T>& queued) const { return cancelled_ && cancelled_(queued.task); }

  static absl::Status Passed(absl::Time deadline, absl::Time now) {
    return absl::DeadlineExceededError(absl::StrCat("the deadline passed ",
                                                    absl::FormatDuration(now - deadline),
                                                    " ago while the image waited in the queue"));
  }

  // Removes cancelled and late tasks, keeps the order of the others.
  void DropDead(absl::Time now, std::vector<Rejection>& rejections) {
    std::deque<Queued<T>> alive;
    for (Queued<T>& queued : queue_) {
      if (IsCancelled(queued)) {
        rejections.push_back(
            {std::move(queued), absl::CancelledError("cancelled while it waited in the queue")});
      } else if (queued.deadline <= now) {
        absl::Status status = Passed(queued.deadline, now);
        rejections.push_back({std::move(queued), std::move(status)});
      } else {
        alive.push_back(std::move(queued));
      }
    }
    queue_ = std::move(alive);
  }

  // Up to max_batch live tasks from the front. Leaves an empty batch only if the queue is empty.
  void Take(absl::Time now, Step& step) {
    std::vector<Queued<T>> hopeless;
    while (!queue_.empty() && static_cast<int>(step.batch.size()) < options_.max_batch) {
      Queued<T> queued = std::move(queue_.front());
      queue_.pop_front();
      if (IsCancelled(queued)) {
        step.rejections.push_back(
            {std::move(queued), absl::CancelledError("cancelled while it waited in the queue")});
      } else if (queued.deadline <= now) {
        absl::Status status = Passed(queued.deadline, now);
        step.rejections.push_back({std::move(queued), std::move(status)});
      } else if (queued.deadline < now + batch_time_) {
        hopeless.push_back(std::move(queued));
      } else {
        step.batch.push_back(std::move(queued));
      }
    }
    // Nothing else to do: try the task with most time left, because the estimate may be wrong and
    // only a batch can correct it.
    if (step.batch.empty() && !hopeless.empty()) {
      const auto best =
          std::max_element(hopeless.begin(), hopeless.end(),
                           [](const auto& a, const auto& b) { return a.deadline < b.deadline; });
      step.batch.push_back(std::move(*best));
      hopeless.erase(best);
    }
    for (Queued<T>& queued : hopeless) {
      absl::Status status = absl::DeadlineExceededError(
          absl::StrCat("the deadline is in ", absl::FormatDuration(queued.deadline - now),
                       ", a batch takes ", absl::FormatDuration(batch_time_)));
      step.rejections.push_back({std::move(queued), std::move(status)});
    }
  }

  BatcherOptions options_;
  std::function<bool(const T&)> cancelled_;
  std::deque<Queued<T>> queue_;
  std::vector<absl::Time> running_;  // start of each batch that runs
  absl::Duration batch_time_ = absl::ZeroDuration();
  bool measured_ = false;
  bool draining_ = false;
};

}  // namespace tern::scheduler

#endif  // TERN_SERVER_SCHEDULER_BATCH_QUEUE_H_
