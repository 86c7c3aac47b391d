// A small C++ client of a Tern server: one object, one method per RPC, absl::Status instead of
// gRPC's types. The command line tool `ternctl` is written on it.
//
//   auto client = tern::client::Client::Connect("127.0.0.1:8500", "127.0.0.1:8501");
//   tern::v1::ClassifyRequest request;
//   request.set_model("demo");
//   request.set_image(jpeg_bytes);
//   auto answer = (*client)->Classify(request);   // absl::StatusOr<tern::v1::ClassifyResponse>
//
// Channels connect lazily: an unreachable server is UNAVAILABLE at the first call. Messages of up
// to 64 MiB pass in both directions. Every call has a deadline. Every method may also return what
// the RPC's comment in proto/tern/v1 lists, DEADLINE_EXCEEDED, UNAVAILABLE (with the address), and
// UNAUTHENTICATED or PERMISSION_DENIED for the token. All methods are thread safe.
//
// Several servers: "a:8500,b:8500" or "dns:///name:8500". Calls go round robin to those that are
// connected and whose grpc.health.v1 says SERVING; one that fails is left out and comes back by
// itself, and the name behind dns:/// is looked up again then, at most every 2 s. Classify and the
// reading admin calls are retried (RetryOptions), elsewhere if there is an elsewhere. Streams and
// calls that change something are not: their caller knows what was done.
#ifndef TERN_CLIENT_TERN_CLIENT_H_
#define TERN_CLIENT_TERN_CLIENT_H_

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tern/v1/classifier.pb.h"
#include "tern/v1/profiler.pb.h"
#include "tern/v1/quantizer.pb.h"
#include "tern/v1/registry.pb.h"

namespace tern::client {

// Retries are gRPC's (gRFC A6): UNAVAILABLE, CANCELLED by the server (it is closing), and
// RESOURCE_EXHAUSTED unless the server says that it makes no sense. The n-th waits initial_backoff
// * 2^(n-1), at most max_backoff, 20 % more or less by chance, or what the server asked for; all
// attempts share the call's deadline.
struct RetryOptions {
  int max_attempts = 5;  // 1 = no retries; gRPC's limit is 5
  absl::Duration initial_backoff = absl::Milliseconds(50);
  absl::Duration max_backoff = absl::Seconds(2);
  // Each failure takes one from the budget, each success gives budget_per_success back; below half
  // of it nothing is retried, so that retries cannot keep overloaded servers down. 1..1000.
  int budget = 200;
  double budget_per_success = 0.1;
};

// PEM files, read by Connect.
struct TlsOptions {
  bool system_roots = false;     // TLS with the system's authorities, if `ca` is empty
  std::string ca;                // authorities of the server
  std::string certificate, key;  // for servers that want one of the client
  // The name that the server's certificate must have; empty: the host of the address, of the first
  // one in a list.
  std::string server_name;

  bool enabled() const { return system_roots || !ca.empty(); }
};

struct ClientOptions {
  // One endpoint, a list "HOST:PORT,HOST:PORT" (names are looked up once, by Connect), or any gRPC
  // target.
  std::string server = "127.0.0.1:8500";                 // data port
  std::string admin = "127.0.0.1:8501";                  // admin port
  absl::Duration deadline = absl::Seconds(30);           // RPCs that answer at once
  absl::Duration transfer_deadline = absl::Minutes(10);  // Import, Load, Export
  absl::Duration job_deadline = absl::Hours(24);         // Quantize, Evaluate, streams
  int channels = 1;  // connections to each data port; ClassifyAsync takes them in turn
  RetryOptions retry;
  TlsOptions tls;          // of both ports
  std::string token_file;  // its first token goes with every call; read again when it changes
};

// Gives the next item, nullopt at the end, or an error, which cancels the RPC and is what the
// method returns. Called from one thread at a time, not the caller's.
using RequestSource = std::function<absl::StatusOr<std::optional<v1::ClassifyRequest>>()>;
using SampleSource = std::function<absl::StatusOr<std::optional<v1::SampleImage>>()>;

// Called for each answer, in the order of the requests; an error cancels the stream.
using ResponseSink = std::function<absl::Status(const v1::ClassifyStreamResponse&)>;

using ProgressCallback = std::function<void(const v1::JobProgress&)>;

// What Quantize found. A gate that was not met is an answer, not an error.
struct QuantizeOutcome {
  v1::QuantizeResult result;
  absl::Status gate;  // OK if published; else the server's FAILED_PRECONDITION
};

class Client {
 public:
  // INVALID_ARGUMENT if an address is empty or malformed, a number is out of its range or a file is
  // not what it should be, NOT_FOUND if a file cannot be read, UNAVAILABLE if a name of a list has
  // no address. Does not wait for a connection.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(ClientOptions options);
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const std::string& server,
                                                         const std::string& admin);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Data port.
  absl::StatusOr<v1::ClassifyResponse> Classify(const v1::ClassifyRequest& request);
  // `done` runs once, on a thread of gRPC's, and must not block. `request` is copied to the wire
  // before this returns. The client must outlive the call.
  void ClassifyAsync(const v1::ClassifyRequest& request,
                     std::function<void(absl::StatusOr<v1::ClassifyResponse>)> done);
  // Sends what `next` gives, at most `window` requests ahead of the answers, so that memory stays
  // bounded however long the stream is.
  absl::Status ClassifyStream(const RequestSource& next, const ResponseSink& sink, int window = 64);
  absl::StatusOr<v1::ReportLabelResponse> ReportLabel(const std::string& request_id,
                                                      uint32_t label);
  // grpc.health.v1: true if `service` ("" = the server, or a model's name) is serving. NOT_FOUND
  // for a name the server does not know.
  absl::StatusOr<bool> Healthy(const std::string& service);

  // Admin port. Version 0 means what the RPC's comment says.
  // `file` holds an ONNX network, or an artifact if start.artifact().
  absl::StatusOr<v1::ModelVersion> Import(const v1::ImportStart& start, std::istream& file);
  absl::StatusOr<v1::ListResponse> Models(const std::string& model = "");
  // One version with its quantisation report and labels.
  absl::StatusOr<v1::ModelVersion> Report(const std::string& model, uint64_t version = 0);
  absl::StatusOr<v1::ModelVersion> SetDefault(const std::string& model, uint64_t version);
  absl::StatusOr<v1::ModelVersion> Load(const std::string& model, uint64_t version);
  absl::StatusOr<v1::ModelVersion> Unload(const std::string& model, uint64_t version);
  absl::StatusOr<v1::DeleteResponse> Delete(const std::string& model, uint64_t version);
  // Writes the version to `out`, as it arrives: the stored file or ONNX; returns the file's name.
  absl::StatusOr<std::string> Export(const std::string& model, uint64_t version,
                                     v1::ExportRequest::Format format, std::ostream& out);

  // `progress` (may be null) is called from the calling thread.
  absl::StatusOr<QuantizeOutcome> Quantize(const v1::QuantizeStart& start,
                                           const SampleSource& images,
                                           const ProgressCallback& progress = nullptr);
  absl::StatusOr<v1::EvaluateResult> Evaluate(const v1::EvaluateStart& start,
                                              const SampleSource& images,
                                              const ProgressCallback& progress = nullptr);

  // The deadline is the usual one plus what the run itself takes.
  absl::StatusOr<v1::BenchmarkResponse> Benchmark(const v1::BenchmarkRequest& request);
  absl::StatusOr<v1::ProfileResponse> Profile(const v1::ProfileRequest& request);

 private:
  struct Impl;
  explicit Client(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace tern::client

#endif  // TERN_CLIENT_TERN_CLIENT_H_
