// Shadow comparison: a sampled share of live images runs again on the float version of its model;
// best classes and outputs are compared (tern_shadow_*, tern_live_agreement_ratio).
//
// Never in the way of requests. A comparison starts only while no image waits or runs anywhere
// (Activity); its thread has the scheduling policy SCHED_IDLE, so that a request which arrives in
// the middle takes the CPU at once; requests never wait for a lock that it holds, for it may have
// lost its CPU: they try ours, share those of the repository and of metrics, and have no business
// with that of VersionMonitor::Compared. What does not fit into a backlog of kMaxWaiting images is
// not compared but counted (tern_shadow_dropped_total).
#ifndef TERN_SERVER_SERVING_SHADOW_H_
#define TERN_SERVER_SERVING_SHADOW_H_

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "server/engine/plan.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/version_monitor.h"
#include "server/repository/repository.h"

namespace tern::serving {

// Thread safe.
class ShadowComparer {
 public:
  static constexpr size_t kMaxWaiting = 8;

  // `fraction` (0..1) of the images of quantised versions is compared, evenly spread. `metrics` is
  // not owned. There is no thread if it is 0: a process that is killed is gone, and its connections
  // closed, when its last thread has had a CPU to end on, and one of SCHED_IDLE waits seconds for
  // that where every CPU is busy.
  ShadowComparer(double fraction, metrics::Metrics* metrics);
  // Drops what waits.
  ~ShadowComparer();

  // Where float versions come from; until then nothing is compared. `repository` must outlive this
  // or be taken back with null, which waits for the comparison in work.
  void SetRepository(const repository::Repository* repository);

  // While one exists, an image waits or runs, and no comparison starts. The comparer
  // outlives it.
  class Activity {
   public:
    Activity() = default;
    Activity(Activity&& other) noexcept : count_(std::exchange(other.count_, nullptr)) {}
    Activity& operator=(Activity&& other) noexcept {
      std::swap(count_, other.count_);
      return *this;
    }
    ~Activity() {
      if (count_ != nullptr) --*count_;
    }

   private:
    friend class ShadowComparer;
    explicit Activity(std::atomic<int>* count) : count_(count) { ++*count; }
    std::atomic<int>* count_ = nullptr;
  };
  Activity Begin() { return Activity(&active_); }

  // Takes the pixels (network input, f32 NHWC) and the logits that they gave, if this image is
  // sampled and there is room. Never blocks. `monitor` gets the outcome.
  void Offer(const repository::LoadedModel& model,
             const std::shared_ptr<monitoring::VersionMonitor>& monitor,
             absl::Span<const float> logits, std::vector<float> pixels);

 private:
  struct Item {
    std::string model;
    uint64_t source;  // the float version that it was quantised from; 0 = unknown, any
    std::weak_ptr<monitoring::VersionMonitor> monitor;
    std::vector<float> logits;
    std::vector<float> pixels;
  };
  void Work();
  void Compare(const Item& item);
  // Lets go of the float version's session if that is no longer what the repository serves.
  void ReleaseUnused();

  const double fraction_;
  metrics::Metrics* const metrics_;
  std::atomic<uint64_t> offered_{0};
  std::atomic<int> active_{0};
  std::mutex repository_mutex_;  // held during a comparison
  const repository::Repository* repository_ = nullptr;
  // Of the last float version used.
  std::shared_ptr<const repository::LoadedModel> float_version_;
  std::optional<engine::Session> session_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Item> waiting_;
  bool stopping_ = false;
  std::thread thread_;  // only if fraction_ > 0
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_SHADOW_H_
