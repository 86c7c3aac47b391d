#include "server/monitoring/version_monitor.h"

#include <optional>
#include <utility>

#include "statistics/statistics.h"

namespace tern::monitoring {

using metrics::LiveFigure;

VersionMonitor::VersionMonitor(metrics::ModelLabels model, const MonitorOptions& options,
                               metrics::Metrics* metrics, const Clock* clock)
    : model_(std::move(model)),
      metrics_(metrics),
      clock_(clock),
      top1_(options.window),
      top5_(options.window),
      agreement_(options.window) {
  refresh_ = metrics_->AddRefresh([this] { Publish(); });
}

VersionMonitor::~VersionMonitor() { metrics_->RemoveRefresh(refresh_); }

void VersionMonitor::Labelled(bool top1, bool top5) {
  metrics_->Labelled(model_, top1, top5);
  const absl::Time now = clock_->Now();
  std::lock_guard<std::mutex> lock(mutex_);
  top1_.Add(now, top1);
  top5_.Add(now, top5);
}

void VersionMonitor::Compared(bool agree, double divergence) {
  metrics_->Shadow(model_, agree, divergence);
  const absl::Time now = clock_->Now();
  std::lock_guard<std::mutex> lock(mutex_);
  agreement_.Add(now, agree);
}

void VersionMonitor::Publish() {
  const auto share = [this](RollingShare::Count count, LiveFigure total, LiveFigure value,
                            LiveFigure low, LiveFigure high) {
    const statistics::Interval interval = statistics::WilsonInterval(count.hits, count.total);
    const auto known = [&](double x) { return count.total > 0 ? std::optional(x) : std::nullopt; };
    metrics_->Live(model_, total, static_cast<double>(count.total));
    metrics_->Live(model_, value, known(interval.value));
    metrics_->Live(model_, low, known(interval.low));
    metrics_->Live(model_, high, known(interval.high));
  };
  const absl::Time now = clock_->Now();
  std::lock_guard<std::mutex> lock(mutex_);
  share(top1_.At(now), LiveFigure::kLabels, LiveFigure::kTop1, LiveFigure::kTop1Low,
        LiveFigure::kTop1High);
  share(top5_.At(now), LiveFigure::kLabels, LiveFigure::kTop5, LiveFigure::kTop5Low,
        LiveFigure::kTop5High);
  share(agreement_.At(now), LiveFigure::kComparisons, LiveFigure::kAgreement,
        LiveFigure::kAgreementLow, LiveFigure::kAgreementHigh);
}

}  // namespace tern::monitoring
