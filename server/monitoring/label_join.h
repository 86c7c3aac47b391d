// Joins true labels with earlier predictions: live accuracy.
#ifndef TERN_SERVER_MONITORING_LABEL_JOIN_H_
#define TERN_SERVER_MONITORING_LABEL_JOIN_H_

#include <cstdint>
#include <list>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/metrics/metrics.h"

namespace tern::monitoring {

// What is remembered of a prediction.
struct Prediction {
  metrics::ModelLabels model;
  std::vector<int> top5;  // best first, at most 5
  int64_t classes = 0;
};

struct Outcome {
  metrics::ModelLabels model;
  bool top1 = false;
  bool top5 = false;
};

// A bounded map from request id to prediction; the oldest is forgotten first. Thread safe.
class LabelJoin {
 public:
  // `capacity` predictions are kept (about 200 bytes each). `metrics` is not owned; may be null.
  LabelJoin(size_t capacity, metrics::Metrics* metrics);

  // Remembers a prediction. A repeated id replaces the older one.
  void Remember(absl::string_view request_id, Prediction prediction);

  // Counts the label. NOT_FOUND: unknown or forgotten id; ALREADY_EXISTS: reported before;
  // INVALID_ARGUMENT: label >= classes.
  absl::StatusOr<Outcome> Report(absl::string_view request_id, uint32_t label);

  // Counts a label that came with its request.
  Outcome Count(const Prediction& prediction, uint32_t label);
};

}  // namespace tern::monitoring

#endif  // TERN_SERVER_MONITORING_LABEL_JOIN_H_
