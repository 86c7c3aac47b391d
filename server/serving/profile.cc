#include "server/serving/profile.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"

namespace tern::serving {
namespace {

void FillRandom(absl::Span<float> input) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& x : input) x = normal(random);
}

}  // namespace

double Quantile(const std::vector<double>& sorted, double q) {
  if (sorted.empty()) return 0;
  const double rank = std::ceil(q * static_cast<double>(sorted.size()));
  const size_t index = rank < 1 ? 0 : static_cast<size_t>(rank) - 1;
  return sorted[std::min(index, sorted.size() - 1)];
}

absl::StatusOr<BenchmarkResult> Benchmark(const std::shared_ptr<const engine::Plan>& plan,
                                          const BenchmarkOptions& options) {
  if (options.batch < 1 || options.batch > plan->max_batch()) {
    return absl::InvalidArgumentError(
        absl::StrCat("batch: got ", options.batch, ", want 1..", plan->max_batch()));
  }
  if (options.sessions < 1 || options.sessions > 256 || options.threads < 1 ||
      options.threads > 256) {
    return absl::InvalidArgumentError(absl::StrCat("sessions ", options.sessions, " x threads ",
                                                   options.threads, ": each must be 1..256"));
  }
  std::vector<engine::Session> sessions;
  for (int i = 0; i < options.sessions; ++i) {
    TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(options.threads));
    FillRandom(session.input());
    sessions.push_back(std::move(session));
  }
  std::vector<std::vector<double>> times(options.sessions);
  std::vector<absl::Status> statuses(options.sessions);
  std::vector<absl::Duration> spans(options.sessions);
  std::vector<std::thread> threads;
  for (int s = 0; s < options.sessions; ++s) {
    threads.emplace_back([&, s] {
      for (int i = 0; i < 2 && statuses[s].ok(); ++i)
        statuses[s] = sessions[s].Run(options.batch).status();
      const absl::Time start = absl::Now();
      absl::Time last = start;
      while (statuses[s].ok() && last - start < options.duration) {
        if (options.cancelled && options.cancelled())
          statuses[s] = absl::CancelledError("benchmark cancelled");
        if (statuses[s].ok()) statuses[s] = sessions[s].Run(options.batch).status();
        const absl::Time now = absl::Now();
        times[s].push_back(absl::ToDoubleMilliseconds(now - last));
        last = now;
      }
      spans[s] = last - start;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) TERN_RETURN_IF_ERROR(status);
  BenchmarkResult result;
  std::vector<double> all;
  for (int s = 0; s < options.sessions; ++s) {
    result.images_per_second +=
        options.batch * static_cast<double>(times[s].size()) / absl::ToDoubleSeconds(spans[s]);
    all.insert(all.end(), times[s].begin(), times[s].end());
  }
  std::sort(all.begin(), all.end());
  result.batches = all.size();
  result.ms_per_image = result.images_per_second > 0 ? 1000.0 / result.images_per_second : 0;
  result.p50_ms = Quantile(all, 0.5);
  result.p90_ms = Quantile(all, 0.9);
  result.p99_ms = Quantile(all, 0.99);
  return result;
}

absl::StatusOr<engine::RunTimes> ProfileRuns(const std::shared_ptr<const engine::Plan>& plan,
                                             int batch, int threads, int runs,
                                             const std::function<bool()>& cancelled) {
  if (batch < 1 || batch > plan->max_batch() || runs < 1 || threads < 1 || threads > 256) {
    return absl::InvalidArgumentError(absl::StrCat("batch ", batch, " (1..", plan->max_batch(),
                                                   "), threads ", threads, " (1..256), runs ", runs,
                                                   " (>= 1): out of range"));
  }
  TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(threads));
  FillRandom(session.input());
  TERN_RETURN_IF_ERROR(session.Run(batch).status());
  std::vector<engine::RunTimes> samples(runs);
  for (engine::RunTimes& sample : samples) {
    if (cancelled && cancelled()) return absl::CancelledError("profile cancelled");
    TERN_RETURN_IF_ERROR(session.RunProfiled(batch, sample).status());
  }
  std::sort(samples.begin(), samples.end(),
            [](const auto& a, const auto& b) { return a.total < b.total; });
  const size_t first = samples.size() / 4, last = samples.size() - first;
  engine::RunTimes mean;
  mean.layers.resize(plan->layers().size());
  for (size_t r = first; r < last; ++r) {
    mean.total += samples[r].total;
    for (size_t l = 0; l < mean.layers.size(); ++l) mean.layers[l] += samples[r].layers[l];
    for (int c = 0; c < engine::kConversions; ++c)
      mean.conversions[c] += samples[r].conversions[c];
  }
  const int64_t count = static_cast<int64_t>(last - first);
  mean.total /= count;
  for (absl::Duration& time : mean.layers) time /= count;
  for (absl::Duration& time : mean.conversions) time /= count;
  return mean;
}

}  // namespace tern::serving
