#include "client/recipe.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/status.h"

namespace tern::client {

absl::StatusOr<uint32_t> ParseClusterSize(const std::string& text) {
  uint32_t size = 0;
  if (text == "all") return 0u;
  if (!absl::SimpleAtoi(text, &size) || size < 1 || size > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("cluster size: got '", text, "', want 1..256 or all"));
  }
  return size;
}

absl::StatusOr<v1::LayerChoice> ParseLayerChoice(const std::string& text) {
  const size_t equals = text.rfind('=');
  const std::string value = equals == std::string::npos ? "" : text.substr(equals + 1);
  const size_t colon = value.find(':');
  const v1::WeightType weights = WeightsNamed(value.substr(0, colon));
  const bool clustered = IsClustered(weights);
  if (equals == std::string::npos || equals == 0 || (!clustered && weights != v1::INT8) ||
      clustered != (colon != std::string::npos)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "got '", text, "', want NAME=int8, NAME=int4:N, NAME=int3:N or NAME=ternary:N"));
  }
  v1::LayerChoice choice;
  choice.set_layer(text.substr(0, equals));
  choice.set_weights(weights);
  if (clustered) {
    TERN_CLIENT_ASSIGN_OR_RETURN(const uint32_t size, ParseClusterSize(value.substr(colon + 1)));
    choice.set_cluster_size(size);
  }
  return choice;
}

bool IsClustered(v1::WeightType weights) {
  return weights == v1::INT4_CLUSTER || weights == v1::INT3_CLUSTER ||
         weights == v1::TERNARY_CLUSTER;
}

v1::WeightType WeightsNamed(const std::string& name) {
  if (name == "int8") return v1::INT8;
  if (name == "int4") return v1::INT4_CLUSTER;
  if (name == "int3") return v1::INT3_CLUSTER;
  if (name == "ternary") return v1::TERNARY_CLUSTER;
  if (name == "mixed") return v1::MIXED;
  return v1::WEIGHT_TYPE_UNSPECIFIED;
}

std::string NameOf(v1::WeightType weights) {
  switch (weights) {
    case v1::FP32:
      return "float";
    case v1::INT8:
      return "int8";
    case v1::INT4_CLUSTER:
      return "int4";
    case v1::INT3_CLUSTER:
      return "int3";
    case v1::TERNARY_CLUSTER:
      return "ternary";
    case v1::MIXED:
      return "mixed";
    default:
      return "?";
  }
}

v1::Method MethodNamed(const std::string& name) {
  return name == "direct" ? v1::DIRECT : name == "corrected" ? v1::CORRECTED : v1::COMPENSATED;
}

std::string NameOf(v1::Method method) {
  switch (method) {
    case v1::COMPENSATED:
      return "compensated";
    case v1::CORRECTED:
      return "corrected";
    case v1::DIRECT:
      return "direct";
    default:
      return "?";
  }
}

v1::ActivationType ActivationsNamed(const std::string& name) {
  return name == "dfp8" ? v1::DFP8 : v1::AFFINE;
}

std::string NameOf(v1::ActivationType activations) {
  switch (activations) {
    case v1::AFFINE:
      return "affine";
    case v1::DFP8:
      return "dfp8";
    default:
      return "?";
  }
}

v1::Distillation DistillationNamed(const std::string& name) {
  if (name == "off") return v1::DISTILL_OFF;
  if (name == "network") return v1::DISTILL_NETWORK;
  if (name == "blocks") return v1::DISTILL_BLOCKS;
  return v1::DISTILL_AUTO;
}

std::string NameOf(v1::Distillation distillation) {
  switch (distillation) {
    case v1::DISTILL_AUTO:
      return "auto";
    case v1::DISTILL_OFF:
      return "off";
    case v1::DISTILL_NETWORK:
      return "network";
    case v1::DISTILL_BLOCKS:
      return "blocks";
    default:
      return "?";
  }
}

std::string ClusterName(v1::WeightType weights, uint32_t cluster_size) {
  if (!IsClustered(weights)) return "-";
  return cluster_size == 0 ? "all" : absl::StrCat(cluster_size);
}

}  // namespace tern::client
