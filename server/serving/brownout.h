// Brown-out by accuracy: which version of a model answers a request that names none.
//
// The versions that come from one float version form a ladder, ordered by the accuracy that their
// reports publish. A request starts at the default version, or above it if its min_accuracy wants
// that, and goes down while the model is overloaded or its max_latency cannot be kept: only to
// versions that are faster by their reports, and only as far as the accuracy allows. A request that
// names a version is never moved. docs/operations.md, "Brown-out", is the user's side of this.
#ifndef TERN_SERVER_SERVING_BROWNOUT_H_
#define TERN_SERVER_SERVING_BROWNOUT_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/repository/repository.h"

namespace tern::serving {

enum class Degradation { kNone, kOverload, kMaxLatency, kMinAccuracy };

// What a request says about accuracy and speed.
struct Wishes {
  // Least published top-1, a fraction; at the lower end of its 95 % interval.
  std::optional<double> min_accuracy;
  absl::Duration max_latency = absl::InfiniteDuration();
};

// A version on a ladder, from its report.
struct Rung {
  uint64_t version = 0;
  double top1_low = -1;  // lower end of the 95 % interval of its top-1; negative = not published
  double drop_high = 0;  // upper end of the top-1 lost against the float version; 0 for that one
  absl::Duration cost;   // per image: one thread, batch 1, where it was quantised
};

// The ladder that `version` is on, most accurate first: those of `versions` that come from the same
// float version and publish how much they lose. With labels that is the paired comparison of the
// report; without them each image on which the two disagree counts as lost. `version` itself is
// always on it.
std::vector<Rung> MakeLadder(
    uint64_t version, const std::vector<std::shared_ptr<const repository::LoadedModel>>& versions);

// Whether a model is overloaded, as steps down from its default version. Not thread safe; time
// comes in as an argument.
//
// Overload is a standing queue: for kHold no image was taken within `queue_wait`. Each further
// kHold is a further step. A step is taken back once no image has waited longer than half of
// queue_wait for some time: kRelease, twice as long each time the step back brings the overload
// back within that time, at most kMaxRelease.
class OverloadController {
 public:
  static constexpr absl::Duration kHold = absl::Milliseconds(500);
  static constexpr absl::Duration kRelease = absl::Seconds(5);
  static constexpr absl::Duration kMaxRelease = absl::Seconds(80);

  explicit OverloadController(absl::Duration queue_wait) : queue_wait_(queue_wait) {}

  // An image waited so long for decoding and its batch; infinite: it was refused because the queue
  // was full.
  void Observe(absl::Duration wait, absl::Time now);
  // Steps down, at most `most`.
  int Level(absl::Time now, int most);

 private:
  const absl::Duration queue_wait_;
  int level_ = 0;
  absl::Time bad_since_ = absl::InfiniteFuture();  // all observations since are over queue_wait
  absl::Time last_wait_ = absl::InfinitePast();    // last observation over half of it
  absl::Time changed_ = absl::InfinitePast();      // level_, up or down
  absl::Time raised_ = absl::InfinitePast();       // last step back up the ladder
  absl::Duration release_ = kRelease;
};

// Thread safe.
class Brownout {
 public:
  // Nothing is owned; all must outlive this.
  Brownout(const repository::Repository* repository, metrics::Metrics* metrics, const Clock* clock)
      : repository_(repository), metrics_(metrics), clock_(clock) {}

  struct Choice {
    uint64_t version = 0;  // to ask the repository for; 0 = the default
    Degradation degradation = Degradation::kNone;
    uint64_t degraded_from = 0;  // the default version, if another one was chosen
  };
  // The version for a request that named `version` (0 = none). `expected` gives the time in which a
  // version would answer now; called only for a max_latency. INVALID_ARGUMENT for a min_accuracy
  // outside 0..1; FAILED_PRECONDITION if no version it may have is accurate enough. An unknown
  // model is the repository's to refuse.
  absl::StatusOr<Choice> Choose(absl::string_view model, uint64_t version, const Wishes& wishes,
                                const std::function<absl::Duration(uint64_t version)>& expected);

  // An image of a request that named no version waited so long; infinite as above.
  void Observe(absl::string_view model, absl::Duration wait);

 private:
  struct Model {
    explicit Model(absl::Duration queue_wait) : queue_wait(queue_wait), overload(queue_wait) {}
    const absl::Duration queue_wait;
    absl::Time read;  // when the following was read from the repository
    uint64_t default_version = 0;
    double max_top1_drop = 0;
    std::vector<Rung> ladder;
    OverloadController overload;
    int told_level = 0;
  };

  // With the lock held. Reads the repository at most once a second per model. Null for an unknown
  // model.
  Model* Find(absl::string_view name);
  void TellLevel(absl::string_view name, Model& model, int level);

  const repository::Repository* const repository_;
  metrics::Metrics* const metrics_;
  const Clock* const clock_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Model>, std::less<>> models_;
};

// The choice on a ladder, by itself: see Brownout::Choose. `level` steps down for overload;
// `max_top1_drop` as in ModelConfig.
absl::StatusOr<Brownout::Choice> ChooseRung(
    const std::vector<Rung>& ladder, uint64_t default_version, int level, double max_top1_drop,
    const Wishes& wishes, const std::function<absl::Duration(uint64_t version)>& expected);

// How many steps down from the default version `max_top1_drop` allows.
int StepsDown(const std::vector<Rung>& ladder, uint64_t default_version, double max_top1_drop);

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_BROWNOUT_H_
