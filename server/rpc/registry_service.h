// tern.v1.ModelRegistry over the synchronous API: few, long calls on the admin port, where a
// blocked thread costs nothing and the code reads top to bottom.
#ifndef TERN_SERVER_RPC_REGISTRY_SERVICE_H_
#define TERN_SERVER_RPC_REGISTRY_SERVICE_H_

#include <functional>

#include "server/metrics/metrics.h"
#include "server/repository/repository.h"
#include "tern/v1/registry.grpc.pb.h"

namespace tern::rpc {

// Thread safe.
class RegistryService final : public v1::ModelRegistry::Service {
 public:
  // `changed` is called after every call that may have changed a version's state. Nothing is owned.
  RegistryService(repository::Repository* repository, metrics::Metrics* metrics,
                  uint64_t max_onnx_bytes, std::function<void()> changed)
      : repository_(repository),
        metrics_(metrics),
        max_onnx_bytes_(max_onnx_bytes),
        changed_(std::move(changed)) {}

  grpc::Status Import(grpc::ServerContext* context, grpc::ServerReader<v1::ImportRequest>* reader,
                      v1::ImportResponse* response) override;
  grpc::Status List(grpc::ServerContext* context, const v1::ListRequest* request,
                    v1::ListResponse* response) override;
  grpc::Status Get(grpc::ServerContext* context, const v1::GetRequest* request,
                   v1::ModelVersion* response) override;
  grpc::Status Load(grpc::ServerContext* context, const v1::VersionRequest* request,
                    v1::ModelVersion* response) override;
  grpc::Status Unload(grpc::ServerContext* context, const v1::VersionRequest* request,
                      v1::ModelVersion* response) override;
  grpc::Status SetDefault(grpc::ServerContext* context, const v1::VersionRequest* request,
                          v1::ModelVersion* response) override;
  grpc::Status Delete(grpc::ServerContext* context, const v1::VersionRequest* request,
                      v1::DeleteResponse* response) override;
  grpc::Status Export(grpc::ServerContext* context, const v1::ExportRequest* request,
                      grpc::ServerWriter<v1::ExportResponse>* writer) override;

 private:
  absl::Status DoImport(grpc::ServerContext* context, grpc::ServerReader<v1::ImportRequest>* reader,
                        v1::ImportResponse* response);
  absl::Status DoExport(const v1::ExportRequest& request,
                        grpc::ServerWriter<v1::ExportResponse>* writer);

  repository::Repository* const repository_;
  metrics::Metrics* const metrics_;
  const uint64_t max_onnx_bytes_;
  const std::function<void()> changed_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_REGISTRY_SERVICE_H_
