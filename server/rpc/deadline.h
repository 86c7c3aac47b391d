// When the client of a call stops waiting.
#ifndef TERN_SERVER_RPC_DEADLINE_H_
#define TERN_SERVER_RPC_DEADLINE_H_

#include <chrono>

#include "absl/time/time.h"
#include "grpcpp/server_context.h"

namespace tern::rpc {

inline absl::Time Deadline(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  return absl::FromChrono(deadline);
}

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_DEADLINE_H_
