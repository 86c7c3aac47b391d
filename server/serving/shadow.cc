#include "server/serving/shadow.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "server/classify/top_k.h"

namespace tern::serving {

ShadowComparer::ShadowComparer(double fraction, metrics::Metrics* metrics)
    : fraction_(std::clamp(fraction, 0.0, 1.0)), metrics_(metrics), thread_([this] { Work(); }) {}

ShadowComparer::~ShadowComparer() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    waiting_.clear();
  }
  wake_.notify_all();
  thread_.join();
}

void ShadowComparer::SetRepository(const repository::Repository* repository) {
  std::lock_guard<std::mutex> lock(repository_mutex_);
  repository_ = repository;
  session_.reset();
  plan_.reset();
}

void ShadowComparer::Offer(const repository::LoadedModel& model, int best_class,
                           std::vector<float> pixels) {
  if (fraction_ <= 0 || model.info.scheme == "fp32") return;
  // Evenly spread, without random numbers: image n is sampled if n * fraction crosses a whole
  // number.
  const auto n = static_cast<double>(offered_.fetch_add(1));
  if (std::floor((n + 1) * fraction_) == std::floor(n * fraction_)) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_ || waiting_.size() >= kMaxWaiting) return;
    waiting_.push_back({model.metric_labels, best_class, std::move(pixels)});
  }
  wake_.notify_one();
}

void ShadowComparer::Work() {
  // On Linux this is the thread's own priority. Failing is harmless.
  (void)::setpriority(PRIO_PROCESS, 0, 19);
  for (;;) {
    Item item;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
      if (stopping_) return;
      item = std::move(waiting_.front());
      waiting_.pop_front();
    }
    Compare(item);
  }
}

void ShadowComparer::Compare(const Item& item) {
  std::lock_guard<std::mutex> lock(repository_mutex_);
  if (repository_ == nullptr) return;
  for (const repository::VersionInfo& info : repository_->List(item.model.model)) {
    if (info.scheme != "fp32" || info.state != repository::State::kReady) continue;
    const auto model = repository_->Find(info.model, info.version);
    if (!model.ok()) continue;
    const std::shared_ptr<const engine::Plan>& plan = (*model)->plan;
    if (plan->input_shape().elements() != static_cast<int64_t>(item.pixels.size())) continue;
    if (plan != plan_) {
      absl::StatusOr<engine::Session> session = plan->NewSession(1);
      if (!session.ok()) return;
      session_ = *std::move(session);
      plan_ = plan;
    }
    std::copy(item.pixels.begin(), item.pixels.end(), session_->input().begin());
    const absl::StatusOr<absl::Span<const float>> logits = session_->Run(1);
    if (!logits.ok()) return;
    metrics_->Shadow(item.model, classify::TopK(*logits, 1).front().index == item.best_class);
    return;
  }
}

}  // namespace tern::serving
