// The header that ties a call to a distributed trace (https://www.w3.org/TR/trace-context/).
#ifndef TERN_SERVER_RPC_TRACE_CONTEXT_H_
#define TERN_SERVER_RPC_TRACE_CONTEXT_H_

#include "absl/strings/string_view.h"

namespace tern::rpc {

// The trace id (32 hexadecimal digits) of a `traceparent` header's value; empty if the value is not
// valid: version 00, or a later one that begins like it.
absl::string_view TraceIdOf(absl::string_view traceparent);

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_TRACE_CONTEXT_H_
