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
  ASSERT_TRUE(batcher.Submit(first, {}).ok());
  gate.AwaitArrivals(1);  // the worker is busy: the next ones pile up
  for (int i = 1; i <= 6; ++i) {
    int task = i;
    ASSERT_TRUE(batcher.Submit(task, {}).ok());
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
    ASSERT_TRUE(batcher.Submit(task, {}).ok());
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
  ASSERT_TRUE(batcher.Submit(task, {}).ok());
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
  ASSERT_TRUE(batcher.Submit(patient, {}).ok());
  ASSERT_TRUE(batcher.Submit(urgent, {.deadline = clock.Now() + absl::Minutes(1)}).ok());
  ran.AwaitArrivals(1);
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(2, 1)));  // by deadline
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
    ASSERT_TRUE(batcher.Submit(task, {}).ok());
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
  ASSERT_TRUE(batcher.Submit(blocker, {}).ok());
  gate.AwaitArrivals(1);
  ASSERT_TRUE(batcher.Submit(late, {.deadline = clock.Now() + absl::Seconds(1)}).ok());
  ASSERT_TRUE(batcher.Submit(dead, {}).ok());
  ASSERT_TRUE(batcher.Submit(good, {.deadline = clock.Now() + absl::Hours(1)}).ok());
  cancelled_task = 2;
  clock.Advance(absl::Seconds(2));
  gate.Open();
  batcher.Drain();
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(0), ElementsAre(3)));
  EXPECT_THAT(log.rejected, ElementsAre(std::pair(1, absl::StatusCode::kDeadlineExceeded),
                                        std::pair(2, absl::StatusCode::kCancelled)));
  EXPECT_EQ(batcher.learned(1).batch_time,
            absl::ZeroDuration());  // the lower median of 2 s and 0 s
}

TEST(BatcherTest, AFullQueueRefusesUntilThereIsRoom) {
  Gate gate;
  Batcher<std::unique_ptr<int>> batcher(
      {.max_batch = 1, .max_delay = absl::ZeroDuration(), .max_queue = 2},
      {.run = [&](int, std::vector<Queued<std::unique_ptr<int>>>) { gate.Pass(); },
       .reject = [](Queued<std::unique_ptr<int>>, absl::Status) { ADD_FAILURE(); }});
  auto task = std::make_unique<int>(0);
  ASSERT_TRUE(batcher.Submit(task, {}).ok());
  gate.AwaitArrivals(1);
  for (int i = 0; i < 2; ++i) {
    task = std::make_unique<int>(i);
    ASSERT_TRUE(batcher.Submit(task, {}).ok());
  }
  task = std::make_unique<int>(9);
  EXPECT_EQ(batcher.Submit(task, {}).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_NE(task, nullptr);
  gate.Open();
  gate.AwaitArrivals(3);
  EXPECT_TRUE(batcher.Submit(task, {}).ok());
}

TEST(BatcherTest, DrainRunsWhatWaitsAndRefusesMore) {
  std::atomic<int> ran{0};
  Batcher<int> batcher({.max_batch = 100, .max_delay = absl::Hours(1), .instances = 2},
                       {.run = [&](int, std::vector<Queued<int>> batch) { ran += batch.size(); },
                        .reject = [](Queued<int>, absl::Status) { ADD_FAILURE(); }});
  for (int i = 0; i < 50; ++i) {
    int task = i;
    ASSERT_TRUE(batcher.Submit(task, {}).ok());
  }
  batcher.Drain();
  EXPECT_EQ(ran, 50);
  int task = 0;
  EXPECT_EQ(batcher.Submit(task, {}).code(), absl::StatusCode::kUnavailable);
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
  ASSERT_TRUE(batcher.Submit(task, {}).ok());
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

TEST(BatcherTest, ATurnUsesAnInstanceThatWorkersThenLeaveAlone) {
  Log log;
  Gate gate;
  std::atomic<int> used{-1};
  Batcher<int> batcher(
      {.max_batch = 4, .instances = 2},
      {.run =
           [&](int instance, std::vector<Queued<int>> batch) {
             used = instance;
             log.Ran(batch);
             gate.Pass();
           },
       .reject = [&](Queued<int> queued, absl::Status s) { log.Rejected(queued.task, s); }});
  auto turn = batcher.TakeTurn({});
  ASSERT_TRUE(turn.has_value());
  const int mine = turn->instance();
  int first = 1, second = 2;
  ASSERT_TRUE(batcher.Submit(first, {}).ok());
  gate.AwaitArrivals(1);
  EXPECT_NE(used, mine);
  EXPECT_FALSE(batcher.TakeTurn({}).has_value()) << "both are in use";
  ASSERT_TRUE(batcher.Submit(second, {}).ok());
  EXPECT_EQ(batcher.depth(), 1);
  // Drain waits for the turn and the task behind it.
  std::thread drain([&] { batcher.Drain(); });
  turn.reset();
  gate.AwaitArrivals(2);
  EXPECT_EQ(used, mine);
  gate.Open();
  drain.join();
  EXPECT_THAT(log.batches, ElementsAre(ElementsAre(1), ElementsAre(2)));
  EXPECT_THAT(log.rejected, IsEmpty());
  EXPECT_FALSE(batcher.TakeTurn({}).has_value()) << "it is drained";
}

TEST(BatcherTest, TurnsAndTasksShareTheInstancesUnderLoad) {
  constexpr int kInstances = 3, kThreads = 6, kTasks = 600;
  std::atomic<bool> in_use[kInstances] = {};
  std::atomic<int> clashes{0}, done{0}, turns{0}, spins{0};
  const auto work = [&](int instance, int tasks) {
    if (in_use[instance].exchange(true)) ++clashes;
    for (int i = 0; i < 200; ++i) ++spins;
    in_use[instance] = false;
    done += tasks;
  };
  for (int round = 0; round < 20; ++round) {
    Batcher<int> batcher({.max_batch = 2, .max_queue = kTasks, .instances = kInstances},
                         {.run =
                              [&](int instance, std::vector<Queued<int>> batch) {
                                work(instance, static_cast<int>(batch.size()));
                              },
                          .reject = [&](Queued<int>, absl::Status) { ++done; }});
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < kTasks / kThreads; ++i) {
          if (auto turn = batcher.TakeTurn({}); turn.has_value()) {
            work(turn->instance(), 1);
            ++turns;
            continue;
          }
          int task = i;
          EXPECT_TRUE(batcher.Submit(task, {}).ok());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    batcher.Drain();
    ASSERT_EQ(done, (round + 1) * kTasks);
  }
  EXPECT_EQ(clashes, 0);
  EXPECT_GT(turns, 0);
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
    ASSERT_TRUE(batcher.Submit(task, {}).ok());
    gate.AwaitArrivals(1);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(batcher.Submit(task, {}).ok());
    gate.Open();
  }
  EXPECT_THAT(depths, ElementsAre(1, 0, 1, 2, 3, 1, 0));
}

// A million small requests from several clients with deadlines, priorities, cancellations and
// preferred sizes, and in one round a drain in the middle: each is answered exactly once, with its
// own result, and what was cancelled before it was submitted or had expired is never computed.
TEST(BatcherTest, EveryAnswerOfAMillionGoesToItsCaller) {
  struct Task {
    int id = 0;
    uint64_t question = 0;
    std::shared_ptr<std::atomic<bool>> cancelled;
  };
  constexpr int kRounds = 4, kClients = 5, kPerClient = 50'000, kTasks = kClients * kPerClient;
  const auto solve = [](uint64_t question) { return question * 0x9E3779B97F4A7C15u ^ 0xABCD; };
  for (int round = 0; round < kRounds; ++round) {
    std::vector<std::atomic<uint8_t>> answers(kTasks), refusals(kTasks);
    std::atomic<int> wrong{0}, dead_computed{0}, bad_batch{0}, computed{0};
    const auto question_of = [&](int id) {
      return (uint64_t{0x51ED270B} << 20) * (round + 1) + id;
    };
    BatcherOptions options{.max_batch = 8, .max_queue = 64, .instances = 3};
    if (round == 1) options.max_delay = absl::Microseconds(20);
    if (round == 2) options.preferred = {4};
    auto batcher = std::make_unique<Batcher<Task>>(
        options, Batcher<Task>::Callbacks{
                     .run =
                         [&](int, std::vector<Queued<Task>> batch) {
                           bad_batch += batch.empty() || batch.size() > 8;
                           // The engine: answers by position, from a copy of the questions.
                           std::vector<uint64_t> results;
                           for (const auto& queued : batch)
                             results.push_back(solve(queued.task.question));
                           for (size_t i = 0; i < batch.size(); ++i) {
                             const Task& task = batch[i].task;
                             wrong += results[i] != solve(question_of(task.id));
                             dead_computed += batch[i].enqueued >= batch[i].key.deadline;
                             ++answers[task.id];
                             ++computed;
                           }
                         },
                     .reject =
                         [&](Queued<Task> queued, absl::Status status) {
                           wrong +=
                               status.ok() || queued.task.question != question_of(queued.task.id);
                           ++refusals[queued.task.id];
                         },
                     .cancelled =
                         [](const Task& task) {
                           return task.cancelled != nullptr && task.cancelled->load();
                         }});
    std::vector<std::thread> clients;
    for (int c = 0; c < kClients; ++c) {
      clients.emplace_back([&, c] {
        std::mt19937 random(100 * round + c);
        for (int i = 0; i < kPerClient; ++i) {
          const int id = c * kPerClient + i;
          Task task{id, question_of(id), nullptr};
          const bool cancel = random() % 16 == 0, cancel_first = random() % 2 == 0;
          if (cancel) task.cancelled = std::make_shared<std::atomic<bool>>(cancel_first);
          const auto flag = task.cancelled;
          Terms terms{.priority = static_cast<int>(random() % 5)};
          if (random() % 4 == 0) {
            terms.deadline =
                absl::Now() + absl::Microseconds(static_cast<int>(random() % 400) - 20);
          }
          absl::Status status = batcher->Submit(task, terms);
          while (absl::IsResourceExhausted(status)) {
            std::this_thread::yield();
            status = batcher->Submit(task, terms);
          }
          if (!status.ok()) {
            wrong += task.question != question_of(id);  // a refused task is untouched
            ++refusals[id];
          } else if (cancel && cancel_first) {
            answers[id] += 100;  // must not be computed: checked below
          }
          if (flag != nullptr) *flag = true;
        }
      });
    }
    if (round == 3) batcher->Drain();
    for (std::thread& client : clients) client.join();
    batcher.reset();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(dead_computed, 0);
    EXPECT_EQ(bad_batch, 0);
    if (round < 3) {
      EXPECT_GT(computed, kTasks / 2);
    }
    for (int id = 0; id < kTasks; ++id) {
      const bool doomed = answers[id] >= 100;
      const int computed_here = answers[id] % 100;
      ASSERT_EQ(computed_here + refusals[id], 1) << "task " << id;
      if (doomed) {
        ASSERT_EQ(computed_here, 0) << "task " << id << " was cancelled before";
      }
    }
  }
}

}  // namespace
}  // namespace tern::scheduler
