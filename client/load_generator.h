// Load on a server, and what it did: closed loop (a fixed number of requests in flight) or open
// loop (requests at given times, whether or not earlier ones have been answered).
#ifndef TERN_CLIENT_LOAD_GENERATOR_H_
#define TERN_CLIENT_LOAD_GENERATOR_H_

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/random.h"
#include "tern/v1/classifier.pb.h"

namespace tern::client {

// The nearest-rank percentile: the smallest of `sorted` (ascending) such that at least `percent`
// per cent of the values are no larger. 0 < percent <= 100. NaN if there are no values.
double Percentile(const std::vector<double>& sorted, double percent);

// Remembers every value up to a limit, then a uniform sample of all (reservoir), so that a run of
// days takes 16 MB.
class LatencyRecorder {
 public:
  explicit LatencyRecorder(size_t limit = 2'000'000, uint64_t seed = 0)
      : limit_(limit), random_(seed) {}

  void Add(double milliseconds);
  // Ascending.
  std::vector<double> Sorted() const;
  uint64_t count() const { return count_; }
  double mean() const { return count_ == 0 ? 0 : sum_ / static_cast<double>(count_); }
  double max() const { return max_; }  // of all values, also those not in the sample

 private:
  size_t limit_;
  Random random_;
  std::vector<double> values_;
  uint64_t count_ = 0;
  double sum_ = 0;
  double max_ = 0;
};

struct LoadOptions {
  int concurrency = 1;       // closed loop: requests in flight
  double rate = 0;           // > 0: open loop, requests per second
  bool poisson = true;       // open loop: exponential gaps; else equal gaps
  double seconds = 10;       // measured time
  double warmup = 1;         // seconds before it that are not counted
  int max_in_flight = 1024;  // open loop: beyond it requests wait, and their clock runs
  uint64_t seed = 0;         // of the Poisson arrivals
};

struct LoadResult {
  uint64_t images = 0;  // answered well within the measured time
  double seconds = 0;   // measured time, longer if every answer came after it
  double images_per_second = 0;
  double ms_per_image = 0;  // 1000 / images_per_second
  double mean_ms = 0, p50_ms = 0, p90_ms = 0, p95_ms = 0, p99_ms = 0, p999_ms = 0, max_ms = 0;
  // Median of each answer's latency less its own decoding and preprocessing.
  double p50_beside_pixels_ms = 0;
  // Open loop: requests of the measured time that the end came before, because this process or the
  // server was behind. Poisson: how many are to be expected in the time left.
  uint64_t not_sent = 0;
  uint64_t errors = 0;
  std::map<std::string, uint64_t> errors_by_code;  // canonical names
  std::string first_error;
  // Means over the answers' receipts.
  double batch_size = 0;
  double decode_us = 0, preprocess_us = 0, queue_us = 0, inference_us = 0, total_us = 0;
};

// Starts request `number` (0, 1, ...); `done` must be called once for each, from any thread but
// not before the function returns.
using Done = std::function<void(absl::StatusOr<v1::ClassifyResponse>)>;
using StartRequest = std::function<void(uint64_t number, Done done)>;

// Runs the load until the measured time is over, waits for the last answer. Latencies run from the
// intended time of sending (in a closed loop that is the real one) of requests due in the measured
// time, to the answer; failed requests count as errors only.
LoadResult RunLoad(const LoadOptions& options, const StartRequest& start);

}  // namespace tern::client

#endif  // TERN_CLIENT_LOAD_GENERATOR_H_
