#include "server/monitoring/label_join.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/file.h"

namespace tern::monitoring {
namespace {

constexpr size_t kMaxKeyBytes = 64;

// Ids come from clients and may be long; long ones are kept as their SHA-256.
std::string KeyOf(absl::string_view request_id) {
  return request_id.size() <= kMaxKeyBytes ? std::string(request_id)
                                           : absl::StrCat("sha256:", Sha256Hex(request_id));
}

// The head of an id, for messages.
absl::string_view Head(absl::string_view request_id) { return request_id.substr(0, kMaxKeyBytes); }

}  // namespace

LabelJoin::LabelJoin(size_t capacity, metrics::Metrics* metrics, absl::Duration max_age,
                     const Clock* clock)
    : capacity_(capacity), metrics_(metrics), max_age_(max_age), clock_(clock) {}

void LabelJoin::ForgetOld() {
  const absl::Time oldest = clock_->Now() - max_age_;
  while (!entries_.empty() && entries_.front().at < oldest) {
    by_key_.erase(entries_.front().key);
    entries_.pop_front();
  }
}

void LabelJoin::Remember(absl::string_view request_id, Prediction prediction) {
  if (request_id.empty() || capacity_ == 0) return;
  std::string key = KeyOf(request_id);
  if (prediction.top5.size() > 5) prediction.top5.resize(5);
  std::lock_guard<std::mutex> lock(mutex_);
  ForgetOld();
  const auto known = by_key_.find(key);
  if (known != by_key_.end()) {
    entries_.erase(known->second);
    by_key_.erase(known);
  } else if (entries_.size() >= capacity_) {
    by_key_.erase(entries_.front().key);
    entries_.pop_front();
  }
  entries_.push_back(Entry{key, std::move(prediction), clock_->Now()});
  by_key_.emplace(std::move(key), std::prev(entries_.end()));
}

absl::StatusOr<Outcome> LabelJoin::Report(absl::string_view request_id, uint32_t label) {
  Prediction prediction;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ForgetOld();
    const auto known = by_key_.find(KeyOf(request_id));
    if (known == by_key_.end()) {
      return absl::NotFoundError(
          absl::StrCat("request id '", Head(request_id), "' is unknown or forgotten; the last ",
                       capacity_, " predictions are kept for ", absl::FormatDuration(max_age_)));
    }
    Entry& entry = *known->second;
    if (entry.reported) {
      return absl::AlreadyExistsError(
          absl::StrCat("a label for request id '", Head(request_id), "' was reported before"));
    }
    if (static_cast<int64_t>(label) >= entry.prediction.classes) {
      return absl::InvalidArgumentError(absl::StrCat("label: got ", label, ", the model has ",
                                                     entry.prediction.classes, " classes"));
    }
    entry.reported = true;
    prediction = entry.prediction;
  }
  return Count(prediction, label);
}

Outcome LabelJoin::Count(const Prediction& prediction, uint32_t label) {
  Outcome outcome;
  outcome.model = prediction.model;
  const std::vector<int>& best = prediction.top5;
  const auto end = best.begin() + std::min<size_t>(best.size(), 5);
  const auto is_label = [label](int index) {
    return index >= 0 && static_cast<uint32_t>(index) == label;
  };
  outcome.top1 = !best.empty() && is_label(best.front());
  outcome.top5 = std::any_of(best.begin(), end, is_label);
  if (const std::shared_ptr<VersionMonitor> monitor = prediction.monitor.lock()) {
    monitor->Labelled(outcome.top1, outcome.top5);
  } else if (metrics_ != nullptr) {
    metrics_->Labelled(prediction.model, outcome.top1, outcome.top5);
  }
  return outcome;
}

}  // namespace tern::monitoring
