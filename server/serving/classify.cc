#include "server/serving/classify.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/message_differencer.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"

namespace tern::serving {
namespace {

static_assert(std::endian::native == std::endian::little, "ImageForm::kTensor");

// Three channels: what the image pipeline makes.
absl::Status CheckImageInput(const repository::LoadedModel& model) {
  const Shape& shape = model.plan->input_shape();
  if (shape.rank() == 3 && shape[0] == 3) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("model ", model.info.model, ": input is ",
                                                    shape.ToString(), ", images need [3,h,w]"));
}

// Every version that the server made or imported does; one that was put into the folder may not.
bool TakesTheSameImages(const repository::LoadedModel& a, const repository::LoadedModel& b) {
  return a.plan->input_shape() == b.plan->input_shape() &&
         google::protobuf::util::MessageDifferencer::Equals(a.preprocessing, b.preprocessing);
}

scheduler::Terms TermsOf(const ClassifyTask& task) {
  return {.deadline = task.input.deadline,
          .priority = static_cast<int>(task.input.priority),
          .arrived = task.arrived};
}

// The label of tern_rejected_total for what the scheduler refused.
const char* Reason(const absl::Status& status) {
  return absl::IsResourceExhausted(status)  ? "queue_full"
         : absl::IsDeadlineExceeded(status) ? "deadline"
         : absl::IsCancelled(status)        ? "cancelled"
                                            : "draining";
}

// Of the layers whose codes can be counted: those with weights.
std::vector<std::string> CodedLayers(const engine::Plan& plan) {
  std::vector<std::string> names;
  for (const engine::LayerInfo& layer : plan.layers()) {
    if (layer.macs > 0) names.push_back(layer.name);
  }
  return names;
}

// By CodedLayers.
std::vector<double> AtLimit(const engine::Plan& plan,
                            const std::vector<engine::CodeCount>& counts) {
  std::vector<double> shares;
  for (size_t l = 0; l < counts.size(); ++l) {
    if (plan.layers()[l].macs == 0) continue;
    const double total = static_cast<double>(counts[l].total);
    shares.push_back(total > 0 ? static_cast<double>(counts[l].at_limit) / total : -1);
  }
  return shares;
}

// A first inference of every batch size in every session, side by side: kernels are made and memory
// is touched. Downwards, because a session keeps the objects of the sizes it ran last, and small
// batches are the most frequent.
absl::Status WarmUp(std::vector<engine::Session>& sessions, int max_batch) {
  std::vector<absl::Status> statuses(sessions.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < sessions.size(); ++i) {
    threads.emplace_back([&, i] {
      const absl::Span<float> input = sessions[i].input();
      std::fill(input.begin(), input.end(), 0.0f);
      for (int batch = max_batch; batch >= 1 && statuses[i].ok(); --batch) {
        statuses[i] = sessions[i].Run(batch).status();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) TERN_RETURN_IF_ERROR(Annotate(status, "warm-up"));
  return absl::OkStatus();
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
  for (const uint32_t size : config.preferred_batch_size()) {
    if (size < 1 || size > static_cast<uint32_t>(batching.max_batch)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "model ", model->info.model, ", config.textproto: batching.preferred_batch_size: got ",
          size, ", want 1..", batching.max_batch, " (the largest batch)"));
    }
    batching.preferred.push_back(static_cast<int>(size));
  }
  batching.target = config.target_p99_us() > 0 ? absl::Microseconds(config.target_p99_us())
                                               : options.default_target_p99;
  batching.priority_levels = options.priority_levels;
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
  if (options.warm_up) TERN_RETURN_IF_ERROR(WarmUp(sessions, batching.max_batch));
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
      monitor_(std::make_shared<monitoring::VersionMonitor>(
          model_->metric_labels, model_->report, model_->plan->classes(),
          CodedLayers(*model_->plan), options.monitor, options.metrics, options.clock)),
      profile_every_(options.profile_every),
      count_codes_every_(options.count_codes_every),
      batching_(batching),
      threads_(threads),
      sessions_(std::move(sessions)),
      batches_(sessions_.size(), 0) {
  scheduler::Batcher<ClassifyTask>::Callbacks callbacks;
  callbacks.run = [this](int instance, std::vector<scheduler::Queued<ClassifyTask>> batch) {
    Run(instance, std::move(batch));
  };
  callbacks.reject = [this](scheduler::Queued<ClassifyTask> queued, absl::Status status) {
    metrics_->Rejected(Reason(status));
    queued.task.done(std::move(status));
  };
  callbacks.cancelled = [](const ClassifyTask& task) {
    return task.input.cancelled && task.input.cancelled();
  };
  callbacks.depth = [this](int n) { metrics_->QueueDepth(model_->metric_labels, n); };
  batcher_ = std::make_unique<scheduler::Batcher<ClassifyTask>>(batching, std::move(callbacks));
  if (options.warm_up) return;
  warming_ = std::thread([this, threads, most = batching.max_batch] { WarmBehind(threads, most); });
}

ModelRunner::~ModelRunner() {
  stop_warming_ = true;
  Drain();
  if (warming_.joinable()) warming_.join();
}

void ModelRunner::WarmBehind(int threads, int max_batch) {
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

absl::Status ModelRunner::Submit(ClassifyTask& task, bool reserved, bool here) {
  if (shadow_ != nullptr) task.activity = shadow_->Begin();
  if (here && RunHere(task, reserved)) return absl::OkStatus();
  return batcher_->Submit(task, TermsOf(task), reserved);
}

bool ModelRunner::RunHere(ClassifyTask& task, bool reserved) {
  // OpenMP keeps a team for each thread that calls it: callers' threads have none.
  if (threads_ > 1 || (task.input.cancelled && task.input.cancelled())) return false;
  const absl::Duration expected = image_time();
  if (expected == absl::ZeroDuration() || expected > kShort) return false;
  const auto turn = batcher_->TakeTurn(TermsOf(task), reserved);
  if (!turn.has_value()) return false;
  std::vector<scheduler::Queued<ClassifyTask>> batch(1);
  batch[0].task = std::move(task);
  batch[0].enqueued = turn->started();
  Run(turn->instance(), std::move(batch));
  return true;
}

void ModelRunner::Succeeded(const StageTimes& times) {
  statistics_.Success(times);
  metrics_->VersionRequest(model_->metric_labels, "OK", times.total);
}

void ModelRunner::Failed(const absl::Status& status, absl::Duration total) {
  statistics_.Failure(total);
  metrics_->VersionRequest(model_->metric_labels, absl::StatusCodeToString(status.code()), total);
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
  const int64_t before = batches_[instance]++;
  // Each kind of batch has its own turns: one may divide the other.
  const auto is_turn = [before](int every, int64_t phase) {
    return every > 0 && (before + phase) % every == 0;
  };
  engine::RunTimes times;
  std::vector<engine::CodeCount> codes;
  const absl::StatusOr<absl::Span<const float>> logits =
      is_turn(profile_every_, 0)       ? session.RunProfiled(images, times)
      : is_turn(count_codes_every_, 1) ? session.RunCounted(images, codes)
                                       : session.Run(images);
  const absl::Time end = clock_->Now();
  const absl::Duration inference = end - start;
  absl::Duration preparation;
  for (const scheduler::Queued<ClassifyTask>& queued : batch)
    preparation += queued.task.decode + queued.task.preprocess;
  if (logits.ok()) statistics_.Execution(images, preparation, inference, end);
  metrics_->Batch(model_->metric_labels, images);
  const auto learned = batcher_->learned(images);
  metrics_->BatchLearned(model_->metric_labels, images, learned.batch_time, learned.batch_limit,
                         learned.delay);
  metrics_->StageTime(metrics::Stage::kInference, model_->metric_labels, inference);
  for (size_t l = 0; l < times.layers.size(); ++l) {
    metrics_->LayerTime(model_->metric_labels, model_->plan->layers()[l].name, times.layers[l]);
  }
  if (logits.ok() && !codes.empty()) monitor_->Codes(AtLimit(*model_->plan, codes), images);
  const int64_t classes = model_->plan->classes();
  for (int i = 0; i < images; ++i) {
    ClassifyTask& task = batch[i].task;
    if (!logits.ok()) {
      task.done(Annotate(logits.status(), model_->info.model));
      continue;
    }
    const absl::Span<const float> scores = logits->subspan(i * classes, classes);
    if (absl::Status finite = classify::CheckFinite(scores); !finite.ok()) {
      if (task.input.form == ImageForm::kTensor) {  // the caller's numbers, of any size
        finite = absl::InvalidArgumentError(
            absl::StrCat("these inputs overflow the network: ", finite.message()));
      }
      task.done(Annotate(finite, model_->info.model));
      continue;
    }
    ClassifyOutput output;
    output.model = model_;
    output.monitor = monitor_;
    output.classes = classify::TopK(scores, std::max(5, task.input.top_k));
    if (task.input.want_logits) output.logits.assign(scores.begin(), scores.end());
    output.batch_size = images;
    output.decode = task.decode;
    output.preprocess = task.preprocess;
    output.queue = task.queued + (start - batch[i].enqueued);
    output.inference = inference;
    const absl::Time now = clock_->Now();
    output.postprocess = now - end;
    output.total = now - task.arrived;
    statistics_.Output(images, output.postprocess);
    metrics_->StageTime(metrics::Stage::kQueue, model_->metric_labels, output.queue);
    metrics_->StageTime(metrics::Stage::kPostprocess, model_->metric_labels, output.postprocess);
    const classify::Prediction& best = output.classes.front();
    metrics_->Confidence(model_->metric_labels, best.probability);
    monitor_->Answered(best.index, best.probability, classify::Entropy(scores));
    if (shadow_ != nullptr) {
      shadow_->Offer(*model_, monitor_, scores, std::move(task.pixels));
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
      admission_(options.admission, metrics),
      brownout_(repository, metrics, clock) {
  scheduler::BatcherOptions decoding;
  decoding.max_batch = 1;
  decoding.max_queue = options.max_waiting;
  decoding.instances = options.decode_threads;
  decoding.priority_levels = options.priority_levels;
  decoding.name = "decode queue";
  decoding.clock = clock;
  scheduler::Batcher<DecodeTask>::Callbacks callbacks;
  callbacks.run = [this](int, std::vector<scheduler::Queued<DecodeTask>> batch) {
    DecodeTask& decode = batch.front().task;
    if (Prepare(decode)) Submit(std::move(decode), false);
  };
  callbacks.reject = [this](scheduler::Queued<DecodeTask> queued, absl::Status status) {
    queued.task.runner->Unreserve(TermsOf(queued.task.task));
    metrics_->Rejected(Reason(status));
    queued.task.task.done(std::move(status));
  };
  callbacks.cancelled = [](const DecodeTask& decode) {
    return decode.task.input.cancelled && decode.task.input.cancelled();
  };
  callbacks.depth = [this](int n) { metrics_->DecodeQueueDepth(n); };
  decode_ = std::make_unique<scheduler::Batcher<DecodeTask>>(decoding, std::move(callbacks));
}

Classifier::~Classifier() { decode_.reset(); }

namespace {

absl::string_view NameOf(ImageForm form) {
  switch (form) {
    case ImageForm::kEncoded:
      return "encoded";
    case ImageForm::kPixels:
      return "u8 [h, w, 3]";
    case ImageForm::kTensor:
      return "f32 [3, h, w]";
  }
  return "?";
}

// Label, number of classes and bytes against the model; sets the default top_k.
absl::Status Check(const repository::LoadedModel& model, int priority_levels,
                   ClassifyInput& input) {
  const int64_t classes = model.plan->classes();
  if (input.label.has_value() && *input.label >= classes) {
    return absl::InvalidArgumentError(
        absl::StrCat("label: got ", *input.label, ", the model has ", classes, " classes"));
  }
  if (input.top_k == 0) input.top_k = static_cast<int>(std::min<int64_t>(5, classes));
  if (input.top_k < 0 || input.top_k > classes) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_k: got ", input.top_k, ", the model has ", classes, " classes"));
  }
  if (input.priority > static_cast<uint32_t>(priority_levels)) {
    return absl::InvalidArgumentError(absl::StrCat("priority: got ", input.priority,
                                                   ", want 0 (default) or 1..", priority_levels));
  }
  if (input.form == ImageForm::kEncoded) return absl::OkStatus();
  const Shape& shape = model.plan->input_shape();
  const size_t want =
      shape.elements() * (input.form == ImageForm::kTensor ? sizeof(float) : sizeof(uint8_t));
  if (input.image.size() != want) {
    return absl::InvalidArgumentError(absl::StrCat("image: ", input.image.size(), " bytes as ",
                                                   NameOf(input.form), ", want ", want, " for ",
                                                   shape.ToString()));
  }
  return absl::OkStatus();
}

// What an image holds until it is answered: an encoded one is in the message, too.
int64_t BytesHeld(const repository::LoadedModel& model, const ClassifyInput& input) {
  const size_t copies = input.form == ImageForm::kEncoded ? 2 : 1;
  return static_cast<int64_t>(copies * input.image.size() +
                              model.plan->input_shape().elements() * sizeof(float));
}

// "image 3: too large"; as it is if it is the only one.
absl::Status NameImage(const absl::Status& status, size_t i, size_t images) {
  return images == 1 ? status : Annotate(status, absl::StrCat("image ", i));
}

// The slowest image of a request, stage by stage.
StageTimes Slowest(const std::vector<ClassifyOutput>& outputs) {
  StageTimes slowest;
  for (const ClassifyOutput& output : outputs) {
    slowest.queue = std::max(slowest.queue, output.queue);
    slowest.input = std::max(slowest.input, output.decode + output.preprocess);
    slowest.inference = std::max(slowest.inference, output.inference);
    slowest.output = std::max(slowest.output, output.postprocess);
  }
  return slowest;
}

// Waits, without a thread, for the images of one request. Held by their `done` callbacks.
class Joined {
 public:
  Joined(std::shared_ptr<ModelRunner> runner, size_t images, absl::Time arrived, const Clock* clock,
         ClassifyAllDone done)
      : runner_(std::move(runner)),
        clock_(clock),
        arrived_(arrived),
        left_(images),
        outputs_(images),
        done_(std::move(done)) {}

  bool failed() const { return failed_; }

  void Finish(size_t i, absl::StatusOr<ClassifyOutput> output) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (output.ok()) {
        outputs_[i] = *std::move(output);
      } else if (error_.ok()) {
        error_ = NameImage(output.status(), i, outputs_.size());
        failed_ = true;
      }
      if (--left_ > 0) return;
    }
    const bool mixed = std::any_of(outputs_.begin(), outputs_.end(), [this](const auto& other) {
      return other.model != outputs_.front().model;
    });
    if (error_.ok() && mixed) {
      error_ =
          absl::UnavailableError("the version was replaced while images waited; send it again");
    }
    const absl::Duration total = clock_->Now() - arrived_;
    if (error_.ok()) {
      StageTimes times = Slowest(outputs_);
      times.total = total;
      runner_->Succeeded(times);
      done_(std::move(outputs_));
    } else {
      runner_->Failed(error_, total);
      done_(std::move(error_));
    }
  }

 private:
  const std::shared_ptr<ModelRunner> runner_;
  const Clock* const clock_;
  const absl::Time arrived_;
  std::mutex mutex_;
  size_t left_;
  std::vector<ClassifyOutput> outputs_;
  absl::Status error_;  // the first
  std::atomic<bool> failed_{false};
  const ClassifyAllDone done_;
};

}  // namespace

void Classifier::Classify(absl::string_view model, uint64_t version, ClassifyInput input,
                          ClassifyDone done) {
  std::vector<ClassifyInput> inputs;
  inputs.push_back(std::move(input));
  ClassifyAll(model, version, std::move(inputs),
              [done = std::move(done)](absl::StatusOr<std::vector<ClassifyOutput>> outputs) {
                if (!outputs.ok()) return done(outputs.status());
                done(std::move(outputs->front()));
              });
}

void Classifier::ClassifyAll(absl::string_view model, uint64_t version,
                             std::vector<ClassifyInput> inputs, ClassifyAllDone done) {
  const absl::Time arrived = clock_->Now();
  const size_t images = inputs.size();
  if (images == 0) return done(absl::InvalidArgumentError("no images"));
  for (size_t i = 0; i < images; ++i) {
    const ClassifyInput& input = inputs[i];
    if (input.form == ImageForm::kEncoded && input.image.size() > options_.limits.max_bytes) {
      metrics_->Rejected("too_large");
      return done(NameImage(
          absl::ResourceExhaustedError(absl::StrCat(
              "image: ", input.image.size(), " bytes, the limit is ", options_.limits.max_bytes)),
          i, images));
    }
  }
  // Images of one request have one priority, deadline and wishes.
  const scheduler::Terms terms{.deadline = inputs[0].deadline,
                               .priority = static_cast<int>(inputs[0].priority),
                               .arrived = arrived};
  const absl::StatusOr<Brownout::Choice> choice =
      brownout_.Choose(model, version, inputs[0].wishes,
                       [&](uint64_t candidate) { return ExpectedTime(model, candidate, terms); });
  if (!choice.ok()) return done(choice.status());
  // More urgent images wait less than the others: they say nothing about overload.
  const bool observed =
      version == 0 && (terms.priority == 0 || terms.priority >= (options_.priority_levels + 1) / 2);
  // What stands in for a version that is gone meanwhile: nothing, where the accuracy was asked for.
  const uint64_t asked = inputs[0].wishes.min_accuracy.has_value() ? choice->version : version;
  Runner runner;
  std::vector<std::shared_ptr<Admission::Ticket>> tickets;
  absl::Status reserved = absl::UnavailableError("not tried");
  // A version that is replaced between lookup and now accepts nothing more: again with its
  // successor. Ends when nothing is put in its place.
  while (absl::IsUnavailable(reserved)) {
    absl::StatusOr<Runner> found = AcquireFor(model, choice->version, asked);
    if (!found.ok()) return done(found.status());
    if (*found == runner) break;
    runner = *std::move(found);
    for (size_t i = 0; i < images; ++i) {
      const absl::Status status = Check(runner->model(), options_.priority_levels, inputs[i]);
      if (!status.ok()) {
        runner->Failed(status, clock_->Now() - arrived);
        return done(NameImage(status, i, images));
      }
    }
    if (absl::Status fits = CheckFits(*runner, inputs); !fits.ok()) {
      tickets.clear();
      metrics_->Rejected("too_large");
      runner->Failed(fits, clock_->Now() - arrived);
      return done(std::move(fits));
    }
    // Before places in the queue, which may displace the images of others.
    for (size_t i = tickets.size(); i < images; ++i) {
      auto ticket = admission_.Admit(inputs[i].client, BytesHeld(runner->model(), inputs[i]));
      if (!ticket.ok()) {
        tickets.clear();
        runner->Failed(ticket.status(), clock_->Now() - arrived);
        return done(ticket.status());
      }
      tickets.push_back(*std::move(ticket));
    }
    for (size_t i = 0; i < images; ++i) {
      reserved = runner->Reserve(terms, decode_->Expect(terms));
      if (reserved.ok()) continue;
      for (; i > 0; --i) runner->Unreserve(terms);
      break;
    }
  }
  if (!reserved.ok()) {
    tickets.clear();
    if (observed && absl::IsResourceExhausted(reserved)) {
      brownout_.Observe(model, absl::InfiniteDuration());
    }
    metrics_->Rejected(Reason(reserved));
    runner->Failed(reserved, clock_->Now() - arrived);
    return done(reserved);
  }
  const bool here = images == 1 && inputs[0].on_this_thread && tickets[0]->alone();
  auto joined = std::make_shared<Joined>(runner, images, arrived, clock_, std::move(done));
  for (size_t i = 0; i < images; ++i) {
    DecodeTask decode;
    decode.runner = runner;
    decode.asked = asked;
    decode.chosen = choice->version;
    ClassifyTask& task = decode.task;
    task.input = std::move(inputs[i]);
    task.arrived = arrived;
    // The ticket is given back before the caller is told: who has an answer may send the next
    // image.
    task.done = [this, joined, i, ticket = std::move(tickets[i]), observed,
                 choice = *choice](absl::StatusOr<ClassifyOutput> output) mutable {
      ticket.reset();
      if (output.ok()) Account(choice, observed, *output);
      joined->Finish(i, std::move(output));
    };
    if (images > 1) {
      task.input.cancelled = [joined, cancelled = std::move(task.input.cancelled)] {
        return joined->failed() || (cancelled && cancelled());
      };
    }
    const scheduler::Terms decoding{.deadline = task.input.deadline, .priority = terms.priority};
    if (here && !(task.input.cancelled && task.input.cancelled())) {
      if (std::optional turn = decode_->TakeTurn(decoding); turn.has_value()) {
        const bool prepared = Prepare(decode);
        turn.reset();
        if (prepared) Submit(std::move(decode), true);
        return;
      }
    }
    const absl::Status queued = decode_->Submit(decode, decoding);
    if (queued.ok()) continue;
    runner->Unreserve(terms);
    metrics_->Rejected(Reason(queued));
    task.done(queued);
  }
}

absl::Status Classifier::CheckFits(const ModelRunner& runner,
                                   const std::vector<ClassifyInput>& inputs) const {
  const int most = runner.batching().max_queue;
  if (inputs.size() > static_cast<size_t>(most)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("images: got ", inputs.size(), " in one request, the queue of ",
                     runner.model().info.model, " takes ", most, " (max_queue)"));
  }
  int64_t bytes = 0;
  for (const ClassifyInput& input : inputs) bytes += BytesHeld(runner.model(), input);
  return admission_.CheckFits(static_cast<int64_t>(inputs.size()), bytes);
}

void Classifier::Account(const Brownout::Choice& choice, bool observed, ClassifyOutput& output) {
  const repository::VersionInfo& info = output.model->info;
  if (observed) brownout_.Observe(info.model, output.queue);
  if (choice.degradation == Degradation::kNone || info.version == choice.degraded_from) return;
  output.degradation = choice.degradation;
  output.degraded_from = choice.degraded_from;
  metrics_->Degraded(info.model, choice.degraded_from, info.version);
}

absl::StatusOr<Classifier::Runner> Classifier::AcquireFor(absl::string_view model, uint64_t chosen,
                                                          uint64_t asked) const {
  absl::StatusOr<std::shared_ptr<repository::Servable>> servable =
      repository_->Acquire(model, chosen);
  if (!servable.ok() && chosen != asked) servable = repository_->Acquire(model, asked);
  if (!servable.ok()) return servable.status();
  return std::static_pointer_cast<ModelRunner>(*std::move(servable));
}

absl::Duration Classifier::ExpectedTime(absl::string_view model, uint64_t version,
                                        const scheduler::Terms& terms) const {
  const auto servable = repository_->Acquire(model, version);
  if (!servable.ok()) return absl::InfiniteDuration();
  const auto& runner = static_cast<const ModelRunner&>(**servable);
  // Where a worker is free, Expect does not count its work.
  const absl::Duration waiting = decode_->Expect(terms);
  const absl::Duration decoded =
      waiting > absl::ZeroDuration() ? waiting : decode_->learned(1).batch_time;
  const absl::Duration answered = runner.Expect(terms, decoded);
  return answered > decoded ? answered : decoded + runner.image_time();
}

namespace {

// Fills task.pixels and the times it took.
absl::Status FillPixels(const repository::LoadedModel& model, const image::Limits& limits,
                        const Clock& clock, ClassifyTask& task) {
  const Shape& shape = model.plan->input_shape();
  const int height = static_cast<int>(shape[1]), width = static_cast<int>(shape[2]);
  const absl::Time start = clock.Now();
  task.pixels.resize(shape.elements());
  const std::string& bytes = task.input.image;
  switch (task.input.form) {
    case ImageForm::kEncoded: {
      TERN_ASSIGN_OR_RETURN(const image::Image decoded,
                            image::Decode(bytes, limits, model.preprocessing, height, width));
      const absl::Time mid = clock.Now();
      task.decode = mid - start;
      TERN_RETURN_IF_ERROR(image::Preprocess(decoded, model.preprocessing, height, width,
                                             absl::MakeSpan(task.pixels)));
      task.preprocess = clock.Now() - mid;
      return absl::OkStatus();
    }
    case ImageForm::kPixels: {
      v1::Preprocessing normalise = model.preprocessing;
      normalise.set_resize(v1::Preprocessing::NONE);
      normalise.set_center_crop(false);
      normalise.set_jpeg_scaling(false);
      image::Image pixels;
      pixels.height = height;
      pixels.width = width;
      pixels.pixels.assign(bytes.begin(), bytes.end());
      TERN_RETURN_IF_ERROR(
          image::Preprocess(pixels, normalise, height, width, absl::MakeSpan(task.pixels)));
      break;
    }
    case ImageForm::kTensor: {
      std::vector<float> planes(shape.elements());
      std::memcpy(planes.data(), bytes.data(), bytes.size());
      const auto bad = std::find_if(planes.begin(), planes.end(),
                                    [](float value) { return !std::isfinite(value); });
      if (bad != planes.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat("element ", bad - planes.begin(), " is ", *bad, ", want finite numbers"));
      }
      engine::NchwToNhwc(planes.data(), 1, shape[0], shape[1], shape[2], task.pixels.data());
      break;
    }
  }
  task.preprocess = clock.Now() - start;
  return absl::OkStatus();
}

}  // namespace

bool Classifier::Prepare(DecodeTask& decode) {
  const Runner& runner = decode.runner;
  const repository::LoadedModel& model = runner->model();
  ClassifyTask& task = decode.task;
  const absl::Time start = clock_->Now();
  task.queued = start - task.arrived;
  const auto refuse = [&](const char* reason, absl::Status status) {
    runner->Unreserve(TermsOf(task));
    metrics_->Rejected(reason);
    task.done(std::move(status));
    return false;
  };
  // While it waited, more urgent images may have gone ahead.
  const absl::Duration estimate = runner->Expect(TermsOf(task), absl::ZeroDuration());
  if (start + estimate > task.input.deadline) {
    return refuse(
        "deadline",
        absl::DeadlineExceededError(absl::StrCat(
            "the deadline is in ", absl::FormatDuration(task.input.deadline - start),
            " before decoding, and the result is expected in ", absl::FormatDuration(estimate))));
  }
  const absl::Status filled = FillPixels(model, options_.limits, *clock_, task);
  if (!filled.ok()) {
    return refuse(absl::IsResourceExhausted(filled) ? "too_large" : "bad_image",
                  Annotate(filled, "image"));
  }
  const bool encoded = task.input.form == ImageForm::kEncoded;
  std::string().swap(task.input.image);  // the bytes are not needed any more
  if (encoded) metrics_->StageTime(metrics::Stage::kDecode, model.metric_labels, task.decode);
  metrics_->StageTime(metrics::Stage::kPreprocess, model.metric_labels, task.preprocess);
  return true;
}

void Classifier::Submit(DecodeTask decode, bool here) {
  const Runner first = decode.runner;  // holds `model`
  const repository::LoadedModel& model = first->model();
  ClassifyTask& task = decode.task;
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
  Runner runner = first;
  absl::Status submitted = runner->Submit(task, true, here);
  // As in ClassifyAll: again with a successor.
  while (absl::IsUnavailable(submitted)) {
    absl::StatusOr<Runner> successor = AcquireFor(model.info.model, decode.chosen, decode.asked);
    if (!successor.ok()) submitted = successor.status();
    if (!successor.ok() || *successor == runner) break;
    runner = *std::move(successor);
    if (!TakesTheSameImages(runner->model(), model)) {
      submitted = absl::UnavailableError(absl::StrCat(
          "model ", model.info.model, " was replaced by a version that takes other images"));
      break;
    }
    submitted = runner->Submit(task, false);
  }
  if (submitted.ok()) return;
  metrics_->Rejected(Reason(submitted));
  task.done(std::move(submitted));
}

}  // namespace tern::serving
