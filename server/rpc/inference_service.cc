#include "server/rpc/inference_service.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/limit_message.h"
#include "server/base/status_macros.h"
#include "server/rpc/deadline.h"
#include "server/rpc/identity.h"
#include "server/rpc/ordered_stream.h"
#include "server/rpc/request_timer.h"
#include "server/rpc/unary_call.h"

namespace tern::rpc {
namespace {

using repository::State;
using repository::VersionInfo;

// A call whose answer is there at once.
grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, RequestTimer& timer,
                                const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(timer.Finish(status));
  return reactor;
}

template <typename T>
absl::Status MoveTo(absl::StatusOr<T> from, T* to) {
  if (from.ok()) *to = *std::move(from);
  return from.status();
}

inference::ModelStreamInferResponse ToStreamResponse(
    const std::string& id, absl::StatusOr<inference::ModelInferResponse> answer) {
  inference::ModelStreamInferResponse response;
  if (answer.ok()) {
    *response.mutable_infer_response() = *std::move(answer);
  } else {
    response.set_error_message(absl::StrCat("[", absl::StatusCodeToString(answer.status().code()),
                                            "] ", LimitMessage(answer.status().message())));
    response.mutable_infer_response()->set_id(id);
  }
  // One answer per request: each is the last of its own.
  (*response.mutable_infer_response()->mutable_parameters())["triton_final_response"]
      .set_bool_param(true);
  return response;
}

}  // namespace

grpc::ServerUnaryReactor* InferenceService::ServerLive(Context* context,
                                                       const inference::ServerLiveRequest* request,
                                                       inference::ServerLiveResponse* response) {
  RequestTimer timer(metrics_, "ServerLive");
  response->set_live(true);
  return Reply(context, timer, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ServerReady(
    Context* context, const inference::ServerReadyRequest* request,
    inference::ServerReadyResponse* response) {
  RequestTimer timer(metrics_, "ServerReady");
  response->set_ready(inference_->ServerReady());
  return Reply(context, timer, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelReady(Context* context,
                                                       const inference::ModelReadyRequest* request,
                                                       inference::ModelReadyResponse* response) {
  RequestTimer timer(metrics_, "ModelReady");
  const absl::StatusOr<bool> ready = inference_->ModelReady(request->name(), request->version());
  if (ready.ok()) response->set_ready(*ready);
  return Reply(context, timer, ready.status());
}

grpc::ServerUnaryReactor* InferenceService::ServerMetadata(
    Context* context, const inference::ServerMetadataRequest* request,
    inference::ServerMetadataResponse* response) {
  RequestTimer timer(metrics_, "ServerMetadata");
  *response = inference_->ServerMetadata();
  return Reply(context, timer, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelMetadata(
    Context* context, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  RequestTimer timer(metrics_, "ModelMetadata");
  return Reply(context, timer,
               MoveTo(inference_->ModelMetadata(request->name(), request->version()), response));
}

grpc::ServerUnaryReactor* InferenceService::ModelInfer(Context* context,
                                                       const inference::ModelInferRequest* request,
                                                       inference::ModelInferResponse* response) {
  return UnaryCall::Serve(context, metrics_, "ModelInfer", [&](UnaryCall* call) {
    // Nobody asks whether it is cancelled after the answer.
    inference_->ModelInfer(*request,
                           {Deadline(*context), [context] { return context->IsCancelled(); },
                            CallerOf(*context).ToString(), /*on_this_thread=*/true},
                           [call, response](absl::StatusOr<inference::ModelInferResponse> answer) {
                             call->Answer(MoveTo(std::move(answer), response));
                           });
  });
}

grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
InferenceService::ModelStreamInfer(Context* context) {
  using Stream = OrderedStream<inference::ModelInferRequest, inference::ModelStreamInferResponse>;
  return Stream::Open(
      context, streams_, metrics_, "ModelStreamInfer",
      [inference = inference_, client = CallerOf(*context).ToString(),
       deadline = Deadline(*context)](const inference::ModelInferRequest& request,
                                      std::shared_ptr<const std::atomic<bool>> cancelled,
                                      Stream::Answer answer) {
        inference->ModelInfer(
            request,
            {deadline, [cancelled = std::move(cancelled)] { return cancelled->load(); }, client},
            [id = request.id(),
             answer = std::move(answer)](absl::StatusOr<inference::ModelInferResponse> response) {
              const absl::Status status = response.status();
              answer(status, ToStreamResponse(id, std::move(response)));
            });
      });
}

grpc::ServerUnaryReactor* InferenceService::ModelConfig(
    Context* context, const inference::ModelConfigRequest* request,
    inference::ModelConfigResponse* response) {
  RequestTimer timer(metrics_, "ModelConfig");
  return Reply(context, timer,
               MoveTo(inference_->ModelConfig(request->name(), request->version()),
                      response->mutable_config()));
}

grpc::ServerUnaryReactor* InferenceService::ModelStatistics(
    Context* context, const inference::ModelStatisticsRequest* request,
    inference::ModelStatisticsResponse* response) {
  RequestTimer timer(metrics_, "ModelStatistics");
  return Reply(context, timer,
               MoveTo(inference_->ModelStatistics(request->name(), request->version()), response));
}

grpc::ServerUnaryReactor* InferenceService::RepositoryIndex(
    Context* context, const inference::RepositoryIndexRequest* request,
    inference::RepositoryIndexResponse* response) {
  RequestTimer timer(metrics_, "RepositoryIndex");
  *response = inference_->RepositoryIndex(request->ready());
  return Reply(context, timer, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::RepositoryModelLoad(
    Context* context, const inference::RepositoryModelLoadRequest* request,
    inference::RepositoryModelLoadResponse* response) {
  RequestTimer timer(metrics_, "RepositoryModelLoad");
  return Reply(context, timer,
               absl::PermissionDeniedError("models are loaded through the admin port"));
}

grpc::ServerUnaryReactor* InferenceService::RepositoryModelUnload(
    Context* context, const inference::RepositoryModelUnloadRequest* request,
    inference::RepositoryModelUnloadResponse* response) {
  RequestTimer timer(metrics_, "RepositoryModelUnload");
  return Reply(context, timer,
               absl::PermissionDeniedError("models are unloaded through the admin port"));
}

grpc::Status InferenceAdminService::ServerLive(grpc::ServerContext* context,
                                               const inference::ServerLiveRequest* request,
                                               inference::ServerLiveResponse* response) {
  RequestTimer timer(metrics_, "ServerLive");
  response->set_live(true);
  return timer.Finish(absl::OkStatus());
}

grpc::Status InferenceAdminService::ServerReady(grpc::ServerContext* context,
                                                const inference::ServerReadyRequest* request,
                                                inference::ServerReadyResponse* response) {
  RequestTimer timer(metrics_, "ServerReady");
  response->set_ready(inference_->ServerReady());
  return timer.Finish(absl::OkStatus());
}

grpc::Status InferenceAdminService::ModelReady(grpc::ServerContext* context,
                                               const inference::ModelReadyRequest* request,
                                               inference::ModelReadyResponse* response) {
  RequestTimer timer(metrics_, "ModelReady");
  const absl::StatusOr<bool> ready = inference_->ModelReady(request->name(), request->version());
  if (ready.ok()) response->set_ready(*ready);
  return timer.Finish(ready.status());
}

grpc::Status InferenceAdminService::ServerMetadata(grpc::ServerContext* context,
                                                   const inference::ServerMetadataRequest* request,
                                                   inference::ServerMetadataResponse* response) {
  RequestTimer timer(metrics_, "ServerMetadata");
  *response = inference_->ServerMetadata();
  return timer.Finish(absl::OkStatus());
}

grpc::Status InferenceAdminService::RepositoryIndex(
    grpc::ServerContext* context, const inference::RepositoryIndexRequest* request,
    inference::RepositoryIndexResponse* response) {
  RequestTimer timer(metrics_, "RepositoryIndex");
  *response = inference_->RepositoryIndex(request->ready());
  return timer.Finish(absl::OkStatus());
}

absl::Status InferenceAdminService::Load(const inference::RepositoryModelLoadRequest& request) {
  if (request.parameters_size() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("parameters: got '", request.parameters().begin()->first,
                     "', want none: models are sent with tern.v1.ModelRegistry.Import"));
  }
  const std::string& name = request.model_name();
  // Also finds a model's folder that was put there since the start.
  TERN_RETURN_IF_ERROR(repository_->Load(name, 0).status());
  for (const VersionInfo& info : repository_->List(name)) {
    if (info.state == State::kReady) continue;
    TERN_RETURN_IF_ERROR(Annotate(repository_->Load(name, info.version).status(),
                                  absl::StrCat("version ", info.version)));
  }
  return absl::OkStatus();
}

grpc::Status InferenceAdminService::RepositoryModelLoad(
    grpc::ServerContext* context, const inference::RepositoryModelLoadRequest* request,
    inference::RepositoryModelLoadResponse* response) {
  RequestTimer timer(metrics_, "RepositoryModelLoad");
  const absl::Status status = Load(*request);
  changed_();
  return timer.Finish(status);
}

grpc::Status InferenceAdminService::RepositoryModelUnload(
    grpc::ServerContext* context, const inference::RepositoryModelUnloadRequest* request,
    inference::RepositoryModelUnloadResponse* response) {
  RequestTimer timer(metrics_, "RepositoryModelUnload");
  const absl::Status status = repository_->UnloadAll(request->model_name());
  changed_();
  return timer.Finish(status);
}

}  // namespace tern::rpc
