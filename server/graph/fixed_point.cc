#include "server/graph/fixed_point.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/tensor/cluster.h"

namespace tern::graph {
namespace {

// Fraction bits of a batch normalisation's multipliers and offsets, in codes of the result.
constexpr int kBatchNormBits = 16;
// Fraction bits of 1 / count.
constexpr int kMeanBits = 31;
// Beyond this a mean vanishes: it is below 2^(8 + kMeanBits).
constexpr int kMaxMeanShift = 48;

template <typename... Args>
absl::Status Bad(const Node& node, const Args&... what) {
  return absl::InvalidArgumentError(
      absl::StrCat("fixed-point node '", node.name, "' (", Name(node.op), "): ", what...));
}

bool IsWeighted(const Node& node) {
  return node.op == OpType::kConv || node.op == OpType::kFullyConnected;
}

// Whether the node is an addition of codes.
bool IsCodeAddition(const Graph& graph, const Node& node) {
  return node.op == OpType::kAdd && graph.values[node.output].quant &&
         graph.values[node.inputs[0]].quant && graph.values[node.inputs[1]].quant;
}

int Exponent(const QuantParams& params) { return *ExponentOf(params.scale); }
int Exponent(const Graph& graph, ValueId id) { return Exponent(*graph.values[id].quant); }

// The smallest e with 2^e >= x, x > 0.
int CeilExponent(double x) {
  int exponent = 0;
  return std::frexp(x, &exponent) == 0.5 ? exponent - 1 : exponent;
}

float PowerOfTwo(int exponent) { return std::ldexp(1.0f, exponent); }

// steps[o] = multiplier[o] * 2^exponent, with the largest such exponent; false if there is none.
struct StepGrid {
  int exponent = 0;
  std::vector<int32_t> multiplier;
};
bool SplitSteps(const std::vector<float>& steps, StepGrid& grid) {
  grid.exponent = std::numeric_limits<int>::max();
  for (float step : steps) {
    int exponent = 0;
    int64_t mantissa = static_cast<int64_t>(std::ldexp(std::frexp(step, &exponent), 24));
    exponent -= 24;
    for (; mantissa % 2 == 0; mantissa /= 2) ++exponent;
    grid.exponent = std::min(grid.exponent, exponent);
  }
  if (std::abs(grid.exponent) > kMaxExponent) return false;
  grid.multiplier.clear();
  for (float step : steps) {
    const double multiplier = std::ldexp(static_cast<double>(step), -grid.exponent);
    if (multiplier > kMaxStepMultiplier) return false;
    grid.multiplier.push_back(static_cast<int32_t>(multiplier));
  }
  return true;
}

// The unit, as an exponent, in which a weighted node is summed up: the finest of its accumulators
// (2^accumulator), its residual and its result.
struct Units {
  int accumulator, sum;
};
Units UnitsOf(const Graph& graph, const Node& node, int step_exponent) {
  Units units{step_exponent + Exponent(graph, node.inputs[0]), 0};
  units.sum = units.accumulator;
  if (node.has_residual()) units.sum = std::min(units.sum, Exponent(graph, node.inputs[1]));
  if (graph.values[node.output].quant) {
    units.sum = std::min(units.sum, Exponent(graph, node.output));
  }
  return units;
}

// The result's zero point and half a unit, in units of the sum.
int64_t RoundingOffset(int zero_point, int shift) {
  return (int64_t{zero_point} << shift) + (shift > 0 ? int64_t{1} << (shift - 1) : 0);
}

std::pair<int32_t, int32_t> ClampOf(const Node& node, const QuantParams& y) {
  if (!node.clip) return {0, 255};
  return {y.Quantize(node.clip->lo), y.Quantize(node.clip->hi)};
}

absl::Status CheckParams(const Value& value) {
  const QuantParams& quant = *value.quant;
  if (!ExponentOf(quant.scale) || (quant.zero_point != 0 && quant.zero_point != 128)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "fixed-point value '", value.name, "': scale ", quant.scale, " and zero point ",
        quant.zero_point, ", wanted a power of two within 2^+-", kMaxExponent, " and 0 or 128"));
  }
  return absl::OkStatus();
}

absl::Status CheckWeighted(const Graph& graph, const Node& node) {
  if (!node.quantized) return Bad(node, "its weights are float");
  for (ValueId id : node.inputs) {
    if (!graph.values[id].quant) return Bad(node, "'", graph.values[id].name, "' is float");
  }
  StepGrid grid;
  if (!SplitSteps(node.quantized->steps, grid)) {
    return Bad(node, "its steps are not 1..", kMaxStepMultiplier, " times one power of two");
  }
  const Units units = UnitsOf(graph, node, grid.exponent);
  if (units.accumulator - units.sum > kMaxAccumulatorShift) {
    return Bad(node, "its accumulators' unit 2^", units.accumulator, " is more than 2^",
               kMaxAccumulatorShift, " times that of its sum, 2^", units.sum);
  }
  for (ValueId id : {node.has_residual() ? node.inputs[1] : node.inputs[0], node.output}) {
    if (id == node.inputs[0] || !graph.values[id].quant) continue;
    if (Exponent(graph, id) - units.sum > kMaxShift) {
      return Bad(node, "the scale 2^", Exponent(graph, id), " of '", graph.values[id].name,
                 "' is more than 2^", kMaxShift, " times the unit of the sum, 2^", units.sum);
    }
  }
  if (units.sum < -126) return Bad(node, "the unit of its sum is 2^", units.sum);
  for (float bias : node.bias.data<float>()) {
    // Exact: f32 has 24 significant bits, and only the exponent changes.
    const double scaled = std::ldexp(static_cast<double>(bias), -units.sum);
    if (!(std::fabs(scaled) <= static_cast<double>(kMaxFixedPointBias)) ||
        scaled != std::nearbyint(scaled)) {
      return Bad(node, "a bias is ", bias, ", not a whole multiple of 2^", units.sum,
                 " up to 2^56");
    }
  }
  return absl::OkStatus();
}

void Raise(Graph& graph, ValueId id, int exponent, bool& changed) {
  QuantParams& quant = *graph.values[id].quant;
  if (Exponent(quant) >= exponent) return;
  quant.scale = PowerOfTwo(exponent);
  changed = true;
}

// The range of codes is covered by the new ones.
void RoundParams(QuantParams& quant) {
  double scale = quant.scale;
  if (quant.zero_point != 0) {
    scale *= std::max(quant.zero_point / 128.0, (255 - quant.zero_point) / 127.0);
    quant.zero_point = 128;
  }
  quant.scale = PowerOfTwo(std::clamp(CeilExponent(scale), -kMaxExponent, kMaxExponent));
}

// One power-of-two unit for the layer's steps, at least 2^least.
void RoundSteps(QuantizedWeights& weights, int least) {
  std::vector<float>& steps = weights.steps;
  const double largest = *std::max_element(steps.begin(), steps.end());
  least = std::max(least, -kMaxExponent);
  if (weights.scheme == WeightScheme::kInt8) {
    const int exponent =
        std::clamp(CeilExponent(largest / kMaxStepMultiplier), least, kMaxExponent);
    for (float& step : steps) {
      const double multiplier = std::nearbyint(std::ldexp(static_cast<double>(step), -exponent));
      step = static_cast<float>(
          std::ldexp(std::clamp<double>(multiplier, 1.0, kMaxStepMultiplier), exponent));
    }
    return;
  }
  // No step shrinks, so that no cluster scale grows and the s32 sums stay exact.
  const float step = PowerOfTwo(std::clamp(CeilExponent(largest), least, kMaxExponent));
  const auto scales = weights.cluster_scales.data<int8_t>();
  const size_t clusters = scales.size() / steps.size();
  for (size_t i = 0; i < scales.size(); ++i) {
    const float scaled =
        std::nearbyint(static_cast<float>(scales[i]) * (steps[i / clusters] / step));
    scales[i] = static_cast<int8_t>(std::clamp(scaled, 1.0f, 127.0f));
  }
  std::fill(steps.begin(), steps.end(), step);
}

}  // namespace

absl::Status ValidateFixedPoint(const Graph& graph) {
  for (const Value& value : graph.values) {
    if (value.quant) TERN_RETURN_IF_ERROR(CheckParams(value));
  }
  for (const Node& node : graph.nodes) {
    if (IsWeighted(node)) {
      TERN_RETURN_IF_ERROR(CheckWeighted(graph, node));
    } else if (IsCodeAddition(graph, node)) {
      const int a = Exponent(graph, node.inputs[0]), b = Exponent(graph, node.inputs[1]),
                y = Exponent(graph, node.output);
      if (std::max({a, b, y}) - std::min({a, b, y}) > kMaxShift) {
        return Bad(node, "the scales 2^", a, ", 2^", b, " and 2^", y, " are more than 2^",
                   kMaxShift, " apart");
      }
    }
  }
  return absl::OkStatus();
}

absl::Status RoundToFixedPoint(Graph& graph) {
  for (const Node& node : graph.nodes) {
    if (!IsWeighted(node)) continue;
    bool codes = node.quantized.has_value();
    for (ValueId id : node.inputs) codes = codes && graph.values[id].quant;
    if (!codes) {
      return absl::FailedPreconditionError(absl::StrCat(
          "node '", node.name, "' runs in float; fixed point needs quantised weights and inputs"));
    }
  }
  graph.arithmetic = Arithmetic::kFixedPoint;
  for (Value& value : graph.values) {
    if (value.quant) RoundParams(*value.quant);
  }
  struct Scales {
    std::vector<float> steps;
    Tensor cluster_scales;
  };
  std::vector<Scales> original(graph.nodes.size());
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const auto& weights = graph.nodes[i].quantized;
    if (weights) original[i] = {weights->steps, weights->cluster_scales};
  }
  // The exponents of values only rise, at most to kMaxExponent, so this ends; usually at once.
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      Node& node = graph.nodes[i];
      if (IsWeighted(node)) {
        node.quantized->steps = original[i].steps;
        node.quantized->cluster_scales = original[i].cluster_scales;
        const int x = Exponent(graph, node.inputs[0]);
        std::vector<ValueId> others;
        if (node.has_residual()) others.push_back(node.inputs[1]);
        if (graph.values[node.output].quant) others.push_back(node.output);
        int least = -kMaxExponent;
        for (ValueId id : others) least = std::max(least, Exponent(graph, id) - kMaxShift);
        StepGrid grid;
        const bool on_grid = SplitSteps(node.quantized->steps, grid);
        if (!on_grid || grid.exponent + x < least) {
          RoundSteps(*node.quantized, least - x);
          if (!SplitSteps(node.quantized->steps, grid)) {
            return absl::FailedPreconditionError(
                absl::StrCat("node '", node.name, "': no fixed-point grid holds its steps"));
          }
        }
        for (ValueId id : others) {
          Raise(graph, id, std::min(grid.exponent + x - kMaxAccumulatorShift, kMaxExponent),
                changed);
        }
      } else if (IsCodeAddition(graph, node)) {
        int largest = Exponent(graph, node.output);
        for (ValueId id : node.inputs) largest = std::max(largest, Exponent(graph, id));
        for (ValueId id : {node.inputs[0], node.inputs[1], node.output}) {
          Raise(graph, id, largest - kMaxShift, changed);
        }
      }
    }
  }
  for (Node& node : graph.nodes) {
    if (!IsWeighted(node)) continue;
    StepGrid grid;
    SplitSteps(node.quantized->steps, grid);
    const int unit = UnitsOf(graph, node, grid.exponent).sum;
    constexpr double kLimit = static_cast<double>(kMaxFixedPointBias);
    for (float& bias : node.bias.data<float>()) {
      const double rounded = std::nearbyint(std::ldexp(static_cast<double>(bias), -unit));
      bias = static_cast<float>(std::ldexp(std::clamp(rounded, -kLimit, kLimit), unit));
    }
  }
  const absl::Status status = ValidateFixedPoint(graph);
  if (status.ok()) return status;
  return absl::FailedPreconditionError(
      absl::StrCat("the network does not fit fixed-point arithmetic: ", status.message()));
}

FixedPointLayer FixedPointOf(const Graph& graph, const Node& node) {
  const QuantizedWeights& weights = *node.quantized;
  const std::optional<QuantParams>& y = graph.values[node.output].quant;
  const int zero_point = graph.values[node.inputs[0]].quant->zero_point;
  StepGrid grid;
  SplitSteps(weights.steps, grid);
  const Units units = UnitsOf(graph, node, grid.exponent);

  FixedPointLayer layer;
  layer.exponent = units.sum;
  int64_t offset = 0;
  if (y) {
    layer.shift = Exponent(*y) - units.sum;
    std::tie(layer.lo, layer.hi) = ClampOf(node, *y);
    offset = RoundingOffset(y->zero_point, layer.shift);
  }
  if (node.has_residual()) {
    const QuantParams& r = *graph.values[node.inputs[1]].quant;
    layer.residual_multiplier = int64_t{1} << (Exponent(r) - units.sum);
    offset -= r.zero_point * layer.residual_multiplier;
  }
  const Shape& shape = weights.codes.shape();
  const int64_t outputs = shape[0], channels = shape[1],
                taps = shape.elements() / (outputs * channels);
  const bool clustered = weights.scheme != WeightScheme::kInt8;
  const ClusterMap map(static_cast<int>(channels), clustered ? weights.cluster_size : 1);
  const auto codes = weights.codes.data<int8_t>();
  const auto scales = weights.cluster_scales.data<int8_t>();
  bool narrow = true;
  for (int64_t o = 0, i = 0; o < outputs; ++o) {
    int64_t positive = 0, negative = 0;  // sums of the weights of either sign
    for (int64_t c = 0; c < channels; ++c) {
      const int scale =
          clustered ? scales[o * map.clusters() + map.cluster_of(static_cast<int>(c))] : 1;
      for (int64_t t = 0; t < taps; ++t, ++i) {
        const int weight = scale * codes[i];
        (weight > 0 ? positive : negative) += weight;
      }
    }
    const int64_t largest = 255 * std::max(positive, -negative);
    layer.largest_accumulator = std::max(layer.largest_accumulator, largest);
    const int32_t multiplier = grid.multiplier[o] << (units.accumulator - units.sum);
    const int64_t bias = static_cast<int64_t>(
        std::ldexp(static_cast<double>(node.bias.data<float>()[o]), -units.sum));
    layer.multiplier.push_back(multiplier);
    layer.offset.push_back(offset + bias - zero_point * (positive + negative) * multiplier);
    narrow = narrow && largest * multiplier + 255 * layer.residual_multiplier +
                               std::abs(layer.offset.back()) <=
                           std::numeric_limits<int32_t>::max();
  }
  if (narrow) layer.narrow_offset.assign(layer.offset.begin(), layer.offset.end());
  return layer;
}

FixedPointAdd FixedPointAddOf(const Graph& graph, const Node& node) {
  const QuantParams &a = *graph.values[node.inputs[0]].quant,
                    &b = *graph.values[node.inputs[1]].quant, &y = *graph.values[node.output].quant;
  const int unit = std::min({Exponent(a), Exponent(b), Exponent(y)});
  FixedPointAdd add;
  add.multiplier_a = int64_t{1} << (Exponent(a) - unit);
  add.multiplier_b = int64_t{1} << (Exponent(b) - unit);
  add.shift = Exponent(y) - unit;
  add.offset = RoundingOffset(y.zero_point, add.shift) - a.zero_point * add.multiplier_a -
               b.zero_point * add.multiplier_b;
  std::tie(add.lo, add.hi) = ClampOf(node, y);
  return add;
}

namespace {

// v * 2^from in codes of y. A multiplier above 2^kMaxShift only saturates what is saturated, a
// shift above it (v below 2^17) leaves 0 where 0 is left.
FixedPointMap Scaled(int from, QuantParams y) {
  FixedPointMap map;
  const int unit = std::min(from, Exponent(y));
  map.multiplier = int64_t{1} << std::min(from - unit, kMaxShift);
  map.shift = std::min(Exponent(y) - unit, kMaxShift);
  map.offset = RoundingOffset(y.zero_point, map.shift);
  return map;
}

}  // namespace

FixedPointMap FixedPointProduct(QuantParams a, QuantParams b, QuantParams y) {
  return Scaled(Exponent(a) + Exponent(b), y);
}

FixedPointMap FixedPointRescale(QuantParams x, QuantParams y) {
  FixedPointMap map = Scaled(Exponent(x), y);
  map.offset -= x.zero_point * map.multiplier;
  return map;
}

FixedPointMap FixedPointMean(QuantParams x, QuantParams y, int64_t count) {
  FixedPointMap map;
  map.multiplier = ((int64_t{1} << kMeanBits) + count / 2) / count;
  map.shift = std::clamp(Exponent(y) - Exponent(x) + kMeanBits, 0, kMaxMeanShift);
  map.offset = RoundingOffset(y.zero_point, map.shift) - count * x.zero_point * map.multiplier;
  return map;
}

FixedPointMap FixedPointBatchNorm(const Graph& graph, const Node& node, int64_t c) {
  const QuantParams &x = *graph.values[node.inputs[0]].quant, &y = *graph.values[node.output].quant;
  const auto rounded = [&](float real, int exponent, double limit) {
    const double scaled =
        std::nearbyint(std::ldexp(static_cast<double>(real), exponent + kBatchNormBits));
    return static_cast<int64_t>(std::clamp(scaled, -limit, limit));
  };
  FixedPointMap map;
  map.shift = kBatchNormBits;
  map.multiplier = rounded(node.weight.data<float>()[c], Exponent(x) - Exponent(y), 0x1p40);
  map.offset = rounded(node.bias.data<float>()[c], -Exponent(y), 0x1p55) +
               RoundingOffset(y.zero_point, map.shift) - x.zero_point * map.multiplier;
  std::tie(map.lo, map.hi) = ClampOf(node, y);
  return map;
}

}  // namespace tern::graph
