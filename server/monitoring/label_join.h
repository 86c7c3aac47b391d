// Joins true labels with earlier predictions: live accuracy.
#ifndef TERN_SERVER_MONITORING_LABEL_JOIN_H_
#define TERN_SERVER_MONITORING_LABEL_JOIN_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/version_monitor.h"

namespace tern::monitoring {

// What is remembered of a prediction.
struct Prediction {
  metrics::ModelLabels model;
  std::vector<int> top5;  // best first, at most 5
  int64_t classes = 0;
  // Of the version that made it, told of the label if it is still there. Without one that ever was,
  // the label is counted in tern_labelled_predictions_total only.
  std::weak_ptr<VersionMonitor> monitor;
};

struct Outcome {
  metrics::ModelLabels model;
  bool top1 = false;
  bool top5 = false;  // among the five best, the first included
};

// A bounded map from request id to prediction; the oldest is forgotten first, and those older than
// max_age. Thread safe.
class LabelJoin {
 public:
  // `capacity` predictions are kept (about 400 bytes each, however long the ids); 0 = none.
  // `metrics` is not owned; may be null.
  LabelJoin(size_t capacity, metrics::Metrics* metrics, absl::Duration max_age = absl::Hours(24),
            const Clock* clock = Clock::Real());

  // Remembers a prediction. A repeated id replaces the older one. An empty id is not remembered.
  void Remember(absl::string_view request_id, Prediction prediction);

  // Counts the label. NOT_FOUND: unknown or forgotten id; ALREADY_EXISTS: reported before;
  // INVALID_ARGUMENT: label >= classes (nothing is counted, a correct label may follow).
  absl::StatusOr<Outcome> Report(absl::string_view request_id, uint32_t label);

  // Counts a label that came with its request. A label that is not a class counts as a miss.
  Outcome Count(const Prediction& prediction, uint32_t label);

 private:
  struct Entry {
    std::string key;
    Prediction prediction;
    absl::Time at;
    bool reported = false;
  };
  // With the lock held.
  void ForgetOld();

  const size_t capacity_;
  metrics::Metrics* const metrics_;
  const absl::Duration max_age_;
  const Clock* const clock_;
  std::mutex mutex_;
  std::list<Entry> entries_;  // oldest first
  std::unordered_map<std::string, std::list<Entry>::iterator> by_key_;
};

}  // namespace tern::monitoring

#endif  // TERN_SERVER_MONITORING_LABEL_JOIN_H_
