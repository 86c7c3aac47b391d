#include "server/rpc/port_guard.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/base/clock.h"
#include "server/base/log_fields.h"

namespace tern::rpc {
namespace {

bool IsHealthCheck(absl::string_view method) {
  return absl::StartsWith(method, "/grpc.health.v1.Health/");
}

// The Open Inference Protocol's health checks.
bool IsProbe(absl::string_view method) {
  return absl::ConsumePrefix(&method, "/inference.GRPCInferenceService/") &&
         (method == "ServerLive" || method == "ServerReady" || method == "ModelReady");
}

}  // namespace

absl::Status PortGuard::Check(absl::string_view method,
                              absl::Span<const absl::string_view> authorization) {
  if (IsHealthCheck(method)) return absl::OkStatus();
  if (rules_.health_only) {
    return Refuse(method, "health_only",
                  absl::UnimplementedError("this port answers grpc.health.v1 only"));
  }
  if (!rules_.token_required || IsProbe(method)) return absl::OkStatus();
  if (authorization.empty()) {
    return Refuse(method, "missing",
                  absl::UnauthenticatedError("authorization: is absent, want \"Bearer <token>\""));
  }
  if (authorization.size() > 1) {
    return Refuse(method, "malformed",
                  absl::UnauthenticatedError("authorization: want one value, got several"));
  }
  const absl::StatusOr<absl::string_view> token = BearerToken(authorization[0]);
  if (!token.ok()) {
    return Refuse(method, "malformed", absl::UnauthenticatedError(token.status().message()));
  }
  for (const auto& file : rules_.known) {
    if (file->Find(*token).has_value()) return absl::OkStatus();
  }
  for (const auto& file : rules_.others) {
    if (const std::optional<std::string> name = file->Find(*token)) {
      return Refuse(method, "forbidden",
                    absl::PermissionDeniedError(absl::StrCat(
                        "token \"", *name, "\" is not for the ", rules_.port, " port")));
    }
  }
  return Refuse(method, "unknown", absl::UnauthenticatedError("authorization: unknown token"));
}

std::optional<std::string> PortGuard::TokenName(
    absl::Span<const absl::string_view> authorization) const {
  if (authorization.size() != 1 || rules_.known.empty()) return std::nullopt;
  const absl::StatusOr<absl::string_view> token = BearerToken(authorization[0]);
  if (!token.ok()) return std::nullopt;
  for (const auto& file : rules_.known) {
    if (std::optional<std::string> name = file->Find(*token)) return name;
  }
  return std::nullopt;
}

absl::Status PortGuard::Refuse(absl::string_view method, absl::string_view reason,
                               absl::Status status) {
  metrics_->Failure(rules_.port, reason);
  LogFields fields = {{"port", rules_.port},
                      {"method", std::string(method.substr(0, 256))},
                      {"reason", std::string(reason)},
                      {"result", absl::StatusCodeToString(status.code())}};
  {
    // Whoever hammers the port must not fill the disk.
    std::lock_guard<std::mutex> lock(mutex_);
    const absl::Time now = Clock::Real()->Now();
    if (now - last_logged_ < absl::Seconds(1)) {
      ++not_logged_;
      return status;
    }
    last_logged_ = now;
    if (not_logged_ > 0) fields.emplace_back("not_logged_before", absl::StrCat(not_logged_));
    not_logged_ = 0;
  }
  AuditLog("refused", fields);
  return status;
}

}  // namespace tern::rpc
