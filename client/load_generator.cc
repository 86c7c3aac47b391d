#include "client/load_generator.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/status/status.h"

namespace tern::client {
namespace {

using Clock = std::chrono::steady_clock;

Clock::duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

double ToSeconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

class Load {
 public:
  Load(const LoadOptions& options, const StartRequest& start)
      : options_(options),
        start_(start),
        recorder_(2'000'000, options.seed),
        beside_pixels_(2'000'000, options.seed),
        begin_(Clock::now() + FromSeconds(options.warmup)),
        end_(begin_ + FromSeconds(options.seconds)),
        last_answer_(begin_) {}

  LoadResult Run() {
    if (options_.rate > 0) {
      RunOpen();
    } else {
      for (int i = 0; i < options_.concurrency; ++i) Send(Clock::now());
    }
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return in_flight_ == 0; });
    return Summary();
  }

 private:
  void Send(Clock::time_point intended) {
    uint64_t number;
    {
      std::lock_guard lock(mutex_);
      ++in_flight_;
      number = next_number_++;
    }
    start_(number, [this, intended](absl::StatusOr<v1::ClassifyResponse> answer) {
      Answer(intended, std::move(answer));
    });
  }

  void RunOpen() {
    Random random(options_.seed);
    Clock::time_point due = Clock::now();
    while (due < end_ && Clock::now() < end_) {
      std::this_thread::sleep_until(due);
      {
        std::unique_lock lock(mutex_);
        if (!wake_.wait_until(lock, end_, [this] { return in_flight_ < options_.max_in_flight; })) {
          break;
        }
      }
      Send(due);
      const double gaps = options_.poisson ? -std::log(random.Unit()) : 1;
      due += FromSeconds(gaps / options_.rate);
    }
    if (due < end_) {
      const double left = ToSeconds(end_ - std::max(due, begin_));
      not_sent_ = static_cast<uint64_t>(std::ceil(left * options_.rate));
    }
  }

  void Answer(Clock::time_point intended, absl::StatusOr<v1::ClassifyResponse> answer) {
    const Clock::time_point now = Clock::now();
    {
      std::lock_guard lock(mutex_);
      if (intended >= begin_ && intended < end_) Record(now - intended, answer);
      if (answer.ok() && now >= begin_) {
        last_answer_ = std::max(last_answer_, now);
        ++answered_;
        if (now < end_) ++answered_in_time_;
      }
    }
    // The next request goes out before this one stops counting, so that the last of the closed
    // loop is seen as such.
    if (options_.rate <= 0 && now < end_) Send(now);
    std::lock_guard lock(mutex_);
    // Waking a thread in vain costs as much as a call.
    if (--in_flight_ == 0 || options_.rate > 0) wake_.notify_all();
  }

  void Record(Clock::duration latency, const absl::StatusOr<v1::ClassifyResponse>& answer) {
    if (!answer.ok()) {
      ++result_.errors;
      ++result_.errors_by_code[absl::StatusCodeToString(answer.status().code())];
      if (result_.first_error.empty()) result_.first_error = std::string(answer.status().message());
      return;
    }
    const double ms = ToSeconds(latency) * 1e3;
    recorder_.Add(ms);
    const v1::Receipt& receipt = answer->receipt();
    const uint64_t pixels_us = receipt.timing().decode_us() + receipt.timing().preprocess_us();
    beside_pixels_.Add(ms - static_cast<double>(pixels_us) / 1e3);
    result_.batch_size += receipt.batch_size();
    result_.decode_us += static_cast<double>(receipt.timing().decode_us());
    result_.preprocess_us += static_cast<double>(receipt.timing().preprocess_us());
    result_.queue_us += static_cast<double>(receipt.timing().queue_us());
    result_.inference_us += static_cast<double>(receipt.timing().inference_us());
    result_.total_us += static_cast<double>(receipt.timing().total_us());
  }

  LoadResult Summary() {
    LoadResult result = result_;
    result.not_sent = not_sent_;
    // Answers inside the measured time, whenever their request was due: neither end of the time
    // biases the rate. Requests slower than the whole time leave only the second way.
    result.images = answered_in_time_ > 0 ? answered_in_time_ : answered_;
    result.seconds = answered_in_time_ > 0 ? options_.seconds : ToSeconds(last_answer_ - begin_);
    if (result.images > 0 && result.seconds > 0) {
      result.images_per_second = static_cast<double>(result.images) / result.seconds;
      result.ms_per_image = 1e3 / result.images_per_second;
    }
    const std::vector<double> sorted = recorder_.Sorted();
    result.mean_ms = recorder_.mean();
    result.p50_ms = Percentile(sorted, 50);
    result.p90_ms = Percentile(sorted, 90);
    result.p95_ms = Percentile(sorted, 95);
    result.p99_ms = Percentile(sorted, 99);
    result.p999_ms = Percentile(sorted, 99.9);
    result.max_ms = recorder_.max();
    result.p50_beside_pixels_ms = Percentile(beside_pixels_.Sorted(), 50);
    const auto n = static_cast<double>(std::max<uint64_t>(recorder_.count(), 1));
    for (double* sum : {&result.batch_size, &result.decode_us, &result.preprocess_us,
                        &result.queue_us, &result.inference_us, &result.total_us}) {
      *sum /= n;
    }
    return result;
  }

  const LoadOptions options_;
  const StartRequest& start_;
  std::mutex mutex_;
  std::condition_variable wake_;
  LatencyRecorder recorder_, beside_pixels_;
  LoadResult result_;  // sums until Summary
  uint64_t next_number_ = 0;
  uint64_t not_sent_ = 0;
  uint64_t answered_ = 0;          // from begin_ on
  uint64_t answered_in_time_ = 0;  // in [begin_, end_)
  int in_flight_ = 0;
  const Clock::time_point begin_;
  const Clock::time_point end_;
  Clock::time_point last_answer_;
};

}  // namespace

double Percentile(const std::vector<double>& sorted, double percent) {
  if (sorted.empty()) return std::numeric_limits<double>::quiet_NaN();
  const double n = static_cast<double>(sorted.size());
  // The product may lie an ulp above an integer (0.9 * 10): that must not count as one rank more.
  const double rank = std::ceil(percent * n / 100 * (1 - 1e-12));
  const auto index = static_cast<size_t>(std::clamp(rank, 1.0, n)) - 1;
  return sorted[index];
}

void LatencyRecorder::Add(double milliseconds) {
  ++count_;
  sum_ += milliseconds;
  max_ = std::max(max_, milliseconds);
  if (values_.size() < limit_) {
    values_.push_back(milliseconds);
    return;
  }
  const uint64_t place = random_.Below(count_);  // kept with probability limit / count
  if (place < limit_) values_[place] = milliseconds;
}

std::vector<double> LatencyRecorder::Sorted() const {
  std::vector<double> sorted = values_;
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

LoadResult RunLoad(const LoadOptions& options, const StartRequest& start) {
  return Load(options, start).Run();
}

}  // namespace tern::client
