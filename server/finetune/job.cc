#include "server/finetune/job.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"
#include "server/engine/plan.h"
#include "server/finetune/network.h"
#include "server/graph/passes.h"
#include "server/onnx/classifier.h"
#include "server/quant/measure.h"
#include "server/quant/self_test.h"
#include "statistics/statistics.h"

namespace tern::finetune {
namespace {

constexpr int64_t kBatch = 32;  // of the engine
// Images for the report's figures about layers.
constexpr int64_t kLayerImages = 256;

// The float network and the version to start from.
struct Inputs {
  graph::Graph source;
  artifact::Artifact start;
  std::string source_sha256, start_sha256;
};

absl::StatusOr<Inputs> ReadInputs(const JobOptions& options) {
  Inputs inputs;
  TERN_ASSIGN_OR_RETURN(const std::string onnx, ReadFile(options.float_model));
  inputs.source_sha256 = Sha256Hex(onnx);
  absl::StatusOr<graph::Graph> source = onnx::ImportClassifier(onnx);
  if (!source.ok()) return Annotate(source.status(), options.float_model);
  inputs.source = *std::move(source);
  graph::Optimize(inputs.source);
  TERN_ASSIGN_OR_RETURN(const std::string start, ReadFile(options.start));
  inputs.start_sha256 = Sha256Hex(start);
  TERN_ASSIGN_OR_RETURN(inputs.start, artifact::Parse(start, options.start));
  if (!inputs.start.source_sha256.empty() && inputs.start.source_sha256 != inputs.source_sha256) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.start, " was made from another float network than ", options.float_model,
        ": SHA-256 ", inputs.start.source_sha256, ", got ", inputs.source_sha256));
  }
  const Shape& shape = inputs.source.shape(inputs.source.input);
  if (shape.rank() != 3 || shape[0] != 3) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.float_model, ": the input is ", shape.ToString(), ", want [3, h, w]"));
  }
  TERN_RETURN_IF_ERROR(
      Annotate(image::ValidatePreprocessing(inputs.start.preprocessing, static_cast<int>(shape[1]),
                                            static_cast<int>(shape[2])),
               options.start));
  return inputs;
}

// Runs networks over the held-out images, in the engine that will serve them.
class Judge {
 public:
  Judge(const Loader& loader, int64_t images, int threads)
      : loader_(loader), images_(images), threads_(threads) {}

  struct Counts {
    uint64_t images = 0, top1 = 0, top5 = 0;
    // With a reference:
    uint64_t agree = 0, both_right = 0, only_reference_right = 0;
    std::vector<int> answers;  // by image
  };

  // `reference` (may be empty) holds the answers to compare with.
  absl::StatusOr<Counts> Measure(const graph::Graph& graph,
                                 const std::vector<int>& reference) const {
    engine::PlanOptions plan_options;
    plan_options.max_batch = kBatch;
    TERN_ASSIGN_OR_RETURN(const auto plan, engine::Plan::Create(graph, plan_options));
    TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(threads_));
    Counts counts;
    for (int64_t first = 0; first < images_; first += kBatch) {
      std::vector<int64_t> indices(std::min(kBatch, images_ - first));
      std::iota(indices.begin(), indices.end(), first);
      const Batch batch = loader_.Load(indices, 0);
      std::copy(batch.pixels.begin(), batch.pixels.end(), session.input().begin());
      const auto count = static_cast<int>(batch.labels.size());
      if (count == 0) continue;
      TERN_ASSIGN_OR_RETURN(const absl::Span<const float> logits, session.Run(count));
      for (int i = 0; i < count; ++i) {
        const auto row = logits.subspan(i * plan->classes(), plan->classes());
        TERN_RETURN_IF_ERROR(
            Annotate(classify::CheckFinite(row), absl::StrCat("held-out image ", first + i)));
        const int label = static_cast<int>(batch.labels[i]);
        const int answer = classify::TopK(row, 1)[0].index;
        counts.top1 += answer == label;
        counts.top5 += classify::InTopK(row, label, 5);
        if (counts.images < reference.size()) {
          const int other = reference[counts.images];
          counts.agree += other == answer;
          counts.both_right += other == label && answer == label;
          counts.only_reference_right += other == label && answer != label;
        }
        counts.answers.push_back(answer);
        ++counts.images;
      }
    }
    return counts;
  }

 private:
  const Loader& loader_;
  const int64_t images_;
  const int threads_;
};

// Signal-to-noise ratio and clipping of every weighted layer against the float network.
absl::Status MeasureLayers(const graph::Graph& source, const graph::Graph& graph,
                           const Loader& loader, int64_t images, v1::QuantizationReport& report) {
  at::NoGradGuard no_grad;
  TERN_ASSIGN_OR_RETURN(const Network teacher, Network::Float(source));
  TERN_ASSIGN_OR_RETURN(const Network network, Network::Quantised(source, graph));
  struct Sums {
    double signal = 0, noise = 0, clipped = 0, count = 0;
  };
  std::map<std::string, Sums> layers;
  Sums logits;
  const auto add = [](const at::Tensor& wanted, const at::Tensor& got, Sums& sums) {
    sums.signal += wanted.square().sum(at::kDouble).item<double>();
    sums.noise += (got - wanted).square().sum(at::kDouble).item<double>();
  };
  const int64_t count = std::min(images, kLayerImages);
  for (int64_t first = 0; first < count; first += kBatch) {
    std::vector<int64_t> indices(std::min(kBatch, count - first));
    std::iota(indices.begin(), indices.end(), first);
    Batch batch = loader.Load(indices, 0);
    const auto [height, width] = loader.size();
    const auto n = static_cast<int64_t>(batch.labels.size());
    if (n == 0) continue;
    const at::Tensor x =
        at::from_blob(batch.pixels.data(), {n, height, width, 3}, at::kFloat).permute({0, 3, 1, 2});
    const std::vector<at::Tensor> wanted = teacher.ForwardAll(x, nullptr);
    const std::vector<at::Tensor> got =
        network.ForwardAll(x, [&](const graph::Node& node, const at::Tensor& real) {
          const auto& quant = graph.values[node.output].quant;
          if (!quant) return;
          const double lo = (-0.5 - quant->zero_point) * quant->scale;
          const double hi = (255.5 - quant->zero_point) * quant->scale;
          layers[node.name].clipped += (real.lt(lo).sum() + real.gt(hi).sum()).item<double>();
          layers[node.name].count += static_cast<double>(real.numel());
        });
    for (const graph::Node& node : graph.nodes) {
      if (node.quantized) add(wanted[node.output], got[node.output], layers[node.name]);
    }
    add(wanted[graph.output], got[graph.output], logits);
  }
  for (v1::LayerReport& layer : *report.mutable_layers()) {
    const auto it = layers.find(layer.name());
    if (it == layers.end()) continue;
    layer.set_output_sqnr_db(quant::Decibels(it->second.signal, it->second.noise));
    layer.set_output_clipped(it->second.count > 0 ? it->second.clipped / it->second.count : 0);
  }
  report.set_sqnr_db(quant::Decibels(logits.signal, logits.noise));
  return absl::OkStatus();
}

// Inputs and logits that a server checks when it loads the artifact.
// From up to quant::kSelfTestCandidates of the loader's images, evenly spread.
absl::Status StoreSelfTest(const Loader& loader, int64_t images, artifact::Artifact& artifact) {
  engine::PlanOptions plan_options;
  plan_options.max_batch = 1;
  TERN_ASSIGN_OR_RETURN(const auto plan, engine::Plan::Create(artifact.graph, plan_options));
  std::vector<std::vector<float>> candidates;
  const int64_t step =
      std::max<int64_t>(1, images / static_cast<int64_t>(quant::kSelfTestCandidates));
  for (int64_t i = 0; i < images && candidates.size() < quant::kSelfTestCandidates; i += step) {
    Batch batch = loader.Load({i}, 0);
    if (!batch.labels.empty()) candidates.push_back(std::move(batch.pixels));
  }
  return quant::AddSelfTest(*plan, 1, candidates, artifact);
}

absl::StatusOr<v1::QuantizationReport> Execute(
    const JobOptions& options, const std::function<void(const Progress&)>& progress) {
  TERN_ASSIGN_OR_RETURN(Inputs inputs, ReadInputs(options));
  const Shape shape = inputs.source.shape(inputs.source.input);
  if (!(options.held_out > 0 && options.held_out < 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("held-out share: got ", options.held_out, ", want more than 0, less than 1"));
  }
  TERN_ASSIGN_OR_RETURN(const std::vector<LabelledImage> images,
                        ListLabelledImages(options.data, inputs.start.labels,
                                           inputs.source.classes(), options.label_offset));
  const Split split = SplitImages(images, options.held_out, options.limit, options.train.seed);
  if (split.held_out.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(options.data, ": a share of ", options.held_out,
                                                   " of ", images.size(),
                                                   " images holds none out; give a larger one"));
  }
  const auto training = static_cast<int64_t>(split.training.size());
  const auto held_out = static_cast<int64_t>(split.held_out.size());
  TERN_LOG_INFO("{}: {} images to train on, {} held out, {} classes", options.data, training,
                held_out, inputs.source.classes());
  TERN_ASSIGN_OR_RETURN(const Loader loader,
                        Loader::Create(&split.training, inputs.start.preprocessing, shape,
                                       options.augmentation, options.train.seed));
  TERN_ASSIGN_OR_RETURN(
      const Loader held_loader,
      Loader::Create(&split.held_out, inputs.start.preprocessing, shape, {}, options.train.seed));

  const Judge judge(held_loader, held_out, options.train.threads);
  TERN_ASSIGN_OR_RETURN(const Judge::Counts reference, judge.Measure(inputs.source, {}));
  TERN_LOG_INFO(
      "float: {:.2f} % of the held-out images",
      100.0 * static_cast<double>(reference.top1) / static_cast<double>(reference.images));

  TrainOptions train = options.train;
  train.settings["float network"] = inputs.source_sha256;
  train.settings["start version"] = inputs.start_sha256;
  train.settings["training images' names"] = Fingerprint(split.training);
  train.settings["held-out images' names"] = Fingerprint(split.held_out);
  train.settings["flip"] = options.augmentation.flip ? "yes" : "no";
  train.settings["crop padding"] = absl::StrCat(options.augmentation.crop_padding);
  const auto measure = [&](const graph::Graph& graph) -> absl::StatusOr<uint64_t> {
    TERN_ASSIGN_OR_RETURN(const Judge::Counts counts, judge.Measure(graph, {}));
    return counts.top1;
  };
  TERN_ASSIGN_OR_RETURN(TrainResult trained, Train(inputs.source, inputs.start.graph, loader,
                                                   training, measure, train, progress));

  artifact::Artifact artifact = std::move(inputs.start);
  artifact.graph = std::move(trained.graph);
  artifact.source_sha256 = inputs.source_sha256;
  TERN_ASSIGN_OR_RETURN(const Judge::Counts counts,
                        judge.Measure(artifact.graph, reference.answers));
  v1::QuantizationReport& report = artifact.report;
  v1::FineTuningReport& tuning = *report.mutable_fine_tuning();
  tuning.Clear();
  for (const EpochResult& epoch : trained.epochs) {
    v1::FineTuningReport::Epoch& to = *tuning.add_epochs();
    to.set_epoch(static_cast<uint64_t>(epoch.epoch));
    to.set_loss(epoch.loss);
    to.set_accuracy(epoch.accuracy);
    *to.mutable_top1() = statistics::MakeProportion(epoch.held_out_top1, counts.images);
  }
  tuning.set_best_epoch(static_cast<uint64_t>(trained.best_epoch));
  tuning.set_training_images(static_cast<uint64_t>(training));
  tuning.set_held_out_images(counts.images);
  tuning.set_learning_rate(train.learning_rate);
  tuning.set_distillation_weight(train.distil_weight);
  tuning.set_seconds(trained.seconds);
  *tuning.mutable_float_top1() = statistics::MakeProportion(reference.top1, reference.images);
  *tuning.mutable_start_top1() = tuning.epochs(0).top1();
  *tuning.mutable_top1() = statistics::MakeProportion(counts.top1, counts.images);
  report.set_evaluation_images(counts.images);
  *report.mutable_top1() = tuning.top1();
  *report.mutable_top5() = statistics::MakeProportion(counts.top5, counts.images);
  *report.mutable_float_top1() = tuning.float_top1();
  *report.mutable_float_top5() = statistics::MakeProportion(reference.top5, reference.images);
  *report.mutable_agreement() = statistics::MakeProportion(counts.agree, counts.images);
  *report.mutable_comparison() = statistics::MakeComparison(
      counts.both_right, counts.only_reference_right, counts.top1 - counts.both_right,
      counts.images - counts.top1 - counts.only_reference_right);
  // Of the start version only.
  report.clear_worst_classes();
  report.clear_outputs();
  for (v1::LayerReport& layer : *report.mutable_layers()) layer.clear_output_at_limit();
  report.clear_overlapping_images();
  report.clear_warnings();
  if (trained.best_epoch == 0) {
    report.add_warnings(
        "no epoch was as good on the held-out images as the version it started "
        "from: this is that version");
  }
  if (trained.unreadable > 0) {
    report.add_warnings(
        absl::StrCat(trained.unreadable, " times an image that cannot be read was left out"));
  }
  TERN_RETURN_IF_ERROR(MeasureLayers(inputs.source, artifact.graph, held_loader, held_out, report));
  TERN_RETURN_IF_ERROR(StoreSelfTest(held_loader, held_out, artifact));
  // The artifact holds its own size, whose varint is part of it: settles in two rounds.
  for (int i = 0; i < 3; ++i) {
    const uint64_t bytes = artifact::Serialize(artifact).size();
    report.set_bytes(bytes);
    report.set_compression_ratio(static_cast<double>(report.float_bytes()) /
                                 static_cast<double>(bytes));
  }
  TERN_RETURN_IF_ERROR(artifact::Write(artifact, options.output));
  return report;
}

}  // namespace

absl::StatusOr<v1::QuantizationReport> RunJob(
    const JobOptions& options, const std::function<void(const Progress&)>& progress) {
  try {
    return Execute(options, progress);
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("torch: ", error.what()));
  }
}

}  // namespace tern::finetune
