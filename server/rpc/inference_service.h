// inference.GRPCInferenceService: the Open Inference Protocol, on the data port over the callback
// API, and what of it changes the repository on the admin port over the synchronous one.
#ifndef TERN_SERVER_RPC_INFERENCE_SERVICE_H_
#define TERN_SERVER_RPC_INFERENCE_SERVICE_H_

#include <functional>
#include <string>

#include "inference/grpc_service.grpc.pb.h"
#include "server/metrics/metrics.h"
#include "server/oip/inference.h"
#include "server/repository/repository.h"
#include "server/rpc/open_streams.h"

namespace tern::rpc {

// Thread safe. Nothing is owned.
class InferenceService final : public inference::GRPCInferenceService::CallbackService {
 public:
  InferenceService(const oip::Inference* inference, OpenStreams* streams, metrics::Metrics* metrics)
      : inference_(inference), streams_(streams), metrics_(metrics) {}

  using Context = grpc::CallbackServerContext;
  using Reactor = grpc::ServerUnaryReactor;
  Reactor* ServerLive(Context* context, const inference::ServerLiveRequest* request,
                      inference::ServerLiveResponse* response) override;
  Reactor* ServerReady(Context* context, const inference::ServerReadyRequest* request,
                       inference::ServerReadyResponse* response) override;
  Reactor* ModelReady(Context* context, const inference::ModelReadyRequest* request,
                      inference::ModelReadyResponse* response) override;
  Reactor* ServerMetadata(Context* context, const inference::ServerMetadataRequest* request,
                          inference::ServerMetadataResponse* response) override;
  Reactor* ModelMetadata(Context* context, const inference::ModelMetadataRequest* request,
                         inference::ModelMetadataResponse* response) override;
  Reactor* ModelInfer(Context* context, const inference::ModelInferRequest* request,
                      inference::ModelInferResponse* response) override;
  grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
  ModelStreamInfer(Context* context) override;
  Reactor* ModelConfig(Context* context, const inference::ModelConfigRequest* request,
                       inference::ModelConfigResponse* response) override;
  Reactor* ModelStatistics(Context* context, const inference::ModelStatisticsRequest* request,
                           inference::ModelStatisticsResponse* response) override;
  Reactor* RepositoryIndex(Context* context, const inference::RepositoryIndexRequest* request,
                           inference::RepositoryIndexResponse* response) override;
  // PERMISSION_DENIED: the admin port has them.
  Reactor* RepositoryModelLoad(Context* context,
                               const inference::RepositoryModelLoadRequest* request,
                               inference::RepositoryModelLoadResponse* response) override;
  Reactor* RepositoryModelUnload(Context* context,
                                 const inference::RepositoryModelUnloadRequest* request,
                                 inference::RepositoryModelUnloadResponse* response) override;

 private:
  const oip::Inference* const inference_;
  OpenStreams* const streams_;
  metrics::Metrics* const metrics_;
};

// Health, server metadata, index, load and unload; the rest is UNIMPLEMENTED here. Thread safe.
// Nothing is owned.
class InferenceAdminService final : public inference::GRPCInferenceService::Service {
 public:
  // `changed` is called after every call that may have changed a version's state.
  InferenceAdminService(const oip::Inference* inference, repository::Repository* repository,
                        metrics::Metrics* metrics, std::function<void()> changed)
      : inference_(inference),
        repository_(repository),
        metrics_(metrics),
        changed_(std::move(changed)) {}

  grpc::Status ServerLive(grpc::ServerContext* context, const inference::ServerLiveRequest* request,
                          inference::ServerLiveResponse* response) override;
  grpc::Status ServerReady(grpc::ServerContext* context,
                           const inference::ServerReadyRequest* request,
                           inference::ServerReadyResponse* response) override;
  grpc::Status ModelReady(grpc::ServerContext* context, const inference::ModelReadyRequest* request,
                          inference::ModelReadyResponse* response) override;
  grpc::Status ServerMetadata(grpc::ServerContext* context,
                              const inference::ServerMetadataRequest* request,
                              inference::ServerMetadataResponse* response) override;
  grpc::Status RepositoryIndex(grpc::ServerContext* context,
                               const inference::RepositoryIndexRequest* request,
                               inference::RepositoryIndexResponse* response) override;
  // Loads every version of the model that is not ready; loads the default one anew if all are.
  // Parameters are refused with INVALID_ARGUMENT: a model's configuration and files cannot be sent.
  grpc::Status RepositoryModelLoad(grpc::ServerContext* context,
                                   const inference::RepositoryModelLoadRequest* request,
                                   inference::RepositoryModelLoadResponse* response) override;
  // Every version of the model, the default one too, which stays the default.
  grpc::Status RepositoryModelUnload(grpc::ServerContext* context,
                                     const inference::RepositoryModelUnloadRequest* request,
                                     inference::RepositoryModelUnloadResponse* response) override;

 private:
  absl::Status Load(const inference::RepositoryModelLoadRequest& request);

  const oip::Inference* const inference_;
  repository::Repository* const repository_;
  metrics::Metrics* const metrics_;
  const std::function<void()> changed_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_INFERENCE_SERVICE_H_
