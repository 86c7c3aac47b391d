#include "server/rpc/server.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "grpc/grpc.h"
#include "grpc/health/v1/health.pb.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/rpc/acceptor.h"
#include "server/rpc/call_interceptor.h"
#include "server/rpc/classifier_service.h"
#include "server/rpc/identity.h"
#include "server/rpc/inference_service.h"
#include "server/rpc/open_streams.h"
#include "server/rpc/port_credentials.h"
#include "server/rpc/port_guard.h"
#include "server/rpc/profiler_service.h"
#include "server/rpc/quantizer_service.h"
#include "server/rpc/registry_service.h"
#include "server/rpc/tls_files.h"
#include "server/rpc/token_file.h"

namespace tern::rpc {
namespace {

// Room for the other fields of a request beside the image.
constexpr int kMessageOverhead = 64 << 10;
// How long a stop waits for streams before it refuses new calls: some milliseconds are enough
// unless a client does not read.
constexpr absl::Duration kStreamsEnd = absl::Seconds(1);
// How long clients have to take the last answers.
constexpr absl::Duration kLastAnswers = absl::Milliseconds(200);
// Pollers and handlers of the admin port.
constexpr int kAdminThreads = 16;

int MaxMessageBytes(const image::Limits& limits) {
  // At least 4 MiB (gRPC's default) for import chunks, at most what gRPC's int takes.
  return static_cast<int>(
      std::clamp<uint64_t>(limits.max_bytes + kMessageOverhead, 4u << 20, 1u << 30));
}

// Listens on one of the server's ports; `name` is its label in the metrics.
absl::StatusOr<std::unique_ptr<Acceptor>> Listen(
    const std::string& host, int port, std::shared_ptr<grpc::ServerCredentials> credentials,
    const char* name, metrics::Metrics* metrics, grpc::ServerBuilder& builder) {
  AcceptorOptions options;
  options.host = host;
  options.port = port;
  options.credentials = std::move(credentials);
  options.refused = [metrics, name] { metrics->RefusedConnection(name); };
  return Acceptor::Listen(std::move(options), builder);
}

bool IsLoopback(absl::string_view host) {
  return host == "localhost" || host == "::1" || host == "[::1]" || absl::StartsWith(host, "127.");
}

absl::StatusOr<std::shared_ptr<TokenFile>> OpenTokens(const std::string& path,
                                                      metrics::Metrics* metrics) {
  if (path.empty()) return std::shared_ptr<TokenFile>();
  TERN_ASSIGN_OR_RETURN(std::unique_ptr<TokenFile> file,
                        TokenFile::Open(path, [metrics] { metrics->Fallback("stale_tokens"); }));
  return std::shared_ptr<TokenFile>(std::move(file));
}

absl::StatusOr<std::shared_ptr<TlsFiles>> OpenTls(const ServerOptions& options,
                                                  const std::string& client_ca, const char* port,
                                                  std::shared_ptr<metrics::AccessMetrics> access,
                                                  metrics::Metrics* metrics) {
  if (options.tls_certificate.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError("TLS: want a certificate and its key, got one of the two");
  }
  if (options.tls_certificate.empty()) {
    if (client_ca.empty()) return std::shared_ptr<TlsFiles>();
    return absl::InvalidArgumentError("TLS: want a certificate and a key with a client authority");
  }
  TERN_ASSIGN_OR_RETURN(std::unique_ptr<TlsFiles> files,
                        TlsFiles::Open(
                            {options.tls_certificate, options.tls_key, client_ca},
                            [access, port](const TlsContent& content) {
                              access->CertificateExpiry(port, content.not_after);
                            },
                            [metrics] { metrics->Fallback("stale_certificate"); }));
  return std::shared_ptr<TlsFiles>(std::move(files));
}

struct Guards {
  std::shared_ptr<PortGuard> data, admin;
};

absl::StatusOr<Guards> MakeGuards(const ServerOptions& options,
                                  const std::shared_ptr<metrics::AccessMetrics>& access,
                                  metrics::Metrics* metrics) {
  TERN_ASSIGN_OR_RETURN(const auto admin_tokens, OpenTokens(options.admin_token_file, metrics));
  TERN_ASSIGN_OR_RETURN(const auto data_tokens, OpenTokens(options.data_token_file, metrics));
  PortRules data{.port = "data", .token_required = data_tokens != nullptr};
  PortRules admin{.port = "admin", .token_required = admin_tokens != nullptr};
  if (data_tokens != nullptr) {
    data.known.push_back(data_tokens);
    admin.others.push_back(data_tokens);
  }
  if (admin_tokens != nullptr) {
    data.known.push_back(admin_tokens);
    admin.known.push_back(admin_tokens);
  } else if (!IsLoopback(options.admin_host) && options.admin_tls_client_ca.empty()) {
    TERN_LOG_WARN(
        "the admin port listens on {} without tokens or client certificates: who reaches it can "
        "replace and delete models (--admin_token_file, --admin_tls_client_ca)",
        options.admin_host);
  }
  return Guards{std::make_shared<PortGuard>(std::move(data), access),
                std::make_shared<PortGuard>(std::move(admin), access)};
}

void SetCommon(grpc::ServerBuilder* builder, const image::Limits& limits) {
  builder->SetMaxReceiveMessageSize(MaxMessageBytes(limits));
  // A client that vanished without a word keeps its connection for 80 s.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // Clients may ping every 30 s also without calls.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // Images and weights are compressed as they are. gRPC 1.51 inflates a message to its end before it
  // looks at its size, and before any token is asked for: 400 kB of gzip became 400 MB.
  builder->AddChannelArgument(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET,
                              1 << GRPC_COMPRESS_NONE);
}

}  // namespace

struct Server::Impl {
  repository::Repository* repository = nullptr;
  oip::Inference* oip = nullptr;
  OpenStreams streams;
  std::unique_ptr<ClassifierService> classifier;
  std::unique_ptr<InferenceService> inference;
  std::unique_ptr<InferenceAdminService> inference_admin;
  std::unique_ptr<RegistryService> registry;
  std::unique_ptr<QuantizerService> quantizer;
  std::unique_ptr<ProfilerService> profiler;
  grpc::CallbackGenericService unknown_methods;  // of the admin port: UNIMPLEMENTED
  std::unique_ptr<grpc::Server> data, admin, health;
  const std::shared_ptr<CallCounts> counts = std::make_shared<CallCounts>();
  std::unique_ptr<Acceptor> data_port, admin_port, health_port;
  std::shared_ptr<PortGuard> data_guard;
  bool data_wants_certificates = false;

  std::vector<grpc::Server*> servers() const {
    std::vector<grpc::Server*> all;
    for (grpc::Server* server : {data.get(), admin.get(), health.get()}) {
      if (server != nullptr) all.push_back(server);
    }
    return all;
  }
  std::vector<Acceptor*> ports() const {
    std::vector<Acceptor*> all;
    for (Acceptor* port : {data_port.get(), admin_port.get(), health_port.get()}) {
      if (port != nullptr) all.push_back(port);
    }
    return all;
  }
  std::mutex mutex;
  std::set<std::string> health_names;
  bool draining = false;
  bool stopped = false;
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() { Shutdown(absl::ZeroDuration()); }

int Server::port() const { return impl_->data_port->port(); }
int Server::admin_port() const { return impl_->admin_port->port(); }
int Server::health_port() const {
  return impl_->health_port == nullptr ? 0 : impl_->health_port->port();
}

absl::StatusOr<std::string> Server::CheckDataCall(
    absl::string_view method, absl::Span<const absl::string_view> authorization) const {
  if (impl_->data_wants_certificates) {
    return absl::PermissionDeniedError(
        "the data port wants client certificates, which this port cannot ask for");
  }
  TERN_RETURN_IF_ERROR(impl_->data_guard->Check(method, authorization));
  std::optional<std::string> token = impl_->data_guard->TokenName(authorization);
  return token.has_value() ? Caller{Caller::Kind::kToken, *std::move(token)}.ToString() : "";
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      repository::Repository* repository,
                                                      serving::Classifier* classifier,
                                                      oip::Inference* inference,
                                                      monitoring::LabelJoin* labels,
                                                      metrics::Metrics* metrics) {
  const uint64_t largest = MaxMessageBytes(options.limits);
  if (options.max_receive_bytes < largest) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_receive_bytes: got ", options.max_receive_bytes,
                     ", want at least one message of the largest size, ", largest));
  }
  const auto access = std::make_shared<metrics::AccessMetrics>(*metrics);
  TERN_ASSIGN_OR_RETURN(const Guards guards, MakeGuards(options, access, metrics));
  TERN_ASSIGN_OR_RETURN(const auto data_tls,
                        OpenTls(options, options.tls_client_ca, "data", access, metrics));
  TERN_ASSIGN_OR_RETURN(const auto admin_tls,
                        OpenTls(options, options.admin_tls_client_ca, "admin", access, metrics));
  grpc::EnableDefaultHealthCheckService(true);
  static std::once_flag reflection;
  std::call_once(reflection, [] {
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    // gRPC's health service comes without its description.
    google::protobuf::LinkMessageReflection<grpc::health::v1::HealthCheckRequest>();
  });

  std::unique_ptr<Server> server(new Server(std::make_unique<Impl>()));
  Impl& impl = *server->impl_;
  impl.repository = repository;
  impl.data_guard = guards.data;
  impl.data_wants_certificates = !options.tls_client_ca.empty();
  const auto changed = [raw = server.get()] { raw->UpdateHealth(); };
  impl.classifier = std::make_unique<ClassifierService>(classifier, labels, &impl.streams, metrics);
  impl.oip = inference;
  inference->LimitMessageBytes(largest);
  impl.inference = std::make_unique<InferenceService>(inference, &impl.streams, metrics);
  impl.inference_admin =
      std::make_unique<InferenceAdminService>(inference, repository, metrics, changed);
  impl.registry =
      std::make_unique<RegistryService>(repository, metrics, options.max_onnx_bytes, changed);
  QuantizerOptions quantizer;
  quantizer.threads = options.cpu_threads;
  quantizer.limits = options.limits;
  quantizer.plan = options.plan;
  quantizer.changed = changed;
  impl.quantizer = std::make_unique<QuantizerService>(repository, metrics, std::move(quantizer));
  impl.profiler = std::make_unique<ProfilerService>(repository, metrics, options.cpu_threads);

  {
    grpc::ServerBuilder builder;
    SetCommon(&builder, options.limits);
    if (options.max_connection_age > absl::ZeroDuration()) {
      builder.AddChannelArgument(
          GRPC_ARG_MAX_CONNECTION_AGE_MS,
          static_cast<int>(absl::ToInt64Milliseconds(options.max_connection_age)));
    }
    grpc::ResourceQuota quota("tern-data");
    quota.Resize(options.max_receive_bytes);
    builder.SetResourceQuota(quota);
    TERN_ASSIGN_OR_RETURN(impl.data_port, Listen(options.host, options.port,
                                                 MakePortCredentials(guards.data, data_tls), "data",
                                                 metrics, builder));
    builder.experimental().SetInterceptorCreators(
        MakeCallInterceptors(guards.data, impl.counts, false));
    builder.RegisterService(impl.classifier.get());
    builder.RegisterService(impl.inference.get());
    impl.data = builder.BuildAndStart();
    if (impl.data == nullptr) return absl::InternalError("gRPC: the data port's server");
  }
  {
    grpc::ServerBuilder builder;
    SetCommon(&builder, options.limits);
    grpc::ResourceQuota quota("tern-admin");
    quota.SetMaxThreads(kAdminThreads);
    quota.Resize(options.max_receive_bytes);
    builder.SetResourceQuota(quota);
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MIN_POLLERS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 2);
    TERN_ASSIGN_OR_RETURN(impl.admin_port, Listen(options.admin_host, options.admin_port,
                                                  MakePortCredentials(guards.admin, admin_tls),
                                                  "admin", metrics, builder));
    builder.experimental().SetInterceptorCreators(
        MakeCallInterceptors(guards.admin, impl.counts, true));
    builder.RegisterService(impl.inference_admin.get());
    builder.RegisterService(impl.registry.get());
    builder.RegisterService(impl.quantizer.get());
    builder.RegisterService(impl.profiler.get());
    // Answers unknown methods. In a server with such a service the threads of synchronous calls do
    // not poll sockets; else they would read the data port's messages too, and wake its threads.
    builder.RegisterCallbackGenericService(&impl.unknown_methods);
    impl.admin = builder.BuildAndStart();
    if (impl.admin == nullptr) return absl::InternalError("gRPC: the admin port's server");
  }
  if (options.health_port.has_value()) {
    grpc::ServerBuilder builder;
    SetCommon(&builder, options.limits);
    const auto guard =
        std::make_shared<PortGuard>(PortRules{.port = "health", .health_only = true}, access);
    TERN_ASSIGN_OR_RETURN(impl.health_port,
                          Listen(options.host, *options.health_port,
                                 MakePortCredentials(guard, nullptr), "health", metrics, builder));
    impl.health = builder.BuildAndStart();
    if (impl.health == nullptr) return absl::InternalError("gRPC: the health port's server");
  }
  server->UpdateHealth();
  for (Acceptor* port : impl.ports()) port->Start();
  return server;
}

void Server::UpdateHealth() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  if (impl_->draining || impl_->data == nullptr || impl_->admin == nullptr) return;
  std::set<std::string> ready, known;
  for (const repository::VersionInfo& info : impl_->repository->List("")) {
    known.insert(info.model);
    if (info.is_default && info.state == repository::State::kReady) ready.insert(info.model);
  }
  for (grpc::Server* server : impl_->servers()) {
    grpc::HealthCheckServiceInterface* health = server->GetHealthCheckService();
    if (health == nullptr) continue;
    for (const char* name : {"", v1::ImageClassifier::service_full_name(),
                             inference::GRPCInferenceService::service_full_name()}) {
      health->SetServingStatus(name, true);
    }
    for (const std::string& name : known) health->SetServingStatus(name, ready.count(name) > 0);
    // The interface cannot remove a name; a deleted model is not serving.
    for (const std::string& name : impl_->health_names) {
      if (known.count(name) == 0) health->SetServingStatus(name, false);
    }
  }
  impl_->health_names.insert(known.begin(), known.end());
}

void Server::SetDraining() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->draining = true;
  impl_->oip->SetDraining();
  for (grpc::Server* server : impl_->servers()) {
    if (server->GetHealthCheckService() != nullptr) {
      server->GetHealthCheckService()->SetServingStatus(false);
    }
  }
}

void Server::Shutdown(absl::Duration grace) {
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    if (impl_->stopped) return;
    impl_->stopped = true;
    impl_->draining = true;
  }
  for (Acceptor* port : impl_->ports()) port->Stop();
  // By clocks that nobody sets.
  const auto steady = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(grace);
  const gpr_timespec deadline =
      gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                   gpr_time_from_nanos(absl::ToInt64Nanoseconds(grace), GPR_TIMESPAN));
  // First: gRPC closes a connection with its last call, and the system drops what a client has not
  // read by then if it is still sending. So it has a moment to hear that its stream has ended.
  if (impl_->streams.Stop(std::min(grace, kStreamsEnd))) {
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(std::min(grace, kLastAnswers)));
  }
  // Side by side: an idle connection may make each take its whole grace.
  std::vector<std::thread> closing;
  for (grpc::Server* server : impl_->servers()) {
    closing.emplace_back([server, deadline] { server->Shutdown(deadline); });
  }
  std::mutex mutex;
  std::condition_variable closed;
  bool done = false;
  std::thread watch([&] {
    std::unique_lock<std::mutex> lock(mutex);
    for (int quiet = 0; quiet < 2; quiet = impl_->counts->running == 0 ? quiet + 1 : 0) {
      const auto next = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(kLastAnswers);
      if (closed.wait_until(lock, std::min(steady, next), [&] { return done; })) return;
      if (std::chrono::steady_clock::now() >= steady) {
        // gRPC cancels what still runs now, and so a call that ends from here on is no answer.
        impl_->counts->closing = true;
        return;
      }
    }
    // What is left has no end of its own: Watch calls, and connections whose client is stuck.
    for (grpc::Server* server : impl_->servers()) grpc_server_cancel_all_calls(server->c_server());
  });
  for (std::thread& thread : closing) thread.join();
  {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
  }
  closed.notify_one();
  watch.join();
  TERN_LOG_INFO("{} calls answered, {} given up", impl_->counts->answered.load(),
                impl_->counts->given_up.load());
}

}  // namespace tern::rpc
