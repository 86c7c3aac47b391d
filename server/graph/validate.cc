#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/graph/fixed_point.h"
#include "server/graph/graph.h"
#include "server/tensor/cluster.h"

namespace tern::graph {
namespace {

template <typename... Args>
absl::Status Bad(const Node& node, const Args&... what) {
  return absl::InvalidArgumentError(
      absl::StrCat("node '", node.name, "' (", Name(node.op), "): ", what...));
}

// Exponents of all ones are infinities and NaN. Without branches, so that the compiler makes vectors
// of it: float networks have 10^8 of them.
bool AllFinite(const Tensor& tensor) {
  uint32_t bad = 0;
  for (float value : tensor.data<float>()) {
    bad |= (std::bit_cast<uint32_t>(value) & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

absl::Status CheckValue(const Value& value) {
  TERN_RETURN_IF_ERROR(
      Annotate(CheckExtents(value.shape), absl::StrCat("value '", value.name, "'")));
  if (value.constant &&
      (value.constant->dtype() != DType::kF32 || value.constant->shape() != value.shape)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "value '", value.name, "': its constant is ", tern::Name(value.constant->dtype()),
        value.constant->shape().ToString(), ", wanted f32", value.shape.ToString()));
  }
  if (value.constant && !AllFinite(*value.constant)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "value '", value.name, "': an element of its constant is infinite or not a number"));
  }
  if (value.quant && (!std::isfinite(value.quant->scale) || value.quant->scale <= 0 ||
                      value.quant->zero_point < 0 || value.quant->zero_point > 255)) {
    return absl::InvalidArgumentError(
        absl::StrCat("value '", value.name, "': scale ", value.quant->scale, " and zero point ",
                     value.quant->zero_point, " are no quantisation of u8 codes"));
  }
  return absl::OkStatus();
}

// The promises of QuantizedWeights. `codes` has the rank InferShape wants.
absl::Status CheckQuantized(const Node& node) {
  const QuantizedWeights& q = *node.quantized;
  const Shape& shape = q.codes.shape();
  if (q.codes.dtype() != DType::kS8) {
    return Bad(node, "weight codes are ", tern::Name(q.codes.dtype()), ", wanted s8");
  }
  const int64_t o = shape[0], c = shape[1];
  const int64_t taps = shape.elements() / (o * c);
  if (static_cast<int64_t>(q.steps.size()) != o) {
    return Bad(node, "got ", q.steps.size(), " steps, wanted ", o);
  }
  for (float step : q.steps) {
    if (!std::isfinite(step) || step <= 0) return Bad(node, "a weight step is ", step);
  }
  if (CodeBits(q.scheme) == 0) {
    return Bad(node, "unknown weight scheme ", static_cast<int>(q.scheme));
  }
  const int limit = LargestCode(q.scheme);
  const bool clustered = IsClustered(q.scheme);
  std::vector<int> cluster_of(c, 0);
  int64_t clusters = 0, largest_scale = 1;
  if (clustered) {
    if (q.cluster_size < 1) return Bad(node, "cluster size ", q.cluster_size, " is below 1");
    if (node.op == OpType::kConv && node.conv.groups != 1) {
      return Bad(node, "a grouped convolution has clustered weights");
    }
    const ClusterMap map(static_cast<int>(c), q.cluster_size);
    clusters = map.clusters();
    for (int i = 0; i < c; ++i) cluster_of[i] = map.cluster_of(i);
    if (q.cluster_scales.dtype() != DType::kS8 || q.cluster_scales.shape() != Shape{o, clusters}) {
      return Bad(node, "cluster scales are ", tern::Name(q.cluster_scales.dtype()),
                 q.cluster_scales.shape().ToString(), ", wanted s8[", o, ",", clusters, "]");
    }
    // Unsigned extremes take 16 at a time.
    uint8_t least = 255, most = 0;
    for (int8_t scale : q.cluster_scales.data<int8_t>()) {
      const uint8_t byte = static_cast<uint8_t>(scale);
      least = byte < least ? byte : least;
      most = byte > most ? byte : most;
    }
    if (least < 1 || most > 127) {
      return Bad(node, "a cluster scale is ", least < 1 ? 0 : static_cast<int8_t>(most));
    }
    largest_scale = most;
  } else if (!q.cluster_scales.empty()) {
    return Bad(node, "int8 weights have cluster scales");
  }
  const absl::Span<const int8_t> codes = q.codes.data<int8_t>();
  const absl::Span<const int8_t> scales = q.cluster_scales.data<int8_t>();
  // What no channel can exceed is usually enough to know. int8 codes have all values.
  const int largest = clustered ? LargestMagnitude(codes) : limit;
  if (largest <= limit && c * taps * largest * largest_scale * 255 <= kMaxElements) {
    return absl::OkStatus();
  }
  for (int64_t i = 0; i < o; ++i) {
    int64_t sum = 0;
    for (int64_t j = 0; j < c; ++j) {
      const int scale = clustered ? scales[i * clusters + cluster_of[j]] : 1;
      for (int64_t t = 0; t < taps; ++t) {
        const int code = std::abs(static_cast<int>(codes[(i * c + j) * taps + t]));
        if (code > limit) {
          return Bad(node, "a weight code is ", code, ", ", tern::Name(q.scheme), " allows ",
                     limit);
        }
        sum += code * scale;
      }
    }
    if (sum * 255 > kMaxElements) {
      return Bad(node, "output channel ", i, " can overflow 32-bit sums");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckWeights(const Node& node, const Shape& output) {
  const bool linear = node.op == OpType::kConv || node.op == OpType::kFullyConnected;
  if (!linear && node.op != OpType::kBatchNorm) {
    if (node.quantized || !node.weight.empty() || !node.bias.empty()) {
      return Bad(node, "has weights, which this operator does not take");
    }
    return absl::OkStatus();
  }
  if (node.quantized) {
    if (!linear) return Bad(node, "has quantised weights, which this operator does not take");
    if (!node.weight.empty()) return Bad(node, "has both float and quantised weights");
    TERN_RETURN_IF_ERROR(Annotate(CheckExtents(node.quantized->codes.shape()),
                                  absl::StrCat("node '", node.name, "' weight")));
    TERN_RETURN_IF_ERROR(CheckQuantized(node));
  } else {
    if (node.weight.dtype() != DType::kF32) {
      return Bad(node, "weight is ", tern::Name(node.weight.dtype()), ", wanted f32");
    }
    TERN_RETURN_IF_ERROR(
        Annotate(CheckExtents(node.weight.shape()), absl::StrCat("node '", node.name, "' weight")));
    if (!AllFinite(node.weight)) return Bad(node, "a weight is infinite or not a number");
  }
  if (node.bias.dtype() != DType::kF32 || node.bias.shape() != Shape{output[0]}) {
    return Bad(node, "bias is ", tern::Name(node.bias.dtype()), node.bias.shape().ToString(),
               ", wanted f32[", output[0], "]");
  }
  if (!AllFinite(node.bias)) return Bad(node, "a bias is infinite or not a number");
  return absl::OkStatus();
}

bool IsArithmetic(OpType op) {
  return op == OpType::kAdd || op == OpType::kSub || op == OpType::kMul || op == OpType::kDiv;
}

absl::Status CheckAttributes(const Node& node) {
  switch (node.op) {
    case OpType::kClip:
      if (!node.clip) return Bad(node, "has no bounds");
      break;
    case OpType::kConv:
    case OpType::kFullyConnected:
    case OpType::kAdd:
    case OpType::kBatchNorm:
      break;
    default:
      if (node.clip) return Bad(node, "has a fused activation, which this operator does not take");
  }
  // False for NaN too.
  if (node.clip && !(node.clip->lo <= node.clip->hi)) {
    return Bad(node, "clips to [", node.clip->lo, ",", node.clip->hi, "]");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const Graph& graph) {
  const auto exists = [&](ValueId id) {
    return id >= 0 && static_cast<size_t>(id) < graph.values.size();
  };
  if (!exists(graph.input) || !exists(graph.output)) {
    return absl::InvalidArgumentError(absl::StrCat("input ", graph.input, " or output ",
                                                   graph.output, " is not one of ",
                                                   graph.values.size(), " values"));
  }
  for (const Value& value : graph.values) TERN_RETURN_IF_ERROR(CheckValue(value));
  if (graph.values[graph.input].constant) {
    return absl::InvalidArgumentError("the input is a constant");
  }

  std::vector<bool> computed(graph.values.size());
  computed[graph.input] = true;
  for (const Node& node : graph.nodes) {
    if (!exists(node.output)) return Bad(node, "output value ", node.output, " does not exist");
    TERN_RETURN_IF_ERROR(CheckAttributes(node));
    bool variable = false;
    for (ValueId id : node.inputs) {
      if (!exists(id)) return Bad(node, "input value ", id, " does not exist");
      if (graph.values[id].constant) {
        if (!IsArithmetic(node.op)) {
          return Bad(node, "input '", graph.values[id].name,
                     "' is a constant, which this operator does not take");
        }
        continue;
      }
      if (!computed[id]) {
        return Bad(node, "reads '", graph.values[id].name, "' before it is computed");
      }
      variable = true;
    }
    if (!variable) return Bad(node, "has only constant inputs");
    const Value& output = graph.values[node.output];
    if (computed[node.output] || output.constant) {
      return Bad(node, "writes '", output.name, "', which already has a value");
    }
    TERN_ASSIGN_OR_RETURN(const Shape shape, InferShape(graph, node));
    if (shape != output.shape) {
      return Bad(node, "computes ", shape.ToString(), ", its output '", output.name,
                 "' is declared ", output.shape.ToString());
    }
    TERN_RETURN_IF_ERROR(CheckWeights(node, shape));
    computed[node.output] = true;
  }
  if (graph.output == graph.input || !computed[graph.output]) {
    return absl::InvalidArgumentError(
        absl::StrCat("no node computes the output '", graph.values[graph.output].name, "'"));
  }
  switch (graph.arithmetic) {
    case Arithmetic::kFloatEpilogue:
      return absl::OkStatus();
    case Arithmetic::kFixedPoint:
      return ValidateFixedPoint(graph);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown arithmetic ", static_cast<int>(graph.arithmetic)));
}

}  // namespace tern::graph
