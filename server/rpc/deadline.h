// When the client of a call stops waiting, in the time of Clock::Real().
#ifndef TERN_SERVER_RPC_DEADLINE_H_
#define TERN_SERVER_RPC_DEADLINE_H_

#include <grpc/support/time.h>

#include "absl/time/time.h"
#include "grpcpp/server_context.h"
#include "server/base/clock.h"

namespace tern::rpc {

inline absl::Time Deadline(const grpc::CallbackServerContext& context) {
  // As gRPC holds it, on its monotonic clock: context.deadline() would convert it to the time of
  // day, which may be set before the next line takes it off again.
  const gpr_timespec deadline = context.raw_deadline();
  if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) {
    return absl::InfiniteFuture();
  }
  const gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
  return Clock::Real()->Now() + absl::Seconds(left.tv_sec) + absl::Nanoseconds(left.tv_nsec);
}

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_DEADLINE_H_
