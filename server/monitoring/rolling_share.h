// How many of the last events were hits: a window bounded by a number of events and by their age.
#ifndef TERN_SERVER_MONITORING_ROLLING_SHARE_H_
#define TERN_SERVER_MONITORING_ROLLING_SHARE_H_

#include <cstddef>
#include <cstdint>
#include <deque>

#include "absl/time/time.h"

namespace tern::monitoring {

// What a window holds.
struct WindowOptions {
  size_t most = 10'000;                 // the newest so many events; >= 1
  absl::Duration age = absl::Hours(1);  // those not older than this
};

// Not thread safe. 16 bytes per event in the window. A clock that is set back makes events younger,
// not the window wrong: they leave in the order in which they came.
class RollingShare {
 public:
  explicit RollingShare(const WindowOptions& options) : options_(options) {}

  void Add(absl::Time now, bool hit) {
    events_.push_back({absl::ToUnixMicros(now), hit});
    hits_ += hit;
    if (events_.size() > options_.most) DropOldest();
  }

  struct Count {
    uint64_t hits = 0, total = 0;
  };
  // Of the events not older than the age; forgets the others.
  Count At(absl::Time now) {
    const int64_t oldest = absl::ToUnixMicros(now - options_.age);
    while (!events_.empty() && events_.front().micros < oldest) DropOldest();
    return {hits_, events_.size()};
  }

 private:
  struct Event {
    int64_t micros;
    bool hit;
  };
  void DropOldest() {
    hits_ -= events_.front().hit;
    events_.pop_front();
  }

  const WindowOptions options_;
  std::deque<Event> events_;  // oldest first
  uint64_t hits_ = 0;
};

}  // namespace tern::monitoring

#endif  // TERN_SERVER_MONITORING_ROLLING_SHARE_H_
