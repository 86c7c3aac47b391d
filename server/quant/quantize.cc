#include "server/quant/quantize.h"

#include <cfloat>
#include <cmath>
#include <set>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/quant/walk.h"

namespace tern::quant {
namespace {

// Larger clusters would be allowed by the arithmetic, but no layer gains from them that N = 0 (all)
// does not serve.
constexpr uint32_t kMaxClusterSize = 256;

absl::Status CheckClusterSize(uint32_t size, const std::string& field) {
  if (size <= kMaxClusterSize) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", size, "; wanted 1..",
                                                 kMaxClusterSize, ", or 0 for all channels"));
}

bool IsLayerType(int weights) {
  return weights == v1::INT8 || weights == v1::INT4_CLUSTER || weights == v1::TERNARY_CLUSTER;
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
  if (recipe.has_target_bits() && !(recipe.target_bits() >= 2 && recipe.target_bits() <= 8)) {
    return absl::InvalidArgumentError(absl::StrCat("recipe.target_bits is ", recipe.target_bits(),
                                                   "; wanted 2..8 bits per weight"));
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
                                                     "; wanted INT8, INT4_CLUSTER or "
                                                     "TERNARY_CLUSTER"));
    }
    TERN_RETURN_IF_ERROR(CheckClusterSize(choice.cluster_size(), field + ".cluster_size"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateRecipe(const v1::Recipe& recipe) {
  const int weights = recipe.weights();
  if (!IsLayerType(weights) && weights != v1::MIXED) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.weights is ", NameOf(weights),
                     "; wanted INT8, INT4_CLUSTER, TERNARY_CLUSTER or MIXED"));
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
  std::set<std::string> layers;
  for (const graph::Node& node : graph.nodes) {
    if (node.quantized) {
      return absl::InvalidArgumentError(
          absl::StrCat("the network is quantised already (", node.name, ")"));
    }
    if (node.op != graph::OpType::kConv && node.op != graph::OpType::kFullyConnected) continue;
    ++weighted;
    layers.insert(node.name);
  }
  for (const v1::LayerChoice& choice : options.recipe.layers()) {
    if (!layers.contains(choice.layer())) {
      return absl::InvalidArgumentError(
          absl::StrCat("recipe.layers names ", choice.layer(),
                       ", which is no convolution or fully connected layer of the network"));
    }
  }
  if (options.recipe.weights() == v1::MIXED || options.recipe.layers_size() > 0 ||
      options.recipe.distillation() == v1::DISTILL_NETWORK ||
      options.recipe.distillation() == v1::DISTILL_BLOCKS) {
    return absl::UnimplementedError(
        "mixed precision, recipe.layers and distillation are not part of this build");
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
  return Walk(graph, calibration, options).Run();
}

}  // namespace tern::quant
