// A hint inside a status: when it makes sense to try again. The RPC layer turns it into
// google.rpc.RetryInfo.
#ifndef TERN_SERVER_BASE_RETRY_AFTER_H_
#define TERN_SERVER_BASE_RETRY_AFTER_H_

#include <algorithm>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace tern {

// Key of the status payload, whose value is a duration in absl's text form ("15ms").
inline constexpr char kRetryAfterPayload[] = "tern.retry_after";

// `status` (not OK) with the hint `after`, kept within 10 ms (less is no relief to a server that
// is full) and 10 s, and in the message.
inline absl::Status RetryAfter(const absl::Status& status, absl::Duration after) {
  after = std::clamp(absl::Ceil(after, absl::Milliseconds(1)), absl::Milliseconds(10),
                     absl::Seconds(10));
  const std::string text = absl::FormatDuration(after);
  absl::Status hinted(status.code(), absl::StrCat(status.message(), "; try again in ", text));
  hinted.SetPayload(kRetryAfterPayload, absl::Cord(text));
  return hinted;
}

// The hint, if there is one.
inline std::optional<absl::Duration> RetryAfterOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterPayload);
  absl::Duration after;
  if (!payload.has_value() || !absl::ParseDuration(std::string(*payload), &after))
    return std::nullopt;
  return after;
}

}  // namespace tern

#endif  // TERN_SERVER_BASE_RETRY_AFTER_H_
