#include "client/tern_client.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <istream>
#include <mutex>
#include <ostream>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/channel.h"
#include "client/status.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tern/v1/classifier.grpc.pb.h"
#include "tern/v1/profiler.grpc.pb.h"
#include "tern/v1/quantizer.grpc.pb.h"
#include "tern/v1/registry.grpc.pb.h"

namespace tern::client {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;
constexpr size_t kChunkBytes = 1 << 20;

// Finds a peer that vanished during a long job. Servers refuse pings more often than every five
// minutes unless told otherwise.
constexpr int kKeepaliveMs = 330'000;
// Among several, a vanished one must not be waited for; Tern's servers allow 10 s.
constexpr int kBalancedKeepaliveMs = 30'000;
constexpr int kKeepaliveTimeoutMs = 10'000;

// `index` keeps channels apart: those with equal arguments would share one connection.
std::shared_ptr<grpc::Channel> MakeChannel(
    const Target& target, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    const ClientOptions& options, bool balanced, int index) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  args.SetMaxSendMessageSize(kMaxMessageBytes);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, balanced ? kBalancedKeepaliveMs : kKeepaliveMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  // gRPC's default of two minutes at most is how long a server that came back would stay unused.
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5'000);
  // A name is looked up again when a server is lost, but no sooner than this after the last time.
  // gRPC's default of 30 s is longer than a rolling update takes to replace three servers by others
  // at new addresses.
  args.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 2'000);
  // A request larger than this (256 KiB unless set) is not kept, and so is not retried.
  args.SetInt(GRPC_ARG_PER_RPC_RETRY_BUFFER_SIZE, kMaxMessageBytes);
  args.SetServiceConfigJSON(ServiceConfig(options.retry, balanced));
  if (options.tls.enabled()) {
    const std::string& name =
        options.tls.server_name.empty() ? target.authority : options.tls.server_name;
    if (!name.empty()) args.SetString(GRPC_ARG_DEFAULT_AUTHORITY, name);
  }
  args.SetInt("tern.channel_index", index);
  return grpc::CreateCustomChannel(target.uri, credentials, args);
}

absl::Status Annotate(const absl::Status& status, const char* context) {
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

enum class Port { kData, kAdmin };

absl::Status FromGrpc(const grpc::Status& status, const ClientOptions& options, Port port) {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  const bool admin = port == Port::kAdmin;
  const std::string& address = admin ? options.admin : options.server;
  if (code == absl::StatusCode::kUnavailable) {
    return absl::Status(code, absl::StrCat("server at ", address, ": ", status.error_message()));
  }
  // gRPC's answer where there is no such service.
  if (code == absl::StatusCode::kUnimplemented && status.error_message().empty()) {
    return absl::UnimplementedError(absl::StrCat(
        address, " was asked as the ",
        admin ? "admin port (--admin), which serves models, quantisation and measurements"
              : "data port (--server), which serves classification",
        ", and does not know the call: are --server and --admin swapped?"));
  }
  return absl::Status(code, status.error_message());
}

// Writes `first` (if any) and what `next` gives to `stream` on a thread of its own while the
// caller reads, so neither direction can stall the other.
template <typename Request, typename Response>
class Writer {
 public:
  using Next = std::function<absl::StatusOr<std::optional<Request>>()>;

  Writer(grpc::ClientContext* context, grpc::ClientReaderWriter<Request, Response>* stream,
         const Request* first, Next next, int window)
      : context_(context), stream_(stream), next_(std::move(next)), window_(window) {
    thread_ = std::thread([this, first] { Run(first); });
  }
  ~Writer() { Join().IgnoreError(); }

  // One more answer has come.
  void Answered() {
    std::lock_guard lock(mutex_);
    --ahead_;
    wake_.notify_one();
  }

  // Ends the writing; returns the error of `next`, if it gave one.
  absl::Status Join() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      wake_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
    return status_;
  }

 private:
  void Run(const Request* first) {
    bool open = first == nullptr || stream_->Write(*first);
    while (open) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || ahead_ < window_; });
        if (stop_) break;
        ++ahead_;
      }
      absl::StatusOr<std::optional<Request>> request = next_();
      if (!request.ok()) {
        status_ = request.status();
        context_->TryCancel();
        return;
      }
      if (!request->has_value()) break;
      open = stream_->Write(**request);
    }
    stream_->WritesDone();
  }

  grpc::ClientContext* context_;
  grpc::ClientReaderWriter<Request, Response>* stream_;
  Next next_;
  const int window_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int ahead_ = 0;
  bool stop_ = false;
  absl::Status status_;  // written by thread_, read after the join
  std::thread thread_;
};

// The window of jobs, where answers do not pair with images: flow control alone holds the writer
// back. Answered() is never called, so the number of images is bounded by this.
constexpr int kNoWindow = 1 << 30;

}  // namespace

struct Client::Impl {
  ClientOptions options;
  std::unique_ptr<TokenSource> token;  // null: none

  // Before every call.
  void Prepare(grpc::ClientContext& context, absl::Duration deadline) const {
    if (deadline < absl::InfiniteDuration()) {
      context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
    }
    if (token != nullptr) {
      context.AddMetadata("authorization", absl::StrCat("Bearer ", token->Token()));
    }
  }
  std::vector<std::unique_ptr<v1::ImageClassifier::Stub>> classifiers;  // one per channel
  std::atomic<uint32_t> next_channel{0};
  std::unique_ptr<grpc::health::v1::Health::Stub> health;
  std::unique_ptr<v1::ModelRegistry::Stub> registry;
  std::unique_ptr<v1::Quantizer::Stub> quantizer;
  std::unique_ptr<v1::Profiler::Stub> profiler;

  // An admin call that answers once.
  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(Stub& stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request, absl::Duration deadline) {
    grpc::ClientContext context;
    Prepare(context, deadline);
    Response response;
    TERN_CLIENT_RETURN_IF_ERROR(
        FromGrpc((stub.*method)(&context, request, &response), options, Port::kAdmin));
    return response;
  }

  absl::StatusOr<v1::ModelVersion> OnVersion(
      grpc::Status (v1::ModelRegistry::Stub::*method)(grpc::ClientContext*,
                                                      const v1::VersionRequest&, v1::ModelVersion*),
      const std::string& model, uint64_t version, absl::Duration deadline) {
    v1::VersionRequest request;
    request.set_model(model);
    request.set_version(version);
    return Call(*registry, method, request, deadline);
  }

  // Quantize and Evaluate: one start message, images, progress, one result. `result` is filled
  // when it came, also when the status is not OK.
  template <typename Request, typename Response, typename Start, typename Result>
  absl::Status RunJob(grpc::ClientContext& context,
                      grpc::ClientReaderWriter<Request, Response>& stream, const Start& start,
                      const SampleSource& images, const ProgressCallback& progress,
                      std::optional<Result>& result) {
    Request first;
    *first.mutable_start() = start;
    Writer<Request, Response> writer(
        &context, &stream, &first,
        [&images]() -> absl::StatusOr<std::optional<Request>> {
          TERN_CLIENT_ASSIGN_OR_RETURN(std::optional<v1::SampleImage> image, images());
          if (!image) return std::nullopt;
          std::optional<Request> request(std::in_place);
          *request->mutable_image() = *std::move(image);
          return request;
        },
        kNoWindow);
    Response response;
    while (stream.Read(&response)) {
      if (response.has_progress() && progress) progress(response.progress());
      if (response.has_result()) result = response.result();
    }
    const absl::Status source = writer.Join();
    const absl::Status status = FromGrpc(stream.Finish(), options, Port::kAdmin);
    return source.ok() ? status : source;
  }
};

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(ClientOptions options) {
  const RetryOptions& retry = options.retry;
  if (options.channels < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("channels must be at least 1, got ", options.channels));
  }
  if (retry.max_attempts < 1 || retry.max_attempts > 5 || retry.budget < 1 || retry.budget > 1000 ||
      !(retry.budget_per_success > 0 && retry.budget_per_success <= 1000)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "retry: got ", retry.max_attempts, " attempts (want 1..5), budget ", retry.budget,
        " (want 1..1000), ", retry.budget_per_success, " per success (want more than 0)"));
  }
  if (retry.initial_backoff < absl::Milliseconds(1) || retry.max_backoff < retry.initial_backoff) {
    return absl::InvalidArgumentError("retry: want 1 ms <= initial_backoff <= max_backoff");
  }
  const absl::StatusOr<Target> server = ParseTarget(options.server);
  if (!server.ok()) return Annotate(server.status(), "the server's address");
  const absl::StatusOr<Target> admin = ParseTarget(options.admin);
  if (!admin.ok()) return Annotate(admin.status(), "the admin address");
  TERN_CLIENT_ASSIGN_OR_RETURN(const auto credentials, MakeCredentials(options.tls));
  auto impl = std::make_unique<Impl>();
  if (!options.token_file.empty()) {
    TERN_CLIENT_ASSIGN_OR_RETURN(impl->token, TokenSource::Open(options.token_file));
  }
  for (int i = 0; i < options.channels; ++i) {
    impl->classifiers.push_back(v1::ImageClassifier::NewStub(
        MakeChannel(*server, credentials, options, server->balanced, i)));
  }
  // Asks servers that are not serving, too.
  impl->health = grpc::health::v1::Health::NewStub(
      MakeChannel(*server, credentials, options, false, options.channels));
  auto admin_channel = MakeChannel(*admin, credentials, options, admin->balanced, 0);
  impl->registry = v1::ModelRegistry::NewStub(admin_channel);
  impl->quantizer = v1::Quantizer::NewStub(admin_channel);
  impl->profiler = v1::Profiler::NewStub(admin_channel);
  impl->options = std::move(options);
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& server,
                                                        const std::string& admin) {
  ClientOptions options;
  options.server = server;
  options.admin = admin;
  return Connect(std::move(options));
}

absl::StatusOr<v1::ClassifyResponse> Client::Classify(const v1::ClassifyRequest& request) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.deadline);
  v1::ClassifyResponse response;
  TERN_CLIENT_RETURN_IF_ERROR(FromGrpc(
      impl_->classifiers[0]->Classify(&context, request, &response), impl_->options, Port::kData));
  return response;
}

void Client::ClassifyAsync(const v1::ClassifyRequest& request,
                           std::function<void(absl::StatusOr<v1::ClassifyResponse>)> done) {
  struct Call {
    grpc::ClientContext context;
    v1::ClassifyResponse response;
    std::function<void(absl::StatusOr<v1::ClassifyResponse>)> done;
  };
  auto call = std::make_unique<Call>();
  impl_->Prepare(call->context, impl_->options.deadline);
  call->done = std::move(done);
  auto& stub = *impl_->classifiers[impl_->next_channel++ % impl_->classifiers.size()];
  Call* raw = call.release();
  stub.async()->Classify(&raw->context, &request, &raw->response,
                         [raw, impl = impl_.get()](grpc::Status status) {
                           std::unique_ptr<Call> owned(raw);
                           if (status.ok()) {
                             owned->done(std::move(owned->response));
                           } else {
                             owned->done(FromGrpc(status, impl->options, Port::kData));
                           }
                         });
}

absl::Status Client::ClassifyStream(const RequestSource& next, const ResponseSink& sink,
                                    int window) {
  if (window < 1) {
    return absl::InvalidArgumentError(absl::StrCat("window must be at least 1, got ", window));
  }
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.job_deadline);
  auto stream = impl_->classifiers[0]->ClassifyStream(&context);
  absl::Status sunk;
  absl::Status source;
  {
    Writer<v1::ClassifyRequest, v1::ClassifyStreamResponse> writer(&context, stream.get(), nullptr,
                                                                   next, window);
    v1::ClassifyStreamResponse response;
    while (sunk.ok() && stream->Read(&response)) {
      writer.Answered();
      sunk = sink(response);
    }
    if (!sunk.ok()) context.TryCancel();
    source = writer.Join();
  }
  const absl::Status status = FromGrpc(stream->Finish(), impl_->options, Port::kData);
  if (!source.ok()) return source;
  return sunk.ok() ? status : sunk;
}

absl::StatusOr<v1::ReportLabelResponse> Client::ReportLabel(const std::string& request_id,
                                                            uint32_t label) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.deadline);
  v1::ReportLabelRequest request;
  request.set_request_id(request_id);
  request.set_label(label);
  v1::ReportLabelResponse response;
  TERN_CLIENT_RETURN_IF_ERROR(
      FromGrpc(impl_->classifiers[0]->ReportLabel(&context, request, &response), impl_->options,
               Port::kData));
  return response;
}

absl::StatusOr<bool> Client::Healthy(const std::string& service) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.deadline);
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  grpc::health::v1::HealthCheckResponse response;
  TERN_CLIENT_RETURN_IF_ERROR(
      FromGrpc(impl_->health->Check(&context, request, &response), impl_->options, Port::kData));
  return response.status() == grpc::health::v1::HealthCheckResponse::SERVING;
}

absl::StatusOr<v1::ModelVersion> Client::Import(const v1::ImportStart& start, std::istream& file) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.transfer_deadline);
  v1::ImportResponse response;
  auto writer = impl_->registry->Import(&context, &response);
  v1::ImportRequest request;
  *request.mutable_start() = start;
  bool open = writer->Write(request);
  std::string buffer(kChunkBytes, '\0');
  while (open) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    const auto got = static_cast<size_t>(file.gcount());
    if (got == 0) break;
    request.set_chunk(buffer.data(), got);
    open = writer->Write(request);
  }
  if (file.bad()) {
    // Without this the server would take the part that was read for the whole file.
    context.TryCancel();
    writer->Finish();
    return absl::DataLossError("reading the file failed");
  }
  writer->WritesDone();
  TERN_CLIENT_RETURN_IF_ERROR(FromGrpc(writer->Finish(), impl_->options, Port::kAdmin));
  return response.version();
}

absl::StatusOr<v1::ListResponse> Client::Models(const std::string& model) {
  v1::ListRequest request;
  request.set_model(model);
  return impl_->Call(*impl_->registry, &v1::ModelRegistry::Stub::List, request,
                     impl_->options.deadline);
}

absl::StatusOr<v1::ModelVersion> Client::Report(const std::string& model, uint64_t version) {
  v1::GetRequest request;
  request.set_model(model);
  request.set_version(version);
  return impl_->Call(*impl_->registry, &v1::ModelRegistry::Stub::Get, request,
                     impl_->options.deadline);
}

absl::StatusOr<v1::ModelVersion> Client::SetDefault(const std::string& model, uint64_t version) {
  return impl_->OnVersion(&v1::ModelRegistry::Stub::SetDefault, model, version,
                          impl_->options.deadline);
}

absl::StatusOr<v1::ModelVersion> Client::Load(const std::string& model, uint64_t version) {
  return impl_->OnVersion(&v1::ModelRegistry::Stub::Load, model, version,
                          impl_->options.transfer_deadline);
}

absl::StatusOr<v1::ModelVersion> Client::Unload(const std::string& model, uint64_t version) {
  return impl_->OnVersion(&v1::ModelRegistry::Stub::Unload, model, version,
                          impl_->options.transfer_deadline);
}

absl::StatusOr<v1::DeleteResponse> Client::Delete(const std::string& model, uint64_t version) {
  v1::VersionRequest request;
  request.set_model(model);
  request.set_version(version);
  return impl_->Call(*impl_->registry, &v1::ModelRegistry::Stub::Delete, request,
                     impl_->options.transfer_deadline);
}

absl::StatusOr<std::string> Client::Export(const std::string& model, uint64_t version,
                                           v1::ExportRequest::Format format, std::ostream& out) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.transfer_deadline);
  v1::ExportRequest request;
  request.set_model(model);
  request.set_version(version);
  request.set_format(format);
  auto reader = impl_->registry->Export(&context, request);
  v1::ExportResponse response;
  std::string name;
  while (reader->Read(&response)) {
    if (!response.file_name().empty()) name = response.file_name();
    out.write(response.chunk().data(), static_cast<std::streamsize>(response.chunk().size()));
    if (!out) {
      context.TryCancel();
      reader->Finish();
      return absl::DataLossError("writing the exported file failed (disk full?)");
    }
  }
  TERN_CLIENT_RETURN_IF_ERROR(FromGrpc(reader->Finish(), impl_->options, Port::kAdmin));
  return name;
}

absl::StatusOr<QuantizeOutcome> Client::Quantize(const v1::QuantizeStart& start,
                                                 const SampleSource& images,
                                                 const ProgressCallback& progress) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.job_deadline);
  auto stream = impl_->quantizer->Quantize(&context);
  std::optional<v1::QuantizeResult> result;
  const absl::Status status = impl_->RunJob(context, *stream, start, images, progress, result);
  const bool gated = absl::IsFailedPrecondition(status) && result && !result->published();
  if (!status.ok() && !gated) return status;
  if (!result) return absl::InternalError("Quantize ended without a result");
  return QuantizeOutcome{*std::move(result), status};
}

absl::StatusOr<v1::EvaluateResult> Client::Evaluate(const v1::EvaluateStart& start,
                                                    const SampleSource& images,
                                                    const ProgressCallback& progress) {
  grpc::ClientContext context;
  impl_->Prepare(context, impl_->options.job_deadline);
  auto stream = impl_->quantizer->Evaluate(&context);
  std::optional<v1::EvaluateResult> result;
  TERN_CLIENT_RETURN_IF_ERROR(impl_->RunJob(context, *stream, start, images, progress, result));
  if (!result) return absl::InternalError("Evaluate ended without a result");
  return *std::move(result);
}

absl::StatusOr<v1::BenchmarkResponse> Client::Benchmark(const v1::BenchmarkRequest& request) {
  const double seconds = request.seconds() > 0 ? request.seconds() : 3;
  return impl_->Call(*impl_->profiler, &v1::Profiler::Stub::Benchmark, request,
                     impl_->options.deadline + absl::Seconds(2 * seconds));
}

absl::StatusOr<v1::ProfileResponse> Client::Profile(const v1::ProfileRequest& request) {
  return impl_->Call(*impl_->profiler, &v1::Profiler::Stub::Profile, request,
                     impl_->options.transfer_deadline);
}

}  // namespace tern::client
