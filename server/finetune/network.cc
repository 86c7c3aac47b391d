#include "server/finetune/network.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <omp.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/graph/fixed_point.h"
#include "server/quant/placement.h"
#include "server/quant/weights.h"
#include "server/tensor/cluster.h"

namespace tern::finetune {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;

// A latent is at least this far (in cells) from the border of its code's cell at first, so that
// rounding the quotient cannot change the code.
constexpr double kMargin = 0.02;

std::vector<int64_t> WithBatch(int64_t n, const Shape& shape) {
  std::vector<int64_t> dims = shape.dims();
  dims.insert(dims.begin(), n);
  return dims;
}

at::Tensor FromTensor(const Tensor& tensor) {
  return at::from_blob(const_cast<void*>(tensor.raw()), tensor.shape().dims(), at::kFloat).clone();
}

at::Tensor FromCodes(const Tensor& tensor) {
  return at::from_blob(const_cast<void*>(tensor.raw()), tensor.shape().dims(), at::kChar)
      .to(at::kFloat);
}

// Memory order of images: NHWC, which oneDNN multiplies fastest.
at::Tensor ChannelsLast(const at::Tensor& x) {
  return x.dim() == 4 ? x.contiguous(at::MemoryFormat::ChannelsLast) : x.contiguous();
}

at::Tensor Parameter(const at::Tensor& x) { return x.detach().clone().requires_grad_(true); }

bool IsWeighted(const Node& node) {
  return node.op == OpType::kConv || node.op == OpType::kFullyConnected;
}

at::Tensor Clip(const at::Tensor& x, const std::optional<graph::ClipRange>& clip) {
  if (!clip) return x;
  if (clip->lo == 0 && std::isinf(clip->hi)) return at::relu(x);
  return at::clamp(x, clip->lo, clip->hi);
}

// Brings `x` to the size that the windows of a pool cover, exactly; what is added at the top and
// left is the pool's own padding.
at::Tensor FitWindows(const at::Tensor& x, const graph::PoolAttributes& pool, const Shape& out,
                      double value) {
  const int64_t height = (out[1] - 1) * pool.stride_h + pool.kernel_h;
  const int64_t width = (out[2] - 1) * pool.stride_w + pool.kernel_w;
  const int64_t bottom = height - x.size(2) - pool.pad_top;
  const int64_t right = width - x.size(3) - pool.pad_left;
  if (pool.pad_top == 0 && pool.pad_left == 0 && bottom == 0 && right == 0) return x;
  return at::constant_pad_nd(x, {pool.pad_left, right, pool.pad_top, bottom}, value);
}

at::Tensor MaxPool(const at::Tensor& x, const graph::PoolAttributes& pool, const Shape& out) {
  return at::max_pool2d(FitWindows(x, pool, out, -std::numeric_limits<double>::infinity()),
                        {pool.kernel_h, pool.kernel_w}, {pool.stride_h, pool.stride_w});
}

at::Tensor AveragePool(const at::Tensor& x, const graph::PoolAttributes& pool, const Shape& out) {
  const auto mean = [&](const at::Tensor& t) {
    return at::avg_pool2d(FitWindows(t, pool, out, 0.0), {pool.kernel_h, pool.kernel_w},
                          {pool.stride_h, pool.stride_w});
  };
  // The share of each window that counts: 1 except at borders.
  at::Tensor inside = at::ones({1, 1, x.size(2), x.size(3)});
  at::Tensor share = mean(inside);
  if (pool.count_include_pad) {
    graph::PoolAttributes padded = pool;
    padded.pad_top = padded.pad_left = 0;
    inside = at::ones({1, 1, x.size(2) + pool.pad_top + pool.pad_bottom,
                       x.size(3) + pool.pad_left + pool.pad_right});
    share = at::avg_pool2d(FitWindows(inside, padded, out, 0.0), {pool.kernel_h, pool.kernel_w},
                           {pool.stride_h, pool.stride_w});
  }
  return mean(x) / share;
}

absl::Status Differ(const std::string& what) {
  return absl::InvalidArgumentError(
      absl::StrCat("the start version was not made from this float network: ", what));
}

absl::Status CheckSameNetwork(const Graph& source, const Graph& start) {
  if (source.nodes.size() != start.nodes.size() || source.values.size() != start.values.size()) {
    return Differ(absl::StrCat(start.nodes.size(), " nodes and ", start.values.size(),
                               " values, the float one has ", source.nodes.size(), " and ",
                               source.values.size()));
  }
  for (size_t i = 0; i < source.values.size(); ++i) {
    if (source.values[i].shape != start.values[i].shape) {
      return Differ(absl::StrCat("value '", start.values[i].name, "' is ",
                                 start.values[i].shape.ToString(), ", the float one ",
                                 source.values[i].shape.ToString()));
    }
  }
  for (size_t i = 0; i < source.nodes.size(); ++i) {
    const Node &a = source.nodes[i], &b = start.nodes[i];
    if (a.op != b.op || a.inputs != b.inputs || a.output != b.output || !(a.conv == b.conv) ||
        a.clip != b.clip || (b.quantized && a.weight.shape() != b.quantized->codes.shape())) {
      return Differ(absl::StrCat("node '", b.name, "' (", graph::Name(b.op), ") is not '", a.name,
                                 "' (", graph::Name(a.op), ")"));
    }
    if (a.quantized) {
      return absl::InvalidArgumentError(
          absl::StrCat("the float network is quantised: node '", a.name, "'"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

Network::Network(const Graph& graph)
    : graph_(graph), constants_(graph.values.size()), layers_(graph.nodes.size()) {
  for (size_t id = 0; id < graph.values.size(); ++id) {
    if (graph.values[id].constant) constants_[id] = FromTensor(*graph.values[id].constant);
  }
}

absl::StatusOr<Network> Network::Float(const Graph& graph) {
  Network network(graph);
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    if (node.quantized) {
      return absl::InvalidArgumentError(absl::StrCat("node '", node.name, "' is quantised"));
    }
    if (node.op > OpType::kSilu) {
      return absl::UnimplementedError(absl::StrCat(
          "node '", node.name, "': operator ", static_cast<int>(node.op), " cannot be fine-tuned"));
    }
    if (node.weight.empty()) continue;
    network.layers_[i].weight = ChannelsLast(FromTensor(node.weight));
    network.layers_[i].bias = FromTensor(node.bias);
  }
  return network;
}

absl::StatusOr<Network> Network::Quantised(const Graph& source, const Graph& start) {
  TERN_RETURN_IF_ERROR(CheckSameNetwork(source, start));
  TERN_RETURN_IF_ERROR(Float(source).status());  // every operator has a counterpart
  Network network(start);
  for (size_t i = 0; i < start.nodes.size(); ++i) {
    const Node& node = start.nodes[i];
    Layer& layer = network.layers_[i];
    if (IsWeighted(node)) {
      if (node.quantized) {
        TERN_ASSIGN_OR_RETURN(layer, MakeLayer(source.nodes[i], node, start.arithmetic));
      } else {  // a float layer of a mixed network is trained as it is
        layer.weight = Parameter(ChannelsLast(FromTensor(node.weight)));
      }
      layer.bias = Parameter(FromTensor(node.bias));
      network.latents_.push_back(layer.weight);
      network.biases_.push_back(layer.bias);
      if (layer.log_scale.defined()) network.scales_.push_back(layer.log_scale);
    } else if (!node.weight.empty()) {
      layer.weight = FromTensor(node.weight);
      layer.bias = FromTensor(node.bias);
    }
  }
  return network;
}

absl::StatusOr<Network::Layer> Network::MakeLayer(const Node& source, const Node& start,
                                                  graph::Arithmetic arithmetic) {
  const QuantizedWeights& weights = *start.quantized;
  const Shape& shape = weights.codes.shape();
  const int64_t outputs = shape[0], columns = shape.elements() / shape[0];
  Layer layer;
  layer.quantised = true;
  layer.has_grid = weights.scheme != WeightScheme::kInt8;
  layer.max_code = quant::MaxCode(weights.scheme);
  const at::Tensor codes = FromCodes(weights.codes);
  layer.start_steps =
      at::from_blob(const_cast<float*>(weights.steps.data()), {outputs, 1}, at::kFloat).clone();
  layer.start_scales = layer.start_steps;
  if (layer.has_grid) {
    const bool fixed_point = arithmetic == graph::Arithmetic::kFixedPoint;
    const at::Tensor integers = FromCodes(weights.cluster_scales);
    const double largest = integers.max().item<double>();
    const int bound =
        quant::MaxScaleWithoutOverflow(static_cast<int>(columns), LargestCode(weights.scheme));
    if (largest > bound) {
      return absl::InvalidArgumentError(absl::StrCat("node '", start.name, "': a cluster scale is ",
                                                     largest, ", want at most ", bound, " for ",
                                                     columns, " weights"));
    }
    // Scales that are larger than this quantiser's stay.
    layer.max_scale = std::max<double>(
        quant::MaxClusterScale(weights.scheme, static_cast<int>(columns), fixed_point), largest);
    layer.start_scales = layer.start_steps * integers;
    const int channels = static_cast<int>(shape[1]);
    const ClusterMap map(channels, weights.cluster_size == 0 ? channels : weights.cluster_size);
    if (map.clusters() > 1) {
      std::vector<int64_t> cluster(channels);
      for (int c = 0; c < channels; ++c) cluster[c] = map.cluster_of(c);
      layer.cluster = at::tensor(cluster, at::kLong);
    }
  } else {
    // Networks that were not quantised here may use all eight bits.
    layer.max_code = std::max<double>(quant::MaxInt8CodeWithoutOverflow(columns),
                                      codes.abs().max().item<double>());
  }
  layer.fixed_step = arithmetic == graph::Arithmetic::kFixedPoint;
  layer.start_top = layer.start_scales.amax(1, true);
  if (!layer.fixed_step || layer.has_grid) {
    layer.log_scale = Parameter(at::zeros_like(layer.start_scales));
  }

  // In cells: as near to the float weight as the code's cell allows; the outermost cells reach
  // half a cell beyond their codes.
  layer.weight = FromTensor(source.weight);
  layer.unit = Stretch(layer, layer.start_scales);
  const at::Tensor limit = at::full_like(codes, layer.max_code + 0.5);
  const at::Tensor hi = at::where(codes >= layer.max_code, limit, codes + (0.5 - kMargin));
  const at::Tensor lo = at::where(codes <= -layer.max_code, -limit, codes - (0.5 - kMargin));
  const at::Tensor cells = at::min(at::max(layer.weight / layer.unit, lo), hi);
  layer.weight = Parameter(ChannelsLast(cells * layer.unit));
  if (!at::equal(Codes(layer), codes)) {
    return absl::InternalError(
        absl::StrCat("node '", start.name, "': latent weights do not give the start's codes"));
  }
  return layer;
}

at::Tensor Network::Stretch(const Layer& layer, const at::Tensor& scales) {
  at::Tensor result = scales;
  if (layer.cluster.defined()) result = result.index_select(1, layer.cluster);
  std::vector<int64_t> dims(layer.weight.dim(), 1);
  dims[0] = result.size(0);
  dims[1] = result.size(1);
  return result.view(dims);
}

at::Tensor Network::Codes(const Layer& layer) {
  // -128 has no counterpart.
  return at::round(layer.weight.detach() / layer.unit)
      .clamp(-layer.max_code, std::min(layer.max_code, 127.0));
}

at::Tensor Network::RealScales(const Layer& layer) {
  if (!layer.log_scale.defined()) return layer.start_scales;
  return layer.start_scales * at::exp(layer.log_scale);
}

Network::Grid Network::OnGrid(const Layer& layer) {
  const at::Tensor real = RealScales(layer).detach();
  if (!layer.has_grid) return {real, at::ones_like(real)};
  // The step follows the row's largest scale, which therefore keeps its integer.
  Grid grid;
  grid.steps = layer.fixed_step ? layer.start_steps
                                : layer.start_steps * (real.amax(1, true) / layer.start_top);
  grid.scales = at::round(real / grid.steps).clamp(1, layer.max_scale);
  return grid;
}

at::Tensor Network::Weight(int index) const {
  const Layer& layer = layers_[index];
  if (!layer.quantised) return layer.weight;
  at::Tensor scales = RealScales(layer);
  if (layer.has_grid) {
    const Grid grid = OnGrid(layer);
    scales = scales + (grid.steps * grid.scales - scales).detach();
  }
  return Stretch(layer, scales) * Codes(layer) + (layer.weight - layer.weight.detach());
}

void Network::ClampLatents() {
  at::NoGradGuard no_grad;
  for (Layer& layer : layers_) {
    if (!layer.quantised) continue;
    const at::Tensor limit = layer.unit * (layer.max_code + 0.5);
    layer.weight.copy_(at::min(at::max(layer.weight, -limit), limit));
  }
}

absl::StatusOr<Graph> Network::ToGraph() const {
  at::NoGradGuard no_grad;
  Graph graph = graph_;
  const auto floats = [](const at::Tensor& t) {
    const at::Tensor dense = t.detach().contiguous();
    return std::vector<float>(dense.data_ptr<float>(), dense.data_ptr<float>() + dense.numel());
  };
  const auto bytes = [&](const at::Tensor& t) {
    std::vector<int8_t> result;
    for (float v : floats(t)) result.push_back(static_cast<int8_t>(v));
    return result;
  };
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    Node& node = graph.nodes[i];
    const Layer& layer = layers_[i];
    if (!IsWeighted(node)) continue;
    for (const at::Tensor& t : {layer.weight, layer.bias, layer.log_scale}) {
      if (t.defined() && !at::isfinite(t).all().item<bool>()) {
        return absl::InternalError(
            absl::StrCat("node '", node.name, "': training left a number that is not finite"));
      }
    }
    node.bias = Tensor::Of<float>(node.bias.shape(), floats(layer.bias));
    if (!layer.quantised) {
      node.weight = Tensor::Of<float>(node.weight.shape(), floats(layer.weight));
      continue;
    }
    QuantizedWeights& weights = *node.quantized;
    const Grid grid = OnGrid(layer);
    weights.codes = Tensor::Of<int8_t>(weights.codes.shape(), bytes(Codes(layer)));
    weights.steps = floats(grid.steps);
    if (layer.has_grid) {
      weights.cluster_scales =
          Tensor::Of<int8_t>(weights.cluster_scales.shape(), bytes(grid.scales));
    }
  }
  // Steps and cluster scales are on the grid already, biases are not.
  if (graph.arithmetic == graph::Arithmetic::kFixedPoint) {
    TERN_RETURN_IF_ERROR(Annotate(graph::RoundToFixedPoint(graph), "the trained network"));
  }
  TERN_RETURN_IF_ERROR(Annotate(graph::Validate(graph), "the trained network"));
  return graph;
}

at::Tensor Network::Round(const at::Tensor& real, graph::ValueId id,
                          const std::optional<graph::ClipRange>& clip) const {
  const std::optional<QuantParams>& quant = graph_.values[id].quant;
  if (!quant) return Clip(real, clip);
  // The fused activation is a narrower range of codes.
  const int64_t lo = clip ? quant->Quantize(clip->lo) : 0;
  const int64_t hi = clip ? quant->Quantize(clip->hi) : 255;
  if (quant->zero_point < lo || quant->zero_point > hi) {  // torch wants zero inside
    return at::fake_quantize_per_tensor_affine(Clip(real, clip), quant->scale, quant->zero_point, 0,
                                               255);
  }
  return at::fake_quantize_per_tensor_affine(real, quant->scale, quant->zero_point, lo, hi);
}

at::Tensor Network::Forward(const at::Tensor& images) const {
  const at::Tensor logits = ForwardAll(images, nullptr)[graph_.output];
  return logits.reshape({logits.size(0), -1});
}

std::vector<at::Tensor> Network::ForwardAll(const at::Tensor& images,
                                            const Observer& observer) const {
  std::vector<at::Tensor> values = constants_;
  values[graph_.input] = Round(images, graph_.input, std::nullopt);
  for (size_t i = 0; i < graph_.nodes.size(); ++i) {
    const Node& node = graph_.nodes[i];
    at::Tensor y = Evaluate(static_cast<int>(i), values);
    if (observer && IsWeighted(node)) observer(node, Clip(y, node.clip));
    const graph::ValueId x = node.inputs[0];
    // Values that only move keep their codes.
    const bool same_codes = quant::PassesParametersThrough(node) && graph_.values[x].quant &&
                            graph_.values[x].quant == graph_.values[node.output].quant;
    values[node.output] = same_codes ? y : Round(y, node.output, node.clip);
  }
  return values;
}

// The result in real numbers, before the fused activation.
at::Tensor Network::Evaluate(int index, const std::vector<at::Tensor>& values) const {
  const Node& node = graph_.nodes[index];
  const Layer& layer = layers_[index];
  const Shape& out = graph_.shape(node.output);
  const at::Tensor& x = values[node.inputs[0]];
  // An operand of element-wise arithmetic with the batch in front and the result's rank.
  const auto operand = [&](int k) {
    const graph::ValueId id = node.inputs[k];
    const Shape& shape = graph_.shape(id);
    std::vector<int64_t> dims(out.rank() + 1, 1);
    for (int d = 0; d < shape.rank(); ++d) dims[out.rank() + 1 - shape.rank() + d] = shape[d];
    if (!graph_.values[id].constant) dims[0] = values[id].size(0);
    return values[id].dim() == static_cast<int64_t>(dims.size()) && !graph_.values[id].constant
               ? values[id]
               : values[id].reshape(dims);
  };
  switch (node.op) {
    case OpType::kConv: {
      const graph::ConvAttributes& a = node.conv;
      at::Tensor input = x;
      std::vector<int64_t> padding = {a.pad_top, a.pad_left};
      if (a.pad_top != a.pad_bottom || a.pad_left != a.pad_right) {
        input = at::constant_pad_nd(x, {a.pad_left, a.pad_right, a.pad_top, a.pad_bottom}, 0);
        padding = {0, 0};
      }
      at::Tensor y = at::conv2d(input, Weight(index), layer.bias, {a.stride_h, a.stride_w}, padding,
                                {a.dilation_h, a.dilation_w}, a.groups);
      return node.has_residual() ? y + values[node.inputs[1]] : y;
    }
    case OpType::kFullyConnected: {
      at::Tensor y = at::linear(x, Weight(index), layer.bias);
      return node.has_residual() ? y + values[node.inputs[1]] : y;
    }
    case OpType::kBatchNorm: {
      std::vector<int64_t> dims(x.dim(), 1);
      dims[1] = layer.weight.numel();
      return x * layer.weight.view(dims) + layer.bias.view(dims);
    }
    case OpType::kRelu:
      return at::relu(x);
    case OpType::kClip:
      return x;  // by the rounding's clip
    case OpType::kSigmoid:
      return at::sigmoid(x);
    case OpType::kHardSigmoid:
      return at::clamp(x * node.alpha + node.beta, 0, 1);
    case OpType::kHardSwish:
      return at::hardswish(x);
    case OpType::kSilu:
      return at::silu(x);
    case OpType::kAdd:
      return operand(0) + operand(1);
    case OpType::kSub:
      return operand(0) - operand(1);
    case OpType::kMul:
      return operand(0) * operand(1);
    case OpType::kDiv:
      return operand(0) / operand(1);
    case OpType::kConcat: {
      std::vector<at::Tensor> parts;
      for (graph::ValueId id : node.inputs) parts.push_back(values[id]);
      return at::cat(parts, node.axis + 1);
    }
    case OpType::kMaxPool:
      return MaxPool(x, node.pool, out);
    case OpType::kAveragePool:
      return AveragePool(x, node.pool, out);
    case OpType::kGlobalAveragePool:
      return at::mean(x, {2, 3}, true);
    case OpType::kReshape:
      return x.reshape(WithBatch(x.size(0), out));
    case OpType::kTranspose: {
      std::vector<int64_t> order = {0};
      for (int axis : node.perm) order.push_back(axis + 1);
      return x.permute(order);
    }
    case OpType::kSlice: {
      const int64_t count = out[node.axis];
      const at::Tensor index = at::arange(count, at::kLong) * node.step + node.start;
      return x.index_select(node.axis + 1, index);
    }
    case OpType::kPad: {
      std::vector<int64_t> pads;  // last axis first
      for (size_t d = node.pads_before.size(); d-- > 0;) {
        pads.push_back(node.pads_before[d]);
        pads.push_back(node.pads_after[d]);
      }
      return at::constant_pad_nd(x, pads, node.pad_value);
    }
    case OpType::kSoftmax:
      return at::softmax(x, node.axis + 1);
    case OpType::kReduceMean: {
      std::vector<int64_t> axes;
      for (int axis : node.axes) axes.push_back(axis + 1);
      return at::mean(x, axes).reshape(WithBatch(x.size(0), out));
    }
  }
  return {};  // Float() has refused other operators
}

void UseThreads(int threads) {
  at::set_num_threads(threads);
#pragma omp parallel num_threads(threads)
  at::globalContext().setFlushDenormal(true);
}

}  // namespace tern::finetune
