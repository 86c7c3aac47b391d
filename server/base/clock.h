// Time as a dependency: code that waits or measures takes a Clock, tests pass a FakeClock.
//
// The real clock starts with the time of day and goes on steadily: setting the system's clock moves
// no deadline and no duration. It is no calendar; absl::Now() is, and what came from there (gRPC's
// deadlines) is to be turned into a time from now first.
#ifndef TERN_SERVER_BASE_CLOCK_H_
#define TERN_SERVER_BASE_CLOCK_H_

#include <chrono>
#include <mutex>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace tern {

// Thread safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;
  // The process-wide real clock; never destroyed.
  static const Clock* Real();
};

namespace clock_internal {
class RealClock final : public Clock {
 public:
  absl::Time Now() const override {
    return start_ + absl::FromChrono(std::chrono::steady_clock::now() - steady_start_);
  }

 private:
  const absl::Time start_ = absl::Now();
  const std::chrono::steady_clock::time_point steady_start_ = std::chrono::steady_clock::now();
};
}  // namespace clock_internal

inline const Clock* Clock::Real() {
  static const clock_internal::RealClock* clock = new clock_internal::RealClock;
  return clock;
}

// A clock that moves only when told. Thread safe.
class FakeClock final : public Clock {
 public:
  explicit FakeClock(absl::Time start = absl::UnixEpoch()) : now_(start) {}
  absl::Time Now() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return now_;
  }
  void Advance(absl::Duration by) {
    std::lock_guard<std::mutex> lock(mutex_);
    now_ += by;
  }

 private:
  mutable std::mutex mutex_;
  absl::Time now_;
};

}  // namespace tern

#endif  // TERN_SERVER_BASE_CLOCK_H_
