// tern.v1.Profiler over the synchronous API (see registry_service.h).
#ifndef TERN_SERVER_RPC_PROFILER_SERVICE_H_
#define TERN_SERVER_RPC_PROFILER_SERVICE_H_

#include <atomic>

#include "server/metrics/metrics.h"
#include "server/repository/repository.h"
#include "tern/v1/profiler.grpc.pb.h"

namespace tern::rpc {

// Thread safe; one measurement at a time, because two would disturb each other.
class ProfilerService final : public v1::Profiler::Service {
 public:
  ProfilerService(repository::Repository* repository, metrics::Metrics* metrics, int cpu_threads)
      : repository_(repository), metrics_(metrics), cpu_threads_(cpu_threads) {}

  grpc::Status Benchmark(grpc::ServerContext* context, const v1::BenchmarkRequest* request,
                         v1::BenchmarkResponse* response) override;
  grpc::Status Profile(grpc::ServerContext* context, const v1::ProfileRequest* request,
                       v1::ProfileResponse* response) override;

 private:
  absl::Status DoBenchmark(grpc::ServerContext* context, const v1::BenchmarkRequest& request,
                           v1::BenchmarkResponse* response);
  absl::Status DoProfile(grpc::ServerContext* context, const v1::ProfileRequest& request,
                         v1::ProfileResponse* response);

  repository::Repository* const repository_;
  metrics::Metrics* const metrics_;
  const int cpu_threads_;
  std::atomic<bool> busy_{false};
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_PROFILER_SERVICE_H_
