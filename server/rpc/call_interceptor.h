// What every call of a port gets, whichever service it is for.
//
// - The caller's token name, for CallerOf.
// - The headers `traceparent` (if it is valid) and `x-request-id` (if it is 1 to 128 printable
// ASCII
//   characters) of the request come back in the answer's initial metadata. A service may set
//   x-request-id itself; that one wins.
// - One line of the log when it ends: on an audited port in the audit log, elsewhere at level
// debug,
//   and at level error if the fault is the server's (INTERNAL, UNKNOWN, DATA_LOSS). Fields: caller,
//   peer, method, request (audited: the plain fields of the first request message and of its
//   `start`; no bytes, no lists, at most 512 characters), result, seconds, error, request_id,
//   trace_id.
// - grpc-retry-pushback-ms in the trailers tells gRPC's clients when to retry, if the status says
// so
//   (google.rpc.RetryInfo), and not to retry a RESOURCE_EXHAUSTED that does not.
// - It is counted, for the log line of the server's end.
//
// Calls of grpc.* services (health, reflection) are neither logged nor counted.
#ifndef TERN_SERVER_RPC_CALL_INTERCEPTOR_H_
#define TERN_SERVER_RPC_CALL_INTERCEPTOR_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "grpcpp/server_context.h"
#include "grpcpp/support/server_interceptor.h"
#include "server/rpc/port_guard.h"

namespace tern::rpc {

// Response header (and request header) with the request's id.
inline constexpr char kRequestIdHeader[] = "x-request-id";

// For services whose requests have an id of their own. If `generated` says that the caller sent
// none there, the id of the header replaces `id`; the answer's header then is `id`, unless it
// cannot stand in a header.
void NameRequest(grpc::ServerContextBase* context, bool generated, std::string* id);

// Thread safe.
struct CallCounts {
  std::atomic<uint64_t> answered{0};
  std::atomic<uint64_t> given_up{0};  // ended after `closing` was set
  std::atomic<bool> closing{false};   // running calls are being cancelled
  std::atomic<int64_t> running{0};    // until the answer was written
};

// For ServerBuilder::experimental().SetInterceptorCreators. The methods of a port with `audit` take
// protobuf messages; raw ones (grpc::ByteBuffer) that read theirs must not be registered there.
std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>
MakeCallInterceptors(std::shared_ptr<PortGuard> guard, std::shared_ptr<CallCounts> counts,
                     bool audit);

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_CALL_INTERCEPTOR_H_
