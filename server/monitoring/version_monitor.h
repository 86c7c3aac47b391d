// What a version in memory does now: its accuracy on the labels that came lately, and its agreement
// with the float version on the images that shadow comparisons took, both with intervals. Published
// at every collection of the metrics (tern_live_*), so that a window empties while nothing happens.
//
// One per loaded version, made and dropped with it: a version that is loaded again starts anew.
#ifndef TERN_SERVER_MONITORING_VERSION_MONITOR_H_
#define TERN_SERVER_MONITORING_VERSION_MONITOR_H_

#include <mutex>

#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/rolling_share.h"

namespace tern::monitoring {

struct MonitorOptions {
  WindowOptions window;  // of labels, and of comparisons
};

// Thread safe.
class VersionMonitor {
 public:
  // `metrics` and `clock` are not owned and outlive this.
  VersionMonitor(metrics::ModelLabels model, const MonitorOptions& options,
                 metrics::Metrics* metrics, const Clock* clock);
  ~VersionMonitor();
  VersionMonitor(const VersionMonitor&) = delete;
  VersionMonitor& operator=(const VersionMonitor&) = delete;

  // A label became known: it was the best class; it was among the five best.
  void Labelled(bool top1, bool top5);
  // The float version saw the same image; `divergence` in nats, see classify::KlDivergence.
  void Compared(bool agree, double divergence);

 private:
  void Publish();

  const metrics::ModelLabels model_;
  metrics::Metrics* const metrics_;
  const Clock* const clock_;
  std::mutex mutex_;
  RollingShare top1_, top5_, agreement_;
  int refresh_ = 0;
};

}  // namespace tern::monitoring

#endif  // TERN_SERVER_MONITORING_VERSION_MONITOR_H_
