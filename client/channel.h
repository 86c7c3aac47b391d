// How the client reaches a port: endpoints, balancing, retries, TLS and tokens. gRPC's own policies
// do the work (service config, gRFC A2, A6 and A17); nothing of them is rebuilt here.
#ifndef TERN_CLIENT_CHANNEL_H_
#define TERN_CLIENT_CHANNEL_H_

#include <grpcpp/grpcpp.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/tern_client.h"

namespace tern::client {

// A gRPC target and how to treat it.
struct Target {
  std::string uri;        // for grpc::CreateCustomChannel
  std::string authority;  // the host that certificates are checked against; empty: gRPC's choice
  bool balanced = false;  // may have several endpoints: round robin and health checks
};

// "HOST:PORT" or another gRPC target ("unix:/path") as it is; "dns:///HOST:PORT",
// "dns://SERVER/HOST:PORT" (which asks that name server) and "HOST:PORT,HOST:PORT,..." are
// balanced. The names of a list are looked up here, once; a name whose addresses change belongs
// behind dns:///. INVALID_ARGUMENT for an empty or malformed entry, UNAVAILABLE for a name without
// an address, or a list that needs both IPv4 and IPv6.
absl::StatusOr<Target> ParseTarget(const std::string& endpoints);

// gRPC's service config (JSON) for a target.
std::string ServiceConfig(const RetryOptions& retry, bool balanced);

// INVALID_ARGUMENT or the error of reading a file, for credentials that cannot be used.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const TlsOptions& tls);

// The token of a file (TokenFile's format, its first token), read again at most once a second when
// the file changes; if that fails the last token is used. Thread safe.
class TokenSource {
 public:
  // NOT_FOUND or INVALID_ARGUMENT if the file cannot be read or holds no token.
  static absl::StatusOr<std::unique_ptr<TokenSource>> Open(std::string path);
  std::string Token() const;

 private:
  explicit TokenSource(std::string path) : path_(std::move(path)) {}
  absl::StatusOr<std::string> Read() const;

  const std::string path_;
  mutable std::mutex mutex_;
  mutable std::string token_;
  mutable std::filesystem::file_time_type changed_;
  mutable absl::Time checked_;
};

}  // namespace tern::client

#endif  // TERN_CLIENT_CHANNEL_H_
