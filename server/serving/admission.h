// What admitted images may hold together, and how many may come from one client.
#ifndef TERN_SERVER_SERVING_ADMISSION_H_
#define TERN_SERVER_SERVING_ADMISSION_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/metrics/metrics.h"

namespace tern::serving {

// Thread safe. Must outlive its tickets. Only clients that have images here are known, so the table
// is as bounded as the images are.
class Admission {
 public:
  struct Options {
    int64_t max_bytes = int64_t{512} << 20;  // held by all admitted images together
    int max_client_images = 0;               // at once, of one client; 0 = no limit
  };

  // `metrics` is not owned.
  Admission(const Options& options, metrics::Metrics* metrics)
      : options_(options), metrics_(metrics) {}
  Admission(const Admission&) = delete;
  Admission& operator=(const Admission&) = delete;

  // Gives back on destruction what was admitted.
  class Ticket {
   public:
    ~Ticket();
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;
    // There was no other image here when this one was admitted.
    bool alone() const { return alone_; }

   private:
    friend class Admission;
    Ticket(Admission* admission, std::string client, int64_t bytes, bool alone)
        : admission_(admission), client_(std::move(client)), bytes_(bytes), alone_(alone) {}
    Admission* const admission_;
    const std::string client_;
    const int64_t bytes_;
    const bool alone_;
  };

  // RESOURCE_EXHAUSTED if so many images of one client, that hold `bytes` together, would exceed a
  // limit even if they were alone.
  absl::Status CheckFits(int64_t images, int64_t bytes) const;

  // One image of `client` that holds `bytes`. RESOURCE_EXHAUSTED with a RetryAfter hint if that
  // would exceed a limit. Clients are told apart by the first 256 bytes of their names.
  absl::StatusOr<std::shared_ptr<Ticket>> Admit(absl::string_view client, int64_t bytes);

 private:
  void Tell();  // with the lock held

  const Options options_;
  metrics::Metrics* const metrics_;
  std::mutex mutex_;
  int64_t bytes_ = 0;
  int64_t images_ = 0;
  std::unordered_map<std::string, int> images_of_;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_ADMISSION_H_
