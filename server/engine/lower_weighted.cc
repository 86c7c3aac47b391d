// Convolutions and fully connected layers: oneDNN in f32 and int8, our kernels for cluster and int8
// depthwise weights.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <tuple>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/engine/lowering.h"
#include "server/graph/fixed_point.h"
#include "server/kernels/int8_conv.h"
#include "server/tensor/cluster.h"

namespace tern::engine {
namespace {

using dnnl::memory;
using graph::Node;
using graph::OpType;
using graph::ValueId;
using tag = memory::format_tag;

// Beyond it two products of u8 and s8 may saturate 16 bits: 2 * 255 * 64 = 32640.
constexpr int kMaxSaturatingCode = 64;
// A fixed-point layer's sums in memory at a time, about: within any second-level cache.
constexpr int64_t kSumBytes = 256 << 10;

}  // namespace

// Packed weights of one oneDNN layer. Different batches may want different layouts; each is made
// once and shared by all sessions. Thread safe.
class PackedWeights {
 public:
  // `data` is let go after the first packing.
  PackedWeights(const memory::desc& plain, std::shared_ptr<const void> data)
      : plain_(std::move(data)),
        versions_{memory(plain, onednn::Engine(), const_cast<void*>(plain_.get()))} {}

  // Throws dnnl::error.
  memory Get(const memory::desc& wanted) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const memory& version : versions_) {
      if (version.get_desc() == wanted && plain_ == nullptr) return version;
    }
    memory packed(wanted, onednn::Engine());
    dnnl::stream stream(onednn::Engine());
    onednn::Reorder(stream, versions_[0], packed);
    // The plain weights have served: later layouts are made from the first packed one.
    if (plain_ != nullptr) versions_.clear();
    plain_.reset();
    versions_.push_back(packed);
    return packed;
  }

  size_t bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t sum = 0;
    for (const memory& version : versions_) sum += version.get_desc().get_size();
    return sum;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const void> plain_;
  std::vector<memory> versions_;
};

namespace {

memory FloatVector(const std::vector<float>& values) {
  memory result({{static_cast<memory::dim>(values.size())}, memory::data_type::f32, tag::x},
                onednn::Engine());
  std::memcpy(result.get_data_handle(), values.data(), values.size() * sizeof(float));
  return result;
}

bool IsDepthwise(const Node& node, const Shape& x) {
  return node.conv.groups > 1 && node.conv.groups == x[0];
}

}  // namespace

IntegerWeights Lowering::Expand(const Node& node) const {
  const QuantizedWeights& q = *node.quantized;
  const Shape& shape = q.codes.shape();
  const int64_t outputs = shape[0], channels = shape[1],
                taps = shape.elements() / (outputs * channels);
  const bool clustered = q.scheme != WeightScheme::kInt8;
  const ClusterMap map(static_cast<int>(channels), clustered ? q.cluster_size : 1);
  const int8_t* codes = q.codes.data<int8_t>().data();
  const auto scales = q.cluster_scales.data<int8_t>();
  IntegerWeights result;
  result.sums.resize(outputs);
  const bool sums = quant(node.inputs[0])->zero_point != 0;
  if (!clustered) {
    result.largest = LargestMagnitude(q.codes.data<int8_t>());
    for (int64_t o = 0; sums && o < outputs; ++o) {
      const int8_t* own = codes + o * channels * taps;
      result.sums[o] = std::accumulate(own, own + channels * taps, 0);
    }
    return result;
  }
  const bool products = ExpandsToInt8(node);
  if (!sums && !products) return result;
  if (products) result.values.resize(shape.elements());
  std::vector<int> cluster_of(channels);
  for (int c = 0; c < static_cast<int>(channels); ++c) cluster_of[c] = map.cluster_of(c);
  std::vector<int16_t> scale_of(channels);
  for (int64_t o = 0; o < outputs; ++o) {
    const int8_t* own_scales = scales.data() + o * map.clusters();
    for (int64_t c = 0; c < channels; ++c) scale_of[c] = own_scales[cluster_of[c]];
    const int8_t* own = codes + o * channels * taps;
    int sum = 0;
    if (taps == 1) {
      for (int64_t c = 0; c < channels; ++c) sum += scale_of[c] * static_cast<int16_t>(own[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        int codes_sum = 0;
        for (int64_t t = 0; t < taps; ++t) codes_sum += own[c * taps + t];
        sum += scale_of[c] * codes_sum;
      }
    }
    result.sums[o] = sum;
    for (int64_t i = 0; products && i < channels * taps; ++i) {
      const int w = scale_of[i / taps] * own[i];
      result.largest = std::max(result.largest, std::abs(w));
      result.values[o * channels * taps + i] = static_cast<int8_t>(w);
    }
  }
  return result;
}

absl::Status Lowering::LowerFloatWeighted(const Node& node) {
  // The graph's own, which lives until everything is packed, or a copy in float.
  const auto weight = node.quantized
                          ? std::make_shared<const Tensor>(Dequantize(*node.quantized))
                          : std::shared_ptr<const Tensor>(std::shared_ptr<void>(), &node.weight);
  const bool conv = node.op == OpType::kConv;
  const Shape &x = graph_.shape(node.inputs[0]), &y = graph_.shape(node.output);
  onednn::Epilogue epilogue;
  epilogue.sum = node.has_residual();
  epilogue.clip = node.clip;
  const auto bias_values = node.bias.data<float>();
  auto bias = std::make_shared<memory>(FloatVector({bias_values.begin(), bias_values.end()}));
  const memory::dims w_dims = WeightDims(node, weight->shape());
  auto weights =
      std::make_shared<PackedWeights>(memory::desc(w_dims, memory::data_type::f32, PlainTag(node)),
                                      std::shared_ptr<const void>(weight, weight->raw()));

  // Candidates of (input, output) format, best first.
  std::vector<std::pair<Format, Format>> candidates;
  const bool blocks = conv && !onednn::UsesAvx512() && y[0] >= kChannelBlock;
  if (blocks && (x[0] >= kChannelBlock || IsDepthwise(node, x))) {
    candidates.push_back({Format::kF32Blocked, Format::kF32Blocked});
  } else if (blocks && x[0] <= 4 && node.conv.groups == 1) {
    candidates.push_back({Format::kF32Planar, Format::kF32Blocked});
  }
  candidates.push_back({Format::kF32, Format::kF32});
  std::optional<std::pair<Format, Format>> chosen;
  Weighted made;
  absl::Status failure;
  for (const auto& candidate : candidates) {
    made.primitives =
        ShareWeighted(node, candidate.first, candidate.second, w_dims, epilogue, x, y);
    const absl::Status status = onednn::Guard(absl::StrCat("node ", node.name),
                                              [&] { made.first = made.primitives->Get(1); });
    if (!status.ok()) {
      failure = status;
      continue;
    }
    const bool fast = absl::StartsWith(made.first->implementation, "jit") ||
                      absl::StartsWith(made.first->implementation, "brg");
    if (candidate.first != Format::kF32 && !fast) continue;
    PackLater(weights, made.first->weights);
    chosen = candidate;
    break;
  }
  if (!chosen) return failure;
  const auto [x_format, y_format] = *chosen;
  SetFloatImplementation(node, absl::StrCat("onednn:", made.first->implementation));
  program_.weight_bytes += bias_values.size() * sizeof(float);

  const int src = Get(node.inputs[0], x_format);
  const int residual = node.has_residual() ? Get(node.inputs[1], y_format) : -1;
  const int dst = NewBuffer(y_format, y);
  AddWeightedStep(made, src, residual, dst, weights, bias);
  StoreFloat(node.output, dst);
  return absl::OkStatus();
}

memory::dims Lowering::WeightDims(const Node& node, const Shape& w) {
  if (node.op == OpType::kFullyConnected) return {w[0], w[1]};
  const int64_t groups = node.conv.groups;
  if (groups == 1) return {w[0], w[1], w[2], w[3]};
  return {groups, w[0] / groups, w[1], w[2], w[3]};
}

tag Lowering::PlainTag(const Node& node) {
  if (node.op == OpType::kFullyConnected) return tag::oi;
  return node.conv.groups == 1 ? tag::oihw : tag::goihw;
}

onednn::Primitive Lowering::MakeWeighted(const Node& node, Format x_format, Format y_format,
                                         const memory::dims& w_dims,
                                         const onednn::Epilogue& epilogue, const Shape& x,
                                         const Shape& y, int64_t batch, bool padded) {
  const auto type = x_format == Format::kU8 ? memory::data_type::s8 : memory::data_type::f32;
  const memory::desc weights(w_dims, type, tag::any);
  // Sums leave as they are.
  const memory::desc bias = y_format == Format::kS32
                                ? memory::desc()
                                : memory::desc({y[0]}, memory::data_type::f32, tag::x);
  if (node.op == OpType::kFullyConnected) {
    return onednn::MakeInnerProduct(Desc(x_format, x, batch), weights, bias,
                                    Desc(y_format, y, batch), epilogue);
  }
  const auto& conv = node.conv;
  onednn::ConvolutionSpec spec;
  spec.src = Desc(x_format, x, batch);
  spec.weights = weights;
  spec.bias = bias;
  spec.dst = Desc(y_format, y, batch);
  spec.grouped = conv.groups != 1;
  spec.strides = {conv.stride_h, conv.stride_w};
  spec.dilations = {conv.dilation_h, conv.dilation_w};
  spec.pads_begin = padded ? memory::dims{0, 0} : memory::dims{conv.pad_top, conv.pad_left};
  spec.pads_end = padded ? memory::dims{0, 0} : memory::dims{conv.pad_bottom, conv.pad_right};
  return onednn::MakeConvolution(spec, epilogue);
}

std::shared_ptr<onednn::SharedPrimitives> Lowering::ShareWeighted(
    const Node& node, Format x_format, Format y_format, const memory::dims& w_dims,
    const onednn::Epilogue& epilogue, const Shape& x, const Shape& y, bool padded) {
  // The node's name and attributes only: its weights are packed elsewhere.
  Node attributes;
  attributes.name = node.name;
  attributes.op = node.op;
  attributes.conv = node.conv;
  return std::make_shared<onednn::SharedPrimitives>([=](int64_t batch) {
    return MakeWeighted(attributes, x_format, y_format, w_dims, epilogue, x, y, batch, padded);
  });
}

absl::Span<const int8_t> Lowering::Products(const Node& node, const IntegerWeights& integers) {
  return integers.values.empty() ? node.quantized->codes.data<int8_t>()
                                 : absl::MakeConstSpan(integers.values);
}

std::shared_ptr<PackedWeights> Lowering::Plain(const Node& node, const memory::dims& w_dims,
                                               IntegerWeights integers) {
  const auto kept = std::make_shared<const IntegerWeights>(std::move(integers));
  return std::make_shared<PackedWeights>(
      memory::desc(w_dims, memory::data_type::s8, PlainTag(node)),
      std::shared_ptr<const void>(kept, Products(node, *kept).data()));
}

void Lowering::PackLater(std::shared_ptr<PackedWeights> weights, const memory::desc& wanted) {
  packing_.push_back({[weights, wanted] { weights->Get(wanted); },
                      [this, weights] { program_.weight_bytes += weights->bytes(); }});
}

void Lowering::AddWeightedStep(const Weighted& made, int src, int residual, int dst,
                               std::shared_ptr<PackedWeights> weights,
                               std::shared_ptr<memory> bias) {
  std::vector<int> reads{src};
  if (residual >= 0) reads.push_back(residual);
  Step& step = AddStep(std::move(reads), {dst});
  if (residual >= 0) {
    step.in_place = {{residual, dst}};
    step.copy_from = residual;
    step.copy_to = dst;
  }
  step.make = [=](const RunContext& run) {
    const auto primitive = made.primitives->Get(run.batch);
    return Bind(primitive, {{DNNL_ARG_SRC, Wrap(run, src, primitive->src)},
                            {DNNL_ARG_WEIGHTS, weights->Get(primitive->weights)},
                            {DNNL_ARG_BIAS, *bias},
                            {DNNL_ARG_DST, Wrap(run, dst, primitive->dst)}});
  };
}

Lowering::Rescaling Lowering::RescalingOf(const Node& node, const IntegerWeights& weights) const {
  const QuantParams x = *quant(node.inputs[0]);
  const bool codes_out = quant(node.output).has_value();
  const QuantParams y = codes_out ? *quant(node.output) : QuantParams{1.0f, 0};
  const QuantizedWeights& q = *node.quantized;
  const auto bias = node.bias.data<float>();
  const int64_t outputs = q.codes.shape()[0];
  Rescaling result;
  double residual_zero = 0;
  if (node.has_residual()) {
    const QuantParams r = *quant(node.inputs[1]);
    result.residual_ratio = static_cast<double>(r.scale) / y.scale;
    residual_zero = r.zero_point;
  }
  result.multiplier.resize(outputs);
  result.offset.resize(outputs);
  for (int64_t o = 0; o < outputs; ++o) {
    const double m = static_cast<double>(x.scale) * q.steps[o] / y.scale;
    result.multiplier[o] = static_cast<float>(m);
    result.offset[o] = static_cast<float>(static_cast<double>(bias[o]) / y.scale + y.zero_point -
                                          static_cast<double>(x.zero_point) * weights.sums[o] * m -
                                          residual_zero * result.residual_ratio);
  }
  if (codes_out) {
    const auto [lo, hi] = ClipCodes(node.clip, y);
    result.clamp = {static_cast<float>(lo), static_cast<float>(hi)};
  } else {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    result.clamp = node.clip.value_or(graph::ClipRange{-kInfinity, kInfinity});
  }
  return result;
}

absl::Status Lowering::LowerIntegerWeighted(const Node& node) {
  const IntegerWeights weights = std::move(integers_[node_]);
  const Rescaling rescaling = RescalingOf(node, weights);
  if (const OwnLayer own = PackOwn(node, weights.largest)) return LowerOwn(node, own, rescaling);
  return LowerInt8(node, weights, rescaling);
}

bool Lowering::ExpandsToInt8(const Node& node) const {
  if (!options_.expand_on_vnni || options_.isa != kernels::Isa::kAvx512Vnni ||
      !onednn::ExactInt8() || !IsExactOnOneDnn(node, 0)) {
    return false;
  }
  const auto scales = node.quantized->cluster_scales.data<int8_t>();
  return *std::max_element(scales.begin(), scales.end()) * LargestCode(node.quantized->scheme) <=
         127;
}

kernels::ConvGeometry Lowering::GeometryOf(const Node& node, const Shape& x, const Shape& y) {
  const Shape& w = node.quantized->codes.shape();
  kernels::ConvGeometry geometry;
  geometry.ic = static_cast<int>(x[0]);
  geometry.oc = static_cast<int>(y[0]);
  if (node.op == OpType::kConv) {
    geometry.ih = static_cast<int>(x[1]);
    geometry.iw = static_cast<int>(x[2]);
    geometry.oh = static_cast<int>(y[1]);
    geometry.ow = static_cast<int>(y[2]);
    geometry.kh = static_cast<int>(w[2]);
    geometry.kw = static_cast<int>(w[3]);
    geometry.stride_h = node.conv.stride_h;
    geometry.stride_w = node.conv.stride_w;
    geometry.pad_top = node.conv.pad_top;
    geometry.pad_left = node.conv.pad_left;
    geometry.dilation_h = node.conv.dilation_h;
    geometry.dilation_w = node.conv.dilation_w;
  }
  return geometry;
}

bool Lowering::IsExactOnOneDnn(const Node& node, int largest) {
  if (largest > kMaxSaturatingCode && !onednn::ExactInt8()) return false;
  if (node.op != OpType::kConv || onednn::UsesAvx512()) return true;
  // oneDNN copies the pixels that a stride leaves of a 1x1 layer's input, 16 channels at a time; a
  // thread's last ones may overwrite the next thread's first.
  const Shape& w = node.quantized->codes.shape();
  return w[2] * w[3] != 1 || (node.conv.stride_h == 1 && node.conv.stride_w == 1) || w[1] % 16 == 0;
}

bool Lowering::RunsInt8OnOneDnn(int i) const {
  const Node& node = graph_.nodes[i];
  if (graph_.arithmetic == graph::Arithmetic::kFixedPoint || !IsInteger(node)) return false;
  if (!IsExactOnOneDnn(node, integers_[i].largest)) return false;
  if (IsClustered(node.quantized->scheme)) return ExpandsToInt8(node);
  return !int8_kernels_[i] && !(IsInt8Depthwise(node) && options_.own_int8);
}

Lowering::Int8OneDnn Lowering::MakeInt8OneDnn(const Node& node, const Rescaling& rescaling) const {
  const bool codes_out = quant(node.output).has_value();
  Int8OneDnn result;
  Shape x = graph_.shape(node.inputs[0]);
  result.bias = rescaling.offset;
  onednn::Epilogue epilogue;
  epilogue.scales = rescaling.multiplier;
  epilogue.sum = node.has_residual();
  epilogue.sum_scale = static_cast<float>(rescaling.residual_ratio);
  // A float result takes its residual as reals, whose zero point is gone.
  if (node.has_residual() && !codes_out) {
    const QuantParams r = *quant(node.inputs[1]);
    for (float& b : result.bias) b += static_cast<float>(r.zero_point * rescaling.residual_ratio);
    epilogue.sum_scale = 1.0f;
  }
  // u8 results saturate at 0 and 255 by themselves.
  const graph::ClipRange clamp = rescaling.clamp;
  const bool clamps = codes_out ? clamp.lo > 0.0f || clamp.hi < 255.0f : node.clip.has_value();
  if (clamps) epilogue.clip = clamp;

  // oneDNN pads with 0. Where the zero point is another code, the input is padded first.
  const auto& conv = node.conv;
  const bool has_pads = node.op == OpType::kConv &&
                        (conv.pad_top | conv.pad_left | conv.pad_bottom | conv.pad_right) != 0;
  result.padded = quant(node.inputs[0])->zero_point != 0 && has_pads;
  if (result.padded)
    x = Shape{x[0], x[1] + conv.pad_top + conv.pad_bottom, x[2] + conv.pad_left + conv.pad_right};
  result.w_dims = WeightDims(node, node.quantized->codes.shape());
  result.made.primitives =
      ShareWeighted(node, Format::kU8, codes_out ? Format::kU8 : Format::kF32, result.w_dims,
                    epilogue, x, graph_.shape(node.output), result.padded);
  result.made.first = result.made.primitives->Get(1);
  return result;
}

absl::Status Lowering::LowerInt8(const Node& node, const IntegerWeights& integers,
                                 const Rescaling& rescaling) {
  const bool codes_out = quant(node.output).has_value();
  if (!IsExactOnOneDnn(node, integers.largest)) {
    const int residual = node.has_residual() ? Get(node.inputs[1], Format::kU8) : -1;
    const int sums = AddInt8Sums(node, integers, Get(node.inputs[0], Format::kU8));
    const int dst = NewBuffer(codes_out ? Format::kU8 : Format::kF32, graph_.shape(node.output));
    std::vector<int> reads{sums};
    if (residual >= 0) reads.push_back(residual);
    Step& step = AddStep(std::move(reads), {dst});
    if (residual >= 0 && codes_out) step.in_place = {{residual, dst}};
    const int64_t pixels =
        buffer(dst).sample_elements / static_cast<int64_t>(rescaling.multiplier.size());
    step.loop = [=, isa = options_.isa](const RunContext& run) {
      const kernels::FloatEpilogue epilogue{rescaling.multiplier.data(), rescaling.offset.data(),
                                            static_cast<float>(rescaling.residual_ratio),
                                            rescaling.clamp.lo, rescaling.clamp.hi};
      FinishSums(isa, epilogue, static_cast<int64_t>(rescaling.multiplier.size()),
                 run.at<int32_t>(sums), residual >= 0 ? run.at<uint8_t>(residual) : nullptr,
                 run.batch * pixels, codes_out ? run.at<uint8_t>(dst) : nullptr,
                 codes_out ? nullptr : run.at<float>(dst));
    };
    Define(node.output, dst);
    return absl::OkStatus();
  }
  std::optional<Int8OneDnn>& ready = int8_onednn_[node_];
  if (!ready) {
    TERN_RETURN_IF_ERROR(onednn::Guard(absl::StrCat("node ", node.name),
                                       [&] { ready = MakeInt8OneDnn(node, rescaling); }));
  }
  const Int8OneDnn layer_made = *std::exchange(ready, std::nullopt);
  const onednn::Primitive& primitive = *layer_made.made.first;
  if (absl::StartsWith(primitive.implementation, "ref")) {
    slow_int8_.push_back(node.name);
    return LowerFloatWeighted(node);
  }
  auto weights = Plain(node, layer_made.w_dims, integers);
  PackLater(weights, primitive.weights);
  auto bias = std::make_shared<memory>(
      FloatVector(onednn::BiasBesideScales(layer_made.bias, rescaling.multiplier)));
  layer().implementation = absl::StrCat("onednn:", primitive.implementation);
  program_.weight_bytes += layer_made.bias.size() * sizeof(float);

  const Format y_format = codes_out ? Format::kU8 : Format::kF32;
  int src = Get(node.inputs[0], Format::kU8);
  if (layer_made.padded) src = Pad(src, node, quant(node.inputs[0])->zero_point);
  const int residual = node.has_residual() ? Get(node.inputs[1], y_format) : -1;
  const int dst = NewBuffer(y_format, graph_.shape(node.output));
  AddWeightedStep(layer_made.made, src, residual, dst, weights, bias);
  Define(node.output, dst);
  return absl::OkStatus();
}

int Lowering::Pad(int src, const Node& node, int zero) {
  const auto conv = node.conv;
  const Shape shape = buffer(src).shape;
  const int result =
      NewBuffer(Format::kU8, Shape{shape[0], shape[1] + conv.pad_top + conv.pad_bottom,
                                   shape[2] + conv.pad_left + conv.pad_right});
  AddStep({src}, {result}, Conversion::kPad).loop = [=](const RunContext& run) {
    PadCodes(run.at<uint8_t>(src), run.batch, shape, conv.pad_top, conv.pad_left, conv.pad_bottom,
             conv.pad_right, static_cast<uint8_t>(zero), run.at<uint8_t>(result));
  };
  return result;
}

bool Lowering::IsInt8Depthwise(const Node& node) const {
  return node.op == OpType::kConv && node.quantized->scheme == WeightScheme::kInt8 &&
         IsDepthwise(node, graph_.shape(node.inputs[0])) &&
         graph_.shape(node.output)[0] == node.conv.groups;
}

Lowering::OwnLayer Lowering::PackOwn(const Node& node, int largest) {
  if (IsInt8Depthwise(node) && (options_.own_int8 || !IsExactOnOneDnn(node, largest))) {
    const auto packed =
        std::make_shared<const kernels::PackedDepthwiseConv>(kernels::PackDepthwiseConv(
            GeometryOf(node, graph_.shape(node.inputs[0]), graph_.shape(node.output)),
            node.quantized->codes.data<int8_t>(), options_.isa));
    layer().implementation = absl::StrCat("tern:depthwise-", kernels::IsaName(packed->isa));
    program_.weight_bytes += packed->bytes();
    program_.scratch_bytes =
        std::max(program_.scratch_bytes, kernels::DepthwiseConvScratchBytes(*packed));
    return {[packed](const RunContext& run, const kernels::ClusterConvArgs& args) {
      RunDepthwise(run, *packed, args);
    }};
  }
  if (node.conv.groups != 1) return {};
  if (!IsClustered(node.quantized->scheme)) {
    std::optional<Int8Kernel>& made = int8_kernels_[node_];
    if (!made) return {};
    const auto kernel = std::make_shared<const kernels::ConvKernel>(std::move(made->kernel));
    CountKernel(*kernel, layer());
    return {[kernel](const RunContext& run, const kernels::ClusterConvArgs& args) {
              RunCluster(run, *kernel, args);
            },
            made->padded};
  }
  if (ExpandsToInt8(node)) return {};
  return {UseKernel(node)};
}

void Lowering::CountKernel(const kernels::ConvKernel& kernel, LayerInfo& layer) {
  layer.implementation = absl::StrCat("tern:", kernel.name());
  program_.weight_bytes += kernel.bytes();
  program_.scratch_bytes = std::max(program_.scratch_bytes, kernel.scratch_bytes());
}

Lowering::OwnKernel Lowering::UseKernel(const Node& node) {
  const kernels::ConvGeometry geometry =
      GeometryOf(node, graph_.shape(node.inputs[0]), graph_.shape(node.output));
  const auto kernel = std::make_shared<std::optional<kernels::ConvKernel>>();
  packing_.push_back({[this, kernel, geometry, &node] {
                        *kernel =
                            kernels::ConvKernel::Make(geometry, *node.quantized, options_.isa);
                      },
                      [this, kernel, at = node_] { CountKernel(**kernel, program_.layers[at]); }});
  return [kernel](const RunContext& run, const kernels::ClusterConvArgs& args) {
    RunCluster(run, **kernel, args);
  };
}

std::optional<Lowering::Int8Kernel> Lowering::MakeInt8Kernel(const Node& node, int largest) const {
  const bool exact = IsExactOnOneDnn(node, largest);
  if (node.quantized->scheme != WeightScheme::kInt8 || node.conv.groups != 1) return std::nullopt;
  // With VNNI oneDNN needs one instruction where these kernels need three.
  if (exact && (options_.isa != kernels::Isa::kAvx2 || !options_.own_int8)) return std::nullopt;
  kernels::ConvGeometry geometry =
      GeometryOf(node, graph_.shape(node.inputs[0]), graph_.shape(node.output));
  const auto& conv = node.conv;
  const bool padded = (conv.pad_top | conv.pad_left | conv.pad_bottom | conv.pad_right) != 0 &&
                      kernels::PrefersRowTaps(geometry, options_.isa);
  if (padded) {
    geometry.ih += conv.pad_top + conv.pad_bottom;
    geometry.iw += conv.pad_left + conv.pad_right;
    geometry.pad_top = geometry.pad_left = 0;
  }
  auto kernel = exact ? kernels::ConvKernel::MakeIfFaster(geometry, *node.quantized, options_.isa)
                      : kernels::ConvKernel::Make(geometry, *node.quantized, options_.isa);
  if (!kernel) return std::nullopt;
  return Int8Kernel{std::move(*kernel), padded};
}

int Lowering::OwnInput(const Node& node, const OwnLayer& own) {
  const int src = Get(node.inputs[0], Format::kU8);
  return own.padded ? Pad(src, node, quant(node.inputs[0])->zero_point) : src;
}

absl::Status Lowering::LowerOwn(const Node& node, const OwnLayer& own, const Rescaling& rescaling) {
  program_.weight_bytes += (rescaling.multiplier.size() + rescaling.offset.size()) * sizeof(float);

  const bool codes_out = quant(node.output).has_value();
  const int src = OwnInput(node, own);
  const int residual = node.has_residual() ? Get(node.inputs[1], Format::kU8) : -1;
  const int dst = NewBuffer(codes_out ? Format::kU8 : Format::kF32, graph_.shape(node.output));
  std::vector<int> reads{src};
  if (residual >= 0) reads.push_back(residual);
  const uint8_t zero = static_cast<uint8_t>(quant(node.inputs[0])->zero_point);
  Step& step = AddStep(std::move(reads), {dst});
  if (residual >= 0 && codes_out) step.in_place = {{residual, dst}};
  step.loop = [=, kernel = own.run](const RunContext& run) {
    kernels::ClusterConvArgs args;
    args.src = run.at<uint8_t>(src);
    args.batch = run.batch;
    args.src_zero_point = zero;
    args.multiplier = rescaling.multiplier.data();
    args.offset = rescaling.offset.data();
    if (residual >= 0) args.residual = run.at<uint8_t>(residual);
    args.residual_multiplier = static_cast<float>(rescaling.residual_ratio);
    if (codes_out) {
      args.dst = run.at<uint8_t>(dst);
    } else {
      args.dst_f32 = run.at<float>(dst);
    }
    args.lo = rescaling.clamp.lo;
    args.hi = rescaling.clamp.hi;
    kernel(run, args);
  };
  Define(node.output, dst);
  return absl::OkStatus();
}

absl::Status Lowering::LowerFixedPoint(const Node& node) {
  const auto fixed = std::make_shared<const FixedPointLayer>(graph::FixedPointOf(graph_, node));
  const IntegerWeights integers = std::move(integers_[node_]);
  OwnLayer own = PackOwn(node, integers.largest);
  if (!own) {
    TERN_ASSIGN_OR_RETURN(const bool done, LowerFixedPointOneDnn(node, integers, fixed));
    if (done) return absl::OkStatus();
    if (node.conv.groups == 1) own = {UseKernel(node)};
  }
  const Shape& y = graph_.shape(node.output);
  const uint8_t zero = static_cast<uint8_t>(quant(node.inputs[0])->zero_point);
  const bool codes_out = quant(node.output).has_value();
  const int src = OwnInput(node, own);
  const int residual = node.has_residual() ? Get(node.inputs[1], Format::kU8) : -1;
  // Our kernels round where 32 bits suffice; elsewhere the sums come out.
  const bool fused = own && codes_out && fixed->narrow();
  int out = -1;
  std::vector<int> reads{src};
  if (fused && residual >= 0) reads.push_back(residual);
  program_.weight_bytes += fixed->multiplier.size() * (sizeof(int32_t) + sizeof(int64_t));
  if (own) {
    out = NewBuffer(fused ? Format::kU8 : Format::kS32, y);
    Step& step = AddStep(std::move(reads), {out});
    if (fused && residual >= 0) step.in_place = {{residual, out}};
    step.loop = [=, kernel = own.run](const RunContext& run) {
      kernels::ClusterConvArgs args;
      args.src = run.at<uint8_t>(src);
      args.batch = run.batch;
      args.src_zero_point = zero;
      if (fused) {
        args.fixed = fixed.get();
        if (residual >= 0) args.residual = run.at<uint8_t>(residual);
        args.dst = run.at<uint8_t>(out);
      } else {
        args.dst_s32 = run.at<int32_t>(out);
      }
      kernel(run, args);
    };
  } else {
    out = AddInt8Sums(node, integers, src);
  }
  if (fused) {
    Define(node.output, out);
    return absl::OkStatus();
  }
  const int dst = NewBuffer(codes_out ? Format::kU8 : Format::kF32, y);
  AddRequantize(out, residual, dst, fixed, node.clip);
  Define(node.output, dst);
  return absl::OkStatus();
}

int Lowering::AddInt8Sums(const Node& node, const IntegerWeights& integers, int src) {
  const Shape &x = graph_.shape(node.inputs[0]), &y = graph_.shape(node.output);
  const kernels::Isa isa = std::min(options_.isa, kernels::Isa::kAvx2);
  const auto packed = std::make_shared<const kernels::PackedInt8Conv>(kernels::PackInt8Conv(
      GeometryOf(node, x, y), node.op == OpType::kConv ? node.conv.groups : 1,
      Products(node, integers), static_cast<uint8_t>(quant(node.inputs[0])->zero_point), isa));
  layer().implementation = absl::StrCat("tern:int8-", kernels::IsaName(isa));
  program_.weight_bytes += packed->bytes();
  const int sums = NewBuffer(Format::kS32, y);
  AddStep({src}, {sums}).loop = [=](const RunContext& run) {
    const int64_t pixels = int64_t{run.batch} * packed->geometry.oh * packed->geometry.ow;
    InRanges(pixels, true, [&](int64_t begin, int64_t end) {
      kernels::RunInt8Conv(*packed, run.at<uint8_t>(src), begin, end, run.at<int32_t>(sums));
    });
  };
  return sums;
}

void Lowering::AddRequantize(int acc, int residual, int dst,
                             std::shared_ptr<const FixedPointLayer> layer,
                             std::optional<graph::ClipRange> clip) {
  std::vector<int> reads{acc};
  if (residual >= 0) reads.push_back(residual);
  Step& step = AddStep(std::move(reads), {dst});
  if (residual >= 0 && buffer(dst).format == Format::kU8) step.in_place = {{residual, dst}};
  const int64_t pixels =
      buffer(dst).sample_elements / static_cast<int64_t>(layer->multiplier.size());
  const bool codes_out = buffer(dst).format == Format::kU8;
  const kernels::Isa isa = options_.isa;
  step.loop = [=](const RunContext& run) {
    const uint8_t* r = residual >= 0 ? run.at<uint8_t>(residual) : nullptr;
    if (codes_out) {
      RequantizeSums(isa, *layer, run.at<int32_t>(acc), r, run.batch * pixels,
                     run.at<uint8_t>(dst));
    } else {
      ScaleSums(*layer, clip, run.at<int32_t>(acc), r, run.batch * pixels, run.at<float>(dst));
    }
  };
}

absl::StatusOr<bool> Lowering::LowerFixedPointOneDnn(const Node& node,
                                                     const IntegerWeights& integers,
                                                     std::shared_ptr<const FixedPointLayer> fixed) {
  // oneDNN converts s32 results through f32, which holds every integer up to 2^24.
  if (fixed->largest_accumulator > (1 << 24)) return false;
  if (!IsExactOnOneDnn(node, integers.largest)) return false;
  const Shape& y = graph_.shape(node.output);
  Shape x = graph_.shape(node.inputs[0]);
  const auto& conv = node.conv;
  const int zero = quant(node.inputs[0])->zero_point;
  const bool padded = zero != 0 && node.op == OpType::kConv &&
                      (conv.pad_top | conv.pad_left | conv.pad_bottom | conv.pad_right) != 0;
  if (padded)
    x = Shape{x[0], x[1] + conv.pad_top + conv.pad_bottom, x[2] + conv.pad_left + conv.pad_right};
  // Small images some at a time, the rows of large ones.
  const int64_t sum_bytes = static_cast<int64_t>(sizeof(int32_t)) * y.elements();
  // Every band must see a row of the input, which pads below the kernel's extent grant.
  const int64_t extent =
      y.rank() == 3 ? (node.quantized->codes.shape()[2] - 1) * conv.dilation_h + 1 : 0;
  const bool by_rows = sum_bytes > kSumBytes && y.rank() == 3 && y[1] > 1 &&
                       conv.pad_top < extent && conv.pad_bottom < extent;
  const int64_t images =
      by_rows ? 1 : std::clamp<int64_t>(kSumBytes / sum_bytes, 1, options_.max_batch);
  const int64_t bands = by_rows ? std::min(y[1], (sum_bytes + kSumBytes - 1) / kSumBytes) : 1;

  const memory::dims w_dims = WeightDims(node, node.quantized->codes.shape());
  onednn::Primitive primitive;
  const absl::Status made = onednn::Guard(absl::StrCat("node ", node.name), [&] {
    primitive = MakeWeighted(node, Format::kU8, Format::kS32, w_dims, {}, x, y, images, padded);
  });
  if (!made.ok() || absl::StartsWith(primitive.implementation, "ref")) return false;
  auto weights = Plain(node, w_dims, integers);
  PackLater(weights, primitive.weights);
  const kernels::Isa isa = options_.isa;
  layer().implementation =
      absl::StrCat("onednn:", primitive.implementation,
                   "+tern:", kernels::IsaName(std::min(isa, kernels::Isa::kAvx2)));
  program_.weight_bytes += fixed->multiplier.size() * (sizeof(int32_t) + sizeof(int64_t));

  const bool codes_out = quant(node.output).has_value();
  int src = Get(node.inputs[0], Format::kU8);
  if (padded) src = Pad(src, node, zero);
  const int residual = node.has_residual() ? Get(node.inputs[1], Format::kU8) : -1;
  Shape band = y;
  if (by_rows) band[1] = (y[1] + bands - 1) / bands;
  const int sums = NewBuffer(Format::kS32, band);
  buffer(sums).max_samples = static_cast<int>(images);
  const int dst = NewBuffer(codes_out ? Format::kU8 : Format::kF32, y);
  std::vector<int> reads{src};
  if (residual >= 0) reads.push_back(residual);
  Step& step = AddStep(std::move(reads), {dst, sums});
  // Each residual code is read before its result is written.
  if (residual >= 0 && codes_out) step.in_place = {{residual, dst}};
  // The node's name and attributes only; the pads are zero where `src` holds them.
  Node attributes;
  attributes.name = node.name;
  attributes.op = node.op;
  attributes.conv = node.conv;
  if (padded) {
    attributes.conv.pad_top = attributes.conv.pad_left = 0;
    attributes.conv.pad_bottom = attributes.conv.pad_right = 0;
  }
  const std::optional<graph::ClipRange> clip = node.clip;
  const int64_t kernel_h = node.op == OpType::kConv ? node.quantized->codes.shape()[2] : 1;
  step.make = [=](const RunContext& run) {
    // A primitive for one shape of input and output, with memory that parts move.
    struct Piece {
      dnnl::primitive primitive;
      onednn::Args args;
      memory src;
      std::vector<dnnl_exec_arg_t> flat;
    };
    struct Part {
      size_t piece;
      int64_t src_offset, dst_offset, pixels;
    };
    std::vector<Piece> pieces;
    std::map<std::tuple<int64_t, int64_t, int, int>, size_t> known;
    const auto piece_for = [&](const Node& like, const Shape& in, const Shape& out, int64_t n) {
      const auto [at, is_new] = known.emplace(
          std::tuple(n, out.rank() == 3 ? out[1] : 1, like.conv.pad_top, like.conv.pad_bottom),
          pieces.size());
      if (is_new) {
        const auto made = MakeWeighted(like, Format::kU8, Format::kS32, w_dims, {}, in, out, n);
        Piece piece{made.primitive,
                    onednn::OwnArgs(made),
                    memory(made.src, onednn::Engine(), run.at<uint8_t>(src)),
                    {}};
        piece.args.insert({{DNNL_ARG_SRC, piece.src},
                           {DNNL_ARG_WEIGHTS, weights->Get(made.weights)},
                           {DNNL_ARG_DST, Wrap(run, sums, made.dst)}});
        piece.flat = onednn::Flatten(piece.args);
        pieces.push_back(std::move(piece));
      }
      return at->second;
    };
    std::vector<Part> parts;
    const int64_t pixels = by_rows || y.rank() == 3 ? y[1] * y[2] : 1;
    for (int64_t first = 0; first < run.batch; first += images) {
      const int64_t n = std::min(images, run.batch - first);
      for (int64_t b = 0; b < bands; ++b) {
        if (!by_rows) {
          parts.push_back({piece_for(attributes, x, y, n), first * x.elements(),
                           first * y.elements(), n * pixels});
          continue;
        }
        // Output rows [begin, end) read input rows [top, bottom); what lies outside is padding.
        const int64_t begin = y[1] * b / bands, end = y[1] * (b + 1) / bands;
        const auto& conv = attributes.conv;
        const int64_t top = begin * conv.stride_h - conv.pad_top;
        const int64_t bottom =
            (end - 1) * conv.stride_h - conv.pad_top + (kernel_h - 1) * conv.dilation_h + 1;
        const int64_t from = std::clamp<int64_t>(top, 0, x[1] - 1);
        const int64_t to = std::clamp<int64_t>(bottom, from + 1, x[1]);
        Node like = attributes;
        like.conv.pad_top = static_cast<int>(from - top);
        like.conv.pad_bottom = static_cast<int>(bottom - to);
        Shape in = x, out = y;
        in[1] = to - from;
        out[1] = end - begin;
        parts.push_back({piece_for(like, in, out, 1), (first * x[1] + from) * x[2] * x[0],
                         (first * y[1] + begin) * y[2] * y[0], out[1] * out[2]});
      }
    }
    Executable executable;
    executable.run = [=](dnnl::stream& stream) {
      for (const Part& part : parts) {
        const Piece& piece = pieces[part.piece];
        memory(piece.src).set_data_handle(run.at<uint8_t>(src) + part.src_offset);
        onednn::Execute(piece.primitive, stream, piece.flat);
        const uint8_t* r = residual >= 0 ? run.at<uint8_t>(residual) + part.dst_offset : nullptr;
        if (codes_out) {
          RequantizeSums(isa, *fixed, run.at<int32_t>(sums), r, part.pixels,
                         run.at<uint8_t>(dst) + part.dst_offset);
        } else {
          ScaleSums(*fixed, clip, run.at<int32_t>(sums), r, part.pixels,
                    run.at<float>(dst) + part.dst_offset);
        }
      }
    };
    return executable;
  };
  Define(node.output, dst);
  return true;
}

void Lowering::RunCluster(const RunContext& run, const kernels::ConvKernel& kernel,
                          kernels::ClusterConvArgs args) {
  const int64_t units = kernel.Units(run.batch);
  const int blocks = kernels::OutputBlocks(kernel.geometry());
  int parts = 1;  // of the units
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int p = 1; p <= run.threads; ++p) {
    if (run.threads % p != 0) continue;
    const int b = run.threads / p;
    const int64_t cost = ((units + p - 1) / p) * ((blocks + b - 1) / b + kernel.SharedBlocks());
    if (cost <= least) {
      least = cost;
      parts = p;
    }
  }
  const int channel_parts = run.threads / parts;
  if (run.threads == 1) {
    args.scratch = run.scratch;
    kernel.Run(args, 0, units, 0, blocks);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(run.threads)
  for (int task = 0; task < parts * channel_parts; ++task) {
    const int64_t p = task % parts, b = task / parts;
    kernels::ClusterConvArgs own = args;
    own.scratch = run.thread_scratch();
    kernel.Run(own, units * p / parts, units * (p + 1) / parts,
               static_cast<int>(blocks * b / channel_parts),
               static_cast<int>(blocks * (b + 1) / channel_parts));
  }
}

void Lowering::RunDepthwise(const RunContext& run, const kernels::PackedDepthwiseConv& packed,
                            kernels::ClusterConvArgs args) {
  const int64_t rows = int64_t{run.batch} * packed.geometry.oh;
  if (run.threads == 1) {
    args.scratch = run.scratch;
    kernels::RunDepthwiseConv(packed, args, 0, rows);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(run.threads)
  for (int t = 0; t < run.threads; ++t) {
    kernels::ClusterConvArgs own = args;
    own.scratch = run.thread_scratch();
    kernels::RunDepthwiseConv(packed, own, rows * t / run.threads, rows * (t + 1) / run.threads);
  }
}

}  // namespace tern::engine
