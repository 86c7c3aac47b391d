// Shadow comparison: a sampled share of live images runs again on the float version of its model,
// and the best classes are compared (tern_shadow_comparisons_total).
//
// Never in the way of requests: one thread of the lowest priority (nice 19) does the work, at most
// kMaxWaiting images wait for it, and more are simply not compared.
#ifndef TERN_SERVER_SERVING_SHADOW_H_
#define TERN_SERVER_SERVING_SHADOW_H_

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "server/engine/plan.h"
#include "server/metrics/metrics.h"
#include "server/repository/repository.h"

namespace tern::serving {

// Thread safe.
class ShadowComparer {
 public:
  static constexpr size_t kMaxWaiting = 8;

  // `fraction` (0..1) of the images of quantised versions is compared, evenly spread. `metrics` is
  // not owned.
  ShadowComparer(double fraction, metrics::Metrics* metrics);
  // Drops what waits.
  ~ShadowComparer();

  // Where float versions come from; until then nothing is compared. `repository` must outlive this
  // or be taken back with null, which waits for the comparison in work.
  void SetRepository(const repository::Repository* repository);

  // Takes the pixels (network input, f32 NHWC) if this image is sampled and there is room.
  void Offer(const repository::LoadedModel& model, int best_class, std::vector<float> pixels);

 private:
  struct Item {
    metrics::ModelLabels model;
    int best_class = 0;
    std::vector<float> pixels;
  };
  void Work();
  void Compare(const Item& item);

  const double fraction_;
  metrics::Metrics* const metrics_;
  std::atomic<uint64_t> offered_{0};
  std::mutex repository_mutex_;  // held during a comparison
  const repository::Repository* repository_ = nullptr;
  // Of the last float version used; holds its plan until another is needed.
  std::shared_ptr<const engine::Plan> plan_;
  std::optional<engine::Session> session_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Item> waiting_;
  bool stopping_ = false;
  std::thread thread_;  // last: uses the rest
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_SHADOW_H_
