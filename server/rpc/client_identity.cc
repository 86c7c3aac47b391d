#include "server/rpc/client_identity.h"

#include <memory>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace tern::rpc {

absl::string_view AddressOf(absl::string_view peer) {
  if (!absl::StartsWith(peer, "ipv4:") && !absl::StartsWith(peer, "ipv6:")) return peer;
  const size_t colon = peer.rfind(':');
  // "ipv4:" and "ipv6:" end with the first colon themselves.
  return colon < 5 ? peer : peer.substr(0, colon);
}

std::string ClientOf(const grpc::ServerContextBase& context) {
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  if (auth != nullptr && auth->IsPeerAuthenticated()) {
    const std::vector<grpc::string_ref> names = auth->GetPeerIdentity();
    if (!names.empty()) {
      return absl::StrCat("id:", absl::string_view(names[0].data(), names[0].size()));
    }
  }
  return std::string(AddressOf(context.peer()));
}

}  // namespace tern::rpc
