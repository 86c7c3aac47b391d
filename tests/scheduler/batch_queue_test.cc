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
  absl::Status Submit(int task, double at_ms, absl::Time deadline = kNever) {
    return queue_->Submit(task, deadline, At(at_ms), dropped_);
  }
  // Makes the queue believe that a batch takes `ms`.
  void Measure(double ms) {
    int task = 0;
    ASSERT_TRUE(queue_->Submit(task, kNever, At(-100000), dropped_).ok());
    ASSERT_EQ(Tasks(queue_->Next(At(-50000))).size(), 1u);
    queue_->Finished(At(-50000), At(-50000 + ms));
  }
  static std::vector<int> Tasks(const Queue::Step& step) {
    std::vector<int> tasks;
    for (const auto& queued : step.batch) tasks.push_back(queued.task);
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
  EXPECT_THAT(Tasks(queue_->Next(At(102))), ElementsAre(1, 2, 3));
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
    ASSERT_TRUE(queue.Submit(task, kNever, At(0), dropped).ok());
    EXPECT_EQ(task, nullptr);
  }
  auto task = std::make_unique<int>(7);
  const absl::Status full = queue.Submit(task, kNever, At(0), dropped);
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
  ASSERT_TRUE(Submit(2, 104).ok());
  ASSERT_TRUE(Submit(3, 104).ok());
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
  ASSERT_TRUE(Submit(2, 100).ok());
  // One waits ahead and two workers free up at 110: the next ends at 120 beside it.
  EXPECT_EQ(Submit(3, 100, At(119)).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Submit(3, 100, At(121)).ok());
}

TEST_F(BatchQueueTest, AnIdleWorkerTakesATaskWhateverTheEstimateSays) {
  Make(4, 0, 100, 1);
  Measure(10000);  // one hiccup must not refuse everything for ever
  ASSERT_TRUE(Submit(1, 100, At(200)).ok());
  EXPECT_THAT(Tasks(queue_->Next(At(100))), ElementsAre(1));
  queue_->Finished(At(100), At(105));
  EXPECT_LT(queue_->batch_time(), absl::Milliseconds(10000));
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

TEST_F(BatchQueueTest, BatchTimeIsSmoothedByAQuarter) {
  Make(1, 0, 100, 1);
  EXPECT_EQ(queue_->batch_time(), absl::ZeroDuration());
  Measure(8);
  EXPECT_EQ(queue_->batch_time(), absl::Milliseconds(8));
  Measure(16);
  EXPECT_EQ(queue_->batch_time(), absl::Milliseconds(10));
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
          queue_->Finished(began[w], now);
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
        busy[w] = now + absl::Milliseconds(batch_ms);
      }
    }
    EXPECT_EQ(accepted, ended);
    EXPECT_GT(accepted, 0);
  }
}

}  // namespace
}  // namespace tern::scheduler
