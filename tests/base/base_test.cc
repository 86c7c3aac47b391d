#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <future>
#include <set>

#include "server/base/aligned_buffer.h"
#include "server/base/clock.h"
#include "server/base/log.h"
#include "server/base/retry_after.h"
#include "server/base/status_macros.h"
#include "server/base/thread_pool.h"

namespace tern {
namespace {

TEST(ThreadPoolTest, RunsEverythingThatWasSubmittedBeforeItEnds) {
  std::atomic<int> done{0};
  {
    ThreadPool pool(3, "pool");
    EXPECT_EQ(pool.threads(), 3);
    for (int i = 0; i < 1000; ++i) pool.Submit([&] { ++done; });
  }
  EXPECT_EQ(done, 1000);
}

TEST(ThreadPoolTest, OneThreadKeepsTheOrder) {
  std::vector<int> order;
  {
    ThreadPool pool(1, "pool");
    for (int i = 0; i < 100; ++i) pool.Submit([&order, i] { order.push_back(i); });
  }
  for (int i = 0; i < 100; ++i) ASSERT_EQ(order[i], i);
}

TEST(ThreadPoolTest, ThreadsWorkAtTheSameTime) {
  ThreadPool pool(2, "pool");
  // Each of the two waits for the other.
  std::promise<void> first, second, both;
  pool.Submit([&] {
    first.set_value();
    second.get_future().wait();
    both.set_value();
  });
  pool.Submit([&] {
    first.get_future().wait();
    second.set_value();
  });
  both.get_future().wait();
}

TEST(ThreadPoolTest, WorkMaySubmitWork) {
  std::promise<int> result;
  ThreadPool pool(1, "pool");
  pool.Submit([&] { pool.Submit([&] { result.set_value(7); }); });
  EXPECT_EQ(result.get_future().get(), 7);
}

TEST(ParallelForTest, CallsEveryIndexOnceWhateverTheTeam) {
  for (int threads : {0, 1, 2, 7}) {
    for (size_t n : {0, 1, 5, 1000}) {
      std::vector<std::atomic<int>> calls(n);
      ParallelFor(threads, n, [&](size_t i) { ++calls[i]; });
      for (size_t i = 0; i < n; ++i) EXPECT_EQ(calls[i], 1) << i << " of " << n;
    }
  }
}

TEST(ParallelForTest, ThrowsWhatAThreadThrewAfterTheRestIsDone) {
  for (int threads : {1, 3}) {
    std::atomic<int> calls{0};
    EXPECT_THROW(ParallelFor(threads, 10,
                             [&](size_t i) {
                               ++calls;
                               if (i == 3) throw std::bad_alloc();
                             }),
                 std::bad_alloc);
    EXPECT_EQ(calls, 10);
  }
}

TEST(ParallelForTest, ThreadsWorkAtTheSameTime) {
  std::atomic<int> here{0};
  ParallelFor(2, 2, [&](size_t) {
    ++here;
    while (here < 2) std::this_thread::yield();  // ends only if both are here
  });
  EXPECT_EQ(here, 2);
}

TEST(ThreadPoolTest, NamesAreCutToWhatTheKernelKeeps) {
  ThreadPool pool(1, "a-name-that-is-much-too-long");
  std::promise<std::string> name;
  // The name is set after the thread has started: the first job waits for it to be seen.
  pool.Submit([&] {
    char buffer[32] = {};
    do {
      pthread_getname_np(pthread_self(), buffer, sizeof(buffer));
    } while (std::string(buffer).find("a-name") != 0);
    name.set_value(buffer);
  });
  EXPECT_EQ(name.get_future().get(), "a-name-that-is-");
}

TEST(AlignedBufferTest, IsAlignedWithZeroedSlack) {
  for (size_t size : {0, 1, 63, 64, 65, 4096}) {
    AlignedBuffer buffer(size);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % AlignedBuffer::kAlignment, 0u);
    EXPECT_EQ(buffer.size_bytes(), size);
    for (size_t i = 0; i < AlignedBuffer::kSlackBytes; ++i)
      EXPECT_EQ(buffer.as<uint8_t>()[size + i], 0);
  }
}

TEST(ClockTest, AFakeClockMovesOnlyWhenTold) {
  FakeClock clock;
  const absl::Time start = clock.Now();
  EXPECT_EQ(clock.Now(), start);
  clock.Advance(absl::Milliseconds(5));
  EXPECT_EQ(clock.Now() - start, absl::Milliseconds(5));
  const absl::Time real = Clock::Real()->Now();
  EXPECT_GE(Clock::Real()->Now(), real);
}

TEST(LogTest, KnowsItsLevels) {
  EXPECT_EQ(InitLog("loud").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(InitLog("error").ok());
  EXPECT_TRUE(InitLog("warn").ok());  // a second call replaces the first
}

absl::StatusOr<int> Half(int x) {
  if (x % 2 != 0) return absl::InvalidArgumentError("odd");
  return x / 2;
}
absl::StatusOr<int> Quarter(int x) {
  TERN_ASSIGN_OR_RETURN(const int half, Half(x));
  TERN_ASSIGN_OR_RETURN(const int quarter, Half(half));
  TERN_RETURN_IF_ERROR(absl::OkStatus());
  return quarter;
}

TEST(StatusMacrosTest, ErrorsTravelUp) {
  EXPECT_EQ(*Quarter(12), 3);
  EXPECT_EQ(Quarter(6).status().message(), "odd");
  EXPECT_EQ(Annotate(Quarter(6).status(), "six").message(), "six: odd");
  EXPECT_EQ(Annotate(Quarter(6).status(), "six").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Annotate(absl::OkStatus(), "fine").ok());
  const absl::Status hinted = RetryAfter(absl::ResourceExhaustedError("full"), absl::Seconds(1));
  EXPECT_EQ(RetryAfterOf(Annotate(hinted, "image 3")), absl::Seconds(1));
}

TEST(RetryAfterTest, TheHintTravelsInThePayloadAndInTheMessage) {
  const absl::Status full = absl::ResourceExhaustedError("the queue is full");
  EXPECT_EQ(RetryAfterOf(full), std::nullopt);
  const absl::Status hinted = RetryAfter(full, absl::Microseconds(250'200));
  EXPECT_EQ(hinted.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(hinted.message(), "the queue is full; try again in 251ms");
  EXPECT_EQ(RetryAfterOf(hinted), absl::Milliseconds(251));
  EXPECT_EQ(RetryAfterOf(RetryAfter(full, -absl::Seconds(1))), absl::Milliseconds(10));
  EXPECT_EQ(RetryAfterOf(RetryAfter(full, absl::InfiniteDuration())), absl::Seconds(10));
}

}  // namespace
}  // namespace tern
