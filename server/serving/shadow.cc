#include "server/serving/shadow.h"

#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "server/base/log.h"
#include "server/classify/top_k.h"

namespace tern::serving {
namespace {

// How often a waiting image looks whether the server is idle.
constexpr auto kLook = std::chrono::milliseconds(5);
// How long an unloaded float version's memory may stay.
constexpr auto kHold = std::chrono::seconds(1);

// The calling thread's: runs only on CPUs that nothing else wants (sched(7)).
void LowerPriority() {
  const sched_param none{};
  if (::sched_setscheduler(0, SCHED_IDLE, &none) == 0) return;
  // On Linux this is the thread's own priority.
  if (::setpriority(PRIO_PROCESS, 0, 19) != 0) {
    TERN_LOG_WARN(
        "shadow comparisons run at the priority of requests: neither SCHED_IDLE nor nice "
        "19 is permitted");
  }
}

}  // namespace

ShadowComparer::ShadowComparer(double fraction, metrics::Metrics* metrics)
    : fraction_(std::clamp(fraction, 0.0, 1.0)), metrics_(metrics) {
  if (fraction_ > 0) thread_ = std::thread([this] { Work(); });
}

ShadowComparer::~ShadowComparer() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    waiting_.clear();
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void ShadowComparer::SetRepository(const repository::Repository* repository) {
  std::lock_guard<std::mutex> lock(repository_mutex_);
  repository_ = repository;
  session_.reset();
  float_version_.reset();
}

void ShadowComparer::Offer(const repository::LoadedModel& model,
                           const std::shared_ptr<monitoring::VersionMonitor>& monitor,
                           absl::Span<const float> logits, std::vector<float> pixels) {
  if (fraction_ <= 0 || model.info.scheme == "fp32") return;
  // Evenly spread, without random numbers: image n is sampled if n * fraction crosses a whole
  // number.
  const auto n = static_cast<double>(offered_.fetch_add(1));
  if (std::floor((n + 1) * fraction_) == std::floor(n * fraction_)) return;
  {
    // The thread may have lost its CPU while it holds the lock, for as long as requests keep every
    // CPU busy: a request must not wait for it.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return metrics_->ShadowDropped("contended");
    if (stopping_) return;
    if (waiting_.size() >= kMaxWaiting) return metrics_->ShadowDropped("backlog");
    const bool own = model.report.source_model() == model.info.model;
    waiting_.push_back({model.info.model,
                        own ? model.report.source_version() : 0,
                        monitor,
                        {logits.begin(), logits.end()},
                        std::move(pixels)});
  }
  wake_.notify_one();
}

void ShadowComparer::Work() {
  LowerPriority();
  for (;;) {
    Item item;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (!wake_.wait_for(lock, kHold, [this] { return stopping_ || !waiting_.empty(); })) {
        lock.unlock();
        ReleaseUnused();
        continue;
      }
      if (stopping_) return;
      if (active_ > 0) {
        wake_.wait_for(lock, kLook, [this] { return stopping_; });
        continue;
      }
      item = std::move(waiting_.front());
      waiting_.pop_front();
    }
    Compare(item);
  }
}

void ShadowComparer::ReleaseUnused() {
  std::lock_guard<std::mutex> lock(repository_mutex_);
  if (float_version_ == nullptr || repository_ == nullptr) return;
  const auto now = repository_->Find(float_version_->info.model, float_version_->info.version);
  if (now.ok() && *now == float_version_) return;
  session_.reset();
  float_version_.reset();
}

void ShadowComparer::Compare(const Item& item) {
  std::lock_guard<std::mutex> lock(repository_mutex_);
  if (repository_ == nullptr) return metrics_->ShadowDropped("no_float");
  for (const repository::VersionInfo& info : repository_->List(item.model)) {
    if (info.scheme != "fp32" || info.state != repository::State::kReady) continue;
    if (item.source != 0 && info.version != item.source) continue;
    const auto model = repository_->Find(info.model, info.version);
    if (!model.ok()) continue;
    const engine::Plan& plan = *(*model)->plan;
    if (plan.input_shape().elements() != static_cast<int64_t>(item.pixels.size()) ||
        plan.classes() != static_cast<int64_t>(item.logits.size())) {
      continue;
    }
    if (*model != float_version_) {
      absl::StatusOr<engine::Session> session = plan.NewSession(1);
      if (!session.ok()) return metrics_->ShadowDropped("failed");
      session_ = *std::move(session);
      float_version_ = *model;
    }
    std::copy(item.pixels.begin(), item.pixels.end(), session_->input().begin());
    const absl::StatusOr<absl::Span<const float>> logits = session_->Run(1);
    if (!logits.ok() || !classify::CheckFinite(*logits).ok()) {
      return metrics_->ShadowDropped("failed");
    }
    // The version may have been unloaded meanwhile.
    const std::shared_ptr<monitoring::VersionMonitor> monitor = item.monitor.lock();
    if (monitor == nullptr) return;
    const bool agree =
        classify::TopK(*logits, 1).front().index == classify::TopK(item.logits, 1).front().index;
    monitor->Compared(agree, classify::KlDivergence(*logits, item.logits));
    return;
  }
  metrics_->ShadowDropped("no_float");
}

}  // namespace tern::serving
