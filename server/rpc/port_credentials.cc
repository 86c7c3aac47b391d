#include "server/rpc/port_credentials.h"

#include <grpc/grpc_security.h>
#include <grpc/slice.h>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "server/base/log.h"

namespace tern::rpc {
namespace {

absl::string_view View(const grpc_slice& slice) {
  return {reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(slice)), GRPC_SLICE_LENGTH(slice)};
}

// What the C credentials of one port refer to; they delete it when they end.
struct State {
  std::shared_ptr<PortGuard> guard;
  std::shared_ptr<TlsFiles> tls;
  std::mutex mutex;
  std::shared_ptr<const TlsContent> in_use;  // what gRPC has got
};

void ProcessMetadata(void* state, grpc_auth_context*, const grpc_metadata* metadata, size_t count,
                     grpc_process_auth_metadata_done_cb done, void* user_data) {
  absl::string_view method;
  std::vector<absl::string_view> authorization;
  for (size_t i = 0; i < count; ++i) {
    const absl::string_view key = View(metadata[i].key);
    if (key == ":path") method = View(metadata[i].value);
    if (key == "authorization") authorization.push_back(View(metadata[i].value));
  }
  const absl::Status status = static_cast<State*>(state)->guard->Check(method, authorization);
  done(user_data, nullptr, 0, nullptr, 0, static_cast<grpc_status_code>(status.code()),
       std::string(status.message()).c_str());
}

// Asked for each new connection.
grpc_ssl_certificate_config_reload_status FetchCertificates(
    void* user_data, grpc_ssl_server_certificate_config** config) {
  State& state = *static_cast<State*>(user_data);
  std::shared_ptr<const TlsContent> current = state.tls->Current();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (current == state.in_use) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
  const grpc_ssl_pem_key_cert_pair pair = {current->key.c_str(), current->certificate.c_str()};
  // gRPC insists on authorities here (it asserts), also where no client is asked for a certificate
  // and nothing is checked against them: the server's own stand in.
  const std::string& authorities =
      current->client_ca.empty() ? current->certificate : current->client_ca;
  *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
  state.in_use = std::move(current);
  return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

class PortCredentials final : public grpc::ServerCredentials {
 public:
  PortCredentials(std::shared_ptr<PortGuard> guard, std::shared_ptr<TlsFiles> tls)
      : guard_(std::move(guard)), tls_(std::move(tls)) {}

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {
    TERN_LOG_ERROR("a port has its guard already");
  }

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    auto* state = new State;
    state->guard = guard_;
    state->tls = tls_;
    grpc_server_credentials* credentials;
    if (tls_ == nullptr) {
      credentials = grpc_insecure_server_credentials_create();
    } else {
      credentials = grpc_ssl_server_credentials_create_with_options(
          grpc_ssl_server_credentials_create_options_using_config_fetcher(
              tls_->wants_client_certificate()
                  ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                  : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
              FetchCertificates, state));
    }
    grpc_auth_metadata_processor processor;
    processor.process = ProcessMetadata;
    processor.destroy = [](void* pointer) { delete static_cast<State*>(pointer); };
    processor.state = state;
    grpc_server_credentials_set_auth_metadata_processor(credentials, processor);
    const int port = grpc_server_add_http2_port(server, address.c_str(), credentials);
    grpc_server_credentials_release(credentials);
    return port;
  }
  bool IsInsecure() const override { return tls_ == nullptr; }

  const std::shared_ptr<PortGuard> guard_;
  const std::shared_ptr<TlsFiles> tls_;
};

}  // namespace

std::shared_ptr<grpc::ServerCredentials> MakePortCredentials(std::shared_ptr<PortGuard> guard,
                                                             std::shared_ptr<TlsFiles> tls) {
  return std::make_shared<PortCredentials>(std::move(guard), std::move(tls));
}

}  // namespace tern::rpc
