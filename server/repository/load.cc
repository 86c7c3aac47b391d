#include "server/repository/load.h"

#include <algorithm>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/graph/passes.h"
#include "server/image/image.h"
#include "server/onnx/classifier.h"
#include "server/repository/storage.h"

namespace tern::repository {
namespace {

// Of the self-test of a version that served before: all four stored images of a CIFAR network, one
// of a ResNet-50, whose four would be most of its start.
constexpr int64_t kReloadMacs = 1'000'000'000;

// Marks the errors for IsFailedSelfTest.
constexpr char kSelfTestPayload[] = "tern.self_test";

// The scheme with the fewest bits, and its cluster size.
struct WeightSummary {
  std::string scheme = "fp32";
  uint32_t cluster_size = 0;
};

WeightSummary Summarize(const graph::Graph& graph) {
  WeightSummary summary;
  int least_bits = 32;
  for (const graph::Node& node : graph.nodes) {
    if (!node.quantized.has_value()) continue;
    const int bits = CodeBits(node.quantized->scheme);
    if (bits < least_bits) {
      least_bits = bits;
      summary.scheme = Name(node.quantized->scheme);
      summary.cluster_size = node.quantized->cluster_size;
    }
  }
  return summary;
}

// As an artifact would store the weights; float ones take 32.
double BitsPerWeight(const graph::Graph& graph) {
  double bits = 0, weights = 0;
  for (const graph::Node& node : graph.nodes) {
    if (node.quantized.has_value()) {
      bits += static_cast<double>(StoredBits(*node.quantized));
      weights += node.quantized->codes.elements();
    } else if (node.op == graph::OpType::kConv || node.op == graph::OpType::kFullyConnected) {
      bits += 32.0 * node.weight.elements();
      weights += node.weight.elements();
    }
  }
  return weights > 0 ? bits / weights : 32;
}

void Describe(const graph::Graph& graph, LoadedModel& loaded) {
  const WeightSummary summary = Summarize(graph);
  VersionInfo& info = loaded.info;
  info.scheme = summary.scheme;
  info.cluster_size = summary.cluster_size;
  // Codes between float weights are no float network either: it cannot be a source of Quantize.
  if (info.scheme == "fp32" && IsQuantized(graph)) info.scheme = Name(WeightScheme::kInt8);
  if (loaded.report.recipe().weights() != v1::WEIGHT_TYPE_UNSPECIFIED) {
    info.cluster_size = loaded.report.recipe().cluster_size();  // as asked for; 0 = all channels
  }
  const double reported = loaded.report.bits_per_weight();
  info.bits_per_weight = reported > 0 ? reported : BitsPerWeight(graph);
  info.classes = graph.classes();
  info.input_shape = graph.shape(graph.input);
}

}  // namespace

bool IsQuantized(const graph::Graph& graph) {
  return std::any_of(graph.values.begin(), graph.values.end(),
                     [](const graph::Value& value) { return value.quant.has_value(); }) ||
         std::any_of(graph.nodes.begin(), graph.nodes.end(),
                     [](const graph::Node& node) { return node.quantized.has_value(); });
}

bool IsFailedSelfTest(const absl::Status& status) {
  return status.GetPayload(kSelfTestPayload).has_value();
}

absl::Status CheckContract(const graph::Graph& graph, const v1::Preprocessing& contract) {
  const Shape& shape = graph.shape(graph.input);
  // Larger images than any network takes; keeps sizes inside int for the image code.
  constexpr int64_t kMaxSide = 1 << 14;
  if (shape.rank() != 3 || shape[0] != 3 || shape[1] > kMaxSide || shape[2] > kMaxSide) {
    return absl::InvalidArgumentError(absl::StrCat("the network's input is ", shape.ToString(),
                                                   ", want [3, h, w] with sides of at most ",
                                                   kMaxSide));
  }
  return image::ValidatePreprocessing(contract, static_cast<int>(shape[1]),
                                      static_cast<int>(shape[2]));
}

absl::StatusOr<std::shared_ptr<LoadedModel>> LoadVersion(const std::string& model_folder,
                                                         const std::string& version_folder,
                                                         Origin origin,
                                                         const RepositoryOptions& options) {
  TERN_ASSIGN_OR_RETURN(const VersionFile file,
                        FindVersionFile(version_folder, options.max_file_bytes));
  auto loaded = std::make_shared<LoadedModel>();
  TERN_ASSIGN_OR_RETURN(loaded->config, ReadConfig(model_folder));
  engine::PlanOptions plan_options = options.plan;
  loaded->isa = kernels::IsaName(plan_options.isa);
  plan_options.max_batch = std::max(plan_options.max_batch,
                                    static_cast<int>(loaded->config.batching().max_batch_size()));

  // The files of a new version bear temporary names, which tell its importer nothing.
  const auto name = [origin](const char* what, const std::string& path) {
    return origin == Origin::kNew ? std::string(what) : path;
  };
  const std::string network = name("the network", file.path);
  graph::Graph graph;
  if (file.quantized) {
    auto artifact = artifact::Read(file.path, plan_options.load_threads);
    if (!artifact.ok()) return artifact.status();
    loaded->preprocessing = artifact->preprocessing;
    loaded->report = artifact->report;
    TERN_RETURN_IF_ERROR(Annotate(CheckContract(artifact->graph, loaded->preprocessing), network));
    auto plan = engine::Plan::Create(artifact->graph, plan_options);
    if (!plan.ok()) return Annotate(plan.status(), network);
    SelfTestOptions self_test;
    self_test.threads = plan_options.load_threads;
    if (origin == Origin::kKnown) self_test.most_macs = kReloadMacs;
    absl::Status tested = Annotate(SelfTest(*artifact, **plan, self_test), network);
    if (!tested.ok()) {
      if (absl::IsDataLoss(tested)) tested.SetPayload(kSelfTestPayload, absl::Cord());
      return tested;
    }
    loaded->self_tested = !artifact->self_test_input.empty();
    loaded->plan = *std::move(plan);
    loaded->labels = std::move(artifact->labels);
    graph = std::move(artifact->graph);
  } else {
    TERN_ASSIGN_OR_RETURN(const std::string bytes,
                          ReadRegularFile(file.path, options.max_file_bytes));
    auto imported = onnx::ImportClassifier(bytes);
    if (!imported.ok()) return Annotate(imported.status(), network);
    graph = *std::move(imported);
    graph::Optimize(graph);
    loaded->preprocessing = loaded->config.preprocessing();
    TERN_RETURN_IF_ERROR(
        Annotate(CheckContract(graph, loaded->preprocessing),
                 name("the contract", absl::StrCat(model_folder, "/", kConfigFile))));
    auto plan = engine::Plan::Create(graph, plan_options);
    if (!plan.ok()) return Annotate(plan.status(), network);
    loaded->plan = *std::move(plan);
  }
  // The engine has named them in the log.
  for (const engine::LayerInfo& layer : loaded->plan->layers()) {
    if (options.metrics != nullptr && layer.macs > 0 &&
        absl::StartsWith(layer.implementation, "float-island")) {
      options.metrics->Fallback("float_island");
    }
  }
  if (loaded->labels.empty()) {
    TERN_ASSIGN_OR_RETURN(loaded->labels,
                          ReadLabels(model_folder, loaded->config, graph.classes()));
  }
  if (!loaded->labels.empty() && static_cast<int64_t>(loaded->labels.size()) != graph.classes()) {
    return absl::InvalidArgumentError(absl::StrCat(network, ": ", loaded->labels.size(),
                                                   " labels for ", graph.classes(), " classes"));
  }
  Describe(graph, *loaded);
  loaded->info.file_bytes = file.bytes;
  loaded->info.state = State::kReady;
  return loaded;
}

std::vector<std::pair<std::string, std::string>> MetadataOf(const artifact::Artifact& artifact) {
  const WeightSummary summary = Summarize(artifact.graph);
  std::string scheme = summary.scheme;
  if (summary.cluster_size > 0) absl::StrAppend(&scheme, " N=", summary.cluster_size);
  v1::QuantizationReport report = artifact.report;
  report.clear_layers();
  report.clear_float_nodes();
  report.clear_warnings();
  report.clear_worst_classes();
  report.clear_sensitivity();
  report.clear_frontier();
  report.clear_outputs();
  return {{"tern.scheme", scheme},
          {"tern.source_sha256", artifact.source_sha256},
          {"tern.preprocessing", artifact.preprocessing.ShortDebugString()},
          {"tern.report", report.ShortDebugString()}};
}

metrics::ReportGauges GaugesOf(const v1::QuantizationReport& report) {
  metrics::ReportGauges gauges;
  if (report.top1().total() > 0 && report.float_top1().value() > 0) {
    gauges.top1_ratio = report.top1().value() / report.float_top1().value();
  }
  if (report.top1().total() > 0) {
    gauges.top1 = report.top1().value();
    gauges.top1_low = report.top1().low();
  }
  if (report.agreement().total() > 0) {
    gauges.top1_agreement = report.agreement().value();
    gauges.top1_agreement_low = report.agreement().low();
  }
  for (const v1::LayerReport& layer : report.layers()) {
    gauges.layer_sqnr_db.emplace_back(layer.name(), layer.output_sqnr_db());
    gauges.layer_clipped.emplace_back(layer.name(), layer.output_clipped());
    if (layer.has_output_at_limit()) {
      gauges.layer_at_limit.emplace_back(layer.name(), layer.output_at_limit());
    }
  }
  return gauges;
}

}  // namespace tern::repository
