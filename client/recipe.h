// The words of the command line for recipes, and back.
#ifndef TERN_CLIENT_RECIPE_H_
#define TERN_CLIENT_RECIPE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "tern/v1/model.pb.h"

namespace tern::client {

// 1..256, or 0 for `all`. INVALID_ARGUMENT otherwise.
absl::StatusOr<uint32_t> ParseClusterSize(const std::string& text);

// NAME=int8, NAME=int4:N, NAME=int3:N or NAME=ternary:N; the name may hold `=` and `:`.
// INVALID_ARGUMENT otherwise.
absl::StatusOr<v1::LayerChoice> ParseLayerChoice(const std::string& text);

// int4, int3 and ternary, which have a cluster size.
bool IsClustered(v1::WeightType weights);

// int8, int4, int3, ternary, mixed; anything else is WEIGHT_TYPE_UNSPECIFIED.
v1::WeightType WeightsNamed(const std::string& name);
std::string NameOf(v1::WeightType weights);
// compensated, corrected, direct; affine, dfp8; auto, off, network, blocks. Unknown: the first.
v1::Method MethodNamed(const std::string& name);
std::string NameOf(v1::Method method);
v1::ActivationType ActivationsNamed(const std::string& name);
std::string NameOf(v1::ActivationType activations);
v1::Distillation DistillationNamed(const std::string& name);
std::string NameOf(v1::Distillation distillation);

// "4", "all", or "-" for weights without clusters.
std::string ClusterName(v1::WeightType weights, uint32_t cluster_size);

}  // namespace tern::client

#endif  // TERN_CLIENT_RECIPE_H_
