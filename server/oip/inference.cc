#include "server/oip/inference.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"
#include "server/oip/infer.h"

namespace tern::oip {
namespace {

using repository::State;
using repository::VersionInfo;

constexpr char kPlatform[] = "tern";
// Room in a message for what is not images.
constexpr uint64_t kOtherBytes = 64 << 10;

// Only what is true: tools choose their calls by it.
constexpr const char* kExtensions[] = {"binary_tensor_data",  "classification",
                                       "model_configuration", "parameters",
                                       "schedule_policy",     "statistics"};

int MaxImages(const serving::ModelRunner& runner, uint64_t max_message_bytes) {
  const uint64_t image = runner.model().plan->input_shape().elements() * sizeof(float);
  const uint64_t room = max_message_bytes - std::min(max_message_bytes, kOtherBytes);
  const int fit = static_cast<int>(std::clamp<uint64_t>(room / image, 1, kMaxImages));
  return std::min(fit, runner.batching().max_queue);
}

const char* NameOf(State state) {
  switch (state) {
    case State::kLoading:
      return "LOADING";
    case State::kReady:
      return "READY";
    case State::kUnavailable:
    case State::kUnloaded:
      return "UNAVAILABLE";
  }
  return "UNKNOWN";
}

void Set(const serving::Tally& tally, inference::StatisticDuration* out) {
  out->set_count(tally.count);
  out->set_ns(std::max<int64_t>(0, absl::ToInt64Nanoseconds(tally.time)));
}

void Set(const serving::ModelStatistics& statistics, inference::ModelStatistics* out) {
  if (statistics.last_inference != absl::InfinitePast())
    out->set_last_inference(std::max<int64_t>(0, absl::ToUnixMillis(statistics.last_inference)));
  out->set_inference_count(statistics.images);
  out->set_execution_count(statistics.executions);
  inference::InferStatistics* infer = out->mutable_inference_stats();
  Set(statistics.success, infer->mutable_success());
  Set(statistics.fail, infer->mutable_fail());
  Set(statistics.queue, infer->mutable_queue());
  Set(statistics.input, infer->mutable_compute_input());
  Set(statistics.inference, infer->mutable_compute_infer());
  Set(statistics.output, infer->mutable_compute_output());
  for (const auto& [images, batch] : statistics.batches) {
    inference::InferBatchStatistics* stats = out->add_batch_stats();
    stats->set_batch_size(images);
    Set(batch.input, stats->mutable_compute_input());
    Set(batch.inference, stats->mutable_compute_infer());
    Set(batch.output, stats->mutable_compute_output());
  }
}

}  // namespace

inference::ServerMetadataResponse Inference::ServerMetadata() const {
  inference::ServerMetadataResponse response;
  response.set_name("tern");
  response.set_version(server_version_);
  for (const char* extension : kExtensions) response.add_extensions(extension);
  return response;
}

absl::StatusOr<bool> Inference::ModelReady(const std::string& name,
                                           const std::string& version) const {
  if (name.empty()) return absl::InvalidArgumentError("model name: is empty");
  TERN_ASSIGN_OR_RETURN(const uint64_t number, ParseVersion(version));
  const absl::StatusOr<VersionInfo> info = repository_->Info(name, number);
  return ServerReady() && info.ok() && info->state == State::kReady;
}

absl::StatusOr<inference::ModelMetadataResponse> Inference::ModelMetadata(
    const std::string& name, const std::string& version) const {
  TERN_ASSIGN_OR_RETURN(const uint64_t number, ParseVersion(version));
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const repository::LoadedModel> model,
                        repository_->Find(name, number));
  inference::ModelMetadataResponse response;
  response.set_name(name);
  response.set_platform(kPlatform);
  for (const VersionInfo& info : repository_->List(name)) {
    if (info.state == State::kReady && (number == 0 || info.version == number))
      response.add_versions(absl::StrCat(info.version));
  }
  auto* input = response.add_inputs();
  input->set_name(kInputName);
  input->set_datatype("FP32");
  input->add_shape(-1);
  for (int i = 0; i < 3; ++i) input->add_shape(model->plan->input_shape()[i]);
  // One output: what is not asked for is not shown, because tools of one output per model use it.
  auto* output = response.add_outputs();
  output->set_name(kProbabilities);
  output->set_datatype("FP32");
  output->add_shape(-1);
  output->add_shape(model->plan->classes());
  auto& properties = *response.mutable_properties();
  properties["scheme"] = model->info.scheme;
  properties["isa"] = model->isa;
  properties["input_forms"] = "FP32 NCHW, UINT8 NHWC, BYTES (encoded images)";
  properties["outputs_on_request"] = kLogits;
  return response;
}

absl::StatusOr<inference::ModelConfig> Inference::ModelConfig(const std::string& name,
                                                              const std::string& version) const {
  TERN_ASSIGN_OR_RETURN(const uint64_t number, ParseVersion(version));
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<repository::Servable> servable,
                        repository_->Acquire(name, number));
  const auto& runner = static_cast<const serving::ModelRunner&>(*servable);
  const repository::LoadedModel& model = runner.model();
  inference::ModelConfig config;
  config.set_name(name);
  config.set_platform(kPlatform);
  config.set_backend(kPlatform);
  config.set_max_batch_size(MaxImages(runner, max_message_bytes_));
  inference::ModelInput* input = config.add_input();
  input->set_name(kInputName);
  input->set_data_type(inference::TYPE_FP32);
  input->set_format(inference::ModelInput::FORMAT_NCHW);
  for (int i = 0; i < 3; ++i) input->add_dims(model.plan->input_shape()[i]);
  inference::ModelOutput* output = config.add_output();
  output->set_name(kProbabilities);
  output->set_data_type(inference::TYPE_FP32);
  output->add_dims(model.plan->classes());
  output->set_label_filename(model.config.labels_file());
  inference::ModelInstanceGroup* group = config.add_instance_group();
  group->set_name(name);
  group->set_count(runner.batching().instances);
  group->set_kind(inference::ModelInstanceGroup::KIND_CPU);
  inference::ModelDynamicBatching* batching = config.mutable_dynamic_batching();
  batching->add_preferred_batch_size(runner.batching().max_batch);
  batching->set_max_queue_delay_microseconds(
      absl::ToInt64Microseconds(runner.batching().max_delay));
  (*config.mutable_parameters())["scheme"].set_string_value(model.info.scheme);
  (*config.mutable_parameters())["preprocessing"].set_string_value(
      model.preprocessing.ShortDebugString());
  return config;
}

absl::StatusOr<inference::ModelStatisticsResponse> Inference::ModelStatistics(
    const std::string& name, const std::string& version) const {
  TERN_ASSIGN_OR_RETURN(const uint64_t number, ParseVersion(version));
  if (!name.empty()) TERN_RETURN_IF_ERROR(repository_->Info(name, number).status());
  inference::ModelStatisticsResponse response;
  absl::Status not_ready;
  for (const VersionInfo& info : repository_->List(name)) {
    if (number != 0 && info.version != number) continue;
    const absl::StatusOr<std::shared_ptr<repository::Servable>> servable =
        repository_->Acquire(info.model, info.version);
    if (!servable.ok()) {
      not_ready = servable.status();
      continue;
    }
    inference::ModelStatistics* stats = response.add_model_stats();
    stats->set_name(info.model);
    stats->set_version(absl::StrCat(info.version));
    Set(static_cast<serving::ModelRunner&>(**servable).statistics().Snapshot(), stats);
  }
  if (!name.empty() && response.model_stats().empty() && !not_ready.ok()) return not_ready;
  return response;
}

inference::RepositoryIndexResponse Inference::RepositoryIndex(bool only_ready) const {
  inference::RepositoryIndexResponse response;
  for (const VersionInfo& info : repository_->List("")) {
    if (only_ready && info.state != State::kReady) continue;
    auto* model = response.add_models();
    model->set_name(info.model);
    model->set_version(absl::StrCat(info.version));
    model->set_state(NameOf(info.state));
    // The repository's own words name its files; who may only classify does not see them.
    if (info.state == State::kUnloaded) model->set_reason("unloaded");
    if (info.state == State::kUnavailable) {
      model->set_reason("cannot be loaded; the server's log and ModelRegistry.List say why");
    }
  }
  return response;
}

void Inference::ModelInfer(const inference::ModelInferRequest& request, Caller caller,
                           InferDone done) const {
  if (request.model_name().empty()) return done(absl::InvalidArgumentError("model_name: is empty"));
  if (request.id().size() > serving::kMaxRequestIdBytes) {
    return done(absl::InvalidArgumentError(absl::StrCat(
        "id: ", request.id().size(), " bytes, the limit is ", serving::kMaxRequestIdBytes)));
  }
  const absl::StatusOr<uint64_t> version = ParseVersion(request.model_version());
  if (!version.ok()) return done(version.status());
  const auto model = repository_->Find(request.model_name(), *version);
  if (!model.ok()) return done(model.status());
  absl::StatusOr<InferPlan> parsed = ParseInfer(request, **model);
  if (!parsed.ok()) return done(parsed.status());
  auto plan = std::make_shared<InferPlan>(*std::move(parsed));
  if (plan->timeout.has_value())
    caller.deadline = std::min(caller.deadline, Clock::Real()->Now() + *plan->timeout);
  std::vector<serving::ClassifyInput> images = std::move(plan->images);
  for (size_t i = 0; i < images.size(); ++i) {
    if (!request.id().empty()) {
      images[i].request_id = images.size() == 1 ? request.id() : absl::StrCat(request.id(), "/", i);
    }
    images[i].deadline = caller.deadline;
    images[i].cancelled = caller.cancelled;
    images[i].client = caller.client;
    images[i].on_this_thread = caller.on_this_thread;
    images[i].priority = plan->priority;
    images[i].wishes = plan->wishes;
  }
  classifier_->ClassifyAll(request.model_name(), *version, std::move(images),
                           [plan, id = request.id(), done = std::move(done)](
                               absl::StatusOr<std::vector<serving::ClassifyOutput>> outputs) {
                             if (!outputs.ok()) return done(outputs.status());
                             done(ToResponse(*plan, id, *outputs));
                           });
}

}  // namespace tern::oip
