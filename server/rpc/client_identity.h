// Who a call comes from, for limits per client.
#ifndef TERN_SERVER_RPC_CLIENT_IDENTITY_H_
#define TERN_SERVER_RPC_CLIENT_IDENTITY_H_

#include <string>

#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"

namespace tern::rpc {

// The authenticated identity ("id:NAME") if the peer has one, else its address without the port
// ("ipv4:10.0.0.7"): connections of one host, and so of one proxy, count as one client.
std::string ClientOf(const grpc::ServerContextBase& context);

// The address of a gRPC peer string without its port: "ipv4:10.0.0.7:5123", "ipv6:%5B::1%5D:5123",
// "unix:/path" as it is.
absl::string_view AddressOf(absl::string_view peer);

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_CLIENT_IDENTITY_H_
