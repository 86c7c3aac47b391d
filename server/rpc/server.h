// The gRPC servers: data port (ImageClassifier, GRPCInferenceService, health, reflection) and
// admin port (Quantizer, ModelRegistry, Profiler, the repository's calls of GRPCInferenceService,
// health, reflection).
#ifndef TERN_SERVER_RPC_SERVER_H_
#define TERN_SERVER_RPC_SERVER_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
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
  std::string admin_host = "127.0.0.1";
  // Files of bearer tokens (token_file.h); empty: none are required. A token of the admin file is
  // good for both ports, one of the data file for the data port.
  std::string admin_token_file, data_token_file;
  // PEM files of both ports (tls_files.h); empty: plain text. With an authority, clients of that
  // port must bring one of its certificates.
  std::string tls_certificate, tls_key, tls_client_ca, admin_tls_client_ca;
  // A third port with health checks only, in plain text on `host`, for probes that cannot do TLS;
  // 0 = any free port.
  std::optional<int> health_port;
  int cpu_threads = 1;
  image::Limits limits;
  // What gRPC may hold of requests that have not arrived completely, for each of the two ports; at
  // least one message of the largest size.
  uint64_t max_receive_bytes = 256ull << 20;
  // A connection of the data port gets GOAWAY after this, give or take a tenth, and ends with its
  // last call: its client looks the name up again, and finds replicas that came since. 0: never.
  absl::Duration max_connection_age = absl::Minutes(2);
  engine::PlanOptions plan;
  uint64_t max_onnx_bytes = 1ull << 30;
};

// Thread safe.
class Server {
 public:
  // Starts both. UNAVAILABLE if a port cannot be bound (names it), the errors of TokenFile::Open
  // and TlsFiles::Open for their files, INVALID_ARGUMENT for a certificate without a key or the
  // reverse, and for max_receive_bytes below its minimum. Nothing is owned; all must outlive the
  // server.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       repository::Repository* repository,
                                                       serving::Classifier* classifier,
                                                       oip::Inference* inference,
                                                       monitoring::LabelJoin* labels,
                                                       metrics::Metrics* metrics);
  ~Server();

  int port() const;
  int admin_port() const;
  int health_port() const;  // 0: there is none

  // Whether a call of one of the data port's methods ("/package.Service/Method") may go on that
  // came another way, without TLS, with these values of the authorization header: the name of its
  // caller (Caller::ToString), empty if it brings no known token. The errors of PortGuard::Check of
  // the data port; PERMISSION_DENIED if the port wants client certificates.
  absl::StatusOr<std::string> CheckDataCall(
      absl::string_view method, absl::Span<const absl::string_view> authorization) const;

  // grpc.health.v1: the names "", those of the data port's services and every model with a ready default version are SERVING, until
  // SetDraining().
  void UpdateHealth();
  void SetDraining();

  // Stops accepting, waits up to `grace` for running calls, then cancels them. Streams take no more
  // requests, and end with UNAVAILABLE once those that they have are answered; calls of other
  // services (health, reflection) are not waited for. Logs how many calls were answered since the
  // start and how many were given up.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_SERVER_H_
