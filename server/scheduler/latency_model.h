// How long batches take, learned per batch size.
#ifndef TERN_SERVER_SCHEDULER_LATENCY_MODEL_H_
#define TERN_SERVER_SCHEDULER_LATENCY_MODEL_H_

#include <algorithm>
#include <array>
#include <vector>

#include "absl/time/time.h"

namespace tern::scheduler {

// The last kWindow times of every batch size: order statistics of them do not see single outliers,
// and a change of load replaces them within kWindow batches. A size that has not run for kFresh
// while others have is read off its neighbours. State: max_batch * kWindow times. Not thread safe.
class LatencyModel {
 public:
  static constexpr int kWindow = 16;
  static constexpr absl::Duration kFresh = absl::Seconds(30);

  explicit LatencyModel(int max_batch) : sizes_(std::max(1, max_batch)) {}

  // A batch of `size` (clamped to 1..max_batch) took `time` (negative counts as 0) and ended `now`.
  void Add(int size, absl::Duration time, absl::Time now) {
    Size& known = sizes_[Index(size)];
    known.times[known.next] = std::max(absl::ZeroDuration(), time);
    known.next = (known.next + 1) % kWindow;
    known.count = std::min(known.count + 1, kWindow);
    std::array<absl::Duration, kWindow> sorted = known.times;
    std::sort(sorted.begin(), sorted.begin() + known.count);
    known.typical = sorted[(known.count - 1) / 2];
    known.high = sorted[std::max(0, known.count - 2)];
    known.last = now;
    last_ = std::max(last_, now);
  }

  // The (lower) median. 0 before the first batch of any size.
  absl::Duration Typical(int size) const { return Read(size, &Size::typical); }
  // The second largest: what nine batches in ten keep, and one hiccup does not move. Never below
  // Typical of the same measurements.
  absl::Duration High(int size) const { return Read(size, &Size::high); }

 private:
  struct Size {
    std::array<absl::Duration, kWindow> times;
    int next = 0;
    int count = 0;
    absl::Duration typical, high;
    absl::Time last = absl::InfinitePast();
  };

  int Index(int size) const { return std::clamp(size, 1, static_cast<int>(sizes_.size())) - 1; }
  bool Fresh(const Size& size) const { return size.count > 0 && last_ - size.last <= kFresh; }

  // Between two fresh sizes: linear. Beyond the largest: in proportion, and below the smallest: as
  // that one, both of which are upper bounds for a network whose batches cost less per image the
  // larger they are.
  absl::Duration Read(int size, absl::Duration Size::*figure) const {
    const int wanted = Index(size);
    if (Fresh(sizes_[wanted])) return sizes_[wanted].*figure;
    int below = wanted, above = wanted;
    while (below >= 0 && !Fresh(sizes_[below])) --below;
    while (above < static_cast<int>(sizes_.size()) && !Fresh(sizes_[above])) ++above;
    const bool has_above = above < static_cast<int>(sizes_.size());
    if (below < 0) return has_above ? sizes_[above].*figure : absl::ZeroDuration();
    const absl::Duration low = sizes_[below].*figure;
    if (!has_above) return low * (static_cast<double>(wanted + 1) / (below + 1));
    const absl::Duration high = sizes_[above].*figure;
    return low + (high - low) * (static_cast<double>(wanted - below) / (above - below));
  }

  std::vector<Size> sizes_;                 // [batch size - 1]
  absl::Time last_ = absl::InfinitePast();  // of any size
};

}  // namespace tern::scheduler

#endif  // TERN_SERVER_SCHEDULER_LATENCY_MODEL_H_
