#include "server/scheduler/batch_queue.h"

#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tern::scheduler {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr absl::Time kNever = absl::InfiniteFuture();

absl::Time At(double milliseconds) { return absl::UnixEpoch() + absl::Milliseconds(milliseconds); }

// A queue of ints with a hand-driven clock.
class BatchQueueTest : public ::testing::Test {
 protected:
  using Queue = BatchQueue<int>;

  void Make(int max_batch, double max_delay_ms, int max_queue, int instances) {
    BatcherOptions options;
    options.max_batch = max_batch;
    options.max_delay = absl::Milliseconds(max_delay_ms);
    options.max_queue = max_queue;
    options.instances = instances;
    queue_ = std::make_unique<Queue>(
        options, [this](const int& task) { return cancelled_.count(task) > 0; });
  }
  absl::Status Submit(int task, double at_ms, absl::Time deadline = kNever, int priority = 0) {
    return queue_->Submit(task, {.deadline = deadline, .priority = priority}, At(at_ms), dropped_);
  }
  // Makes the queue believe that a batch of `images`, and any other size, takes `ms`.
  void Measure(double ms, int images = 0) {
    const int least = images > 0 ? images : 1;
    const int most = images > 0 ? images : queue_->options().max_batch;
    for (int size = least; size <= most; ++size) {
      for (int i = 0; i < size; ++i) ASSERT_TRUE(Submit(0, -100000).ok());
      ASSERT_EQ(static_cast<int>(Tasks(queue_->Next(At(-50000))).size()), size);
      queue_->Finished(At(-50000), size, At(-50000 + ms));
    }
  }
  static std::vector<int> Tasks(const Queue::Step& step) {
    std::vector<int> tasks;
    for (const auto& queued : step.batch) tasks.push_back(queued.task);
    return tasks;
  }
  // Takes batches until nothing is left, each ending at once.
  std::vector<int> Order(double at_ms) {
    std::vector<int> tasks;
    while (queue_->size() > 0) {
      const Queue::Step step = queue_->Next(At(at_ms));
      if (step.batch.empty() && step.rejections.empty()) break;
      for (const int task : Tasks(step)) tasks.push_back(task);
      queue_->Finished(At(at_ms), static_cast<int>(step.batch.size()), At(at_ms));
    }
    return tasks;
  }
  static std::vector<int> Rejected(const std::vector<Queue::Rejection>& rejections) {
    std::vector<int> tasks;
    for (const auto& rejection : rejections) tasks.push_back(rejection.task.task);
    return tasks;
  }

  std::unique_ptr<Queue> queue_;
  std::set<int> cancelled_;
  std::vector<Queue::Rejection> dropped_;
};

TEST_F(BatchQueueTest, AnEmptyQueueWaitsForASubmission) {
  Make(4, 10, 100, 1);
  const Queue::Step step = queue_->Next(At(0));
  EXPECT_THAT(step.batch, IsEmpty());
  EXPECT_EQ(step.wake_at, kNever);
  EXPECT_FALSE(step.leave);
}

TEST_F(BatchQueueTest, ALoneTaskLeavesMaxDelayAfterItsArrival) {
  Make(4, 10, 100, 1);
  ASSERT_TRUE(Submit(1, 100).ok());
  Queue::Step step = queue_->Next(At(103));
  EXPECT_THAT(step.batch, IsEmpty());
  EXPECT_EQ(step.wake_at, At(110));
  EXPECT_THAT(queue_->Next(At(109.999)).batch, IsEmpty());
  EXPECT_THAT(Tasks(queue_->Next(At(110))), ElementsAre(1));
}

TEST_F(BatchQueueTest, LaterTasksDoNotLengthenTheWaitOfTheOldest) {
  Make(4, 10, 100, 1);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_TRUE(Submit(2, 109).ok());
  EXPECT_EQ(queue_->Next(At(109)).wake_at, At(110));
  EXPECT_THAT(Tasks(queue_->Next(At(110))), ElementsAre(1, 2));
}

TEST_F(BatchQueueTest, AFullBatchLeavesAtOnceInOrderOfSubmission) {
  Make(3, 10, 100, 1);
  for (int i = 1; i <= 4; ++i) ASSERT_TRUE(Submit(i, 100).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(100))), ElementsAre(1, 2, 3));
  EXPECT_EQ(queue_->size(), 1);
  EXPECT_EQ(queue_->Next(At(100)).wake_at, At(110));
}

TEST_F(BatchQueueTest, WithoutDelayWhatIsThereLeavesAtOnce) {
  Make(8, 0, 100, 1);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_TRUE(Submit(2, 100).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(100))), ElementsAre(1, 2));
}

TEST_F(BatchQueueTest, ATaskThatCannotAffordTheDelaySendsItsBatchOffAtOnce) {
  Make(8, 10, 100, 1);
  Measure(5);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_TRUE(Submit(2, 101, At(126)).ok());  // 110 + a batch of 5 + 10 of slack: can wait
  EXPECT_EQ(queue_->Next(At(101)).wake_at, At(110));
  ASSERT_TRUE(Submit(3, 102, At(124)).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(102))), ElementsAre(3, 2, 1));
}

TEST_F(BatchQueueTest, ATaskWithAShortDeadlineIsNotLostToTheDelayBeforeTheFirstMeasurement) {
  Make(8, 10, 100, 1);
  ASSERT_TRUE(Submit(1, 100, At(105)).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(100.1))), ElementsAre(1));
}

TEST_F(BatchQueueTest, AFullQueueRefusesWithItsLimitAndLeavesTheTaskUntouched) {
  BatchQueue<std::unique_ptr<int>> queue({.max_batch = 1, .max_queue = 2}, nullptr);
  std::vector<BatchQueue<std::unique_ptr<int>>::Rejection> dropped;
  for (int i = 0; i < 2; ++i) {
    auto task = std::make_unique<int>(i);
    ASSERT_TRUE(queue.Submit(task, {}, At(0), dropped).ok());
    EXPECT_EQ(task, nullptr);
  }
  auto task = std::make_unique<int>(7);
  const absl::Status full = queue.Submit(task, {}, At(0), dropped);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("the limit is 2"));
  ASSERT_NE(task, nullptr);
  EXPECT_EQ(*task, 7);
  EXPECT_THAT(dropped, IsEmpty());
}

TEST_F(BatchQueueTest, DeadTasksMakeRoomInAFullQueue) {
  Make(8, 1000, 3, 1);
  ASSERT_TRUE(Submit(1, 0, At(50)).ok());
  ASSERT_TRUE(Submit(2, 0).ok());
  ASSERT_TRUE(Submit(3, 0).ok());
  cancelled_ = {3};
  ASSERT_TRUE(Submit(4, 60).ok());
  EXPECT_THAT(Rejected(dropped_), ElementsAre(1, 3));
  EXPECT_EQ(dropped_[0].status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(dropped_[1].status.code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(Tasks(queue_->Next(At(2000))), ElementsAre(2, 4));
}

TEST_F(BatchQueueTest, APassedDeadlineIsRefusedAtSubmission) {
  Make(4, 10, 100, 1);
  EXPECT_EQ(Submit(1, 100, At(100)).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Submit(1, 100, absl::InfinitePast()).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(queue_->size(), 0);
}

TEST_F(BatchQueueTest, RefusesWhatTheBatchesAheadWillMakeLate) {
  Make(2, 0, 100, 1);
  Measure(10);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_EQ(Tasks(queue_->Next(At(100))).size(), 1u);  // runs until about 110
  ASSERT_TRUE(Submit(2, 104, At(129)).ok());
  ASSERT_TRUE(Submit(3, 104, At(129)).ok());
  // The next one is in the second batch to start: 6 ms left of the running one, then 10, then its
  // own 10.
  EXPECT_EQ(Submit(4, 104, At(129.9)).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Submit(5, 104, At(130.1)).ok());
}

TEST_F(BatchQueueTest, InstancesShareTheBatchesAhead) {
  Make(1, 0, 100, 2);
  Measure(10);
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(Submit(i, 100).ok());
    ASSERT_EQ(Tasks(queue_->Next(At(100))).size(), 1u);
  }
  ASSERT_TRUE(Submit(2, 100, At(120.5)).ok());
  // One waits ahead and two workers free up at 110: the next ends at 120 beside it.
  EXPECT_EQ(Submit(3, 100, At(119)).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Submit(3, 100, At(121)).ok());
  // A third would have to wait for one of these two.
  EXPECT_EQ(Submit(4, 100, At(129)).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(BatchQueueTest, AnIdleWorkerTakesATaskWhateverTheEstimateSays) {
  Make(4, 0, 100, 1);
  Measure(10000);  // one hiccup must not refuse everything for ever
  ASSERT_TRUE(Submit(1, 100, At(200)).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(100))), ElementsAre(1));
  queue_->Finished(At(100), 1, At(105));
  EXPECT_EQ(queue_->batch_time(1), absl::Milliseconds(5));
}

TEST_F(BatchQueueTest, PassedDeadlinesAreNotComputed) {
  Make(4, 0, 100, 1);
  ASSERT_TRUE(Submit(1, 100, At(105)).ok());
  ASSERT_TRUE(Submit(2, 100).ok());
  const Queue::Step step = queue_->Next(At(105));
  EXPECT_THAT(Tasks(step), ElementsAre(2));
  EXPECT_THAT(Rejected(step.rejections), ElementsAre(1));
  EXPECT_EQ(step.rejections[0].status.code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(BatchQueueTest, DeadlinesBeforeTheEstimatedEndAreNotComputedIfOthersCanBe) {
  Make(4, 0, 100, 1);
  Measure(10);
  ASSERT_TRUE(Submit(1, 100, At(107)).ok());
  ASSERT_TRUE(Submit(2, 100, At(120)).ok());
  const Queue::Step step = queue_->Next(At(100));
  EXPECT_THAT(Tasks(step), ElementsAre(2));
  EXPECT_THAT(Rejected(step.rejections), ElementsAre(1));
}

TEST_F(BatchQueueTest, OfOnlyHopelessTasksTheLeastHopelessIsTried) {
  Make(4, 0, 100, 1);
  Measure(1000);
  ASSERT_TRUE(Submit(1, 100, At(107)).ok());
  ASSERT_TRUE(Submit(2, 100, At(120)).ok());
  ASSERT_TRUE(Submit(3, 100, At(110)).ok());
  const Queue::Step step = queue_->Next(At(100));
  EXPECT_THAT(Tasks(step), ElementsAre(2));
  EXPECT_THAT(Rejected(step.rejections), ElementsAre(1, 3));
}

TEST_F(BatchQueueTest, CancelledTasksAreNotComputedAndTheirPlacesAreFilled) {
  Make(2, 10, 100, 1);
  for (int i = 1; i <= 4; ++i) ASSERT_TRUE(Submit(i, 100).ok());
  cancelled_ = {1, 3};
  const Queue::Step step = queue_->Next(At(100));
  EXPECT_THAT(Tasks(step), ElementsAre(2, 4));
  EXPECT_THAT(Rejected(step.rejections), ElementsAre(1, 3));
  EXPECT_EQ(step.rejections[0].status.code(), absl::StatusCode::kCancelled);
}

TEST_F(BatchQueueTest, OnlyDeadTasksGiveNoBatch) {
  Make(4, 0, 100, 1);
  ASSERT_TRUE(Submit(1, 100).ok());
  cancelled_ = {1};
  const Queue::Step step = queue_->Next(At(100));
  EXPECT_THAT(step.batch, IsEmpty());
  EXPECT_EQ(step.rejections.size(), 1u);
  EXPECT_EQ(queue_->running(), 0);
}

TEST_F(BatchQueueTest, DrainingRunsWhatWaitsWithoutDelayAndThenLeaves) {
  Make(2, 1000, 100, 1);
  for (int i = 1; i <= 3; ++i) ASSERT_TRUE(Submit(i, 100).ok());
  queue_->Drain();
  EXPECT_EQ(Submit(9, 100).code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Tasks(queue_->Next(At(100))), ElementsAre(1, 2));
  Queue::Step last = queue_->Next(At(100));
  EXPECT_THAT(Tasks(last), ElementsAre(3));
  EXPECT_FALSE(last.leave);
  EXPECT_TRUE(queue_->Next(At(100)).leave);
}

TEST_F(BatchQueueTest, OptionsOutOfRangeAreRaisedToTheirLeastValue) {
  Make(0, -5, 0, 0);
  EXPECT_EQ(queue_->options().max_batch, 1);
  EXPECT_EQ(queue_->options().max_queue, 1);
  EXPECT_EQ(queue_->options().instances, 1);
  EXPECT_EQ(queue_->options().max_delay, absl::ZeroDuration());
}

// A simulated server: batches take `batch_ms`, workers ask as soon as they are free or woken.
// Checks the contract of batcher.h for every task.
TEST_F(BatchQueueTest, NoTaskWaitsLongerThanTheLatencyContract) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const int max_batch = 1 + random() % 5, instances = 1 + random() % 3,
              max_queue = 1 + random() % 12;
    const double max_delay = random() % 4, batch_ms = 1 + random() % 9;
    Make(max_batch, max_delay, max_queue, instances);
    const int per_round = max_batch * instances;
    const double bound = max_delay + batch_ms * ((max_queue + per_round - 1) / per_round);
    std::vector<absl::Time> busy(instances, absl::InfinitePast());  // end of the running batch
    std::vector<absl::Time> began(instances);
    std::vector<int> images(instances);
    std::map<int, absl::Time> submitted;
    int next = 0, accepted = 0, ended = 0;
    for (double ms = 0; ms < 300; ms += 0.25) {
      const absl::Time now = At(ms);
      if (ms < 150) {
        for (int n = random() % 3; n > 0; --n) {
          const int task = next++;
          if (Submit(task, ms).ok()) {
            submitted[task] = now;
            ++accepted;
          }
        }
      }
      for (int w = 0; w < instances; ++w) {
        if (busy[w] > now) continue;
        if (busy[w] != absl::InfinitePast()) {
          queue_->Finished(began[w], images[w], now);
          busy[w] = absl::InfinitePast();
        }
        const Queue::Step step = queue_->Next(now);
        EXPECT_THAT(step.rejections, IsEmpty());
        if (step.batch.empty()) continue;
        EXPECT_LE(step.batch.size(), static_cast<size_t>(max_batch));
        for (size_t i = 0; i < step.batch.size(); ++i) {
          const int task = step.batch[i].task;
          ASSERT_EQ(submitted.count(task), 1u) << "never accepted, or handed out twice";
          EXPECT_LE(absl::ToDoubleMilliseconds(now - submitted[task]), bound + 1e-6)
              << "task " << task;
          submitted.erase(task);
          if (i > 0) {
            EXPECT_LT(step.batch[i - 1].task, task);
          }
          ++ended;
        }
        began[w] = now;
        images[w] = static_cast<int>(step.batch.size());
        busy[w] = now + absl::Milliseconds(batch_ms);
      }
    }
    EXPECT_EQ(accepted, ended);
    EXPECT_GT(accepted, 0);
  }
}

TEST_F(BatchQueueTest, WithinALevelTheEarliestDeadlineLeavesFirst) {
  Make(2, 0, 100, 1);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_TRUE(Submit(2, 100, At(900)).ok());
  ASSERT_TRUE(Submit(3, 100, At(700)).ok());
  ASSERT_TRUE(Submit(4, 100, At(800)).ok());
  ASSERT_TRUE(Submit(5, 100).ok());
  ASSERT_TRUE(Submit(6, 100, At(800)).ok());
  EXPECT_THAT(Order(100), ElementsAre(3, 4, 6, 2, 1, 5));
}

TEST_F(BatchQueueTest, APriorityGoesBeforeAnyDeadlineAndZeroIsTheMiddleLevel) {
  Make(1, 0, 100, 1);
  ASSERT_TRUE(Submit(1, 100, At(500), 3).ok());
  ASSERT_TRUE(Submit(2, 100, kNever, 2).ok());
  ASSERT_TRUE(Submit(3, 100).ok());
  ASSERT_TRUE(Submit(4, 100, kNever, 1).ok());
  ASSERT_TRUE(Submit(5, 100, At(600), 7).ok());  // as the last level
  EXPECT_THAT(Order(100), ElementsAre(4, 2, 3, 1, 5));
}

TEST_F(BatchQueueTest, AStreamOfUrgentTasksCannotHoldAnotherBackForGood) {
  Make(1, 0, 100, 1);
  ASSERT_TRUE(Submit(0, 0, kNever, 3).ok());
  ASSERT_TRUE(Submit(1, 0, kNever, 3).ok());
  std::vector<int> taken;
  for (int i = 2; i < 40; ++i) {
    ASSERT_TRUE(Submit(i, i, kNever, 1).ok());
    const Queue::Step step = queue_->Next(At(i));
    taken.push_back(Tasks(step)[0]);
    queue_->Finished(At(i), 1, At(i));
  }
  // Two tasks of the last level were there first: the eighth and the sixteenth place are theirs.
  EXPECT_EQ(taken[7], 0);
  EXPECT_EQ(taken[15], 1);
  EXPECT_EQ(std::count_if(taken.begin(), taken.end(), [](int task) { return task < 2; }), 2);
}

TEST_F(BatchQueueTest, AFullQueueMakesRoomForAHigherPriorityOnly) {
  Make(8, 1000, 3, 1);
  ASSERT_TRUE(Submit(1, 0, kNever, 2).ok());
  ASSERT_TRUE(Submit(2, 0, kNever, 3).ok());
  ASSERT_TRUE(Submit(3, 0, At(90000), 3).ok());
  EXPECT_EQ(Submit(4, 0, kNever, 3).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(dropped_, IsEmpty());
  ASSERT_TRUE(Submit(5, 0, kNever, 2).ok());
  EXPECT_THAT(Rejected(dropped_), ElementsAre(2));  // of the lowest level, the latest deadline
  EXPECT_EQ(dropped_[0].status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(RetryAfterOf(dropped_[0].status).has_value());
  EXPECT_THAT(Order(5000), ElementsAre(1, 5, 3));
}

TEST_F(BatchQueueTest, AFullQueueSaysWhenItWillBeEmpty) {
  Make(2, 0, 4, 1);
  Measure(100);
  for (int i = 0; i < 6; ++i) {
    ASSERT_TRUE(Submit(i, 0).ok());
    if (i == 1) {
      ASSERT_EQ(Tasks(queue_->Next(At(0))).size(), 2u);
    }
  }
  // 60 ms of the running batch, two batches wait, and then its own.
  const absl::Status full = Submit(9, 40);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(RetryAfterOf(full), absl::Milliseconds(360));
  EXPECT_THAT(std::string(full.message()), HasSubstr("try again in 360ms"));
}

TEST_F(BatchQueueTest, ABatchLeavesAtOnceWithAPreferredSizeAndIsCutToIt) {
  BatcherOptions options;
  options.max_batch = 8;
  options.max_delay = absl::Milliseconds(10);
  options.preferred = {4, 6};
  queue_ = std::make_unique<Queue>(options, nullptr);
  for (int i = 1; i <= 3; ++i) ASSERT_TRUE(Submit(i, 100).ok());
  EXPECT_EQ(queue_->Next(At(100)).wake_at, At(110));
  for (int i = 4; i <= 5; ++i) ASSERT_TRUE(Submit(i, 101).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(101))), ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(queue_->Next(At(101)).wake_at, At(111));  // the fifth waits for company again
  EXPECT_THAT(Tasks(queue_->Next(At(111))), ElementsAre(5));
  for (int i = 1; i <= 7; ++i) ASSERT_TRUE(Submit(i, 200).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(200))), ElementsAre(1, 2, 3, 4, 5, 6));
  for (int i = 8; i <= 14; ++i) ASSERT_TRUE(Submit(i, 200).ok());
  EXPECT_EQ(Tasks(queue_->Next(At(200))).size(), 8u);
}

TEST_F(BatchQueueTest, WithoutAFullBatchTheBatchStaysSmallEnoughForItsDeadlines) {
  Make(8, 0, 100, 1);
  for (int size = 1; size <= 8; ++size) Measure(10.0 * size, size);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_TRUE(Submit(2, 100, At(125)).ok());
  ASSERT_TRUE(Submit(3, 100, At(155)).ok());
  ASSERT_TRUE(Submit(4, 100).ok());
  // Alone 2 ends at 110, with one more at 120, with two more too late.
  const Queue::Step step = queue_->Next(At(100));
  EXPECT_THAT(Tasks(step), ElementsAre(2, 3));
  EXPECT_THAT(step.rejections, IsEmpty());
  EXPECT_EQ(queue_->size(), 2);
}

TEST_F(BatchQueueTest, WhereAFullBatchWaitsItIsNotMadeSmallerForATightDeadline) {
  Make(3, 0, 100, 1);
  for (int size = 1; size <= 3; ++size) Measure(10.0 * size, size);
  ASSERT_TRUE(Submit(1, 100, At(115)).ok());
  for (int i = 2; i <= 4; ++i) ASSERT_TRUE(Submit(i, 100).ok());
  const Queue::Step step = queue_->Next(At(100));
  EXPECT_THAT(Tasks(step), ElementsAre(2, 3, 4));
  EXPECT_THAT(Rejected(step.rejections), ElementsAre(1));
  EXPECT_EQ(step.rejections[0].status.code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(BatchQueueTest, AReservedPlaceCountsAndIsSureForItsTask) {
  Make(4, 0, 2, 1);
  ASSERT_TRUE(queue_->Reserve({}, absl::ZeroDuration(), At(0), dropped_).ok());
  ASSERT_TRUE(Submit(1, 0).ok());
  EXPECT_EQ(Submit(2, 0).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(queue_->Reserve({}, absl::ZeroDuration(), At(0), dropped_).code(),
            absl::StatusCode::kResourceExhausted);
  int task = 3;
  ASSERT_TRUE(queue_->Submit(task, {}, At(0), dropped_, true).ok());
  EXPECT_EQ(Submit(4, 0).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Tasks(queue_->Next(At(0))).size(), 2u);
  ASSERT_TRUE(queue_->Reserve({}, absl::ZeroDuration(), At(0), dropped_).ok());
  queue_->Unreserve({});
  ASSERT_TRUE(Submit(5, 0).ok());
  ASSERT_TRUE(Submit(6, 0).ok());
  EXPECT_THAT(dropped_, IsEmpty());
}

TEST_F(BatchQueueTest, ATaskStartsUnqueuedOnlyIfItWouldRunAtOnceAndAlone) {
  Make(4, 0, 10, 2);
  EXPECT_FALSE(queue_->Start({.deadline = At(0)}, At(0))) << "too late";
  ASSERT_TRUE(queue_->Reserve({}, absl::ZeroDuration(), At(0), dropped_).ok());
  EXPECT_TRUE(queue_->Start({}, At(0), /*reserved=*/true));
  EXPECT_EQ(queue_->running(), 1);
  queue_->Finished(At(0), 1, At(3));
  EXPECT_EQ(queue_->batch_time(1), absl::Milliseconds(3)) << "learned from";
  EXPECT_TRUE(queue_->Start({}, At(4)));
  EXPECT_TRUE(queue_->Start({}, At(4)));
  EXPECT_FALSE(queue_->Start({}, At(4))) << "no worker is free";
  queue_->Finished(At(4), 1, At(5));
  ASSERT_TRUE(Submit(1, 5).ok());
  EXPECT_FALSE(queue_->Start({}, At(5))) << "another waits";
  EXPECT_THAT(Order(5), ElementsAre(1));
  queue_->Drain();
  EXPECT_FALSE(queue_->Start({}, At(6)));

  Make(4, 10, 10, 1);
  EXPECT_FALSE(queue_->Start({}, At(0))) << "would wait for company";

  Make(1, 0, 1, 1);
  ASSERT_TRUE(queue_->Reserve({}, absl::ZeroDuration(), At(0), dropped_).ok());
  ASSERT_TRUE(queue_->Start({}, At(0), /*reserved=*/true));
  EXPECT_TRUE(Submit(1, 0).ok()) << "the reserved place is free again";
}

TEST_F(BatchQueueTest, AReservationMakesRoomForAHigherPriorityToo) {
  Make(4, 0, 2, 1);
  ASSERT_TRUE(queue_->Reserve({}, absl::ZeroDuration(), At(0), dropped_).ok());
  ASSERT_TRUE(Submit(1, 0).ok());
  ASSERT_TRUE(queue_->Reserve({.priority = 1}, absl::ZeroDuration(), At(0), dropped_).ok());
  EXPECT_THAT(Rejected(dropped_), ElementsAre(1));
}

TEST_F(BatchQueueTest, ThePlacesKeptForLowerPrioritiesGoToHigherOnes) {
  Make(4, 1000, 2, 1);
  const auto reserve = [this](int priority) {
    return queue_->Reserve({.priority = priority}, absl::ZeroDuration(), At(0), dropped_).code();
  };
  const auto come = [this](int task, int priority) {
    return queue_->Submit(task, {.priority = priority}, At(0), dropped_, true).code();
  };
  for (int i = 0; i < 2; ++i) ASSERT_EQ(reserve(3), absl::StatusCode::kOk);
  ASSERT_EQ(reserve(3), absl::StatusCode::kResourceExhausted);
  // As many as there are places, reserved or at once.
  EXPECT_EQ(reserve(1), absl::StatusCode::kOk);
  EXPECT_TRUE(Submit(1, 0, kNever, 2).ok());
  EXPECT_EQ(reserve(2), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(come(31, 3), absl::StatusCode::kResourceExhausted) << "its place is taken";
  EXPECT_EQ(come(32, 3), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(come(11, 1), absl::StatusCode::kOk);
  EXPECT_THAT(dropped_, IsEmpty());
  EXPECT_THAT(Order(5000), ElementsAre(11, 1));
}

TEST_F(BatchQueueTest, APlaceThatIsFreeAgainIsThatOfTheTaskItWasKeptFor) {
  Make(4, 0, 1, 1);
  ASSERT_TRUE(queue_->Reserve({.priority = 3}, absl::ZeroDuration(), At(0), dropped_).ok());
  ASSERT_TRUE(Submit(1, 0, kNever, 1).ok());
  EXPECT_THAT(Order(0), ElementsAre(1));
  int task = 3;
  EXPECT_TRUE(queue_->Submit(task, {.priority = 3}, At(0), dropped_, true).ok());
}

TEST_F(BatchQueueTest, AWaitingTaskStaysWhereThePlaceOfALessUrgentOneWillDo) {
  Make(4, 1000, 2, 1);
  ASSERT_TRUE(queue_->Reserve({.priority = 3}, absl::ZeroDuration(), At(0), dropped_).ok());
  ASSERT_TRUE(Submit(2, 0, kNever, 2).ok());
  ASSERT_TRUE(Submit(1, 0, kNever, 1).ok());
  EXPECT_THAT(dropped_, IsEmpty());
  int task = 3;
  EXPECT_EQ(queue_->Submit(task, {.priority = 3}, At(0), dropped_, true).code(),
            absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(Submit(10, 0, kNever, 1).ok());
  EXPECT_THAT(Rejected(dropped_), ElementsAre(2));
  EXPECT_EQ(Submit(11, 0, kNever, 1).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Order(5000), ElementsAre(1, 10));
}

// Whatever comes in whatever order: the queue and the places kept for each level stay within
// max_queue, each task ends once, and who is refused or dropped for want of room sees max_queue
// others, waiting or with places kept, that are at least as urgent.
TEST_F(BatchQueueTest, PlacesAreBoundedAndGoToTheMostUrgent) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    const int max_queue = 1 + random() % 6;
    Make(1 + random() % 3, 0, max_queue, 1);
    std::map<int, int> level_of;  // of the waiting tasks
    std::vector<int> kept(4, 0);  // places, by level
    size_t dropped = 0;
    int next = 0, ended = 0;
    // Waiting tasks and kept places up to `level`.
    const auto held = [&](int level) {
      int count = 0;
      for (const auto& [task, other] : level_of) count += other <= level;
      for (int other = 1; other <= level; ++other) count += kept[other];
      return count;
    };
    const auto account = [&] {
      for (; dropped < dropped_.size(); ++dropped) {
        const auto it = level_of.find(dropped_[dropped].task.task);
        ASSERT_NE(it, level_of.end()) << "never accepted, or dropped twice";
        const int level = it->second;
        level_of.erase(it);
        EXPECT_EQ(held(level), max_queue);
        ++ended;
      }
    };
    dropped_.clear();
    for (int step = 0; step < 200; ++step) {
      const int level = 1 + random() % 3;
      const scheduler::Terms terms{.priority = level};
      const int what = random() % 5;
      if (what == 0) {
        if (queue_->Reserve(terms, absl::ZeroDuration(), At(step), dropped_).ok()) {
          ++kept[level];
        } else {
          EXPECT_GE(held(level), max_queue);
        }
      } else if (what == 1 && kept[level] > 0) {
        queue_->Unreserve(terms);
        --kept[level];
      } else if (what < 4) {
        const bool reserved = kept[level] > 0;
        kept[level] -= reserved;
        int task = next++;
        if (queue_->Submit(task, terms, At(step), dropped_, reserved).ok()) {
          level_of[task] = level;
        } else {
          EXPECT_GE(held(level), max_queue);
          ++ended;
        }
      } else {
        for (const int task : Tasks(queue_->Next(At(step)))) {
          ASSERT_EQ(level_of.erase(task), 1u) << "never accepted, or handed out twice";
          ++ended;
        }
        while (queue_->running() > 0) {
          for (int images = 1; images <= 3; ++images) queue_->Finished(At(step), images, At(step));
        }
      }
      ASSERT_NO_FATAL_FAILURE(account());
      ASSERT_LE(queue_->size(), max_queue);
      ASSERT_EQ(queue_->size(), static_cast<int>(level_of.size()));
      for (const int places : kept) ASSERT_LE(places, max_queue);
    }
    EXPECT_EQ(next, ended + queue_->size());
  }
}

TEST_F(BatchQueueTest, AReservationIsNotHeldUpByLessUrgentOnes) {
  Make(1, 0, 100, 1);
  Measure(10);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_EQ(Tasks(queue_->Next(At(100))).size(), 1u);  // runs until 110
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(queue_->Reserve({.priority = 3}, absl::ZeroDuration(), At(100), dropped_).ok());
  }
  const auto reserve = [this](int priority) {
    return queue_->Reserve({.deadline = At(135), .priority = priority}, absl::ZeroDuration(),
                           At(100), dropped_);
  };
  // Five before it end at 160; nobody before it, and it ends at 120.
  EXPECT_EQ(reserve(3).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(reserve(1).ok());
  EXPECT_TRUE(reserve(2).ok());  // after that one
  EXPECT_EQ(reserve(2).code(), absl::StatusCode::kDeadlineExceeded);
  queue_->Unreserve({.priority = 1});
  EXPECT_TRUE(reserve(2).ok());
}

TEST_F(BatchQueueTest, AReservationIsRefusedIfItsDeadlineCannotBeMetAfterDecoding) {
  Make(1, 0, 100, 1);
  Measure(10);
  ASSERT_TRUE(Submit(1, 100).ok());
  ASSERT_EQ(Tasks(queue_->Next(At(100))).size(), 1u);  // runs until about 110
  const auto reserve = [&](double ready_ms, double deadline_ms) {
    return queue_
        ->Reserve({.deadline = At(deadline_ms)}, absl::Milliseconds(ready_ms), At(100), dropped_)
        .code();
  };
  // The worker is free before the image is decoded: 15 + 10.
  EXPECT_EQ(reserve(15, 124), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(reserve(15, 126), absl::StatusCode::kOk);
  // One is on its way: it decodes while the other waits for its turn, 10 + 10 + 10.
  EXPECT_EQ(reserve(15, 129), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(reserve(15, 131), absl::StatusCode::kOk);
}

TEST(LatencyModelTest, TheMedianOfTheLastSixteenIsTypicalAndOneHiccupMovesNothing) {
  LatencyModel model(4);
  EXPECT_EQ(model.Typical(2), absl::ZeroDuration());
  for (int i = 1; i <= 15; ++i) model.Add(2, absl::Milliseconds(i), At(i));
  model.Add(2, absl::Seconds(9), At(16));
  EXPECT_EQ(model.Typical(2), absl::Milliseconds(8));  // of 1..15 and a hiccup, the eighth
  EXPECT_EQ(model.High(2), absl::Milliseconds(15));
  for (int i = 0; i < 16; ++i) model.Add(2, absl::Milliseconds(40), At(20));
  EXPECT_EQ(model.Typical(2), absl::Milliseconds(40));  // what was before is forgotten
  EXPECT_EQ(model.High(2), absl::Milliseconds(40));
}

TEST(LatencyModelTest, SizesThatHaveNotRunAreReadOffTheirNeighbours) {
  LatencyModel model(8);
  model.Add(2, absl::Milliseconds(20), At(0));
  EXPECT_EQ(model.Typical(1), absl::Milliseconds(20));
  EXPECT_EQ(model.Typical(8), absl::Milliseconds(80));
  model.Add(6, absl::Milliseconds(40), At(0));
  EXPECT_EQ(model.Typical(4), absl::Milliseconds(30));
  EXPECT_EQ(model.Typical(99), model.Typical(8));
  EXPECT_EQ(model.Typical(0), model.Typical(1));
  // Half a minute later only what has run since counts.
  model.Add(4, absl::Milliseconds(100), At(31000));
  EXPECT_EQ(model.Typical(2), absl::Milliseconds(100));
  EXPECT_EQ(model.Typical(6), absl::Milliseconds(150));
}

// A simulated server with Poisson arrivals whose batch of n takes 2 + n ms: what a queue with a
// target chooses, and what the accepted tasks then see.
struct TargetRun {
  double p99_ms = 0, images_per_second = 0;
  int limit = 0;
  absl::Duration delay;
  int refused = 0;
};

TargetRun RunWithTarget(double target_ms, double per_second) {
  BatcherOptions options;
  options.max_batch = 32;
  options.target = absl::Milliseconds(target_ms);
  BatchQueue<int> queue(options, nullptr);
  std::mt19937 random(7);
  std::exponential_distribution<double> gap(per_second / 1000);
  std::vector<BatchQueue<int>::Rejection> dropped;
  std::vector<double> times;
  TargetRun run;
  double next = 0, free_at = 0, end_ms = 20000;
  std::vector<Queued<int>> batch;
  absl::Time began;
  for (double ms = 0; ms < end_ms; ms += 0.05) {
    for (; next <= ms; next += gap(random)) {
      int task = 0;
      run.refused += !queue.Submit(task, {.arrived = At(ms)}, At(ms), dropped).ok() && ms > 5000;
    }
    if (ms < free_at) continue;
    if (!batch.empty()) {
      queue.Finished(began, static_cast<int>(batch.size()), At(ms));
      for (const auto& queued : batch) {
        if (ms > 5000) times.push_back(absl::ToDoubleMilliseconds(At(ms) - queued.enqueued));
      }
      batch.clear();
    }
    batch = queue.Next(At(ms)).batch;
    if (batch.empty()) continue;
    began = At(ms);
    free_at = ms + 2 + static_cast<double>(batch.size());
  }
  std::sort(times.begin(), times.end());
  run.p99_ms = times[times.size() * 99 / 100];
  run.images_per_second = static_cast<double>(times.size()) / (end_ms - 5000) * 1000;
  run.limit = queue.batch_limit();
  run.delay = queue.delay();
  return run;
}

TEST(BatchQueueTargetTest, UnderLightLoadNothingWaits) {
  const TargetRun run = RunWithTarget(40, 20);
  EXPECT_EQ(run.limit, 1);
  EXPECT_EQ(run.delay, absl::ZeroDuration());
  EXPECT_EQ(run.refused, 0);
}

TEST(BatchQueueTargetTest, BatchesGrowWithTheLoadAndTheTargetHolds) {
  // Singles serve 333/s, batches of 18, the largest that end in half of 40 ms, 900/s.
  const TargetRun run = RunWithTarget(40, 600);
  EXPECT_GT(run.limit, 3);
  EXPECT_LE(run.limit, 18);
  EXPECT_LE(run.p99_ms, 40);
  EXPECT_LT(run.refused, 600 * 15 / 100);  // at most one in a hundred
}

TEST(BatchQueueTargetTest, UnderOverloadTheAcceptedKeepTheTargetAtNearlyFullThroughput) {
  const TargetRun run = RunWithTarget(40, 4500);
  EXPECT_LE(run.p99_ms, 40);
  EXPECT_GE(run.images_per_second, 0.9 * 18 / 20 * 1000);
  EXPECT_GT(run.refused, 0);
}

}  // namespace
}  // namespace tern::scheduler
