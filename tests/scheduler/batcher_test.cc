#include "server/scheduler/batcher.h"

#include <atomic>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tern::scheduler {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr absl::Time kNever = absl::InfiniteFuture();

// A door that threads wait at until it is opened.
class Gate {
 public:
  void Open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // Blocks the caller; counts it as arrived.
  void Pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void AwaitArrivals(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return arrived_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int arrived_ = 0;
};

// What became of the tasks.
struct Log {
  std::mutex mutex;
  std::vector<std::vector<int>> batches;
  std::vector<std::pair<int, absl::StatusCode>> rejected;

  void Ran(const std::vector<Queued<int>>& batch) {
    std::lock_guard<std::mutex> lock(mutex);
    batches.emplace_back();
    for (const Queued<int>& queued : batch) batches.back().push_back(queued.task);
  }
  void Rejected(int task, const absl::Status& status) {
    std::lock_guard<std::mutex> lock(mutex);
    rejected.emplace_back(task, status.code());
  }
};

TEST(BatcherTest, RunsALoneTaskAndGathersTasksThatWait) {
  Log log;
  Gate gate;
  BatcherOptions options{.max_batch = 4, .max_delay = absl::ZeroDuration()};
  Batcher<int> batcher(options, {.run =
                                     [&](int instance, std::vector<Queued<int>> batch) {
                                       EXPECT_EQ(instance, 0);
                                       log.Ran(batch);
                                       gate.Pass();
                                     },
                                 .reject = [&](Queued<int> queued,
                                               absl::Status s) { log.Rejected(queued.task, s); }});
  int first = 0;
  ASSERT_TRUE(batcher.Submit(first, kNever).ok());
  gate.AwaitArrivals(1);  // the worker is busy: the next ones pile up
  for (int i = 1; i <= 6; ++i) {
    int task = i;
    ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  }
  EXPECT_EQ(batcher.depth(), 6);
  gate.Open();
  batcher.Drain();
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(0), ElementsAre(1, 2, 3, 4), ElementsAre(5, 6)));
  EXPECT_THAT(log.rejected, IsEmpty());
  EXPECT_EQ(batcher.depth(), 0);
}

TEST(BatcherTest, AFullBatchDoesNotWaitForTheDelay) {
  Log log;
  Gate ran;
  ran.Open();
  Batcher<int> batcher(
      {.max_batch = 3, .max_delay = absl::Hours(1)},
      {.run =
           [&](int, std::vector<Queued<int>> batch) {
             log.Ran(batch);
             ran.Pass();
           },
       .reject = [&](Queued<int> queued, absl::Status s) { log.Rejected(queued.task, s); }});
  for (int i = 0; i < 3; ++i) {
    int task = i;
    ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  }
  ran.AwaitArrivals(1);  // would hang for an hour
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(0, 1, 2)));
}

TEST(BatcherTest, APartialBatchLeavesAfterTheDelay) {
  Log log;
  Gate ran;
  ran.Open();
  Batcher<int> batcher(
      {.max_batch = 100, .max_delay = absl::Milliseconds(1), .instances = 3},
      {.run =
           [&](int, std::vector<Queued<int>> batch) {
             log.Ran(batch);
             ran.Pass();
           },
       .reject = [&](Queued<int> queued, absl::Status s) { log.Rejected(queued.task, s); }});
  int task = 5;
  ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  ran.AwaitArrivals(1);
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(5)));
}

TEST(BatcherTest, AnUrgentTaskEndsTheWaitForCompany) {
  Log log;
  Gate ran;
  ran.Open();
  FakeClock clock;
  Batcher<int> batcher(
      {.max_batch = 100, .max_delay = absl::Hours(1), .instances = 2, .clock = &clock},
      {.run =
           [&](int, std::vector<Queued<int>> batch) {
             log.Ran(batch);
             ran.Pass();
           },
       .reject = [&](Queued<int> queued, absl::Status s) { log.Rejected(queued.task, s); }});
  int patient = 1, urgent = 2;
  ASSERT_TRUE(batcher.Submit(patient, kNever).ok());
  ASSERT_TRUE(batcher.Submit(urgent, clock.Now() + absl::Minutes(1)).ok());
  ran.AwaitArrivals(1);
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(1, 2)));
}

TEST(BatcherTest, InstancesRunBatchesSideBySide) {
  Gate gate;
  std::mutex mutex;
  std::map<int, int> runs_of;
  Batcher<int> batcher({.max_batch = 1, .max_delay = absl::ZeroDuration(), .instances = 3},
                       {.run =
                            [&](int instance, std::vector<Queued<int>>) {
                              {
                                std::lock_guard<std::mutex> lock(mutex);
                                ++runs_of[instance];
                              }
                              gate.Pass();
                            },
                        .reject = [](Queued<int>, absl::Status) { ADD_FAILURE(); }});
  for (int i = 0; i < 3; ++i) {
    int task = i;
    ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  }
  gate.AwaitArrivals(3);  // hangs if one worker had to run two
  gate.Open();
  batcher.Drain();
  EXPECT_THAT(runs_of, ElementsAre(std::pair(0, 1), std::pair(1, 1), std::pair(2, 1)));
}

TEST(BatcherTest, DeadlinesAndCancellationsAreDecidedWhenABatchLeaves) {
  Log log;
  Gate gate;
  FakeClock clock;
  std::atomic<int> cancelled_task{-1};
  Batcher<int> batcher(
      {.max_batch = 4, .max_delay = absl::ZeroDuration(), .clock = &clock},
      {.run =
           [&](int, std::vector<Queued<int>> batch) {
             log.Ran(batch);
             gate.Pass();
           },
       .reject = [&](Queued<int> queued, absl::Status s) { log.Rejected(queued.task, s); },
       .cancelled = [&](const int& task) { return task == cancelled_task; }});
  int blocker = 0, late = 1, dead = 2, good = 3;
  ASSERT_TRUE(batcher.Submit(blocker, kNever).ok());
  gate.AwaitArrivals(1);
  ASSERT_TRUE(batcher.Submit(late, clock.Now() + absl::Seconds(1)).ok());
  ASSERT_TRUE(batcher.Submit(dead, kNever).ok());
  ASSERT_TRUE(batcher.Submit(good, clock.Now() + absl::Hours(1)).ok());
  cancelled_task = 2;
  clock.Advance(absl::Seconds(2));
  gate.Open();
  batcher.Drain();
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(0), ElementsAre(3)));
  EXPECT_THAT(log.rejected, ElementsAre(std::pair(1, absl::StatusCode::kDeadlineExceeded),
                                        std::pair(2, absl::StatusCode::kCancelled)));
  EXPECT_EQ(batcher.batch_time(), absl::Seconds(1.5));  // 2 s, then a quarter of 0 s
}

TEST(BatcherTest, AFullQueueRefusesUntilThereIsRoom) {
  Gate gate;
  Batcher<std::unique_ptr<int>> batcher(
      {.max_batch = 1, .max_delay = absl::ZeroDuration(), .max_queue = 2},
      {.run = [&](int, std::vector<Queued<std::unique_ptr<int>>>) { gate.Pass(); },
       .reject = [](Queued<std::unique_ptr<int>>, absl::Status) { ADD_FAILURE(); }});
  auto task = std::make_unique<int>(0);
  ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  gate.AwaitArrivals(1);
  for (int i = 0; i < 2; ++i) {
    task = std::make_unique<int>(i);
    ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  }
  task = std::make_unique<int>(9);
  EXPECT_EQ(batcher.Submit(task, kNever).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_NE(task, nullptr);
  gate.Open();
  gate.AwaitArrivals(3);
  EXPECT_TRUE(batcher.Submit(task, kNever).ok());
}

TEST(BatcherTest, DrainRunsWhatWaitsAndRefusesMore) {
  std::atomic<int> ran{0};
  Batcher<int> batcher({.max_batch = 100, .max_delay = absl::Hours(1), .instances = 2},
                       {.run = [&](int, std::vector<Queued<int>> batch) { ran += batch.size(); },
                        .reject = [](Queued<int>, absl::Status) { ADD_FAILURE(); }});
  for (int i = 0; i < 50; ++i) {
    int task = i;
    ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  }
  batcher.Drain();
  EXPECT_EQ(ran, 50);
  int task = 0;
  EXPECT_EQ(batcher.Submit(task, kNever).code(), absl::StatusCode::kUnavailable);
  batcher.Drain();
}

TEST(BatcherTest, DrainWaitsForABatchThatRuns) {
  Gate gate;
  std::atomic<bool> done{false}, drained{false};
  Batcher<int> batcher({.max_batch = 1, .max_delay = absl::ZeroDuration()},
                       {.run =
                            [&](int, std::vector<Queued<int>>) {
                              gate.Pass();
                              done = true;
                            },
                        .reject = [](Queued<int>, absl::Status) { ADD_FAILURE(); }});
  int task = 0;
  ASSERT_TRUE(batcher.Submit(task, kNever).ok());
  gate.AwaitArrivals(1);
  std::vector<std::thread> drains;
  for (int i = 0; i < 2; ++i) {
    drains.emplace_back([&] {
      batcher.Drain();
      EXPECT_TRUE(done);
      drained = true;
    });
  }
  EXPECT_FALSE(drained);
  gate.Open();
  for (std::thread& drain : drains) drain.join();
}

TEST(BatcherTest, DepthIsReportedAfterEveryChangeAndEndsAtZero) {
  Gate gate;
  std::vector<int> depths;  // written under the batcher's lock
  {
    Batcher<int> batcher({.max_batch = 2, .max_delay = absl::ZeroDuration()},
                         {.run = [&](int, std::vector<Queued<int>>) { gate.Pass(); },
                          .reject = [](Queued<int>, absl::Status) { ADD_FAILURE(); },
                          .depth = [&](int n) { depths.push_back(n); }});
    int task = 0;
    ASSERT_TRUE(batcher.Submit(task, kNever).ok());
    gate.AwaitArrivals(1);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(batcher.Submit(task, kNever).ok());
    gate.Open();
  }
  EXPECT_THAT(depths, ElementsAre(1, 0, 1, 2, 3, 1, 0));
}

// Several clients, workers, deadlines, cancellations and a drain in the middle: every accepted
// task ends exactly once, with its own content.
TEST(BatcherTest, EveryAcceptedTaskEndsExactlyOnceUnderLoad) {
  struct Task {
    int id;
    std::unique_ptr<int> payload;
    std::shared_ptr<std::atomic<bool>> cancelled;
  };
  constexpr int kClients = 4, kPerClient = 3000;
  for (int round = 0; round < 3; ++round) {
    std::vector<std::atomic<int>> ends(kClients * kPerClient);
    std::vector<std::atomic<int>> accepted(kClients * kPerClient);
    std::atomic<int> too_big{0}, wrong{0}, ran{0};
    auto batcher = std::make_unique<Batcher<Task>>(
        BatcherOptions{
            .max_batch = 4, .max_delay = absl::Microseconds(50), .max_queue = 16, .instances = 3},
        Batcher<Task>::Callbacks{
            .run =
                [&](int, std::vector<Queued<Task>> batch) {
                  too_big += batch.empty() || batch.size() > 4;
                  for (const auto& queued : batch) {
                    wrong += *queued.task.payload != queued.task.id * 7;
                    ++ends[queued.task.id];
                    ++ran;
                  }
                },
            .reject =
                [&](Queued<Task> queued, absl::Status status) {
                  wrong += status.ok() || *queued.task.payload != queued.task.id * 7;
                  ++ends[queued.task.id];
                },
            .cancelled = [](const Task& task) { return task.cancelled->load(); }});
    std::vector<std::thread> clients;
    for (int c = 0; c < kClients; ++c) {
      clients.emplace_back([&, c] {
        std::mt19937 random(100 * round + c);
        for (int i = 0; i < kPerClient; ++i) {
          const int id = c * kPerClient + i;
          Task task{id, std::make_unique<int>(id * 7), std::make_shared<std::atomic<bool>>(false)};
          const auto cancelled = task.cancelled;
          const absl::Time deadline =
              random() % 3 == 0 ? absl::Now() + absl::Microseconds(random() % 400) : kNever;
          absl::Status status = batcher->Submit(task, deadline);
          while (status.code() == absl::StatusCode::kResourceExhausted) {
            std::this_thread::yield();
            status = batcher->Submit(task, deadline);
          }
          if (status.ok()) {
            accepted[id] = 1;
          } else {
            wrong += task.payload == nullptr;  // a refused task is untouched
          }
          if (random() % 5 == 0) *cancelled = true;
        }
      });
    }
    if (round == 2) batcher->Drain();
    for (std::thread& client : clients) client.join();
    batcher.reset();
    EXPECT_EQ(too_big, 0);
    EXPECT_EQ(wrong, 0);
    if (round < 2) {
      EXPECT_GT(ran, 1000);
    }
    for (int id = 0; id < kClients * kPerClient; ++id)
      ASSERT_EQ(ends[id], accepted[id]) << "task " << id;
  }
}

}  // namespace
}  // namespace tern::scheduler
