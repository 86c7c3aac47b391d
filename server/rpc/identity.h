// Who makes a call.
#ifndef TERN_SERVER_RPC_IDENTITY_H_
#define TERN_SERVER_RPC_IDENTITY_H_

#include <string>

#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"

namespace tern::rpc {

struct Caller {
  enum class Kind { kToken, kCertificate, kAddress };
  Kind kind = Kind::kAddress;
  // kToken: the token's name in its file; kCertificate: the subject of the client's verified
  // certificate (RFC 2253), or its first subject alternative name if the subject is empty;
  // kAddress: the peer's address without its port, "unix" for a socket in the file system.
  std::string name;

  bool authenticated() const { return kind != Kind::kAddress; }
  // "token:ci", "certificate:CN=ops", "address:ipv4:10.0.0.7": distinct for distinct callers, never
  // a secret.
  std::string ToString() const;
};

// The caller of `context`, which is a call of a tern::rpc::Server: a known bearer token before a
// verified client certificate before the peer's address. Never fails. Cheap (no lock, no system
// call), but it copies: ask once per call. Safe while the call lives.
Caller CallerOf(const grpc::ServerContextBase& context);

// The address of a gRPC peer string without its port: "ipv4:10.0.0.7:5123", "ipv6:%5B::1%5D:5123",
// "unix:/path" as it is.
absl::string_view AddressOf(absl::string_view peer);

// The metadata key under which CallInterceptor hands the token's name to CallerOf. A name that no
// client can send: HTTP/2 refuses it.
inline constexpr char kTokenNameKey[] = "tern token name";

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_IDENTITY_H_
