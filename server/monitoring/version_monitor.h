// What a version in memory does now, against what its report promised: accuracy on the labels that
// came lately, agreement with the float version on the images that shadow comparisons took, and
// signs of drift that need no labels (confidence, entropy, mix of classes, activation codes at
// their limits). Published at every collection of the metrics (tern_live_*), so that a window
// empties while nothing happens.
//
// One per loaded version, made and dropped with it: a version that is loaded again starts anew.
#ifndef TERN_SERVER_MONITORING_VERSION_MONITOR_H_
#define TERN_SERVER_MONITORING_VERSION_MONITOR_H_

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/rolling_share.h"
#include "tern/v1/model.pb.h"

namespace tern::monitoring {

struct MonitorOptions {
  WindowOptions window;  // of labels, of comparisons and of answers
};

// Thread safe. About 60 bytes for each event in the windows. No other function waits for a thread
// in Compared(), which may have lost its CPU for long (shadow.h); collections do.
class VersionMonitor {
 public:
  // Answers that are the reference for drift where the report has none: the first ones.
  static constexpr uint64_t kOwnReference = 1000;
  // Batches whose codes are in the window.
  static constexpr size_t kMostBatches = 64;

  // `report` is the version's, empty if it has none; one whose figures contradict each other or
  // `classes` counts as none (logged). `layers`: those that Codes() speaks of. `metrics` and
  // `clock` are not owned and outlive this.
  VersionMonitor(metrics::ModelLabels model, const v1::QuantizationReport& report, int64_t classes,
                 std::vector<std::string> layers, const MonitorOptions& options,
                 metrics::Metrics* metrics, const Clock* clock);
  ~VersionMonitor();
  VersionMonitor(const VersionMonitor&) = delete;
  VersionMonitor& operator=(const VersionMonitor&) = delete;

  // A label became known: it was the best class; it was among the five best.
  void Labelled(bool top1, bool top5);
  // The float version saw the same image; `divergence` in nats, see classify::KlDivergence.
  void Compared(bool agree, double divergence);
  // An answer: its best class (others than 0..classes-1 are not counted), that class's probability,
  // and the entropy of all probabilities in nats.
  void Answered(int best_class, double confidence, double entropy);
  // Of a batch whose codes were counted: by layer the share at the limits, negative where a layer
  // has none to count.
  void Codes(absl::Span<const double> at_limit, int images);

 private:
  struct Answer {
    int64_t micros;
    int32_t best_class;
    float confidence, entropy;
  };
  struct Batch {
    int64_t micros;
    int images;
    std::vector<float> at_limit;  // by layer
  };
  void Publish();
  // The following with the lock held.
  void UseReference(const v1::OutputReference& reference);
  void Count(const Answer& answer, int by);
  void PublishAnswers(absl::Time now);
  void PublishCodes(absl::Time now);

  const metrics::ModelLabels model_;
  const int64_t classes_;
  const std::vector<std::string> layers_;
  const MonitorOptions options_;
  metrics::Metrics* const metrics_;
  const Clock* const clock_;
  std::mutex comparisons_mutex_;  // never held with mutex_
  RollingShare agreement_;
  std::mutex mutex_;  // of all that follows
  RollingShare top1_, top5_;
  // Of the report, or of the first answers; no images: not known yet.
  v1::OutputReference reference_, own_reference_;
  std::vector<double> calibration_at_limit_;  // by layer; negative: not in the report
  std::vector<int> group_of_;                 // by class
  std::vector<uint64_t> reference_groups_, groups_;
  std::deque<Answer> answers_;           // oldest first
  double confidence_ = 0, entropy_ = 0;  // sums over answers_
  std::deque<Batch> batches_;            // oldest first
  bool told_reference_ = false;
  int refresh_ = 0;
};

}  // namespace tern::monitoring

#endif  // TERN_SERVER_MONITORING_VERSION_MONITOR_H_
