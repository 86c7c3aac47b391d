// The two gRPC servers: data port (ImageClassifier, GRPCInferenceService, health, reflection) and
// admin port (Quantizer, ModelRegistry, Profiler, the repository's calls of GRPCInferenceService,
// health, reflection).
#ifndef TERN_SERVER_RPC_SERVER_H_
#define TERN_SERVER_RPC_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/image/image.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/label_join.h"
#include "server/oip/inference.h"
#include "server/repository/repository.h"
#include "server/serving/classify.h"

namespace tern::rpc {

struct ServerOptions {
  std::string host = "0.0.0.0";
  int port = 8500;  // 0 = any free port
  int admin_port = 8501;
  std::string admin_host = "0.0.0.0";
  int cpu_threads = 1;
  image::Limits limits;
  engine::PlanOptions plan;
  uint64_t max_onnx_bytes = 1ull << 30;
};

// Thread safe.
class Server {
 public:
  // Starts both. UNAVAILABLE if a port cannot be bound (names it). Nothing is owned; all must
  // outlive the server.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       repository::Repository* repository,
                                                       serving::Classifier* classifier,
                                                       oip::Inference* inference,
                                                       monitoring::LabelJoin* labels,
                                                       metrics::Metrics* metrics);
  ~Server();

  int port() const;
  int admin_port() const;

  // grpc.health.v1: the name "" and every model with a ready default version are SERVING, until
  // SetDraining().
  void UpdateHealth();
  void SetDraining();

  // Stops accepting, waits up to `grace` for running calls, then cancels them.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_SERVER_H_
