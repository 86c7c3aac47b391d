// absl::Status -> grpc::Status: both use the canonical codes, so the conversion is a cast. A
// RetryAfter hint becomes a google.rpc.RetryInfo in the status details. A message that is too long
// for the headers it travels in is cut (limit_message.h).
#ifndef TERN_SERVER_RPC_GRPC_STATUS_H_
#define TERN_SERVER_RPC_GRPC_STATUS_H_

#include <string>

#include "absl/status/status.h"
#include "grpcpp/support/status.h"

namespace tern::rpc {

static_assert(int(absl::StatusCode::kOk) == int(grpc::StatusCode::OK));
static_assert(int(absl::StatusCode::kCancelled) == int(grpc::StatusCode::CANCELLED));
static_assert(int(absl::StatusCode::kUnknown) == int(grpc::StatusCode::UNKNOWN));
static_assert(int(absl::StatusCode::kInvalidArgument) == int(grpc::StatusCode::INVALID_ARGUMENT));
static_assert(int(absl::StatusCode::kDeadlineExceeded) == int(grpc::StatusCode::DEADLINE_EXCEEDED));
static_assert(int(absl::StatusCode::kNotFound) == int(grpc::StatusCode::NOT_FOUND));
static_assert(int(absl::StatusCode::kAlreadyExists) == int(grpc::StatusCode::ALREADY_EXISTS));
static_assert(int(absl::StatusCode::kPermissionDenied) == int(grpc::StatusCode::PERMISSION_DENIED));
static_assert(int(absl::StatusCode::kResourceExhausted) ==
              int(grpc::StatusCode::RESOURCE_EXHAUSTED));
static_assert(int(absl::StatusCode::kFailedPrecondition) ==
              int(grpc::StatusCode::FAILED_PRECONDITION));
static_assert(int(absl::StatusCode::kAborted) == int(grpc::StatusCode::ABORTED));
static_assert(int(absl::StatusCode::kOutOfRange) == int(grpc::StatusCode::OUT_OF_RANGE));
static_assert(int(absl::StatusCode::kUnimplemented) == int(grpc::StatusCode::UNIMPLEMENTED));
static_assert(int(absl::StatusCode::kInternal) == int(grpc::StatusCode::INTERNAL));
static_assert(int(absl::StatusCode::kUnavailable) == int(grpc::StatusCode::UNAVAILABLE));
static_assert(int(absl::StatusCode::kDataLoss) == int(grpc::StatusCode::DATA_LOSS));
static_assert(int(absl::StatusCode::kUnauthenticated) == int(grpc::StatusCode::UNAUTHENTICATED));

grpc::Status ToGrpc(const absl::Status& status);

// "OK", "INVALID_ARGUMENT", ...: the label of tern_requests_total.
inline std::string CodeName(const grpc::Status& status) {
  return absl::StatusCodeToString(static_cast<absl::StatusCode>(status.error_code()));
}

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_GRPC_STATUS_H_
