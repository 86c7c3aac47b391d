// How fast a plan is on this machine, without the network and the images.
#ifndef TERN_SERVER_SERVING_PROFILE_H_
#define TERN_SERVER_SERVING_PROFILE_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/engine/plan.h"

namespace tern::serving {

struct BenchmarkOptions {
  int batch = 1;
  int threads = 1;   // OpenMP threads of each session
  int sessions = 1;  // concurrent sessions
  absl::Duration duration = absl::Seconds(3);
  std::function<bool()> cancelled;  // polled between runs; may be null
};

struct BenchmarkResult {
  double images_per_second = 0;
  double ms_per_image = 0;                    // wall time over images, all sessions together
  double p50_ms = 0, p90_ms = 0, p99_ms = 0;  // of one batch
  uint64_t batches = 0;
};

// Runs random pixels (fixed seed) through `plan` for `duration`, after a warm-up of two batches.
// INVALID_ARGUMENT for options out of range; CANCELLED.
absl::StatusOr<BenchmarkResult> Benchmark(const std::shared_ptr<const engine::Plan>& plan,
                                          const BenchmarkOptions& options);

// Where the time of a run goes: the means over the middle half of `runs` runs by total time, so
// that the rows add up to the total as those of one run do. `cancelled` is polled between runs and
// may be null. INVALID_ARGUMENT for options out of range; CANCELLED.
absl::StatusOr<engine::RunTimes> ProfileRuns(const std::shared_ptr<const engine::Plan>& plan,
                                             int batch, int threads, int runs,
                                             const std::function<bool()>& cancelled = nullptr);

// The q-quantile (0..1) of `sorted` by the nearest-rank method; 0 if empty.
double Quantile(const std::vector<double>& sorted, double q);

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_PROFILE_H_
