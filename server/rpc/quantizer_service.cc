#include "server/rpc/quantizer_service.h"

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"
#include "server/rpc/request_timer.h"
#include "server/serving/evaluate.h"
#include "server/serving/quantize_job.h"
#include "statistics/statistics.h"

namespace tern::rpc {
namespace {

// Raises a flag within 50 ms of the client's going away, for work that knows no gRPC.
class CancelWatcher {
 public:
  explicit CancelWatcher(grpc::ServerContext* context)
      : thread_([this, context] {
          while (!stop_) {
            if (context->IsCancelled()) cancelled_ = true;
            absl::SleepFor(absl::Milliseconds(50));
          }
        }) {}
  ~CancelWatcher() {
    stop_ = true;
    thread_.join();
  }
  const std::atomic<bool>* flag() const { return &cancelled_; }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<bool> cancelled_{false};
  std::thread thread_;  // last: uses the flags
};

serving::Sample ToSample(v1::SampleImage* image, uint64_t index) {
  serving::Sample sample;
  sample.name = image->name().empty() ? absl::StrCat("#", index) : image->name();
  if (image->has_label()) sample.label = image->label();
  sample.image = std::move(*image->mutable_image());
  return sample;
}

// Sends at most ten progress messages a second, and every change of phase.
template <typename Stream, typename Response>
class ProgressWriter {
 public:
  explicit ProgressWriter(Stream* stream) : stream_(stream) {}
  void Write(const std::string& phase, double done, const std::string& detail,
             double seconds_left) {
    const absl::Time now = absl::Now();
    if (phase == phase_ && now - last_ < absl::Milliseconds(100)) return;
    phase_ = phase;
    last_ = now;
    Response response;
    v1::JobProgress* progress = response.mutable_progress();
    progress->set_phase(phase);
    progress->set_done(done);
    progress->set_detail(detail);
    progress->set_seconds_left(seconds_left);
    stream_->Write(response);
  }

 private:
  Stream* const stream_;
  std::string phase_;
  absl::Time last_;
};

}  // namespace

grpc::Status QuantizerService::Quantize(grpc::ServerContext* context, QuantizeStream* stream) {
  RequestTimer timer(metrics_, "Quantize");
  if (jobs_.fetch_add(1) >= options_.max_jobs) {
    --jobs_;
    return timer.Finish(absl::ResourceExhaustedError(
        absl::StrCat("quantisation jobs: ", options_.max_jobs, " in work, that is the limit")));
  }
  const absl::Status status = DoQuantize(context, stream);
  --jobs_;
  if (options_.changed) options_.changed();
  return timer.Finish(status);
}

absl::Status QuantizerService::DoQuantize(grpc::ServerContext* context, QuantizeStream* stream) {
  v1::QuantizeRequest request;
  if (!stream->Read(&request) || !request.has_start()) {
    return absl::InvalidArgumentError("the first message must be `start`");
  }
  serving::QuantizeJobOptions options;
  options.model = request.start().model();
  options.source_version = request.start().source_version();
  options.recipe = request.start().recipe();
  options.set_default = request.start().set_default();
  options.dry_run = request.start().dry_run();
  options.threads = options_.threads;
  options.limits = options_.limits;
  options.plan = options_.plan;
  TERN_ASSIGN_OR_RETURN(std::unique_ptr<serving::QuantizeJob> job,
                        serving::QuantizeJob::Create(repository_, metrics_, std::move(options)));
  ProgressWriter<QuantizeStream, v1::QuantizeResponse> progress(stream);
  uint64_t received = 0;
  while (stream->Read(&request)) {
    if (!request.has_image())
      return absl::InvalidArgumentError("messages after the first must be images");
    v1::SampleImage* image = request.mutable_image();
    if (!image->calibration() && !image->evaluation()) {
      return absl::InvalidArgumentError(
          absl::StrCat("image ", image->name(), " #", received,
                       ": is marked neither for calibration nor evaluation"));
    }
    const bool calibration = image->calibration(), evaluation = image->evaluation();
    TERN_RETURN_IF_ERROR(job->AddImage(ToSample(image, received), calibration, evaluation));
    ++received;
    progress.Write("receiving", 0, absl::StrCat(received, " images"), -1);
  }
  if (context->IsCancelled()) return absl::CancelledError("cancelled while receiving images");
  CancelWatcher watcher(context);
  TERN_ASSIGN_OR_RETURN(const serving::QuantizeOutcome outcome,
                        job->Run(
                            [&](const serving::JobProgress& p) {
                              progress.Write(p.phase, p.done, p.detail, p.seconds_left);
                            },
                            watcher.flag()));
  v1::QuantizeResponse response;
  v1::QuantizeResult* result = response.mutable_result();
  result->set_model(outcome.report.source_model());
  result->set_version(outcome.version);
  result->set_published(outcome.version != 0);
  *result->mutable_report() = outcome.report;
  stream->Write(response);
  if (!outcome.gate_met) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "not published: top-1 is %.4f against %.4f in float, the allowed drop is %.4f",
        outcome.report.top1().value(), outcome.report.float_top1().value(),
        outcome.report.recipe().max_top1_drop()));
  }
  return absl::OkStatus();
}

grpc::Status QuantizerService::Evaluate(grpc::ServerContext* context, EvaluateStream* stream) {
  RequestTimer timer(metrics_, "Evaluate");
  return timer.Finish(DoEvaluate(context, stream));
}

absl::Status QuantizerService::DoEvaluate(grpc::ServerContext* context, EvaluateStream* stream) {
  v1::EvaluateRequest request;
  if (!stream->Read(&request) || !request.has_start()) {
    return absl::InvalidArgumentError("the first message must be `start`");
  }
  const v1::EvaluateStart start = request.start();
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const repository::LoadedModel> model,
                        repository_->Find(start.model(), start.version()));
  std::shared_ptr<const engine::Plan> reference;
  if (start.reference_version() != 0) {
    TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const repository::LoadedModel> other,
                          repository_->Find(start.model(), start.reference_version()));
    reference = other->plan;
  }
  TERN_ASSIGN_OR_RETURN(std::unique_ptr<serving::Evaluator> evaluator,
                        serving::Evaluator::Create(model->plan, reference, model->preprocessing,
                                                   options_.limits, options_.threads));
  ProgressWriter<EvaluateStream, v1::EvaluateResponse> progress(stream);
  uint64_t received = 0;
  while (stream->Read(&request)) {
    if (!request.has_image())
      return absl::InvalidArgumentError("messages after the first must be images");
    TERN_RETURN_IF_ERROR(evaluator->Add(ToSample(request.mutable_image(), received)));
    ++received;
    progress.Write("evaluating", 0, absl::StrCat(received, " images"), -1);
  }
  if (context->IsCancelled()) return absl::CancelledError("cancelled by the caller");
  if (received == 0) return absl::InvalidArgumentError("no images were sent");
  TERN_ASSIGN_OR_RETURN(const serving::Counts counts, evaluator->Finish());
  v1::EvaluateResponse response;
  v1::EvaluateResult* result = response.mutable_result();
  result->set_model(model->info.model);
  result->set_version(model->info.version);
  result->set_images(counts.images);
  result->set_labelled(counts.labelled);
  *result->mutable_top1() = statistics::MakeProportion(counts.top1, counts.labelled);
  *result->mutable_top5() = statistics::MakeProportion(counts.top5, counts.labelled);
  if (reference != nullptr) {
    *result->mutable_agreement() = statistics::MakeProportion(counts.agree, counts.images);
    result->set_divergence(counts.divergence / static_cast<double>(counts.images));
  }
  if (counts.labelled > 0) {
    if (reference != nullptr) *result->mutable_comparison() = serving::MakeComparison(counts);
    for (v1::ClassReport& worst : evaluator->classes().Worst(model->labels)) {
      *result->add_worst_classes() = std::move(worst);
    }
    const std::string too_few = reference != nullptr
                                    ? serving::TooFewForDrop(result->comparison(), std::nullopt)
                                    : serving::TooFewForAccuracy(result->top1());
    if (!too_few.empty()) result->add_warnings(too_few);
  }
  stream->Write(response);
  return absl::OkStatus();
}

}  // namespace tern::rpc
