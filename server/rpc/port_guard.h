// What a port asks of its callers, for every service on it at once: the check runs before a call
// reaches any service.
#ifndef TERN_SERVER_RPC_PORT_GUARD_H_
#define TERN_SERVER_RPC_PORT_GUARD_H_

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/metrics/access_metrics.h"
#include "server/rpc/token_file.h"

namespace tern::rpc {

struct PortRules {
  std::string port;                                // data, admin or health: names it in metrics
  bool token_required = false;                     // health checks are open even so
  std::vector<std::shared_ptr<TokenFile>> known;   // tokens that are let in
  std::vector<std::shared_ptr<TokenFile>> others;  // known tokens that are not let in here
  bool health_only = false;                        // nothing but grpc.health.v1
};

// Thread safe.
class PortGuard {
 public:
  PortGuard(PortRules rules, std::shared_ptr<metrics::AccessMetrics> metrics)
      : rules_(std::move(rules)), metrics_(std::move(metrics)) {}

  // May a call of `method` ("/package.Service/Method") go on? `authorization` are the values of
  // that header, as they were sent.
  //   UNAUTHENTICATED: a token is required and there is none, or several, or an unknown one.
  //   PERMISSION_DENIED: the token is known, but not for this port.
  //   UNIMPLEMENTED: not a health check, on a health-only port.
  // Refusals are counted (tern_auth_failures_total), and logged at most once a second.
  absl::Status Check(absl::string_view method, absl::Span<const absl::string_view> authorization);

  // The name of the token that these headers hold, if it is one that is let in.
  std::optional<std::string> TokenName(absl::Span<const absl::string_view> authorization) const;

 private:
  absl::Status Refuse(absl::string_view method, absl::string_view reason, absl::Status status);

  const PortRules rules_;
  const std::shared_ptr<metrics::AccessMetrics> metrics_;
  std::mutex mutex_;
  absl::Time last_logged_ = absl::InfinitePast();
  uint64_t not_logged_ = 0;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_PORT_GUARD_H_
