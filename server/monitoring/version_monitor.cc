#include "server/monitoring/version_monitor.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/string_view.h"
#include "server/base/log.h"
#include "server/monitoring/class_mix.h"
#include "statistics/statistics.h"

namespace tern::monitoring {

using metrics::LiveFigure;

namespace {

// Whether the reference is one: it comes from a file.
bool IsUsable(const v1::OutputReference& reference, int64_t classes) {
  const uint64_t sum =
      std::accumulate(reference.best_class().begin(), reference.best_class().end(), uint64_t{0});
  return reference.best_class_size() == classes && reference.images() > 0 &&
         sum == reference.images() && reference.confidence() >= 0 && reference.confidence() <= 1 &&
         reference.entropy() >= 0 && std::isfinite(reference.entropy());
}

}  // namespace

VersionMonitor::VersionMonitor(metrics::ModelLabels model, const v1::QuantizationReport& report,
                               int64_t classes, std::vector<std::string> layers,
                               const MonitorOptions& options, metrics::Metrics* metrics,
                               const Clock* clock)
    : model_(std::move(model)),
      classes_(classes),
      layers_(std::move(layers)),
      options_(options),
      metrics_(metrics),
      clock_(clock),
      agreement_(options.window),
      top1_(options.window),
      top5_(options.window),
      calibration_at_limit_(layers_.size(), -1) {
  if (report.has_outputs()) {
    if (IsUsable(report.outputs(), classes)) {
      UseReference(report.outputs());
    } else {
      TERN_LOG_WARN(
          "{} version {}: the report's reference for drift is unusable; the first {} "
          "answers are the reference",
          model_.model, model_.version, kOwnReference);
      metrics_->Fallback("drift_reference");
    }
  }
  own_reference_.mutable_best_class()->Resize(static_cast<int>(classes), 0);
  std::map<absl::string_view, double> at_limit;
  for (const v1::LayerReport& layer : report.layers()) {
    if (layer.has_output_at_limit()) at_limit[layer.name()] = layer.output_at_limit();
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    const auto it = at_limit.find(layers_[l]);
    if (it != at_limit.end()) calibration_at_limit_[l] = it->second;
  }
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
  std::lock_guard<std::mutex> lock(comparisons_mutex_);
  agreement_.Add(clock_->Now(), agree);
}

void VersionMonitor::UseReference(const v1::OutputReference& reference) {
  reference_ = reference;
  group_of_ = GroupClasses(reference_.best_class());
  const size_t count = group_of_.empty() ? 0 : group_of_.back() + 1;
  reference_groups_.assign(count, 0);
  groups_.assign(count, 0);
  for (int c = 0; c < reference_.best_class_size(); ++c) {
    reference_groups_[group_of_[c]] += reference_.best_class(c);
  }
  for (const Answer& answer : answers_) ++groups_[group_of_[answer.best_class]];
}

void VersionMonitor::Count(const Answer& answer, int by) {
  confidence_ += by * static_cast<double>(answer.confidence);
  entropy_ += by * static_cast<double>(answer.entropy);
  if (!groups_.empty()) groups_[group_of_[answer.best_class]] += by;
}

void VersionMonitor::Answered(int best_class, double confidence, double entropy) {
  if (best_class < 0 || best_class >= classes_) return;
  const Answer answer{absl::ToUnixMicros(clock_->Now()), best_class, static_cast<float>(confidence),
                      static_cast<float>(entropy)};
  if (!std::isfinite(answer.confidence) || !std::isfinite(answer.entropy)) return;
  std::lock_guard<std::mutex> lock(mutex_);
  answers_.push_back(answer);
  Count(answer, 1);
  if (answers_.size() > options_.window.most) {
    Count(answers_.front(), -1);
    answers_.pop_front();
  }
  if (reference_.images() > 0) return;
  v1::OutputReference& own = own_reference_;
  own.set_images(own.images() + 1);
  own.set_confidence(own.confidence() + answer.confidence);
  own.set_entropy(own.entropy() + answer.entropy);
  own.set_best_class(best_class, own.best_class(best_class) + 1);
  if (own.images() < kOwnReference) return;
  own.set_images_of("first_answers");
  own.set_confidence(own.confidence() / kOwnReference);
  own.set_entropy(own.entropy() / kOwnReference);
  UseReference(own);
}

void VersionMonitor::Codes(absl::Span<const double> at_limit, int images) {
  const int64_t now = absl::ToUnixMicros(clock_->Now());
  std::lock_guard<std::mutex> lock(mutex_);
  batches_.push_back({now, images, {at_limit.begin(), at_limit.end()}});
  batches_.back().at_limit.resize(layers_.size(), -1);
  if (batches_.size() > kMostBatches) batches_.pop_front();
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
  RollingShare::Count agreement;
  {
    std::lock_guard<std::mutex> lock(comparisons_mutex_);
    agreement = agreement_.At(now);
  }
  share(agreement, LiveFigure::kComparisons, LiveFigure::kAgreement, LiveFigure::kAgreementLow,
        LiveFigure::kAgreementHigh);
  std::lock_guard<std::mutex> lock(mutex_);
  share(top1_.At(now), LiveFigure::kLabels, LiveFigure::kTop1, LiveFigure::kTop1Low,
        LiveFigure::kTop1High);
  share(top5_.At(now), LiveFigure::kLabels, LiveFigure::kTop5, LiveFigure::kTop5Low,
        LiveFigure::kTop5High);
  PublishAnswers(now);
  PublishCodes(now);
}

void VersionMonitor::PublishAnswers(absl::Time now) {
  const int64_t oldest = absl::ToUnixMicros(now - options_.window.age);
  while (!answers_.empty() && answers_.front().micros < oldest) {
    Count(answers_.front(), -1);
    answers_.pop_front();
  }
  // What rounding left in the sums goes when the window is empty.
  if (answers_.empty()) confidence_ = entropy_ = 0;
  const double images = static_cast<double>(answers_.size());
  const auto known = [](bool is, double x) { return is ? std::optional(x) : std::nullopt; };
  metrics_->Live(model_, LiveFigure::kImages, images);
  metrics_->Live(model_, LiveFigure::kConfidence, known(images > 0, confidence_ / images));
  metrics_->Live(model_, LiveFigure::kEntropy, known(images > 0, std::max(0.0, entropy_ / images)));
  const bool has = reference_.images() > 0;
  metrics_->Live(model_, LiveFigure::kReferenceImages, static_cast<double>(reference_.images()));
  metrics_->Live(model_, LiveFigure::kReferenceConfidence, known(has, reference_.confidence()));
  metrics_->Live(model_, LiveFigure::kReferenceEntropy, known(has, reference_.entropy()));
  metrics_->Live(model_, LiveFigure::kClassMix,
                 known(has && images > 0, StabilityIndex(reference_groups_, groups_)));
  if (has && !told_reference_) metrics_->DriftReference(model_, reference_.images_of());
  told_reference_ = has;
}

void VersionMonitor::PublishCodes(absl::Time now) {
  const int64_t oldest = absl::ToUnixMicros(now - options_.window.age);
  while (!batches_.empty() && batches_.front().micros < oldest) batches_.pop_front();
  std::optional<double> excess;
  for (size_t l = 0; l < layers_.size(); ++l) {
    double sum = 0, images = 0;
    for (const Batch& batch : batches_) {
      if (batch.at_limit[l] < 0) continue;
      sum += static_cast<double>(batch.at_limit[l]) * batch.images;
      images += batch.images;
    }
    metrics_->LiveAtLimit(model_, layers_[l],
                          images > 0 ? std::optional(sum / images) : std::nullopt);
    if (images == 0 || calibration_at_limit_[l] < 0) continue;
    const double more = sum / images - calibration_at_limit_[l];
    excess = excess.has_value() ? std::max(*excess, more) : more;
  }
  metrics_->Live(model_, LiveFigure::kAtLimitExcess, excess);
}

}  // namespace tern::monitoring
