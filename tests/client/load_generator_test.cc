#include "client/load_generator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace tern::client {
namespace {

// By counting, in whole numbers: per_mille of 10 is one per cent.
double ByDefinition(const std::vector<double>& values, uint64_t per_mille) {
  double best = INFINITY;
  for (double candidate : values) {
    uint64_t no_larger = 0;
    for (double value : values) no_larger += value <= candidate ? 1 : 0;
    if (no_larger * 1000 >= per_mille * values.size()) best = std::min(best, candidate);
  }
  return best;
}

TEST(PercentileTest, IsTheSmallestValueThatEnoughOthersDoNotExceed) {
  Random random(7);
  for (size_t n = 1; n <= 120; ++n) {
    std::vector<double> values;
    for (size_t i = 0; i < n; ++i) {
      values.push_back(static_cast<double>(random.Below(50)));  // with ties
    }
    std::sort(values.begin(), values.end());
    for (uint64_t per_mille : {1u, 100u, 250u, 500u, 700u, 900u, 950u, 990u, 999u, 1000u}) {
      EXPECT_EQ(Percentile(values, static_cast<double>(per_mille) / 10),
                ByDefinition(values, per_mille))
          << n << " values, " << per_mille << " per mille";
    }
  }
}

TEST(PercentileTest, OfNothingIsNotANumber) { EXPECT_TRUE(std::isnan(Percentile({}, 50))); }

TEST(LatencyRecorderTest, KeepsEveryValueUpToTheLimit) {
  LatencyRecorder recorder(1000);
  for (int i = 999; i >= 0; --i) recorder.Add(i);
  const std::vector<double> sorted = recorder.Sorted();
  ASSERT_EQ(sorted.size(), 1000u);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(sorted[i], i);
  EXPECT_EQ(recorder.mean(), 499.5);
}

TEST(LatencyRecorderTest, BeyondTheLimitKeepsAFairSample) {
  LatencyRecorder recorder(1000, 3);
  for (int i = 0; i < 100'000; ++i) recorder.Add(i);
  const std::vector<double> sorted = recorder.Sorted();
  EXPECT_EQ(sorted.size(), 1000u);
  EXPECT_EQ(recorder.count(), 100'000u);
  EXPECT_EQ(recorder.max(), 99'999);
  // The median of 1000 uniform draws has a standard deviation of 1.6 % of the range.
  EXPECT_NEAR(Percentile(sorted, 50), 50'000, 8'000);
}

// Answers requests on a thread of its own, in order.
class Responder {
 public:
  using Handler = std::function<absl::StatusOr<v1::ClassifyResponse>(uint64_t number)>;

  explicit Responder(Handler handler) : handler_(std::move(handler)), thread_([this] { Run(); }) {}
  ~Responder() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  void Start(uint64_t number, Done done) {
    std::lock_guard lock(mutex_);
    queue_.emplace_back(number, std::move(done));
    most_ = std::max(most_, queue_.size() + (busy_ ? 1 : 0));
    ++started_;
    wake_.notify_all();
  }
  size_t most_in_flight() const { return most_; }
  uint64_t started() const { return started_; }

 private:
  void Run() {
    while (true) {
      std::pair<uint64_t, Done> item;
      {
        std::unique_lock lock(mutex_);
        busy_ = false;
        wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (queue_.empty()) return;
        item = std::move(queue_.front());
        queue_.pop_front();
        busy_ = true;
      }
      item.second(handler_(item.first));
    }
  }

  Handler handler_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<uint64_t, Done>> queue_;
  bool stop_ = false;
  bool busy_ = false;
  size_t most_ = 0;
  uint64_t started_ = 0;
  std::thread thread_;
};

v1::ClassifyResponse Answer() {
  v1::ClassifyResponse response;
  response.mutable_receipt()->set_batch_size(4);
  response.mutable_receipt()->mutable_timing()->set_inference_us(250);
  return response;
}

TEST(LoadTest, ClosedLoopKeepsTheGivenNumberInFlight) {
  Responder responder([](uint64_t) { return Answer(); });
  LoadOptions options;
  options.concurrency = 5;
  options.seconds = 0.2;
  options.warmup = 0.02;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  // While an answer is handled its successor is already queued: one more than in flight.
  EXPECT_GE(responder.most_in_flight(), 5u);
  EXPECT_LE(responder.most_in_flight(), 6u);
  EXPECT_GT(result.images, 0u);
  EXPECT_EQ(result.errors, 0u);
  EXPECT_DOUBLE_EQ(result.ms_per_image * result.images_per_second, 1000);
  EXPECT_LE(result.p50_ms, result.p90_ms);
  EXPECT_LE(result.p90_ms, result.p99_ms);
  EXPECT_LE(result.p99_ms, result.max_ms);
  EXPECT_DOUBLE_EQ(result.batch_size, 4);
  EXPECT_DOUBLE_EQ(result.inference_us, 250);
}

TEST(LoadTest, WhatIsBesideThePixelsIsToldCallByCall) {
  // Decoding takes so different times that the difference of medians says nothing.
  Responder responder([](uint64_t number) {
    v1::ClassifyResponse answer = Answer();
    answer.mutable_receipt()->mutable_timing()->set_decode_us(number % 3 == 0 ? 0 : 1'000'000);
    answer.mutable_receipt()->mutable_timing()->set_preprocess_us(500'000);
    return answer;
  });
  LoadOptions options;
  options.seconds = 0.1;
  options.warmup = 0;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  EXPECT_GE(result.p50_beside_pixels_ms, -1500);
  EXPECT_LE(result.p50_beside_pixels_ms, -1500 + result.max_ms);
}

TEST(LoadTest, FailedRequestsAreCountedByCodeAndHaveNoLatency) {
  Responder responder([](uint64_t number) -> absl::StatusOr<v1::ClassifyResponse> {
    if (number % 2 == 1) return absl::ResourceExhaustedError("queue full");
    return Answer();
  });
  LoadOptions options;
  options.concurrency = 2;
  options.seconds = 0.1;
  options.warmup = 0;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  EXPECT_GT(result.errors, 0u);
  EXPECT_EQ(result.errors_by_code.at("RESOURCE_EXHAUSTED"), result.errors);
  EXPECT_EQ(result.first_error, "queue full");
  EXPECT_GT(result.images, 0u);
}

TEST(LoadTest, OpenLoopOffersTheRate) {
  Responder responder([](uint64_t) { return Answer(); });
  LoadOptions options;
  options.rate = 400;
  options.poisson = false;
  options.seconds = 0.25;
  options.warmup = 0;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  // Arrivals at 0, 2.5, ... below 250 ms, however slow the machine; one more or less by rounding.
  EXPECT_NEAR(static_cast<double>(responder.started() + result.not_sent), 100, 1);
}

TEST(LoadTest, AnOpenLoopEndsWithItsTimeAndCountsWhatItDidNotSend) {
  constexpr auto kStall = std::chrono::milliseconds(50);
  Responder responder([kStall](uint64_t) {
    std::this_thread::sleep_for(kStall);  // the load under test, not a wait
    return Answer();
  });
  LoadOptions options;
  options.rate = 1000;
  options.poisson = false;
  options.seconds = 0.2;
  options.warmup = 0.1;
  options.max_in_flight = 2;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  // Two at once and one more every 50 ms until 300 ms are over; all 300 would take 15 s.
  EXPECT_LE(responder.started(), 8u);
  EXPECT_EQ(result.not_sent, 200u);  // those due in the 100 ms before are not of the measurement
}

TEST(LoadTest, NothingIsLeftUnsentByAClientThatKeepsUp) {
  Responder responder([](uint64_t) { return Answer(); });
  LoadOptions options;
  options.rate = 20;
  options.seconds = 0.2;
  options.warmup = 0;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  EXPECT_EQ(result.not_sent, 0u);
}

TEST(LoadTest, PoissonArrivalsFollowTheSeed) {
  uint64_t started[3];
  const uint64_t seeds[] = {1, 1, 2};
  for (int i = 0; i < 3; ++i) {
    LoadOptions options;
    options.rate = 2000;
    options.seconds = 0.2;
    options.warmup = 0;
    options.seed = seeds[i];
    LoadResult result;
    // A run that was behind at its end has not seen all arrivals.
    for (int run = 0; run == 0 || (run < 20 && result.not_sent > 0); ++run) {
      Responder responder([](uint64_t) { return Answer(); });
      result = RunLoad(
          options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
      started[i] = responder.started();
    }
    EXPECT_NEAR(static_cast<double>(started[i]), 400, 100);  // 5 standard deviations
  }
  // The end of the run falls between two arrivals, so the last may or may not belong to it.
  EXPECT_NEAR(static_cast<double>(started[0]), static_cast<double>(started[1]), 1);
  EXPECT_NE(started[0], started[2]);
}

// A server that stands still must not hide the requests that would have come meanwhile.
TEST(LoadTest, OpenLoopMeasuresFromTheIntendedTime) {
  constexpr auto kStall = std::chrono::milliseconds(200);
  Responder responder([kStall](uint64_t number) {
    if (number == 0) std::this_thread::sleep_for(kStall);  // the load under test, not a wait
    return Answer();
  });
  LoadOptions options;
  options.rate = 100;
  options.poisson = false;
  options.seconds = 0.4;
  options.warmup = 0;
  options.max_in_flight = 1;
  const LoadResult result = RunLoad(
      options, [&](uint64_t number, Done done) { responder.Start(number, std::move(done)); });
  // 40 requests; those due at 0, 10, ..., 190 ms are answered after 200: at least 200, 190, ... ms.
  // Had they been timed from when they could be sent, only the first would be slow.
  EXPECT_GE(result.max_ms, 200);
  EXPECT_GE(result.p90_ms, 150);
}

}  // namespace
}  // namespace tern::client
