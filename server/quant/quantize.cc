#include "server/quant/quantize.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/quant/distill.h"
#include "server/quant/measure.h"
#include "server/quant/mixed.h"
#include "server/quant/walk.h"

namespace tern::quant {
namespace {

// Larger clusters would be allowed by the arithmetic, but no layer gains from them that N = 0 (all)
// does not serve.
constexpr uint32_t kMaxClusterSize = 256;
// With fewer calibration images too few are left to judge a distillation by.
constexpr int64_t kLeastForDistillation = 100;
// Mixed precision needs some to build layers with, to measure and to judge.
constexpr int64_t kLeastForMixed = 50;
constexpr int64_t kMostHeldOut = 100;
// Images for the report's figures about a distilled network's layers: one pass of each network.
constexpr size_t kMeasuredImages = 64;
// A network that agrees with the float one on so large a share of the calibration images, of those
// apart too, is not distilled.
constexpr double kNothingToWin = 0.97;

// What the recipe's wish comes to.
v1::Distillation DistillationFor(const v1::Recipe& recipe, int64_t images) {
  if (recipe.method() != v1::COMPENSATED) return v1::DISTILL_OFF;
  if (recipe.distillation() != v1::DISTILL_AUTO) return recipe.distillation();
  const bool clustered =
      recipe.weights() != v1::INT8 ||
      std::any_of(recipe.layers().begin(), recipe.layers().end(),
                  [](const v1::LayerChoice& choice) { return choice.weights() != v1::INT8; });
  // int8 has nothing to win: its scales are as good as they get.
  return clustered && images >= kLeastForDistillation ? v1::DISTILL_AUTO : v1::DISTILL_OFF;
}

absl::Status CheckLayerNames(const graph::Graph& graph, const v1::Recipe& recipe) {
  for (const v1::LayerChoice& choice : recipe.layers()) {
    const auto node = std::find_if(graph.nodes.begin(), graph.nodes.end(), [&](const auto& n) {
      return n.name == choice.layer() &&
             (n.op == graph::OpType::kConv || n.op == graph::OpType::kFullyConnected);
    });
    if (node == graph.nodes.end()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "recipe.layers: the network has no convolution or fully connected layer named '",
          choice.layer(), "'"));
    }
    if (node->conv.groups != 1 && choice.weights() != v1::INT8) {
      return absl::InvalidArgumentError(absl::StrCat("recipe.layers: ", choice.layer(), " has ",
                                                     node->conv.groups,
                                                     " groups; grouped layers are INT8 only"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckClusterSize(uint32_t size, const std::string& field) {
  if (size <= kMaxClusterSize) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", size, "; wanted 1..",
                                                 kMaxClusterSize, ", or 0 for all channels"));
}

bool IsLayerType(int weights) {
  return weights == v1::INT8 || weights == v1::INT4_CLUSTER || weights == v1::INT3_CLUSTER ||
         weights == v1::TERNARY_CLUSTER;
}

std::string NameOf(int weights) {
  return absl::StrCat(v1::WeightType_IsValid(weights)
                          ? v1::WeightType_Name(static_cast<v1::WeightType>(weights))
                          : "unknown",
                      " (", weights, ")");
}

absl::Status CheckBudget(const v1::Recipe& recipe) {
  const bool mixed = recipe.weights() == v1::MIXED;
  if (!mixed && (recipe.has_target_bits() || recipe.has_target_ms())) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.", recipe.has_target_bits() ? "target_bits" : "target_ms",
                     " is set for weights ", NameOf(recipe.weights()), "; it is for MIXED only"));
  }
  if (recipe.has_target_bits() && !(recipe.target_bits() >= 1.6 && recipe.target_bits() <= 8)) {
    return absl::InvalidArgumentError(absl::StrCat("recipe.target_bits is ", recipe.target_bits(),
                                                   "; wanted 1.6..8 bits per weight"));
  }
  if (recipe.has_target_ms() && !(recipe.target_ms() > 0 && recipe.target_ms() <= 1e6)) {
    return absl::InvalidArgumentError(absl::StrCat("recipe.target_ms is ", recipe.target_ms(),
                                                   "; wanted more than 0 and at most 1000000"));
  }
  const bool drop = recipe.has_max_top1_drop() && recipe.max_top1_drop() >= 0;
  const int budgets = recipe.has_target_bits() + recipe.has_target_ms();
  if (mixed && (budgets > 1 || (budgets == 0 && !drop))) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe of weights MIXED has ", budgets == 0 ? "no budget" : "two budgets",
                     "; wanted target_bits or target_ms, or else max_top1_drop >= 0"));
  }
  return absl::OkStatus();
}

absl::Status CheckLayers(const v1::Recipe& recipe) {
  std::set<std::string> seen;
  for (const v1::LayerChoice& choice : recipe.layers()) {
    if (choice.layer().empty()) {
      return absl::InvalidArgumentError("recipe.layers has an entry without a layer's name");
    }
    const std::string field = absl::StrCat("recipe.layers[", choice.layer(), "]");
    if (!seen.insert(choice.layer()).second) {
      return absl::InvalidArgumentError(absl::StrCat(field, " is there twice"));
    }
    if (!IsLayerType(choice.weights())) {
      return absl::InvalidArgumentError(absl::StrCat(field, ".weights is ",
                                                     NameOf(choice.weights()),
                                                     "; wanted INT8, INT4_CLUSTER, "
                                                     "INT3_CLUSTER or TERNARY_CLUSTER"));
    }
    TERN_RETURN_IF_ERROR(CheckClusterSize(choice.cluster_size(), field + ".cluster_size"));
  }
  return absl::OkStatus();
}

absl::StatusOr<QuantizeResult> Logged(const graph::Graph& graph,
                                      absl::StatusOr<QuantizeResult> result) {
  if (!result.ok()) return result;
  for (const std::string& warning : result->report.warnings())
    TERN_LOG_WARN("quantising {}: {}", graph.name, warning);
  return result;
}

}  // namespace

absl::Status ValidateRecipe(const v1::Recipe& recipe) {
  const int weights = recipe.weights();
  if (!IsLayerType(weights) && weights != v1::MIXED) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.weights is ", NameOf(weights),
                     "; wanted INT8, INT4_CLUSTER, INT3_CLUSTER, TERNARY_CLUSTER or MIXED"));
  }
  TERN_RETURN_IF_ERROR(CheckClusterSize(recipe.cluster_size(), "recipe.cluster_size"));
  if (!v1::ActivationType_IsValid(recipe.activations())) {
    return absl::InvalidArgumentError(absl::StrCat("recipe.activations is ",
                                                   static_cast<int>(recipe.activations()),
                                                   "; wanted AFFINE or DFP8"));
  }
  if (!v1::Method_IsValid(recipe.method())) {
    return absl::InvalidArgumentError(absl::StrCat("recipe.method is ",
                                                   static_cast<int>(recipe.method()),
                                                   "; wanted COMPENSATED, CORRECTED or DIRECT"));
  }
  if (recipe.has_max_top1_drop() && !(recipe.max_top1_drop() <= 1.0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.max_top1_drop is ", recipe.max_top1_drop(),
                     "; wanted a fraction of at most 1 (0.01 is one point)"));
  }
  if (!v1::Distillation_IsValid(recipe.distillation())) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.distillation is ", static_cast<int>(recipe.distillation()),
                     "; wanted DISTILL_AUTO, DISTILL_OFF, DISTILL_NETWORK or DISTILL_BLOCKS"));
  }
  TERN_RETURN_IF_ERROR(CheckBudget(recipe));
  return CheckLayers(recipe);
}

absl::StatusOr<QuantizeResult> Quantize(const graph::Graph& graph, const Tensor& calibration,
                                        const QuantizeOptions& options) {
  TERN_RETURN_IF_ERROR(ValidateRecipe(options.recipe));
  TERN_RETURN_IF_ERROR(graph::Validate(graph));
  if (options.threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", options.threads, "; wanted at least 1"));
  }
  int weighted = 0;
  for (const graph::Node& node : graph.nodes) {
    if (node.quantized) {
      return absl::InvalidArgumentError(
          absl::StrCat("the network is quantised already (", node.name, ")"));
    }
    if (node.op != graph::OpType::kConv && node.op != graph::OpType::kFullyConnected) continue;
    ++weighted;
  }
  int last = graph.ProducerOf(graph.output);
  while (last >= 0 && graph.nodes[last].op == graph::OpType::kReshape)
    last = graph.ProducerOf(graph.nodes[last].inputs[0]);
  if (last >= 0 && graph.nodes[last].op == graph::OpType::kSoftmax) {
    return absl::InvalidArgumentError(absl::StrCat("the network ends in a softmax (",
                                                   graph.nodes[last].name,
                                                   "); wanted one whose output is the logits"));
  }
  if (weighted == 0)
    return absl::InvalidArgumentError("the network has no convolution or fully connected layer");
  const Shape& sample = graph.shape(graph.input);
  const Shape& got = calibration.shape();
  if (calibration.dtype() != DType::kF32 || got.rank() != sample.rank() + 1 || got[0] < 1 ||
      got != sample.WithBatch(got[0])) {
    return absl::InvalidArgumentError(
        absl::StrCat("calibration images are ", Name(calibration.dtype()), " ", got.ToString(),
                     "; wanted f32 [n, ...", sample.ToString(), "] with n >= 1"));
  }
  for (float v : calibration.data<float>()) {
    if (!(std::fabs(v) <= FLT_MAX))
      return absl::InvalidArgumentError("calibration images hold non-finite values");
  }
  TERN_RETURN_IF_ERROR(CheckLayerNames(graph, options.recipe));
  const bool mixed = options.recipe.weights() == v1::MIXED;
  if (mixed && got[0] < kLeastForMixed) {
    return absl::InvalidArgumentError(absl::StrCat(
        "mixed precision wants at least ", kLeastForMixed, " calibration images, got ", got[0]));
  }
  std::vector<int64_t> all(got[0]), train, held_out;
  std::iota(all.begin(), all.end(), 0);
  if (!mixed && DistillationFor(options.recipe, got[0]) == v1::DISTILL_OFF)
    return Logged(graph, QuantizeAndDistill(graph, calibration, all, {}, options));
  // Every k-th image is kept apart, to judge by.
  const int64_t apart = std::min(got[0] / 10, kMostHeldOut);
  for (int64_t i = 0; i < got[0]; ++i)
    (i * apart / got[0] != (i + 1) * apart / got[0] ? held_out : train).push_back(i);
  return Logged(graph, mixed ? QuantizeMixed(graph, calibration, train, held_out, options)
                             : QuantizeAndDistill(graph, calibration, train, held_out, options));
}

absl::StatusOr<QuantizeResult> QuantizeAndDistill(const graph::Graph& graph,
                                                  const Tensor& calibration,
                                                  absl::Span<const int64_t> train,
                                                  absl::Span<const int64_t> held_out,
                                                  const QuantizeOptions& options) {
  const v1::Distillation kind = DistillationFor(options.recipe, calibration.shape()[0]);
  const bool whole = static_cast<int64_t>(train.size()) == calibration.shape()[0];
  TERN_ASSIGN_OR_RETURN(QuantizeResult result,
                        whole ? Walk(graph, calibration, options).Run()
                              : Walk(graph, TakeImages(calibration, train), options).Run());
  if (kind == v1::DISTILL_OFF) return result;
  if (kind == v1::DISTILL_AUTO && result.report.calibration_agreement().value() >= kNothingToWin) {
    // The images that built the codes flatter a network with few of them; the others do not.
    TERN_ASSIGN_OR_RETURN(const Tensor wanted, RunEngine(graph, calibration, held_out, options.plan,
                                                         options.threads, options.cancelled));
    TERN_ASSIGN_OR_RETURN(const Tensor got,
                          RunEngine(result.graph, calibration, held_out, options.plan,
                                    options.threads, options.cancelled));
    if (Compare(wanted, got).agreement >= kNothingToWin) return result;
  }
  DistillOptions distill;
  distill.kind = kind;
  distill.seed = options.recipe.seed();
  distill.power_of_two_steps = options.recipe.activations() == v1::DFP8;
  distill.threads = options.threads;
  distill.plan = options.plan;
  distill.cancelled = options.cancelled;
  const absl::Time start = absl::Now();
  distill.progress = [&](double done) {
    if (!options.progress) return;
    Progress progress;
    progress.phase = "distilling";
    progress.done = done;
    progress.seconds_left = absl::ToDoubleSeconds(absl::Now() - start) * (1 - done) / done;
    options.progress(progress);
  };
  TERN_ASSIGN_OR_RETURN(*result.report.mutable_distillation(),
                        Distill(graph, calibration, train, held_out, distill, result.graph));
  if (!result.report.distillation().kept()) return result;
  std::vector<int64_t> measured;
  const size_t count = std::min(kMeasuredImages, train.size());
  for (size_t i = 0; i < count; ++i) measured.push_back(train[i * train.size() / count]);
  TERN_RETURN_IF_ERROR(MeasureOutputs(graph, result.graph, calibration, measured, options.threads,
                                      options.cancelled, result.report));
  return result;
}

}  // namespace tern::quant
