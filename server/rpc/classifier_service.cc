#include "server/rpc/classifier_service.h"

#include <atomic>
#include <memory>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/limit_message.h"
#include "server/base/retry_after.h"
#include "server/rpc/call_interceptor.h"
#include "server/rpc/deadline.h"
#include "server/rpc/identity.h"
#include "server/rpc/ordered_stream.h"
#include "server/rpc/request_timer.h"
#include "server/rpc/unary_call.h"

namespace tern::rpc {
namespace {

std::string MakeRequestId() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return absl::StrFormat("%016x%016x", random(), random());
}

absl::StatusOr<serving::ClassifyInput> ToInput(const v1::ClassifyRequest& request,
                                               const std::string& client, absl::Time deadline) {
  if (request.model().empty()) return absl::InvalidArgumentError("model: is empty");
  if (request.image().empty()) return absl::InvalidArgumentError("image: is empty");
  if (request.top_k() > 100000) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_k: got ", request.top_k(), ", want at most 100000"));
  }
  if (request.request_id().size() > serving::kMaxRequestIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("request_id: ", request.request_id().size(),
                                                   " bytes, the limit is ",
                                                   serving::kMaxRequestIdBytes));
  }
  serving::ClassifyInput input;
  input.image = request.image();
  input.top_k = static_cast<int>(request.top_k());
  input.request_id = request.request_id().empty() ? MakeRequestId() : request.request_id();
  if (request.has_label()) input.label = request.label();
  input.client = client;
  input.priority = request.priority();
  if (request.has_min_accuracy()) input.wishes.min_accuracy = request.min_accuracy();
  if (request.has_max_latency_us()) {
    input.wishes.max_latency = absl::Microseconds(request.max_latency_us());
  }
  input.deadline = deadline;
  return input;
}

uint64_t Micros(absl::Duration d) { return std::max<int64_t>(0, absl::ToInt64Microseconds(d)); }

v1::Receipt::Degradation ToProto(serving::Degradation degradation) {
  switch (degradation) {
    case serving::Degradation::kOverload:
      return v1::Receipt::OVERLOAD;
    case serving::Degradation::kMaxLatency:
      return v1::Receipt::MAX_LATENCY;
    case serving::Degradation::kMinAccuracy:
      return v1::Receipt::MIN_ACCURACY;
    case serving::Degradation::kNone:
      break;
  }
  return v1::Receipt::NONE;
}

void ToResponse(const serving::ClassifyOutput& output, const std::string& request_id,
                v1::ClassifyResponse* response) {
  response->set_request_id(request_id);
  const repository::LoadedModel& model = *output.model;
  for (const classify::Prediction& prediction : output.classes) {
    v1::ClassScore* score = response->add_classes();
    score->set_index(prediction.index);
    score->set_probability(prediction.probability);
    if (static_cast<size_t>(prediction.index) < model.labels.size()) {
      score->set_label(model.labels[prediction.index]);
    }
  }
  v1::Receipt* receipt = response->mutable_receipt();
  receipt->set_model(model.info.model);
  receipt->set_version(model.info.version);
  receipt->set_scheme(model.info.scheme);
  receipt->set_isa(model.isa);
  receipt->set_batch_size(output.batch_size);
  receipt->set_degradation(ToProto(output.degradation));
  receipt->set_degraded_from(output.degraded_from);
  v1::Timing* timing = receipt->mutable_timing();
  timing->set_decode_us(Micros(output.decode));
  timing->set_preprocess_us(Micros(output.preprocess));
  timing->set_queue_us(Micros(output.queue));
  timing->set_inference_us(Micros(output.inference));
  timing->set_total_us(Micros(output.total));
}

v1::ClassifyStreamResponse ToStreamResponse(const std::string& id,
                                            const absl::StatusOr<serving::ClassifyOutput>& output) {
  v1::ClassifyStreamResponse response;
  response.set_request_id(id);
  if (output.ok()) {
    ToResponse(*output, id, response.mutable_response());
  } else {
    response.mutable_error()->set_code(static_cast<int>(output.status().code()));
    response.mutable_error()->set_message(LimitMessage(output.status().message()));
    if (const auto after = RetryAfterOf(output.status()); after.has_value()) {
      response.mutable_error()->set_retry_after_us(Micros(*after));
    }
  }
  return response;
}

}  // namespace

grpc::ServerUnaryReactor* ClassifierService::Classify(grpc::CallbackServerContext* context,
                                                      const v1::ClassifyRequest* request,
                                                      v1::ClassifyResponse* response) {
  return UnaryCall::Serve(context, metrics_, "Classify", [&](UnaryCall* call) {
    absl::StatusOr<serving::ClassifyInput> input =
        ToInput(*request, CallerOf(*context).ToString(), Deadline(*context));
    if (!input.ok()) return call->Answer(input.status());
    NameRequest(context, request->request_id().empty(), &input->request_id);
    // Nobody asks after the answer.
    input->cancelled = [context] { return context->IsCancelled(); };
    input->on_this_thread = true;  // gRPC has others
    const std::string id = input->request_id;
    classifier_->Classify(request->model(), request->version(), *std::move(input),
                          [call, response, id](absl::StatusOr<serving::ClassifyOutput> output) {
                            if (output.ok()) ToResponse(*output, id, response);
                            call->Answer(output.status());
                          });
  });
}

grpc::ServerBidiReactor<v1::ClassifyRequest, v1::ClassifyStreamResponse>*
ClassifierService::ClassifyStream(grpc::CallbackServerContext* context) {
  using Stream = OrderedStream<v1::ClassifyRequest, v1::ClassifyStreamResponse>;
  return Stream::Open(
      context, streams_, metrics_, "ClassifyStream",
      [classifier = classifier_, client = CallerOf(*context).ToString(),
       deadline = Deadline(*context)](const v1::ClassifyRequest& request,
                                      std::shared_ptr<const std::atomic<bool>> cancelled,
                                      Stream::Answer answer) {
        absl::StatusOr<serving::ClassifyInput> input = ToInput(request, client, deadline);
        if (!input.ok()) {
          return answer(input.status(), ToStreamResponse(request.request_id(), input.status()));
        }
        input->cancelled = [cancelled = std::move(cancelled)] { return cancelled->load(); };
        const std::string id = input->request_id;
        classifier->Classify(request.model(), request.version(), *std::move(input),
                             [id, answer = std::move(answer)](
                                 const absl::StatusOr<serving::ClassifyOutput>& output) {
                               answer(output.status(), ToStreamResponse(id, output));
                             });
      });
}

grpc::ServerUnaryReactor* ClassifierService::ReportLabel(grpc::CallbackServerContext* context,
                                                         const v1::ReportLabelRequest* request,
                                                         v1::ReportLabelResponse* response) {
  RequestTimer timer(metrics_, "ReportLabel");
  const absl::StatusOr<monitoring::Outcome> outcome =
      labels_->Report(request->request_id(), request->label());
  if (outcome.ok()) {
    response->set_model(outcome->model.model);
    response->set_version(outcome->model.version);
    response->set_top1(outcome->top1);
    response->set_top5(outcome->top5);
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(timer.Finish(outcome.status()));
  return reactor;
}

}  // namespace tern::rpc
