#include "server/serving/classify.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"

namespace tern::serving {
namespace {

// Three channels: what the image pipeline makes.
absl::Status CheckImageInput(const repository::LoadedModel& model) {
  const Shape& shape = model.plan->input_shape();
  if (shape.rank() == 3 && shape[0] == 3) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("model ", model.info.model, ": input is ",
                                                    shape.ToString(), ", images need [3,h,w]"));
}

}  // namespace

absl::StatusOr<std::shared_ptr<repository::Servable>> ModelRunner::Create(
    std::shared_ptr<const repository::LoadedModel> model, const RunnerOptions& options) {
  TERN_RETURN_IF_ERROR(CheckImageInput(*model));
  const v1::ModelConfig::Batching& config = model->config.batching();
  scheduler::BatcherOptions batching;
  batching.max_batch = config.max_batch_size() > 0 ? static_cast<int>(config.max_batch_size())
                                                   : options.default_max_batch;
  batching.max_batch = std::min(batching.max_batch, model->plan->max_batch());
  batching.max_delay = config.max_delay_us() > 0 ? absl::Microseconds(config.max_delay_us())
                                                 : options.default_max_delay;
  batching.max_queue =
      config.max_queue() > 0 ? static_cast<int>(config.max_queue()) : options.default_max_queue;
  batching.clock = options.clock;
  // Throughput mode by default: one thread per instance, an instance per CPU.
  const int wanted = static_cast<int>(model->config.instances());
  batching.instances = wanted > 0 ? std::min(wanted, options.cpu_threads) : options.cpu_threads;
  const int threads = std::max(1, options.cpu_threads / batching.instances);
  std::vector<engine::Session> sessions;
  for (int i = 0; i < batching.instances; ++i) {
    TERN_ASSIGN_OR_RETURN(engine::Session session, model->plan->NewSession(threads));
    sessions.push_back(std::move(session));
  }
  return std::shared_ptr<repository::Servable>(
      new ModelRunner(std::move(model), options, batching, std::move(sessions), threads));
}

ModelRunner::ModelRunner(std::shared_ptr<const repository::LoadedModel> model,
                         const RunnerOptions& options, const scheduler::BatcherOptions& batching,
                         std::vector<engine::Session> sessions, int threads)
    : model_(std::move(model)),
      metrics_(options.metrics),
      clock_(options.clock),
      shadow_(options.shadow),
      monitor_(std::make_shared<monitoring::VersionMonitor>(model_->metric_labels, options.monitor,
                                                            options.metrics, options.clock)),
      profile_every_(options.profile_every),
      sessions_(std::move(sessions)),
      batches_(sessions_.size(), 0) {
  scheduler::Batcher<ClassifyTask>::Callbacks callbacks;
  callbacks.run = [this](int instance, std::vector<scheduler::Queued<ClassifyTask>> batch) {
    Run(instance, std::move(batch));
  };
  callbacks.reject = [this](scheduler::Queued<ClassifyTask> queued, absl::Status status) {
    metrics_->Rejected(absl::IsDeadlineExceeded(status) ? "deadline"
                       : absl::IsCancelled(status)      ? "cancelled"
                                                        : "draining");
    queued.task.done(std::move(status));
  };
  callbacks.cancelled = [](const ClassifyTask& task) {
    return task.input.cancelled && task.input.cancelled();
  };
  callbacks.depth = [this](int n) { metrics_->QueueDepth(model_->metric_labels, n); };
  batcher_ = std::make_unique<scheduler::Batcher<ClassifyTask>>(batching, std::move(callbacks));
  warming_ = std::thread([this, threads, most = batching.max_batch] { Warm(threads, most); });
}

ModelRunner::~ModelRunner() {
  stop_warming_ = true;
  Drain();
  warming_.join();
}

void ModelRunner::Warm(int threads, int max_batch) {
  absl::StatusOr<engine::Session> session = model_->plan->NewSession(threads);
  absl::Status status = session.status();
  for (int batch = 2; batch <= max_batch && status.ok() && !stop_warming_; ++batch)
    status = session->Prepare(batch);
  if (!status.ok()) {
    TERN_LOG_WARN("{}: first batches will be slow, warming failed: {}", model_->info.model,
                  status.ToString());
  }
}

void ModelRunner::Drain() { batcher_->Drain(); }

absl::Status ModelRunner::Submit(ClassifyTask& task) {
  const absl::Time deadline = task.input.deadline;
  if (shadow_ != nullptr) task.activity = shadow_->Begin();
  return batcher_->Submit(task, deadline);
}

void ModelRunner::Run(int instance, std::vector<scheduler::Queued<ClassifyTask>> batch) {
  engine::Session& session = sessions_[instance];
  const absl::Time start = clock_->Now();
  const int images = static_cast<int>(batch.size());
  const absl::Span<float> input = session.input();
  const size_t per_image = input.size() / model_->plan->max_batch();
  for (int i = 0; i < images; ++i) {
    std::memcpy(input.data() + i * per_image, batch[i].task.pixels.data(),
                per_image * sizeof(float));
  }
  const bool profiled = profile_every_ > 0 && batches_[instance]++ % profile_every_ == 0;
  engine::RunTimes times;
  const absl::StatusOr<absl::Span<const float>> logits =
      profiled ? session.RunProfiled(images, times) : session.Run(images);
  const absl::Time end = clock_->Now();
  const absl::Duration inference = end - start;
  metrics_->Batch(model_->metric_labels, images);
  metrics_->StageTime(metrics::Stage::kInference, model_->metric_labels, inference);
  for (size_t l = 0; l < times.layers.size(); ++l) {
    metrics_->LayerTime(model_->metric_labels, model_->plan->layers()[l].name, times.layers[l]);
  }
  const int64_t classes = model_->plan->classes();
  for (int i = 0; i < images; ++i) {
    ClassifyTask& task = batch[i].task;
    if (!logits.ok()) {
      task.done(Annotate(logits.status(), model_->info.model));
      continue;
    }
    ClassifyOutput output;
    output.model = model_;
    output.monitor = monitor_;
    output.classes =
        classify::TopK(logits->subspan(i * classes, classes), std::max(5, task.input.top_k));
    output.batch_size = images;
    output.decode = task.decode;
    output.preprocess = task.preprocess;
    output.queue = start - batch[i].enqueued;
    output.inference = inference;
    const absl::Time now = clock_->Now();
    output.total = now - task.arrived;
    metrics_->StageTime(metrics::Stage::kQueue, model_->metric_labels, output.queue);
    metrics_->StageTime(metrics::Stage::kPostprocess, model_->metric_labels, now - end);
    metrics_->Confidence(model_->metric_labels, output.classes.front().probability);
    if (shadow_ != nullptr) {
      shadow_->Offer(*model_, monitor_, logits->subspan(i * classes, classes),
                     std::move(task.pixels));
    }
    task.done(std::move(output));
  }
}

Classifier::Classifier(const repository::Repository* repository, monitoring::LabelJoin* labels,
                       metrics::Metrics* metrics, const ClassifierOptions& options,
                       const Clock* clock)
    : repository_(repository),
      labels_(labels),
      metrics_(metrics),
      options_(options),
      clock_(clock),
      pool_(std::make_unique<ThreadPool>(options.decode_threads, "tern-decode")) {}

Classifier::~Classifier() { pool_.reset(); }

void Classifier::Classify(absl::string_view model, uint64_t version, ClassifyInput input,
                          ClassifyDone done) {
  const absl::Time arrived = clock_->Now();
  if (input.image.size() > options_.limits.max_bytes) {
    metrics_->Rejected("too_large");
    return done(absl::ResourceExhaustedError(absl::StrCat(
        "image: ", input.image.size(), " bytes, the limit is ", options_.limits.max_bytes)));
  }
  absl::StatusOr<std::shared_ptr<repository::Servable>> servable =
      repository_->Acquire(model, version);
  if (!servable.ok()) return done(servable.status());
  auto runner = std::static_pointer_cast<ModelRunner>(*std::move(servable));
  if (input.label.has_value() && *input.label >= runner->model().plan->classes()) {
    return done(
        absl::InvalidArgumentError(absl::StrCat("label: got ", *input.label, ", the model has ",
                                                runner->model().plan->classes(), " classes")));
  }
  const int64_t classes = runner->model().plan->classes();
  if (input.top_k == 0) input.top_k = static_cast<int>(std::min<int64_t>(5, classes));
  if (input.top_k < 0 || input.top_k > classes) {
    return done(
        absl::InvalidArgumentError(absl::StrCat("top_k: got ", input.top_k, ", the model has ",
                                                runner->model().plan->classes(), " classes")));
  }
  if (waiting_.fetch_add(1) >= options_.max_waiting) {
    --waiting_;
    metrics_->Rejected("queue_full");
    return done(absl::ResourceExhaustedError(
        absl::StrCat("decode queue is full: ", options_.max_waiting, " images wait")));
  }
  ClassifyTask task;
  task.input = std::move(input);
  task.arrived = arrived;
  task.done = std::move(done);
  // std::function wants a copyable closure.
  auto shared = std::make_shared<ClassifyTask>(std::move(task));
  pool_->Submit([this, version, runner = std::move(runner), shared]() mutable {
    Prepare(std::move(runner), version, std::move(*shared));
    --waiting_;
  });
}

void Classifier::Prepare(std::shared_ptr<ModelRunner> runner, uint64_t version, ClassifyTask task) {
  const repository::LoadedModel& model = runner->model();
  const absl::Time start = clock_->Now();
  if (start >= task.input.deadline) {
    metrics_->Rejected("deadline");
    return task.done(absl::DeadlineExceededError("the deadline passed before decoding"));
  }
  if (task.input.cancelled && task.input.cancelled()) {
    metrics_->Rejected("cancelled");
    return task.done(absl::CancelledError("cancelled before decoding"));
  }
  const Shape& shape = model.plan->input_shape();
  absl::StatusOr<image::Image> decoded =
      image::Decode(task.input.image, options_.limits, model.preprocessing,
                    static_cast<int>(shape[1]), static_cast<int>(shape[2]));
  if (!decoded.ok()) {
    metrics_->Rejected(absl::IsResourceExhausted(decoded.status()) ? "too_large" : "bad_image");
    return task.done(Annotate(decoded.status(), "image"));
  }
  const absl::Time mid = clock_->Now();
  task.pixels.resize(shape.elements());
  const absl::Status status =
      image::Preprocess(*decoded, model.preprocessing, static_cast<int>(shape[1]),
                        static_cast<int>(shape[2]), absl::MakeSpan(task.pixels));
  if (!status.ok()) {
    metrics_->Rejected("bad_image");
    return task.done(Annotate(status, "image"));
  }
  std::string().swap(task.input.image);  // the encoded bytes are not needed any more
  task.decode = mid - start;
  task.preprocess = clock_->Now() - mid;
  metrics_->StageTime(metrics::Stage::kDecode, model.metric_labels, task.decode);
  metrics_->StageTime(metrics::Stage::kPreprocess, model.metric_labels, task.preprocess);
  // Remember or count the prediction, then cut it to what was asked for.
  task.done = [this, done = std::move(task.done), id = task.input.request_id,
               label = task.input.label,
               top_k = task.input.top_k](absl::StatusOr<ClassifyOutput> output) {
    if (output.ok()) {
      monitoring::Prediction prediction;
      prediction.model = output->model->metric_labels;
      prediction.classes = output->model->plan->classes();
      prediction.monitor = output->monitor;
      for (size_t i = 0; i < output->classes.size() && i < 5; ++i) {
        prediction.top5.push_back(output->classes[i].index);
      }
      if (label.has_value()) {
        labels_->Count(prediction, *label);
      } else {
        labels_->Remember(id, std::move(prediction));
      }
      if (output->classes.size() > static_cast<size_t>(top_k)) output->classes.resize(top_k);
    }
    done(std::move(output));
  };
  absl::Status submitted = runner->Submit(task);
  if (absl::IsUnavailable(submitted)) {
    // The version was replaced between lookup and now (hot reload, new default): once more with its
    // successor, which has the same input and contract, as every version of a model.
    auto successor = repository_->Acquire(model.info.model, version);
    submitted = successor.ok()
                    ? std::static_pointer_cast<ModelRunner>(*std::move(successor))->Submit(task)
                    : successor.status();
  }
  if (submitted.ok()) return;
  metrics_->Rejected(absl::IsResourceExhausted(submitted)  ? "queue_full"
                     : absl::IsDeadlineExceeded(submitted) ? "deadline"
                                                           : "draining");
  task.done(std::move(submitted));
}

}  // namespace tern::serving
