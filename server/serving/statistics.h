// What one loaded version has done: counts and time per stage, since it was loaded. The figures of
// the Open Inference Protocol's ModelStatistics; the same events are in metrics.h as histograms.
#ifndef TERN_SERVER_SERVING_STATISTICS_H_
#define TERN_SERVER_SERVING_STATISTICS_H_

#include <cstdint>
#include <map>
#include <mutex>

#include "absl/time/time.h"

namespace tern::serving {

// How often, and how long altogether.
struct Tally {
  uint64_t count = 0;
  absl::Duration time;

  void Add(absl::Duration once) {
    ++count;
    time += once;
  }
};

struct StageTimes {
  absl::Duration queue, input, inference, output, total;
};

// A value type. `input` is decoding and preprocessing, `output` what follows the network.
struct ModelStatistics {
  struct Batch {
    Tally input, inference, output;  // per execution of that size; counts are equal
  };
  absl::Time last_inference = absl::InfinitePast();  // end of the last execution
  uint64_t images = 0;
  uint64_t executions = 0;
  // Requests, of one or several images. Stages are those of requests that succeeded, so their
  // counts equal success.count.
  Tally success, fail;
  Tally queue, input, inference, output;
  std::map<int, Batch> batches;  // by batch size
};

// Thread safe.
class StatisticsCounter {
 public:
  // A batch has run. `input` is the sum over its images.
  void Execution(int images, absl::Duration input, absl::Duration inference, absl::Time end) {
    std::lock_guard<std::mutex> lock(mutex_);
    statistics_.images += images;
    ++statistics_.executions;
    statistics_.last_inference = end;
    ModelStatistics::Batch& batch = statistics_.batches[images];
    batch.input.Add(input);
    batch.inference.Add(inference);
    batch.output.Add(absl::ZeroDuration());
  }
  // Of one image of a batch of that size that was counted before.
  void Output(int images, absl::Duration output) {
    std::lock_guard<std::mutex> lock(mutex_);
    statistics_.batches[images].output.time += output;
  }
  void Success(const StageTimes& times) {
    std::lock_guard<std::mutex> lock(mutex_);
    statistics_.success.Add(times.total);
    statistics_.queue.Add(times.queue);
    statistics_.input.Add(times.input);
    statistics_.inference.Add(times.inference);
    statistics_.output.Add(times.output);
  }
  void Failure(absl::Duration total) {
    std::lock_guard<std::mutex> lock(mutex_);
    statistics_.fail.Add(total);
  }
  ModelStatistics Snapshot() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return statistics_;
  }

 private:
  mutable std::mutex mutex_;
  ModelStatistics statistics_;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_STATISTICS_H_
