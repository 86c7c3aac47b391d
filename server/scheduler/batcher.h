// Dynamic batching: a bounded queue of tasks and a few workers that take them in batches. A
// template on the task; knows no tensors. The decisions are BatchQueue's; this class adds threads
// and the lock.
//
// Latency contract. A task that Submit() accepted is handed to `run`, or finished through `reject`,
// no later than max_delay + (time of one batch) * ceil(max_queue / (max_batch * instances)) if all
// tasks have one priority and no deadlines; else kFairPlace times as late at worst (see
// BatchQueue). Every accepted task ends in exactly one of the two, once. Batches may overtake each
// other when instances > 1.
#ifndef TERN_SERVER_SCHEDULER_BATCHER_H_
#define TERN_SERVER_SCHEDULER_BATCHER_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/scheduler/batch_queue.h"

namespace tern::scheduler {

// Thread safe.
template <typename T>
class Batcher {
 public:
  // `run(instance, batch)`: called on a worker thread with 1..max_batch tasks, for each `instance`
  //   (0..instances-1) once at a time. Required.
  // `reject(task, status)`: DEADLINE_EXCEEDED (its deadline passed, or would pass before the
  //   estimated end of its batch), CANCELLED (`cancelled(task)` said so) or RESOURCE_EXHAUSTED (it
  //   made room for a higher priority). Called without the lock, on a worker or on a thread in
  //   Submit() or Reserve(). Required.
  // `cancelled(task)`: may be empty. Called with the lock held: quick, and no call of the Batcher.
  // `depth(n)`: the queue's length changed; may be empty. As `cancelled`; calls come in the order
  // of the changes.
  struct Callbacks {
    std::function<void(int instance, std::vector<Queued<T>> batch)> run;
    std::function<void(Queued<T> task, absl::Status status)> reject;
    std::function<bool(const T& task)> cancelled;
    std::function<void(int n)> depth;
  };

  Batcher(BatcherOptions options, Callbacks callbacks)
      : clock_(options.clock),
        callbacks_(std::move(callbacks)),
        queue_(options, callbacks_.cancelled) {
    const int instances = queue_.options().instances;
    for (int i = instances - 1; i >= 0; --i) free_.push_back(i);
    workers_.reserve(instances);
    for (int i = 0; i < instances; ++i) workers_.emplace_back([this] { Work(); });
  }

  // Drain() and join.
  ~Batcher() {
    Drain();
    for (std::thread& worker : workers_) worker.join();
  }
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  // Accepts the task or leaves it untouched: RESOURCE_EXHAUSTED (queue full, with the limit and a
  // RetryAfter hint), DEADLINE_EXCEEDED (passed already, or the estimated end of its batch is
  // later), UNAVAILABLE (draining). `reserved`: gives back the place that Reserve() kept, so that
  // the queue cannot be full, unless tasks of a higher priority took it.
  absl::Status Submit(T& task, const Terms& terms, bool reserved = false) {
    Rejections rejections;
    std::unique_lock<std::mutex> lock(mutex_);
    const absl::Status status = queue_.Submit(task, terms, clock_->Now(), rejections, reserved);
    if (status.ok() || !rejections.empty()) TellDepth();
    std::condition_variable* wake = nullptr;
    if (status.ok()) {
      if (!collecting_) {
        wake = &idle_;
      } else if (queue_.LeaveAt() < collect_until_) {
        wake = &collect_;
      }
    }
    Deliver(std::move(lock), std::move(rejections), wake);
    return status;
  }

  // An instance that is in use until this is destroyed.
  class Turn {
   public:
    Turn(Turn&& other) noexcept
        : batcher_(std::exchange(other.batcher_, nullptr)),
          instance_(other.instance_),
          started_(other.started_) {}
    Turn& operator=(Turn&&) = delete;
    ~Turn() {
      if (batcher_ != nullptr) batcher_->EndTurn(*this);
    }
    int instance() const { return instance_; }
    absl::Time started() const { return started_; }

   private:
    friend class Batcher;
    Turn(Batcher* batcher, int instance, absl::Time started)
        : batcher_(batcher), instance_(instance), started_(started) {}
    Batcher* batcher_;
    int instance_;
    absl::Time started_;
  };

  // Instead of Submit, for a thread that would run the task itself rather than wake a worker: an
  // instance, if nothing waits and a worker would run the task at once and alone. Nothing if not;
  // then Submit says why, or takes it. Neither `run` nor `reject` is called.
  std::optional<Turn> TakeTurn(const Terms& terms, bool reserved = false) {
    std::lock_guard<std::mutex> lock(mutex_);
    const absl::Time now = clock_->Now();
    if (free_.empty() || !queue_.Start(terms, now, reserved)) return std::nullopt;
    ++outside_;
    return Turn(this, TakeInstance(), now);
  }

  // Keeps a place for a task that will be submitted in about `ready_in`, or says as Submit why it
  // would not be taken. Each OK is followed by one Submit(..., true) or Unreserve() with terms of
  // the same priority. Does not hold up Drain().
  absl::Status Reserve(const Terms& terms, absl::Duration ready_in) {
    Rejections rejections;
    std::unique_lock<std::mutex> lock(mutex_);
    const absl::Status status = queue_.Reserve(terms, ready_in, clock_->Now(), rejections);
    if (!rejections.empty()) TellDepth();
    Deliver(std::move(lock), std::move(rejections));
    return status;
  }
  void Unreserve(const Terms& terms) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.Unreserve(terms);
  }

  // Expected time from now to the end of a task that is submitted in `ready_in`; just `ready_in` if
  // a worker is free.
  absl::Duration Expect(const Terms& terms, absl::Duration ready_in = absl::ZeroDuration()) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.Expect(terms, ready_in, clock_->Now());
  }

  // Accepts nothing more, runs what is queued, returns when the last batch is done. Idempotent; not
  // to be called from a callback.
  void Drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    queue_.Drain();
    idle_.notify_all();
    collect_.notify_all();
    drained_.wait(lock, [this] { return queue_.size() == 0 && outside_ == 0; });
  }

  int depth() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.size();
  }

  // What has been learned.
  struct Learned {
    absl::Duration batch_time;  // of a batch of `images`; 0 until the first batch
    int batch_limit = 0;        // the largest batch and the delay in force
    absl::Duration delay;
  };
  Learned learned(int images) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return {queue_.batch_time(images), queue_.batch_limit(), queue_.delay()};
  }

 private:
  using Rejections = std::vector<typename BatchQueue<T>::Rejection>;

  // `wake` (may be null) gets its worker without the lock, which that would have to wait for.
  void Deliver(std::unique_lock<std::mutex> lock, Rejections rejections,
               std::condition_variable* wake = nullptr) {
    if (!rejections.empty()) ++outside_;
    lock.unlock();
    if (wake != nullptr) wake->notify_one();
    if (rejections.empty()) return;
    for (auto& rejection : rejections)
      callbacks_.reject(std::move(rejection.task), std::move(rejection.status));
    lock.lock();
    Return();
  }

  // At most one worker at a time waits for a batch to fill (collecting_); the others sleep until
  // there is something to do, so a task that arrives wakes one thread, not all.
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      // Threads with a Turn use instances, too.
      const bool none_free = free_.empty() && queue_.size() > 0;
      if (none_free || (collecting_ && !queue_.draining() && !queue_.Full())) {
        idle_.wait(lock);
        continue;
      }
      const absl::Time now = clock_->Now();
      typename BatchQueue<T>::Step step = queue_.Next(now);
      if (step.batch.empty() && step.rejections.empty()) {
        if (step.leave) return;
        Wait(lock, now, step.wake_at);
        continue;
      }
      const int images = static_cast<int>(step.batch.size());
      const int instance = images > 0 ? TakeInstance() : -1;
      TellDepth();
      if (queue_.size() > 0) idle_.notify_one();
      ++outside_;
      lock.unlock();
      for (auto& rejection : step.rejections) {
        callbacks_.reject(std::move(rejection.task), std::move(rejection.status));
      }
      if (images > 0) callbacks_.run(instance, std::move(step.batch));
      lock.lock();
      if (images > 0) {
        queue_.Finished(now, images, clock_->Now());
        free_.push_back(instance);
      }
      Return();
    }
  }

  int TakeInstance() {
    const int instance = free_.back();
    free_.pop_back();
    return instance;
  }

  void EndTurn(const Turn& turn) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.Finished(turn.started_, 1, clock_->Now());
    free_.push_back(turn.instance_);
    Return();
    // Workers that found no instance free wait for this one, or to leave.
    if (queue_.draining()) {
      idle_.notify_all();
    } else if (queue_.size() > 0) {
      idle_.notify_one();
    }
  }

  void Wait(std::unique_lock<std::mutex>& lock, absl::Time now, absl::Time until) {
    if (until == absl::InfiniteFuture()) {
      idle_.wait(lock);
      return;
    }
    collecting_ = true;
    collect_until_ = until;
    // At most a second at a time: the clock may have been set.
    collect_.wait_for(lock, absl::ToChronoNanoseconds(std::min(until - now, absl::Seconds(1))));
    collecting_ = false;
  }

  void TellDepth() {
    if (callbacks_.depth) callbacks_.depth(queue_.size());
  }

  void Return() {
    --outside_;
    if (queue_.size() == 0 && outside_ == 0) drained_.notify_all();
  }

  const Clock* const clock_;
  const Callbacks callbacks_;
  mutable std::mutex mutex_;
  BatchQueue<T> queue_;
  bool collecting_ = false;
  absl::Time collect_until_;
  std::vector<int> free_;  // instances
  int outside_ = 0;        // threads that run a batch or deliver rejections without the lock
  std::condition_variable idle_;
  std::condition_variable collect_;
  std::condition_variable drained_;
  std::vector<std::thread> workers_;
};

}  // namespace tern::scheduler

#endif  // TERN_SERVER_SCHEDULER_BATCHER_H_
