#include "server/rpc/identity.h"

#include <grpc/grpc_security_constants.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/security/auth_context.h"

namespace tern::rpc {
namespace {

std::string FirstProperty(const grpc::AuthContext& context, const char* name) {
  for (const grpc::string_ref& value : context.FindPropertyValues(name)) {
    if (!value.empty()) return std::string(value.data(), value.size());
  }
  return "";
}

}  // namespace

absl::string_view AddressOf(absl::string_view peer) {
  if (!absl::StartsWith(peer, "ipv4:") && !absl::StartsWith(peer, "ipv6:")) return peer;
  const size_t colon = peer.rfind(':');
  // "ipv4:" and "ipv6:" end with the first colon themselves.
  return colon < 5 ? peer : peer.substr(0, colon);
}

std::string Caller::ToString() const {
  switch (kind) {
    case Kind::kToken:
      return absl::StrCat("token:", name);
    case Kind::kCertificate:
      return absl::StrCat("certificate:", name);
    case Kind::kAddress:
      break;
  }
  return absl::StrCat("address:", name);
}

Caller CallerOf(const grpc::ServerContextBase& context) {
  const auto& metadata = context.client_metadata();
  if (const auto token = metadata.find(kTokenNameKey); token != metadata.end()) {
    return {Caller::Kind::kToken, std::string(token->second.data(), token->second.size())};
  }
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  if (auth != nullptr && auth->IsPeerAuthenticated()) {
    std::string name = FirstProperty(*auth, GRPC_X509_SUBJECT_PROPERTY_NAME);
    if (name.empty()) name = FirstProperty(*auth, GRPC_X509_SAN_PROPERTY_NAME);
    if (!name.empty()) return {Caller::Kind::kCertificate, std::move(name)};
  }
  return {Caller::Kind::kAddress, std::string(AddressOf(context.peer()))};
}

}  // namespace tern::rpc
