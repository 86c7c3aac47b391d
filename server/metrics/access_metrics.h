// The metrics of who was let in: tern_auth_failures_total,
// tern_tls_certificate_expiry_timestamp_seconds. They live in the registry of a Metrics; apart from
// it, because only the ports need them.
#ifndef TERN_SERVER_METRICS_ACCESS_METRICS_H_
#define TERN_SERVER_METRICS_ACCESS_METRICS_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/metrics/metrics.h"

namespace tern::metrics {

// Thread safe. Several objects of one Metrics share their series.
class AccessMetrics {
 public:
  // The known series of both ports start at 0. Keeps the registry alive.
  explicit AccessMetrics(const Metrics& metrics);
  ~AccessMetrics();

  // tern_auth_failures_total{port,reason}: missing, malformed, unknown, forbidden, health_only
  void Failure(absl::string_view port, absl::string_view reason);
  // tern_tls_certificate_expiry_timestamp_seconds{port}
  void CertificateExpiry(absl::string_view port, absl::Time not_after);

  // Name and help of each, for Metrics::Catalogue.
  static std::vector<std::pair<std::string, std::string>> Catalogue();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace tern::metrics

#endif  // TERN_SERVER_METRICS_ACCESS_METRICS_H_
