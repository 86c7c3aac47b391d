#include "server/metrics/access_metrics.h"

#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/registry.h"

namespace tern::metrics {
namespace {

constexpr char kFailures[] = "tern_auth_failures_total";
constexpr char kFailuresHelp[] =
    "Calls refused before they reached a service: missing, malformed, unknown (no such token), "
    "forbidden (a token of another port), health_only.";
constexpr char kExpiry[] = "tern_tls_certificate_expiry_timestamp_seconds";
constexpr char kExpiryHelp[] =
    "When the certificate that new connections get ends, seconds since 1970.";

}  // namespace

struct AccessMetrics::Impl {
  explicit Impl(std::shared_ptr<prometheus::Registry> in)
      : registry(std::move(in)),
        failures(
            prometheus::BuildCounter().Name(kFailures).Help(kFailuresHelp).Register(*registry)),
        expiry(prometheus::BuildGauge().Name(kExpiry).Help(kExpiryHelp).Register(*registry)) {}

  // Port and reason come from the code, not from outside: few series, and none is removed.
  prometheus::Counter& Failure(absl::string_view port, absl::string_view reason) {
    return failures.Add({{"port", std::string(port)}, {"reason", std::string(reason)}});
  }

  const std::shared_ptr<prometheus::Registry> registry;
  prometheus::Family<prometheus::Counter>& failures;
  prometheus::Family<prometheus::Gauge>& expiry;
};

AccessMetrics::AccessMetrics(const Metrics& metrics)
    : impl_(std::make_unique<Impl>(metrics.registry())) {
  for (const char* port : {"data", "admin"}) {
    for (const char* reason : {"missing", "malformed", "unknown", "forbidden"}) {
      impl_->Failure(port, reason);
    }
  }
}

AccessMetrics::~AccessMetrics() = default;

void AccessMetrics::Failure(absl::string_view port, absl::string_view reason) {
  impl_->Failure(port, reason).Increment();
}

void AccessMetrics::CertificateExpiry(absl::string_view port, absl::Time not_after) {
  impl_->expiry.Add({{"port", std::string(port)}})
      .Set(absl::ToDoubleSeconds(not_after - absl::UnixEpoch()));
}

std::vector<std::pair<std::string, std::string>> AccessMetrics::Catalogue() {
  return {{kFailures, kFailuresHelp}, {kExpiry, kExpiryHelp}};
}

}  // namespace tern::metrics
