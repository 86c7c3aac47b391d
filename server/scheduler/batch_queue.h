// The decisions of dynamic batching, without threads, locks or waiting: what is accepted, what is
// taken now, when to look again. Time comes in as an argument, so every decision can be tested
// exactly.
//
// Order. Tasks leave by priority level (1 first), within a level by deadline, equal deadlines in
// order of submission. So that no stream of more urgent tasks can hold a task back for good, every
// kFairPlace-th place in a batch goes to the task that has waited longest, whatever its level and
// deadline: with n tasks waiting, each is taken within n * kFairPlace places.
#ifndef TERN_SERVER_SCHEDULER_BATCH_QUEUE_H_
#define TERN_SERVER_SCHEDULER_BATCH_QUEUE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/base/retry_after.h"
#include "server/scheduler/latency_model.h"

namespace tern::scheduler {

struct BatcherOptions {
  int max_batch = 8;  // >= 1
  // How long a batch that is not full waits for company although a worker is free, from its oldest
  // task's arrival. 0 = not at all: while all workers are busy, batches fill by themselves. A task
  // whose deadline is too near for the wait sends the batch off at once.
  absl::Duration max_delay = absl::ZeroDuration();
  // Batch sizes that run well, ascending, within 1..max_batch; may be empty. A batch leaves without
  // delay once it has one of these sizes, and one that leaves with fewer than max_batch tasks is
  // cut to the largest of these that can be filled.
  std::vector<int> preferred;
  int max_queue = 1024;  // waiting tasks and reserved places; >= 1
  int instances = 1;     // worker threads; >= 1
  // Priorities are 1 (first) .. priority_levels; >= 1. Tasks that name none have the middle one,
  // (priority_levels + 1) / 2.
  int priority_levels = 3;
  // > 0: max_delay and preferred are ignored. The largest batch and the delay follow from the
  // learned times and the arrival rate (see Tune), and tasks that are expected to end later than
  // `target` after their arrival are refused, so that nine in ten that are accepted keep it.
  absl::Duration target = absl::ZeroDuration();
  const char* name = "queue";  // in messages
  const Clock* clock = Clock::Real();
};

// What a task asks for.
struct Terms {
  absl::Time deadline = absl::InfiniteFuture();
  int priority = 0;  // 1..priority_levels; 0 = the middle level; larger ones count as the last
  // When the work for this task began, before it came here; the past infinity = now.
  absl::Time arrived = absl::InfinitePast();
};

// What orders waiting tasks.
struct Key {
  int level = 1;
  absl::Time deadline = absl::InfiniteFuture();
  uint64_t number = 0;  // of submission
  friend bool operator<(const Key& a, const Key& b) {
    return std::tie(a.level, a.deadline, a.number) < std::tie(b.level, b.deadline, b.number);
  }
};

// A waiting task. T is movable.
template <typename T>
struct Queued {
  T task;
  absl::Time enqueued;
  Key key;
};

// Events per second, over about the last second. Not thread safe.
class ArrivalRate {
 public:
  void Add(absl::Time now) {
    per_second_ = PerSecond(now) + 1;
    last_ = std::max(last_, now);
  }
  double PerSecond(absl::Time now) const {
    return per_second_ == 0 ? 0 : per_second_ * std::exp(-Seconds(now));
  }

 private:
  double Seconds(absl::Time now) const { return std::max(0.0, absl::ToDoubleSeconds(now - last_)); }
  double per_second_ = 0;
  absl::Time last_ = absl::InfinitePast();
};

// Not thread safe. `now` must not run backwards by more than the clock does; nothing breaks if it
// does.
template <typename T>
class BatchQueue {
 public:
  static constexpr int kFairPlace = 8;

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
      : options_(options), cancelled_(std::move(cancelled)), times_(options.max_batch), before_(1) {
    options_.max_batch = std::max(1, options_.max_batch);
    options_.max_queue = std::max(1, options_.max_queue);
    options_.instances = std::max(1, options_.instances);
    options_.priority_levels = std::max(1, options_.priority_levels);
    options_.max_delay = std::max(absl::ZeroDuration(), options_.max_delay);
    options_.target = std::max(absl::ZeroDuration(), options_.target);
    reserved_.assign(options_.priority_levels, 0);
    limit_ = options_.max_batch;
    delay_ = options_.max_delay;
    if (options_.target > absl::ZeroDuration()) {
      options_.preferred.clear();
      delay_ = absl::ZeroDuration();
    }
  }

  // Takes `task` or leaves it untouched with the reason (see Batcher::Submit). Tasks that were
  // dropped to make room, because they were dead or of a lower priority, are appended to
  // `rejections`, whatever the outcome. `reserved`: a place was kept for it, and is given back.
  absl::Status Submit(T& task, const Terms& terms, absl::Time now,
                      std::vector<Rejection>& rejections, bool reserved = false) {
    Count(terms, now, reserved);
    const absl::Time arrived = Arrived(terms, now);
    const Key key{Level(terms.priority), terms.deadline, next_number_++};
    absl::Status status = Admit(key, arrived, absl::ZeroDuration(), 0, now, rejections);
    if (!status.ok()) return status;
    queue_.insert(queue_.begin() + PlaceOf(key), Queued<T>{std::move(task), now, key});
    Displace(now, rejections);
    return status;
  }

  // Whether a task, submitted now, would run at once and alone. Then it counts as a running batch
  // of one until Finished(now, 1, ...), without having been queued, and the reserved place is
  // given back.
  bool Start(const Terms& terms, absl::Time now, bool reserved = false) {
    const bool waits_for_company = delay_ > absl::ZeroDuration() && limit_ > 1 && Preferred(1) == 0;
    if (draining_ || !queue_.empty() || running() >= options_.instances || waits_for_company ||
        terms.deadline <= now) {
      return false;
    }
    Count(terms, now, reserved);
    running_.push_back({now, 1});
    return true;
  }

  // Keeps a place for a task that needs about `ready_in` more before it can be submitted, or says
  // why Submit would refuse it: the same checks, as of then. A reservation ends with Submit or
  // Unreserve, with terms of the same priority. Reserved places of its own and more urgent levels
  // count as ahead of a task; those of less urgent ones do not hold it up, and if it takes the
  // place of one, Submit refuses the one that comes first.
  absl::Status Reserve(const Terms& terms, absl::Duration ready_in, absl::Time now,
                       std::vector<Rejection>& rejections) {
    rate_.Add(now);
    const Key key{Level(terms.priority), terms.deadline, next_number_++};
    absl::Status status =
        Admit(key, Arrived(terms, now), ready_in, ReservedUpTo(key.level), now, rejections);
    if (!status.ok()) return status;
    ++reserved_[key.level - 1];
    Displace(now, rejections);
    return status;
  }
  void Unreserve(const Terms& terms) {
    int& reserved = reserved_[Level(terms.priority) - 1];
    reserved = std::max(0, reserved - 1);
  }

  // Expected time from `now` to the end of a task submitted in `ready_in`; with a free worker only
  // `ready_in`.
  absl::Duration Expect(const Terms& terms, absl::Duration ready_in, absl::Time now) const {
    return TimeToEnd(PlaceOf({Level(terms.priority), terms.deadline, next_number_}), ready_in, now);
  }

  // When the next batch leaves even if it is not full; infinite if the queue is empty.
  absl::Time LeaveAt() const {
    if (queue_.empty()) return absl::InfiniteFuture();
    if (Full() || Preferred(size()) > 0) return absl::InfinitePast();
    absl::Time at = absl::InfiniteFuture();
    for (const Queued<T>& queued : queue_) at = std::min(at, queued.enqueued + delay_);
    for (const Queued<T>& queued : queue_) {
      // One more delay of slack: waiting until the last moment would turn a late wake-up into a
      // miss.
      if (queued.key.deadline < at + times_.Typical(size()) + delay_)
        return std::min(at, queued.enqueued);
    }
    return at;
  }

  // As many tasks wait as the largest batch takes.
  bool Full() const { return size() >= limit_; }

  // Called by a worker that is free. A returned batch counts as running until Finished().
  Step Next(absl::Time now) {
    Step step;
    if (!draining_ && !Full() && !queue_.empty()) {
      const absl::Time wake_at = LeaveAt();
      if (now < wake_at) {
        step.wake_at = wake_at;
        return step;
      }
    }
    Take(now, step);
    if (!step.batch.empty()) {
      running_.push_back({now, static_cast<int>(step.batch.size())});
    } else {
      step.leave = draining_;  // Take() emptied the queue
    }
    return step;
  }

  // The batch of `images` that Next() returned at `started` has ended.
  void Finished(absl::Time started, int images, absl::Time now) {
    const auto it = std::find_if(running_.begin(), running_.end(), [&](const Running& batch) {
      return batch.started == started && batch.images == images;
    });
    if (it != running_.end()) running_.erase(it);
    times_.Add(images, now - started, now);
    if (options_.target > absl::ZeroDuration()) Tune(now);
  }

  void Drain() { draining_ = true; }
  bool draining() const { return draining_; }
  int size() const { return static_cast<int>(queue_.size()); }
  int running() const { return static_cast<int>(running_.size()); }
  // What a batch of `images` takes, learned; 0 until the first batch.
  absl::Duration batch_time(int images) const { return times_.Typical(images); }
  // The largest batch and the delay in force: the options', or what Tune chose.
  int batch_limit() const { return limit_; }
  absl::Duration delay() const { return delay_; }
  const BatcherOptions& options() const { return options_; }

 private:
  struct Running {
    absl::Time started;
    int images = 0;
  };
  // No request is believed to have begun longer ago.
  static constexpr absl::Duration kLongAgo = absl::Hours(1);
  // A full queue is searched for dead tasks no more often, or under overload each refusal would
  // cost as much as the queue is long.
  static constexpr absl::Duration kSearchEvery = absl::Milliseconds(50);
  // Capacity kept in hand over the arrival rate: queues of a server that is busier grow without
  // bound even if it is fast enough on average.
  static constexpr double kHeadroom = 1.25;

  // A task comes: it gives back its place, or is news to the arrival rate.
  void Count(const Terms& terms, absl::Time now, bool reserved) {
    if (reserved) {
      Unreserve(terms);
    } else {
      rate_.Add(now);
    }
    if (terms.arrived != absl::InfinitePast()) before_.Add(1, now - Arrived(terms, now), now);
  }

  int Level(int priority) const {
    return priority <= 0 ? (options_.priority_levels + 1) / 2
                         : std::min(priority, options_.priority_levels);
  }

  // The largest preferred size of at most `tasks`; 0 if there is none.
  int Preferred(int tasks) const {
    int best = 0;
    for (const int size : options_.preferred) {
      if (size <= std::min(tasks, limit_)) best = std::max(best, size);
    }
    return best;
  }

  static absl::Time Arrived(const Terms& terms, absl::Time now) {
    return terms.arrived == absl::InfinitePast()
               ? now
               : std::min(now, std::max(terms.arrived, now - kLongAgo));
  }

  // How many waiting tasks go first.
  int PlaceOf(const Key& key) const {
    return static_cast<int>(
        std::upper_bound(queue_.begin(), queue_.end(), key,
                         [](const Key& a, const Queued<T>& b) { return a < b.key; }) -
        queue_.begin());
  }

  int ReservedUpTo(int level) const {
    return std::accumulate(reserved_.begin(), reserved_.begin() + level, 0);
  }
  int held() const { return size() + ReservedUpTo(options_.priority_levels); }
  // There is no place for a task of `level`, not even that of a less urgent one. Places kept for
  // those do not count: so max_queue bounds the waiting tasks, and the reserved places of each
  // level.
  bool FullFor(int level) const {
    return size() + ReservedUpTo(level) >= options_.max_queue &&
           (queue_.empty() || queue_.back().key.level <= level);
  }

  // `coming`: tasks not queued yet that count as ahead.
  absl::Status Admit(const Key& key, absl::Time arrived, absl::Duration ready_in, int coming,
                     absl::Time now, std::vector<Rejection>& rejections) {
    if (draining_) {
      return absl::UnavailableError(
          "the queue is draining: the model is being unloaded or replaced");
    }
    if (key.deadline <= now) {
      return absl::DeadlineExceededError(absl::StrCat("the deadline passed ",
                                                      absl::FormatDuration(now - key.deadline),
                                                      " before the image was queued"));
    }
    if (held() >= options_.max_queue && now - searched_ >= kSearchEvery) DropDead(now, rejections);
    if (FullFor(key.level)) {
      return RetryAfter(absl::ResourceExhaustedError(
                            absl::StrCat("the ", options_.name, " is full: ", held(),
                                         " images wait, the limit is ", options_.max_queue)),
                        TimeToEnd(held(), absl::ZeroDuration(), now));
    }
    const absl::Duration estimate = TimeToEnd(PlaceOf(key) + coming, ready_in, now);
    if (now + estimate > key.deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "the deadline is in ", absl::FormatDuration(key.deadline - now), ", ", held(),
          " images wait and the result is expected in ", absl::FormatDuration(estimate)));
    }
    if (options_.target > absl::ZeroDuration() && estimate > ready_in &&
        now + estimate > arrived + options_.target) {
      return RetryAfter(
          absl::ResourceExhaustedError(absl::StrCat(
              "the ", options_.name, " is full: the result is expected ",
              absl::FormatDuration(now + estimate - arrived), " after the request, the target is ",
              absl::FormatDuration(options_.target))),
          estimate);
    }
    return absl::OkStatus();
  }

  // Admit let a task of a higher priority into a full queue: the last one goes, unless a place is
  // kept for one that is less urgent still; that one then finds none when it comes.
  void Displace(absl::Time now, std::vector<Rejection>& rejections) {
    if (queue_.empty()) return;
    if (size() + ReservedUpTo(queue_.back().key.level) <= options_.max_queue) return;
    absl::Status status =
        RetryAfter(absl::ResourceExhaustedError("made room for a request of a higher priority"),
                   TimeToEnd(held(), absl::ZeroDuration(), now));
    rejections.push_back({std::move(queue_.back()), std::move(status)});
    queue_.pop_back();
  }

  // Expected time from `now` to the end of the batch of a task that can be queued in `ready_in` and
  // has `ahead` tasks before it. `ready_in` while a worker is free to take it: an estimate alone
  // never keeps work from an idle worker (so a wrong estimate corrects itself).
  absl::Duration TimeToEnd(int ahead, absl::Duration ready_in, absl::Time now) const {
    const int free = options_.instances - running();
    const int batches_ahead = ahead / limit_;
    if (batches_ahead < free) return ready_in;
    absl::Duration first_free = absl::ZeroDuration();
    if (free <= 0) {
      first_free = absl::InfiniteDuration();
      for (const Running& batch : running_) {
        first_free = std::min(first_free, batch.started + times_.Typical(batch.images) - now);
      }
      first_free = std::max(absl::ZeroDuration(), first_free);
    }
    const absl::Duration wait = std::max(
        ready_in, first_free + times_.Typical(limit_) * (batches_ahead / options_.instances));
    // Its batch fills while it waits.
    const double company = rate_.PerSecond(now) * absl::ToDoubleSeconds(wait);
    const int images = static_cast<int>(std::min<double>(limit_, ahead % limit_ + 1 + company));
    return wait + times_.Typical(images);
  }

  // Chooses the largest batch and the delay for the target. Of the batch sizes that keep it even
  // when a task arrives just after a batch has left (two batch times, of the slow kind), the
  // smallest that can serve the arrival rate with some headroom; if none can, the one with the
  // highest throughput, the larger of equals: sizes that have not run yet are believed to be no
  // better, and so they are tried. The delay is what that many tasks take to arrive, within what
  // the target leaves; sizes of 1 need none.
  void Tune(absl::Time now) {
    const absl::Duration budget = options_.target - before_.High(1);
    const double wanted = rate_.PerSecond(now) * kHeadroom;
    int best = 1;
    double best_throughput = 0;
    for (int size = 1; size <= options_.max_batch; ++size) {
      const absl::Duration time = times_.High(size);
      if (size > 1 && 2 * time > budget) break;
      const double throughput =
          size * options_.instances / absl::ToDoubleSeconds(std::max(time, absl::Nanoseconds(1)));
      if (throughput >= 0.999 * best_throughput) {
        best = size;
        best_throughput = std::max(best_throughput, throughput);
      }
      if (throughput >= wanted) break;
    }
    limit_ = best;
    const double rate = std::max(rate_.PerSecond(now), 1e-3);
    delay_ = std::max(absl::ZeroDuration(), std::min(absl::Seconds((limit_ - 1) / rate),
                                                     budget - 2 * times_.High(limit_)));
  }

  bool IsCancelled(const Queued<T>& queued) const { return cancelled_ && cancelled_(queued.task); }

  // OK, or why the task is not worth computing any more.
  absl::Status Alive(const Queued<T>& queued, absl::Time now) const {
    if (IsCancelled(queued)) return absl::CancelledError("cancelled while it waited in the queue");
    if (queued.key.deadline <= now) {
      return absl::DeadlineExceededError(
          absl::StrCat("the deadline passed ", absl::FormatDuration(now - queued.key.deadline),
                       " ago while the image waited in the queue"));
    }
    return absl::OkStatus();
  }

  // Removes cancelled and late tasks, keeps the order of the others.
  void DropDead(absl::Time now, std::vector<Rejection>& rejections) {
    searched_ = now;
    if (std::all_of(queue_.begin(), queue_.end(),
                    [&](const Queued<T>& queued) { return Alive(queued, now).ok(); })) {
      return;  // as nearly always
    }
    std::deque<Queued<T>> alive;
    for (Queued<T>& queued : queue_) {
      absl::Status status = Alive(queued, now);
      if (status.ok()) {
        alive.push_back(std::move(queued));
      } else {
        rejections.push_back({std::move(queued), std::move(status)});
      }
    }
    queue_ = std::move(alive);
  }

  // Whose turn it is: the first in order, or for every kFairPlace-th place the oldest.
  typename std::deque<Queued<T>>::iterator Turn() {
    if (places_ % kFairPlace != kFairPlace - 1) return queue_.begin();
    return std::min_element(queue_.begin(), queue_.end(), [](const auto& a, const auto& b) {
      return a.key.number < b.key.number;
    });
  }

  // A batch of live tasks, as far as there are any. Where a full batch waits, tasks that cannot
  // wait for the end of a full batch are refused: smaller batches for their sake would cost the
  // throughput that the others need. With less work than that the batch stays as small as its most
  // pressing deadline wants.
  void Take(absl::Time now, Step& step) {
    const bool busy = Full();
    const int preferred = busy ? 0 : Preferred(size());
    const size_t most = preferred > 0 ? preferred : limit_;
    std::vector<Queued<T>> hopeless;
    absl::Time earliest = absl::InfiniteFuture();  // deadline of the batch
    while (!queue_.empty() && step.batch.size() < most) {
      const auto turn = Turn();
      absl::Status status = Alive(*turn, now);
      const int images = static_cast<int>(step.batch.size()) + 1;
      const absl::Time end = now + times_.Typical(busy ? limit_ : images);
      if (status.ok() && turn->key.deadline >= end && earliest < end) break;
      if (status.ok() && turn->key.deadline < end && !busy && images > 1) break;  // the next one's
      Queued<T> queued = std::move(*turn);
      queue_.erase(turn);
      if (!status.ok()) {
        step.rejections.push_back({std::move(queued), std::move(status)});
      } else if (queued.key.deadline < end) {
        hopeless.push_back(std::move(queued));
      } else {
        ++places_;
        earliest = std::min(earliest, queued.key.deadline);
        step.batch.push_back(std::move(queued));
      }
    }
    // Nothing else to do: try the task with most time left, because the estimate may be wrong and
    // only a batch can correct it.
    if (step.batch.empty() && !hopeless.empty()) {
      const auto best = std::max_element(
          hopeless.begin(), hopeless.end(),
          [](const auto& a, const auto& b) { return a.key.deadline < b.key.deadline; });
      step.batch.push_back(std::move(*best));
      hopeless.erase(best);
    }
    for (Queued<T>& queued : hopeless) {
      absl::Status status = absl::DeadlineExceededError(absl::StrCat(
          "the deadline is in ", absl::FormatDuration(queued.key.deadline - now),
          ", a batch takes ", absl::FormatDuration(times_.Typical(busy ? limit_ : 1))));
      step.rejections.push_back({std::move(queued), std::move(status)});
    }
  }

  BatcherOptions options_;
  std::function<bool(const T&)> cancelled_;
  std::deque<Queued<T>> queue_;  // ascending keys
  std::vector<Running> running_;
  LatencyModel times_;
  LatencyModel before_;  // from a task's arrival to Submit
  ArrivalRate rate_;
  int limit_ = 1;
  absl::Duration delay_;
  absl::Time searched_ = absl::InfinitePast();  // for dead tasks
  std::vector<int> reserved_;                   // places kept for tasks that will come, by level
  uint64_t next_number_ = 0;
  uint64_t places_ = 0;  // given out so far
  bool draining_ = false;
};

}  // namespace tern::scheduler

#endif  // TERN_SERVER_SCHEDULER_BATCH_QUEUE_H_
