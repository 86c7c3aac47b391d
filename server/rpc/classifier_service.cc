#include "server/rpc/classifier_service.h"

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/rpc/request_timer.h"

namespace tern::rpc {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
// Images of one stream between read and answer. Bounds the memory of a stream, and is
// enough to fill batches.
constexpr int kStreamWindow = 32;

std::string MakeRequestId() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return absl::StrFormat("%016x%016x", random(), random());
}

absl::StatusOr<serving::ClassifyInput> ToInput(const v1::ClassifyRequest& request,
                                               absl::Time deadline) {
  if (request.model().empty()) return absl::InvalidArgumentError("model: is empty");
  if (request.image().empty()) return absl::InvalidArgumentError("image: is empty");
  if (request.top_k() > 100000) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_k: got ", request.top_k(), ", want at most 100000"));
  }
  if (request.request_id().size() > kMaxRequestIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("request_id: ", request.request_id().size(),
                                                   " bytes, the limit is ", kMaxRequestIdBytes));
  }
  serving::ClassifyInput input;
  input.image = request.image();
  input.top_k = static_cast<int>(request.top_k());
  input.request_id = request.request_id().empty() ? MakeRequestId() : request.request_id();
  if (request.has_label()) input.label = request.label();
  input.deadline = deadline;
  return input;
}

uint64_t Micros(absl::Duration d) { return std::max<int64_t>(0, absl::ToInt64Microseconds(d)); }

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
  v1::Timing* timing = receipt->mutable_timing();
  timing->set_decode_us(Micros(output.decode));
  timing->set_preprocess_us(Micros(output.preprocess));
  timing->set_queue_us(Micros(output.queue));
  timing->set_inference_us(Micros(output.inference));
  timing->set_total_us(Micros(output.total));
}

absl::Time Deadline(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  return absl::FromChrono(deadline);
}

// One Classify call. Deletes itself in OnDone; the flag outlives it, because a queued task may ask
// later.
class ClassifyCall final : public grpc::ServerUnaryReactor {
 public:
  explicit ClassifyCall(metrics::Metrics* metrics)
      : timer_(metrics, "Classify"), cancelled_(std::make_shared<std::atomic<bool>>(false)) {}

  void Start(serving::Classifier* classifier, const v1::ClassifyRequest& request,
             absl::Time deadline, v1::ClassifyResponse* response) {
    absl::StatusOr<serving::ClassifyInput> input = ToInput(request, deadline);
    if (!input.ok()) return Finish(timer_.Finish(input.status()));
    input->cancelled = [flag = cancelled_] { return flag->load(); };
    classifier->Classify(
        request.model(), request.version(), *input,
        [this, response, id = input->request_id](absl::StatusOr<serving::ClassifyOutput> output) {
          if (output.ok()) ToResponse(*output, id, response);
          Finish(timer_.Finish(output.status()));
        });
  }
  void OnCancel() override { *cancelled_ = true; }
  void OnDone() override { delete this; }

 private:
  RequestTimer timer_;
  std::shared_ptr<std::atomic<bool>> cancelled_;
};

// One ClassifyStream call. Slots are answered in the order they were read. Finish is
// called once: after the last read, the last slot's result and the last write.
class StreamCall final
    : public grpc::ServerBidiReactor<v1::ClassifyRequest, v1::ClassifyStreamResponse> {
 public:
  StreamCall(serving::Classifier* classifier, metrics::Metrics* metrics, absl::Time deadline)
      : classifier_(classifier),
        timer_(metrics, "ClassifyStream"),
        deadline_(deadline),
        cancelled_(std::make_shared<std::atomic<bool>>(false)) {
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      std::unique_lock<std::mutex> lock(mutex_);
      reads_done_ = true;
      reading_ = false;
      Advance(std::move(lock));
      return;
    }
    auto slot = std::make_shared<Slot>();
    absl::StatusOr<serving::ClassifyInput> input = ToInput(request_, deadline_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      slots_.push_back(slot);
    }
    if (!input.ok()) {
      Answer(slot, request_.request_id(), input.status());
    } else {
      input->cancelled = [flag = cancelled_] { return flag->load(); };
      const std::string id = input->request_id;
      classifier_->Classify(request_.model(), request_.version(), *std::move(input),
                            [this, slot, id](absl::StatusOr<serving::ClassifyOutput> output) {
                              Answer(slot, id, std::move(output));
                            });
    }
    // Only now may the next read overwrite request_.
    std::unique_lock<std::mutex> lock(mutex_);
    reading_ = false;
    Advance(std::move(lock));
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mutex_);
    writing_ = false;
    if (!ok) broken_ = true;
    slots_.pop_front();
    Advance(std::move(lock));
  }

  void OnCancel() override { *cancelled_ = true; }
  void OnDone() override { delete this; }

 private:
  struct Slot {
    bool ready = false;
    v1::ClassifyStreamResponse response;
  };

  void Answer(const std::shared_ptr<Slot>& slot, const std::string& id,
              absl::StatusOr<serving::ClassifyOutput> output) {
    v1::ClassifyStreamResponse response;
    response.set_request_id(id);
    if (output.ok()) {
      ToResponse(*output, id, response.mutable_response());
    } else {
      response.mutable_error()->set_code(static_cast<int>(output.status().code()));
      response.mutable_error()->set_message(std::string(output.status().message()));
    }
    std::unique_lock<std::mutex> lock(mutex_);
    slot->response = std::move(response);
    slot->ready = true;
    Advance(std::move(lock));
  }

  // Starts whatever can start. `this` may be gone when it returns: Finish can lead to OnDone at
  // once.
  void Advance(std::unique_lock<std::mutex> lock) {
    if (broken_) {
      while (!writing_ && !slots_.empty() && slots_.front()->ready) slots_.pop_front();
    }
    if (!writing_ && !broken_ && !slots_.empty() && slots_.front()->ready) {
      writing_ = true;
      StartWrite(&slots_.front()->response);
    }
    if (!reading_ && !reads_done_ && static_cast<int>(slots_.size()) < kStreamWindow) {
      reading_ = true;
      StartRead(&request_);
    }
    const bool finish = reads_done_ && slots_.empty() && !writing_ && !finished_;
    if (finish) finished_ = true;
    lock.unlock();
    if (finish)
      Finish(
          timer_.Finish(broken_ ? absl::CancelledError("the client went away") : absl::OkStatus()));
  }

  serving::Classifier* const classifier_;
  RequestTimer timer_;
  const absl::Time deadline_;
  std::shared_ptr<std::atomic<bool>> cancelled_;
  v1::ClassifyRequest request_;  // of the read in progress
  std::mutex mutex_;
  std::deque<std::shared_ptr<Slot>> slots_;
  bool reading_ = true, reads_done_ = false, writing_ = false, broken_ = false, finished_ = false;
};

}  // namespace

grpc::ServerUnaryReactor* ClassifierService::Classify(grpc::CallbackServerContext* context,
                                                      const v1::ClassifyRequest* request,
                                                      v1::ClassifyResponse* response) {
  auto* call = new ClassifyCall(metrics_);
  call->Start(classifier_, *request, Deadline(*context), response);
  return call;
}

grpc::ServerBidiReactor<v1::ClassifyRequest, v1::ClassifyStreamResponse>*
ClassifierService::ClassifyStream(grpc::CallbackServerContext* context) {
  return new StreamCall(classifier_, metrics_, Deadline(*context));
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
