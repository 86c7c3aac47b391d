#include "server/quant/student.h"

#include <algorithm>
#include <cmath>

#include "server/base/status_macros.h"
#include "server/engine/backward.h"
#include "server/engine/ops.h"
#include "server/quant/weights.h"
#include "server/tensor/cluster.h"

namespace tern::quant {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::ValueId;

// Where the value is quantised: the reals of its first and last code.
std::optional<graph::ClipRange> RangeOf(const graph::Value& value) {
  if (!value.quant) return std::nullopt;
  return graph::ClipRange{value.quant->Dequantize(0), value.quant->Dequantize(255)};
}

// The cluster of every OIHW column.
std::vector<int> ClusterOfColumn(const QuantizedWeights& weights) {
  const Shape& shape = weights.codes.shape();
  const int64_t columns = shape.elements() / shape[0];
  std::vector<int> result(columns, 0);
  if (weights.scheme == WeightScheme::kInt8) return result;
  const int64_t channels = shape[1], taps = columns / channels;
  const ClusterMap map(static_cast<int>(channels), weights.cluster_size);
  for (int64_t j = 0; j < columns; ++j) result[j] = map.cluster_of(static_cast<int>(j / taps));
  return result;
}

}  // namespace

void Student::Parameters::Step(float rate, int step) {
  constexpr float kFirst = 0.9f, kSecond = 0.999f, kEpsilon = 1e-8f;
  const float c1 = 1 - std::pow(kFirst, static_cast<float>(step));
  const float c2 = 1 - std::pow(kSecond, static_cast<float>(step));
  for (size_t i = 0; i < value.size(); ++i) {
    const float g = gradient[i];
    first[i] = kFirst * first[i] + (1 - kFirst) * g;
    second[i] = kSecond * second[i] + (1 - kSecond) * g * g;
    value[i] -= rate * (first[i] / c1) / (std::sqrt(second[i] / c2) + kEpsilon);
    gradient[i] = 0;
  }
}

Student::Student(const Graph& quantised, float logit_unit, int threads)
    : graph_(quantised),
      threads_(threads),
      last_reader_(quantised.values.size(), -1),
      layers_(quantised.nodes.size()) {
  for (size_t i = 0; i < graph_.nodes.size(); ++i) {
    Node& node = graph_.nodes[i];
    for (ValueId id : node.inputs) last_reader_[id] = static_cast<int>(i);
    if (!node.quantized) continue;
    Layer& layer = layers_[i];
    layer.trained = true;
    layer.cluster_of = ClusterOfColumn(*node.quantized);
    layer.clusters = *std::max_element(layer.cluster_of.begin(), layer.cluster_of.end()) + 1;
    node.weight = Dequantize(*node.quantized);
    node.quantized.reset();
    const auto weight = node.weight.data<float>();
    const auto bias = node.bias.data<float>();
    layer.base.assign(weight.begin(), weight.end());
    layer.bias.assign(bias.begin(), bias.end());
    const size_t outputs = layer.bias.size();
    layer.theta = Parameters(outputs * layer.clusters);
    layer.beta = Parameters(outputs);
    // The first quantised value that the result goes into.
    ValueId id = node.output;
    while (!graph_.values[id].quant && id != graph_.output) {
      const std::vector<int> readers = graph_.ConsumersOf(id);
      if (readers.empty()) break;
      id = graph_.nodes[readers[0]].output;
    }
    const auto range = RangeOf(graph_.values[id]);
    layer.unit = range ? (range->hi - range->lo) / 6 : logit_unit;
  }
  last_reader_[graph_.output] = static_cast<int>(graph_.nodes.size());
}

NodeRange Student::whole() const {
  return {0, static_cast<int>(graph_.nodes.size()), graph_.input, graph_.output};
}

std::vector<NodeRange> Student::Blocks() const {
  std::vector<NodeRange> blocks;
  const int nodes = static_cast<int>(graph_.nodes.size());
  NodeRange open{0, 0, graph_.input, graph::kNoValue};
  bool weighted = false;
  int live = -1;  // the last reader of anything made so far, besides the newest value
  ValueId newest = graph_.input;
  for (int i = 0; i < nodes; ++i) {
    // Between node i - 1 and node i only `newest` is alive.
    if (i > 0 && live < i && weighted) {
      blocks.push_back({open.first, i, open.input, newest});
      open = {i, i, newest, graph::kNoValue};
      weighted = false;
    }
    live = std::max(live, last_reader_[newest]);
    weighted |= layers_[i].trained;
    newest = graph_.nodes[i].output;
  }
  open.last = nodes;
  open.output = graph_.output;
  if (!weighted && !blocks.empty()) {
    blocks.back().last = nodes;
    blocks.back().output = graph_.output;
  } else {
    blocks.push_back(open);
  }
  return blocks;
}

int64_t Student::BytesPerImage(const NodeRange& range) const {
  int64_t elements = graph_.shape(range.input).elements();
  for (int i = range.first; i < range.last; ++i)
    elements += graph_.shape(graph_.nodes[i].output).elements();
  return 4 * elements;
}

absl::Status Student::CheckCancelled() const {
  if (cancelled_ != nullptr && cancelled_->load(std::memory_order_relaxed))
    return absl::CancelledError("quantisation cancelled");
  return absl::OkStatus();
}

void Student::Clamp(ValueId id, Tensor& value) const {
  const auto limits = RangeOf(graph_.values[id]);
  if (!limits) return;
  const auto data = value.data<float>();
  const int64_t count = static_cast<int64_t>(data.size());
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t i = 0; i < count; ++i) data[i] = std::min(std::max(data[i], limits->lo), limits->hi);
}

absl::StatusOr<Tensor> Student::Replay(const std::vector<Tensor>& values, int index, Tensor weight,
                                       Tensor bias) const {
  std::vector<Tensor> changed(graph_.values.size());
  for (int i = index; i < static_cast<int>(graph_.nodes.size()); ++i) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    const Node* node = &graph_.nodes[i];
    Node other;
    if (i == index) {
      other = *node;
      other.weight = std::move(weight);
      other.bias = std::move(bias);
      node = &other;
    }
    bool affected = i == index;
    std::vector<const Tensor*> inputs;
    for (ValueId id : node->inputs) {
      const bool constant = graph_.values[id].constant.has_value();
      affected |= !constant && !changed[id].empty();
      inputs.push_back(constant              ? &*graph_.values[id].constant
                       : changed[id].empty() ? &values[id]
                                             : &changed[id]);
    }
    if (!affected) continue;
    TERN_ASSIGN_OR_RETURN(changed[node->output],
                          engine::RunFloatNode(graph_, *node, inputs, threads_));
    Clamp(node->output, changed[node->output]);
    for (ValueId id : node->inputs) {
      if (last_reader_[id] <= i) changed[id] = Tensor();
    }
  }
  return std::move(changed[graph_.output]);
}

absl::StatusOr<std::vector<Tensor>> Student::Forward(const NodeRange& range, const Tensor& input,
                                                     bool keep) const {
  std::vector<Tensor> values(graph_.values.size());
  values[range.input] = input;
  Clamp(range.input, values[range.input]);
  for (int i = range.first; i < range.last; ++i) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    const Node& node = graph_.nodes[i];
    std::vector<const Tensor*> inputs;
    for (ValueId id : node.inputs) {
      inputs.push_back(graph_.values[id].constant ? &*graph_.values[id].constant : &values[id]);
    }
    TERN_ASSIGN_OR_RETURN(values[node.output],
                          engine::RunFloatNode(graph_, node, inputs, threads_));
    Clamp(node.output, values[node.output]);
    if (keep) continue;
    for (ValueId id : node.inputs) {
      if (last_reader_[id] <= i && id != range.output) values[id] = Tensor();
    }
  }
  return values;
}

absl::Status Student::Backward(const NodeRange& range, const std::vector<Tensor>& values,
                               Tensor output_gradient) {
  std::vector<Tensor> gradients(graph_.values.size());
  gradients[range.output] = std::move(output_gradient);
  for (int i = range.last - 1; i >= range.first; --i) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    const Node& node = graph_.nodes[i];
    Tensor gradient = std::move(gradients[node.output]);
    gradients[node.output] = Tensor();
    if (gradient.empty()) continue;
    if (const auto limits = RangeOf(graph_.values[node.output])) {
      const auto y = values[node.output].data<float>();
      const auto g = gradient.data<float>();
      const int64_t count = static_cast<int64_t>(g.size());
#pragma omp parallel for schedule(static) num_threads(threads_)
      for (int64_t k = 0; k < count; ++k) {
        // A loss may rise or fall where a value leaves the range, not beyond.
        g[k] = y[k] > limits->lo && y[k] < limits->hi ? g[k] : 0;
      }
    }
    engine::BackwardOptions options;
    options.weight = layers_[i].trained;
    options.threads = threads_;
    std::vector<const Tensor*> inputs;
    for (ValueId id : node.inputs) {
      const bool constant = graph_.values[id].constant.has_value();
      inputs.push_back(constant ? &*graph_.values[id].constant : &values[id]);
      options.inputs.push_back(!constant && id != range.input);
    }
    TERN_ASSIGN_OR_RETURN(
        engine::Gradients result,
        engine::RunBackward(graph_, node, inputs, values[node.output], gradient, options));
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      if (result.inputs[k].empty()) continue;
      Tensor& sum = gradients[node.inputs[k]];
      if (sum.empty()) {
        sum = std::move(result.inputs[k]);
        continue;
      }
      const auto from = result.inputs[k].data<float>();
      const auto to = sum.data<float>();
      const int64_t count = static_cast<int64_t>(to.size());
#pragma omp parallel for schedule(static) num_threads(threads_)
      for (int64_t n = 0; n < count; ++n) to[n] += from[n];
    }
    if (!options.weight) continue;
    Layer& layer = layers_[i];
    const float* w = node.weight.data<float>().data();
    const float* dw = result.weight.data<float>().data();
    const size_t columns = layer.cluster_of.size(), outputs = layer.bias.size();
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (size_t o = 0; o < outputs; ++o) {
      float* theta = &layer.theta.gradient[o * layer.clusters];
      for (size_t j = 0; j < columns; ++j)
        theta[layer.cluster_of[j]] += w[o * columns + j] * dw[o * columns + j];
      layer.beta.gradient[o] += layer.unit * result.bias.data<float>()[o];
    }
  }
  return absl::OkStatus();
}

void Student::Step(const NodeRange& range, const Rates& rates) {
  for (int i = range.first; i < range.last; ++i) {
    Layer& layer = layers_[i];
    if (!layer.trained) continue;
    ++layer.step;
    layer.theta.Step(rates.theta, layer.step);
    layer.beta.Step(rates.beta, layer.step);
    UpdateWeights(i);
  }
}

void Student::UpdateWeights(int index) {
  const Layer& layer = layers_[index];
  Node& node = graph_.nodes[index];
  const auto weight = node.weight.data<float>();
  const auto bias = node.bias.data<float>();
  const size_t columns = layer.cluster_of.size();
  const size_t outputs = layer.bias.size();
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (size_t o = 0; o < outputs; ++o) {
    std::vector<float> factor(layer.clusters);
    for (int g = 0; g < layer.clusters; ++g)
      factor[g] = std::exp(layer.theta.value[o * layer.clusters + g]);
    for (size_t j = 0; j < columns; ++j)
      weight[o * columns + j] = layer.base[o * columns + j] * factor[layer.cluster_of[j]];
    bias[o] = layer.bias[o] + layer.unit * layer.beta.value[o];
  }
}

void Student::Store(bool power_of_two_steps, Graph& quantised) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    if (!layer.trained) continue;
    Node& node = quantised.nodes[i];
    QuantizedWeights& weights = *node.quantized;
    std::vector<double> factor(layer.theta.value.size());
    for (size_t k = 0; k < factor.size(); ++k)
      factor[k] = std::exp(static_cast<double>(layer.theta.value[k]));
    RescaleClusters(factor, power_of_two_steps, weights);
    const auto bias = graph_.nodes[i].bias.data<float>();
    std::copy(bias.begin(), bias.end(), node.bias.data<float>().begin());
  }
}

}  // namespace tern::quant
