#include "server/serving/quantize_job.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/quant/self_test.h"
#include "server/serving/profile.h"
#include "statistics/statistics.h"

namespace tern::serving {
namespace {

bool IsSet(const std::atomic<bool>* flag) { return flag != nullptr && flag->load(); }

void SetAtLimit(const engine::Plan& plan, const std::vector<engine::CodeCount>& counts,
                v1::QuantizationReport& report) {
  std::map<absl::string_view, engine::CodeCount> by_name;
  for (size_t l = 0; l < counts.size(); ++l) by_name[plan.layers()[l].name] = counts[l];
  for (v1::LayerReport& layer : *report.mutable_layers()) {
    const auto it = by_name.find(layer.name());
    if (it == by_name.end() || it->second.total == 0) continue;
    layer.set_output_at_limit(static_cast<double>(it->second.at_limit) /
                              static_cast<double>(it->second.total));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<QuantizeJob>> QuantizeJob::Create(repository::Repository* repository,
                                                                 metrics::Metrics* metrics,
                                                                 QuantizeJobOptions options) {
  TERN_RETURN_IF_ERROR(quant::ValidateRecipe(options.recipe));
  if (options.dry_run && options.set_default) {
    return absl::InvalidArgumentError(
        "set_default with dry_run: a dry run publishes nothing that could be the default");
  }
  if (!options.dry_run) TERN_RETURN_IF_ERROR(repository->CheckWritable());
  if (options.source_version == 0) {
    for (const repository::VersionInfo& info : repository->List(options.model)) {
      if (info.state == repository::State::kReady && info.scheme == "fp32") {
        options.source_version = info.version;
        break;
      }
    }
    if (options.source_version == 0) {
      // Tells an unknown model from one without a float version.
      TERN_RETURN_IF_ERROR(repository->Info(options.model, 0).status());
      return absl::FailedPreconditionError(
          absl::StrCat("model ", options.model, " has no float version that is ready"));
    }
  }
  std::unique_ptr<QuantizeJob> job(new QuantizeJob(repository, metrics, std::move(options)));
  TERN_ASSIGN_OR_RETURN(job->source_model_,
                        repository->Find(job->options_.model, job->options_.source_version));
  TERN_ASSIGN_OR_RETURN(
      job->source_, repository->ReadFloatSource(job->options_.model, job->options_.source_version));
  return job;
}

QuantizeJob::QuantizeJob(repository::Repository* repository, metrics::Metrics* metrics,
                         QuantizeJobOptions options)
    : repository_(repository), metrics_(metrics), options_(std::move(options)) {}

QuantizeJob::~QuantizeJob() = default;

absl::Status QuantizeJob::AddImage(Sample sample, bool calibration, bool evaluation) {
  const Shape& shape = source_model_->plan->input_shape();
  if (evaluation && sample.label.has_value() && *sample.label >= source_model_->plan->classes()) {
    return absl::InvalidArgumentError(absl::StrCat("image ", sample.name, ": label ", *sample.label,
                                                   ", the model has ",
                                                   source_model_->plan->classes(), " classes"));
  }
  // Prepared here in any case: a bad image is told while the client still sends.
  TERN_ASSIGN_OR_RETURN(
      std::vector<float> pixels,
      PrepareSample(sample, source_model_->preprocessing, shape, options_.limits));
  const std::string hash = Sha256Hex(sample.image);
  if (calibration) {
    if (calibration_.size() >= options_.max_calibration_images) {
      return absl::ResourceExhaustedError(
          absl::StrCat("calibration images: the limit is ", options_.max_calibration_images));
    }
    bytes_ += pixels.size() * sizeof(float);
    calibration_.push_back(std::move(pixels));
    calibration_hashes_.insert(hash);
  }
  if (evaluation) {
    bytes_ += sample.image.size();
    evaluation_.push_back(std::move(sample));
    evaluation_hashes_.push_back(hash);
  }
  if (bytes_ > options_.max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("images of this job: more than ", options_.max_bytes, " bytes"));
  }
  return absl::OkStatus();
}

absl::StatusOr<QuantizeOutcome> QuantizeJob::Run(
    const std::function<void(const JobProgress&)>& progress, const std::atomic<bool>* cancelled) {
  const absl::Time start = absl::Now();
  absl::StatusOr<QuantizeOutcome> outcome = RunPhases(progress, cancelled);
  const char* word = !outcome.ok() ? (absl::IsCancelled(outcome.status()) ? "cancelled" : "failed")
                     : !outcome->gate_met ? "rejected"
                     : options_.dry_run   ? "dry_run"
                                          : "published";
  metrics_->QuantizeJob(word, absl::Now() - start);
  TERN_LOG_INFO("quantize {} from version {}: {}{}", options_.model, options_.source_version, word,
                !outcome.ok()           ? absl::StrCat(": ", outcome.status().message())
                : outcome->version != 0 ? absl::StrCat(" as version ", outcome->version)
                                        : std::string());
  return outcome;
}

absl::StatusOr<QuantizeOutcome> QuantizeJob::RunPhases(
    const std::function<void(const JobProgress&)>& progress, const std::atomic<bool>* cancelled) {
  const absl::Time start = absl::Now();
  if (calibration_.empty()) {
    return absl::FailedPreconditionError("no calibration images were sent");
  }
  const bool gated = options_.recipe.has_max_top1_drop() && options_.recipe.max_top1_drop() >= 0;
  const bool labelled = std::any_of(evaluation_.begin(), evaluation_.end(),
                                    [](const Sample& s) { return s.label.has_value(); });
  if (gated && !labelled) {
    return absl::FailedPreconditionError(
        "max_top1_drop is set, but no labelled evaluation images were sent");
  }

  // Calibrate and quantise.
  const Shape shape = source_model_->plan->input_shape();
  quant::QuantizeOptions quantize;
  quantize.recipe = options_.recipe;
  quantize.threads = options_.threads;
  quantize.plan = options_.plan;
  quantize.cancelled = cancelled;
  quantize.progress = [&](const quant::Progress& p) {
    progress({p.phase, p.done, p.layer, p.seconds_left});
  };
  TERN_ASSIGN_OR_RETURN(
      quant::QuantizeResult quantized,
      quant::Quantize(source_.graph, quant::ToNchw(calibration_, shape), quantize));
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const engine::Plan> plan,
                        engine::Plan::Create(quantized.graph, options_.plan));

  artifact::Artifact artifact;
  artifact.graph = std::move(quantized.graph);
  artifact.preprocessing = source_model_->preprocessing;
  artifact.labels = source_model_->labels;
  artifact.source_sha256 = source_.sha256;
  artifact.report = std::move(quantized.report);
  v1::QuantizationReport& report = artifact.report;
  report.set_source_model(options_.model);
  report.set_source_version(options_.source_version);
  report.set_calibration_images(calibration_.size());
  report.set_evaluation_images(evaluation_.size());
  report.set_isa(source_model_->isa);

  // The plan that will serve decides what is reported, not the quantiser's simulation.
  {
    TERN_ASSIGN_OR_RETURN(std::unique_ptr<Evaluator> evaluator,
                          Evaluator::Create(plan, source_model_->plan, artifact.preprocessing,
                                            options_.limits, options_.threads));
    evaluator->CountCodes();
    for (const std::vector<float>& pixels : calibration_) {
      if (IsSet(cancelled)) return absl::CancelledError("cancelled by the caller");
      TERN_RETURN_IF_ERROR(evaluator->AddPixels(pixels, std::nullopt));
    }
    TERN_ASSIGN_OR_RETURN(const Counts counts, evaluator->Finish());
    *report.mutable_calibration_agreement() =
        statistics::MakeProportion(counts.agree, counts.images);
    *report.mutable_outputs() = evaluator->Outputs();
    report.mutable_outputs()->set_images_of("calibration");
    SetAtLimit(*plan, evaluator->codes(), report);
  }
  if (!evaluation_.empty()) {
    TERN_ASSIGN_OR_RETURN(std::unique_ptr<Evaluator> evaluator,
                          Evaluator::Create(plan, source_model_->plan, artifact.preprocessing,
                                            options_.limits, options_.threads));
    for (size_t i = 0; i < evaluation_.size(); ++i) {
      if (IsSet(cancelled)) return absl::CancelledError("cancelled by the caller");
      if (i % 64 == 0) {
        progress({"evaluating", static_cast<double>(i) / evaluation_.size(), "", -1});
      }
      TERN_RETURN_IF_ERROR(evaluator->Add(std::move(evaluation_[i])));
    }
    TERN_ASSIGN_OR_RETURN(const Counts counts, evaluator->Finish());
    *report.mutable_agreement() = statistics::MakeProportion(counts.agree, counts.images);
    *report.mutable_outputs() = evaluator->Outputs();
    report.mutable_outputs()->set_images_of("evaluation");
    if (counts.labelled > 0) {
      using statistics::MakeProportion;
      *report.mutable_top1() = MakeProportion(counts.top1, counts.labelled);
      *report.mutable_top5() = MakeProportion(counts.top5, counts.labelled);
      *report.mutable_float_top1() = MakeProportion(counts.reference_top1, counts.labelled);
      *report.mutable_float_top5() = MakeProportion(counts.reference_top5, counts.labelled);
      *report.mutable_comparison() = MakeComparison(counts);
      for (v1::ClassReport& worst : evaluator->classes().Worst(source_model_->labels)) {
        *report.add_worst_classes() = std::move(worst);
      }
      const std::string too_few = TooFewForDrop(
          report.comparison(),
          gated ? std::optional<double>(options_.recipe.max_top1_drop()) : std::nullopt);
      if (!too_few.empty()) report.add_warnings(too_few);
    }
    const auto overlapping =
        std::count_if(evaluation_hashes_.begin(), evaluation_hashes_.end(),
                      [this](const std::string& h) { return calibration_hashes_.contains(h); });
    if (overlapping > 0) {
      report.set_overlapping_images(static_cast<uint64_t>(overlapping));
      report.add_warnings(absl::StrCat(
          overlapping, " of ", evaluation_hashes_.size(),
          " evaluation images are calibration images too: accuracy and agreement are better on "
          "them than on images that the quantiser has not seen"));
    }
    const double gap = report.calibration_agreement().value() - report.agreement().value();
    if (gap > 0.10) {
      report.add_warnings(absl::StrFormat(
          "agreement with float is %.1f %% on calibration images but %.1f %% on fresh ones: the "
          "calibration set is too small or not like the evaluation set",
          100 * report.calibration_agreement().value(), 100 * report.agreement().value()));
    }
  }

  progress({"measuring", 0, "latency of float and quantised, one thread, batch 1", -1});
  BenchmarkOptions benchmark;
  benchmark.duration = absl::Milliseconds(700);
  benchmark.cancelled = [cancelled] { return IsSet(cancelled); };
  TERN_ASSIGN_OR_RETURN(const BenchmarkResult float_time,
                        Benchmark(source_model_->plan, benchmark));
  TERN_ASSIGN_OR_RETURN(const BenchmarkResult time, Benchmark(plan, benchmark));
  report.set_float_ms_per_image(float_time.p50_ms);
  report.set_ms_per_image(time.p50_ms);

  TERN_RETURN_IF_ERROR(quant::AddSelfTest(*plan, options_.threads, calibration_, artifact));

  report.set_seconds(absl::ToDoubleSeconds(absl::Now() - start));
  // The artifact holds its own size, whose varint is part of it: settles in two rounds.
  report.set_bytes(1);
  report.set_compression_ratio(1);
  for (int i = 0; i < 3; ++i) {
    const uint64_t bytes = artifact::Serialize(artifact).size();
    report.set_bytes(bytes);
    report.set_compression_ratio(static_cast<double>(report.float_bytes()) /
                                 static_cast<double>(bytes));
  }

  QuantizeOutcome outcome;
  if (gated) {
    const double drop = report.float_top1().value() - report.top1().value();
    if (drop > options_.recipe.max_top1_drop()) {
      report.add_warnings(absl::StrFormat("not published: top-1 drops by %.4f, the limit is %.4f",
                                          drop, options_.recipe.max_top1_drop()));
      outcome.gate_met = false;
      outcome.report = report;
      return outcome;
    }
  }
  if (options_.dry_run) {
    outcome.report = report;
    return outcome;
  }
  if (IsSet(cancelled)) return absl::CancelledError("cancelled by the caller");
  progress({"publishing", 0, "", -1});
  TERN_ASSIGN_OR_RETURN(
      const repository::VersionInfo info,
      repository_->Publish(options_.model, artifact, options_.set_default, source_.version));
  outcome.version = info.version;
  outcome.report = artifact.report;
  progress({"publishing", 1, "", 0});
  return outcome;
}

}  // namespace tern::serving
