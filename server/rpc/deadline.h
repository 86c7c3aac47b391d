// When the client of a call stops waiting, in the time of Clock::Real().
#ifndef TERN_SERVER_RPC_DEADLINE_H_
#define TERN_SERVER_RPC_DEADLINE_H_

#include <chrono>

#include "absl/time/time.h"
#include "grpcpp/server_context.h"
#include "server/base/clock.h"

namespace tern::rpc {

inline absl::Time Deadline(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  // gRPC counts it from the time of day as it is now; Clock's time goes on when that is set.
  return Clock::Real()->Now() + absl::FromChrono(deadline - std::chrono::system_clock::now());
}

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_DEADLINE_H_
