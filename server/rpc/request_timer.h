// Counts one RPC: in flight, duration and code, for every outcome.
#ifndef TERN_SERVER_RPC_REQUEST_TIMER_H_
#define TERN_SERVER_RPC_REQUEST_TIMER_H_

#include <string>

#include "grpcpp/support/status.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/rpc/grpc_status.h"

namespace tern::rpc {

class RequestTimer {
 public:
  RequestTimer(metrics::Metrics* metrics, std::string method)
      : metrics_(metrics), method_(std::move(method)), start_(Clock::Real()->Now()) {
    metrics_->InFlight(method_, 1);
  }
  RequestTimer(const RequestTimer&) = delete;
  RequestTimer& operator=(const RequestTimer&) = delete;

  // Call once, with what the client is told. Returns `status` for `return timer.Finish(...)`.
  grpc::Status Finish(grpc::Status status) {
    metrics_->InFlight(method_, -1);
    metrics_->Request(method_, CodeName(status), Clock::Real()->Now() - start_);
    return status;
  }
  grpc::Status Finish(const absl::Status& status) { return Finish(ToGrpc(status)); }

 private:
  metrics::Metrics* const metrics_;
  const std::string method_;
  const absl::Time start_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_REQUEST_TIMER_H_
