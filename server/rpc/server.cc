#include "server/rpc/server.h"

#include <algorithm>
#include <mutex>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "server/base/status_macros.h"
#include "server/rpc/acceptor.h"
#include "server/rpc/classifier_service.h"
#include "server/rpc/inference_service.h"
#include "server/rpc/profiler_service.h"
#include "server/rpc/quantizer_service.h"
#include "server/rpc/registry_service.h"

namespace tern::rpc {
namespace {

// Room for the other fields of a request beside the image.
constexpr int kMessageOverhead = 64 << 10;
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

void SetCommon(grpc::ServerBuilder* builder, const image::Limits& limits) {
  builder->SetMaxReceiveMessageSize(MaxMessageBytes(limits));
  // A client that vanished without a word keeps its connection for 80 s.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // Clients may ping every 30 s also without calls.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
}

}  // namespace

struct Server::Impl {
  repository::Repository* repository = nullptr;
  oip::Inference* oip = nullptr;
  std::unique_ptr<ClassifierService> classifier;
  std::unique_ptr<InferenceService> inference;
  std::unique_ptr<InferenceAdminService> inference_admin;
  std::unique_ptr<RegistryService> registry;
  std::unique_ptr<QuantizerService> quantizer;
  std::unique_ptr<ProfilerService> profiler;
  std::unique_ptr<grpc::Server> data, admin;
  std::unique_ptr<Acceptor> data_port, admin_port;
  std::mutex mutex;
  std::set<std::string> health_names;
  bool draining = false;
  bool stopped = false;
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() { Shutdown(absl::ZeroDuration()); }

int Server::port() const { return impl_->data_port->port(); }
int Server::admin_port() const { return impl_->admin_port->port(); }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      repository::Repository* repository,
                                                      serving::Classifier* classifier,
                                                      oip::Inference* inference,
                                                      monitoring::LabelJoin* labels,
                                                      metrics::Metrics* metrics) {
  grpc::EnableDefaultHealthCheckService(true);
  static std::once_flag reflection;
  std::call_once(reflection, [] { grpc::reflection::InitProtoReflectionServerBuilderPlugin(); });

  std::unique_ptr<Server> server(new Server(std::make_unique<Impl>()));
  Impl& impl = *server->impl_;
  impl.repository = repository;
  const auto changed = [raw = server.get()] { raw->UpdateHealth(); };
  impl.classifier = std::make_unique<ClassifierService>(classifier, labels, metrics);
  impl.oip = inference;
  impl.inference = std::make_unique<InferenceService>(inference, metrics);
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
    TERN_ASSIGN_OR_RETURN(impl.data_port,
                          Listen(options.host, options.port, grpc::InsecureServerCredentials(),
                                 "data", metrics, builder));
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
    builder.SetResourceQuota(quota);
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MIN_POLLERS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 2);
    TERN_ASSIGN_OR_RETURN(impl.admin_port,
                          Listen(options.admin_host, options.admin_port,
                                 grpc::InsecureServerCredentials(), "admin", metrics, builder));
    builder.RegisterService(impl.inference_admin.get());
    builder.RegisterService(impl.registry.get());
    builder.RegisterService(impl.quantizer.get());
    builder.RegisterService(impl.profiler.get());
    impl.admin = builder.BuildAndStart();
    if (impl.admin == nullptr) return absl::InternalError("gRPC: the admin port's server");
  }
  server->UpdateHealth();
  impl.data_port->Start();
  impl.admin_port->Start();
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
  for (grpc::Server* server : {impl_->data.get(), impl_->admin.get()}) {
    grpc::HealthCheckServiceInterface* health = server->GetHealthCheckService();
    if (health == nullptr) continue;
    health->SetServingStatus("", true);
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
  for (grpc::Server* server : {impl_->data.get(), impl_->admin.get()}) {
    if (server != nullptr && server->GetHealthCheckService() != nullptr) {
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
  for (Acceptor* port : {impl_->data_port.get(), impl_->admin_port.get()}) {
    if (port != nullptr) port->Stop();
  }
  const auto deadline = absl::ToChronoTime(absl::Now() + grace);
  // Side by side: an idle connection may make each take its whole grace.
  std::thread admin([&] {
    if (impl_->admin != nullptr) impl_->admin->Shutdown(deadline);
  });
  if (impl_->data != nullptr) impl_->data->Shutdown(deadline);
  admin.join();
}

}  // namespace tern::rpc
