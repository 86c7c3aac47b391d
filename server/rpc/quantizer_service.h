// tern.v1.Quantizer over the synchronous API (see registry_service.h).
#ifndef TERN_SERVER_RPC_QUANTIZER_SERVICE_H_
#define TERN_SERVER_RPC_QUANTIZER_SERVICE_H_

#include <atomic>
#include <functional>

#include "server/image/image.h"
#include "server/metrics/metrics.h"
#include "server/repository/repository.h"
#include "tern/v1/quantizer.grpc.pb.h"

namespace tern::rpc {

struct QuantizerOptions {
  int threads = 1;
  image::Limits limits;
  engine::PlanOptions plan;
  int max_jobs = 1;               // quantisations at once; more are RESOURCE_EXHAUSTED
  std::function<void()> changed;  // a version may have been published
};

// Thread safe.
class QuantizerService final : public v1::Quantizer::Service {
 public:
  QuantizerService(repository::Repository* repository, metrics::Metrics* metrics,
                   QuantizerOptions options)
      : repository_(repository), metrics_(metrics), options_(std::move(options)) {}

  grpc::Status Quantize(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::QuantizeResponse, v1::QuantizeRequest>* stream) override;
  grpc::Status Evaluate(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::EvaluateResponse, v1::EvaluateRequest>* stream) override;

 private:
  using QuantizeStream = grpc::ServerReaderWriter<v1::QuantizeResponse, v1::QuantizeRequest>;
  using EvaluateStream = grpc::ServerReaderWriter<v1::EvaluateResponse, v1::EvaluateRequest>;
  absl::Status DoQuantize(grpc::ServerContext* context, QuantizeStream* stream);
  absl::Status DoEvaluate(grpc::ServerContext* context, EvaluateStream* stream);

  repository::Repository* const repository_;
  metrics::Metrics* const metrics_;
  const QuantizerOptions options_;
  std::atomic<int> jobs_{0};
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_QUANTIZER_SERVICE_H_
