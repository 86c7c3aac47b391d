// From a graph to the steps of a Program: which implementation runs each node, in which memory layout, and the
// conversions between them.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/engine/float_ops.h"
#include "server/engine/integer_ops.h"
#include "server/engine/program.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/elementwise.h"
#include "server/tensor/cluster.h"

namespace tern::engine {

char* RunContext::thread_scratch() const { return scratch + omp_get_thread_num() * program->scratch_bytes; }

namespace {

using dnnl::memory;
using graph::Node;
using graph::OpType;
using graph::ValueId;
using tag = memory::format_tag;

// Integer weights of a layer in plain OIHW order, as products of code and cluster scale.
struct IntegerWeights {
  std::vector<int8_t> values;
  std::vector<int64_t> sums;  // per output channel
  int largest = 0;            // magnitude
};

absl::StatusOr<IntegerWeights> Expand(const Node& node) {
  const QuantizedWeights& q = *node.quantized;
  const Shape& shape = q.codes.shape();
  const int64_t outputs = shape[0], channels = shape[1], taps = shape.elements() / (outputs * channels);
  const bool clustered = q.scheme != WeightScheme::kInt8;
  const ClusterMap map(static_cast<int>(channels), clustered ? q.cluster_size : 1);
  const auto codes = q.codes.data<int8_t>();
  const auto scales = q.cluster_scales.data<int8_t>();
  IntegerWeights result;
  result.values.resize(codes.size());
  result.sums.resize(outputs);
  for (int64_t o = 0, i = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      const int scale = clustered ? scales[o * map.clusters() + map.cluster_of(static_cast<int>(c))] : 1;
      for (int64_t t = 0; t < taps; ++t, ++i) {
        const int w = scale * codes[i];
        result.sums[o] += w;
        result.largest = std::max(result.largest, std::abs(w));
        // 4-bit products leave s8; only their sums are of use then.
        result.values[i] = static_cast<int8_t>(w);
      }
    }
  }
  return result;
}

// Packed weights of one oneDNN layer. Different batches may want different layouts; each is made once and
// shared by all sessions. Thread safe.
class PackedWeights {
 public:
  PackedWeights(const memory::desc& plain, const void* data) : versions_{memory(plain, onednn::Engine())} {
    std::memcpy(versions_[0].get_data_handle(), data, plain.get_size());
  }

  // Throws dnnl::error.
  memory Get(const memory::desc& wanted) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const memory& version : versions_) {
      if (version.get_desc() == wanted) return version;
    }
    memory packed(wanted, onednn::Engine());
    dnnl::stream stream(onednn::Engine());
    onednn::Reorder(stream, versions_[0], packed);
    // The plain copy has served: later layouts are made from the first packed one.
    if (first_) versions_.clear();
    first_ = false;
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
  bool first_ = true;
  std::vector<memory> versions_;
};

memory FloatVector(const std::vector<float>& values) {
  memory result({{static_cast<memory::dim>(values.size())}, memory::data_type::f32, tag::x}, onednn::Engine());
  std::memcpy(result.get_data_handle(), values.data(), values.size() * sizeof(float));
  return result;
}

bool IsDepthwise(const Node& node, const Shape& x) { return node.conv.groups > 1 && node.conv.groups == x[0]; }

class Lowering {
 public:
  Lowering(const graph::Graph& graph, const PlanOptions& options) : graph_(graph), options_(options) {}

  absl::StatusOr<Program> Run() {
    program_.input_shape = graph_.shape(graph_.input);
    program_.classes = graph_.classes();
    program_.max_batch = options_.max_batch;
    program_.isa = options_.isa;
    program_.values = graph_.values;
    for (graph::Value& value : program_.values) value.constant.reset();
    formats_.resize(graph_.values.size());
    program_.value_buffer.assign(graph_.values.size(), -1);
    program_.value_step.assign(graph_.values.size(), 0);
    quantized_ = graph_.values[graph_.input].quant.has_value();
    for (const Node& node : graph_.nodes) {
      quantized_ = quantized_ || node.quantized || graph_.values[node.output].quant;
      LayerInfo layer;
      layer.name = node.name;
      layer.op = graph::Name(node.op);
      layer.scheme = graph_.values[node.output].quant ? "u8" : "fp32";
      layer.macs = graph::MultiplyAccumulates(graph_, node);
      program_.layers.push_back(std::move(layer));
    }

    program_.input = NewBuffer(Format::kF32, program_.input_shape);
    program_.buffers[program_.input].pinned = true;
    StoreFloat(graph_.input, program_.input);
    for (node_ = 0; node_ < static_cast<int>(graph_.nodes.size()); ++node_) {
      const Node& node = graph_.nodes[node_];
      layer().implementation.clear();
      TERN_RETURN_IF_ERROR(LowerNode(node));
    }
    node_ = static_cast<int>(graph_.nodes.size()) - 1;
    program_.output = Get(graph_.output, Format::kF32);
    program_.buffers[program_.output].pinned = true;
    for (const AlignedBuffer& constant : program_.constants) program_.weight_bytes += constant.size_bytes();
    return std::move(program_);
  }

 private:
  // ---- Buffers -----------------------------------------------------------------------------

  LayerInfo& layer() { return program_.layers[node_]; }
  const std::optional<QuantParams>& quant(ValueId id) const { return graph_.values[id].quant; }
  Buffer& buffer(int id) { return program_.buffers[id]; }

  int NewBuffer(Format format, const Shape& shape) {
    Buffer b;
    b.format = format;
    b.shape = shape;
    b.sample_elements = shape.elements();
    if (format == Format::kF32Blocked) {
      b.sample_elements = (shape[0] + kChannelBlock - 1) / kChannelBlock * kChannelBlock * shape[1] * shape[2];
    }
    b.sample_bytes = b.sample_elements * (format == Format::kU8 ? 1 : sizeof(float));
    program_.buffers.push_back(std::move(b));
    return static_cast<int>(program_.buffers.size()) - 1;
  }

  Step& AddStep(std::vector<int> reads, std::vector<int> writes) {
    Step step;
    step.node = node_;
    step.reads = std::move(reads);
    step.writes = std::move(writes);
    program_.steps.push_back(std::move(step));
    return program_.steps.back();
  }

  // Declares buffer `b` to be value `id`, in the format in which it is defined.
  void Define(ValueId id, int b) {
    formats_[id][buffer(b).format] = b;
    program_.value_buffer[id] = b;
    program_.value_step[id] = static_cast<int>(program_.steps.size());
  }

  // Declares f32 buffer `b` to hold the reals of value `id`, and quantises them if the value is defined as u8.
  void StoreFloat(ValueId id, int b) {
    if (!quant(id)) {
      Define(id, b);
      return;
    }
    const int dense = Convert(b, Format::kF32);
    const int codes = NewBuffer(Format::kU8, graph_.shape(id));
    const QuantParams params = *quant(id);
    const int64_t elements = buffer(dense).sample_elements;
    const kernels::Isa isa = options_.isa;
    AddStep({dense}, {codes}).loop = [=](const RunContext& run) {
      const float* src = run.at<float>(dense);
      uint8_t* dst = run.at<uint8_t>(codes);
      const int64_t n = run.batch * elements, chunks = std::max<int64_t>(1, std::min<int64_t>(run.threads, n / 16384));
#pragma omp parallel for schedule(static) if (chunks > 1)
      for (int64_t i = 0; i < chunks; ++i) {
        const int64_t begin = n * i / chunks;
        kernels::QuantizeF32(isa, src + begin, n * (i + 1) / chunks - begin, params, dst + begin);
      }
    };
    Define(id, codes);
  }

  // A buffer with the f32 content of f32 buffer `b` in another order.
  int Convert(int b, Format format) {
    if (buffer(b).format == format || (buffer(b).shape.rank() != 3 && format != Format::kU8)) return b;
    const int result = NewBuffer(format, buffer(b).shape);
    const Shape shape = buffer(b).shape;
    const Format from = buffer(b).format;
    AddStep({b}, {result}).make = [=](const RunContext& run) {
      const memory src = Wrap(run, b, Desc(from, shape, run.batch)), dst = Wrap(run, result, Desc(format, shape, run.batch));
      Executable executable;
      executable.primitive = dnnl::reorder(src, dst);
      executable.args = {{DNNL_ARG_FROM, src}, {DNNL_ARG_TO, dst}};
      return executable;
    };
    return result;
  }

  // The buffer that holds value `id` in `format`; converts it if there is none. kU8 only if it is quantised.
  int Get(ValueId id, Format format) {
    auto& known = formats_[id];
    const graph::Value& value = graph_.values[id];
    if (value.shape.rank() != 3 && format != Format::kU8) format = Format::kF32;
    if (value.constant && known.find(format) == known.end()) return known[format] = Constant(value, format);
    const auto found = known.find(format);
    if (found != known.end()) return found->second;
    if (known.count(Format::kU8) != 0 && known.size() == 1) {
      const int codes = known[Format::kU8];
      const int dense = NewBuffer(Format::kF32, value.shape);
      const QuantParams params = *value.quant;
      const int64_t elements = buffer(codes).sample_elements;
      const kernels::Isa isa = options_.isa;
      AddStep({codes}, {dense}).loop = [=](const RunContext& run) {
        kernels::DequantizeU8(isa, run.at<uint8_t>(codes), run.batch * elements, params, run.at<float>(dense));
      };
      known[Format::kF32] = dense;
      return Get(id, format);
    }
    int source = -1;
    for (Format f : {Format::kF32, Format::kF32Blocked, Format::kF32Planar}) {
      if (source < 0 && known.count(f) != 0) source = known[f];
    }
    return known[format] = Convert(source, format);
  }

  // One sample in dense NHWC order.
  int Constant(const graph::Value& value, Format format) {
    const int result = NewBuffer(format, value.shape);
    AlignedBuffer data(buffer(result).sample_bytes);
    const float* src = value.constant->data<float>().data();
    const Strides to = FormatStrides(format, value.shape), from = RowMajorStrides(value.shape);
    if (format == Format::kU8) {
      StridedMap(value.shape.dims(), data.as<uint8_t>(), to, src, from, [&](float v) { return value.quant->Quantize(v); });
    } else {
      StridedMap(value.shape.dims(), data.as<float>(), to, src, from, [](float v) { return v; });
    }
    buffer(result).constant = static_cast<int>(program_.constants.size());
    program_.constants.push_back(std::move(data));
    return result;
  }

  // The f32 format that a consumer without a preference of its own should take.
  Format Current(ValueId id) {
    const auto& known = formats_[id];
    if (known.count(Format::kF32Blocked) != 0) return Format::kF32Blocked;
    return Format::kF32;
  }

  static memory::desc Desc(Format format, const Shape& shape, int64_t batch) {
    const auto type = format == Format::kU8 ? memory::data_type::u8 : memory::data_type::f32;
    const memory::dims dims = shape.WithBatch(batch).dims();
    if (shape.rank() == 1) return memory::desc(dims, type, tag::nc);
    if (shape.rank() != 3) return memory::desc({batch, shape.elements()}, type, tag::nc);
    const tag order = format == Format::kF32Planar    ? tag::nchw
                      : format == Format::kF32Blocked ? tag::nChw8c
                                                      : tag::nhwc;
    return memory::desc(dims, type, order);
  }

  static memory Wrap(const RunContext& run, int b, const memory::desc& desc) {
    return memory(desc, onednn::Engine(), run.at<void>(b));
  }

  // ---- Nodes -------------------------------------------------------------------------------

  absl::Status LowerNode(const Node& node) {
    const bool weighted = node.op == OpType::kConv || node.op == OpType::kFullyConnected;
    if (weighted) {
      if (node.quantized) layer().scheme = Name(node.quantized->scheme);
      if (node.quantized && IsInteger(node)) return LowerIntegerWeighted(node);
      return LowerFloatWeighted(node);
    }
    if (TryShuffle(node)) return absl::OkStatus();
    if (quant(node.output) && IsInteger(node) && LowerInteger(node)) return absl::OkStatus();
    return LowerFloat(node);
  }

  // True if every input is u8.
  bool IsInteger(const Node& node) const {
    return std::all_of(node.inputs.begin(), node.inputs.end(), [&](ValueId id) { return quant(id).has_value(); });
  }

  // Names what runs a float node; in a quantised network that is an island.
  void SetFloatImplementation(const Node& node, const std::string& implementation) {
    const bool island = quantized_ && (quant(node.output) || IsInteger(node));
    layer().implementation = island ? absl::StrCat("float-island ", implementation) : implementation;
    if (node.quantized) layer().scheme = "fp32";
  }

  // ---- Convolution and fully connected, float ------------------------------------------------

  absl::Status LowerFloatWeighted(const Node& node) {
    const Tensor weight = node.quantized ? Dequantize(*node.quantized) : node.weight;
    const bool conv = node.op == OpType::kConv;
    const Shape &x = graph_.shape(node.inputs[0]), &y = graph_.shape(node.output);
    onednn::Epilogue epilogue;
    epilogue.sum = node.has_residual();
    epilogue.clip = node.clip;
    const auto bias_values = node.bias.data<float>();
    auto bias = std::make_shared<memory>(FloatVector({bias_values.begin(), bias_values.end()}));
    const memory::dims w_dims = WeightDims(node, weight.shape());
    auto weights = std::make_shared<PackedWeights>(
        memory::desc(w_dims, memory::data_type::f32, PlainTag(node)), weight.raw());

    // Candidates of (input, output) format, best first.
    std::vector<std::pair<Format, Format>> candidates;
    const bool blocks = conv && !onednn::PrefersNhwc() && y[0] >= kChannelBlock;
    if (blocks && (x[0] >= kChannelBlock || IsDepthwise(node, x))) {
      candidates.push_back({Format::kF32Blocked, Format::kF32Blocked});
    } else if (blocks && x[0] <= 4 && node.conv.groups == 1) {
      candidates.push_back({Format::kF32Planar, Format::kF32Blocked});
    }
    candidates.push_back({Format::kF32, Format::kF32});
    std::optional<std::pair<Format, Format>> chosen;
    std::string implementation;
    absl::Status failure;
    for (const auto& candidate : candidates) {
      onednn::Primitive primitive;
      const absl::Status made = onednn::Guard(absl::StrCat("node ", node.name), [&] {
        primitive = MakeWeighted(node, candidate.first, candidate.second, w_dims, epilogue, x, y, options_.max_batch);
      });
      if (!made.ok()) {
        failure = made;
        continue;
      }
      const bool fast = absl::StartsWith(primitive.implementation, "jit") || absl::StartsWith(primitive.implementation, "brg");
      if (candidate.first != Format::kF32 && !fast) continue;
      TERN_RETURN_IF_ERROR(onednn::Guard(absl::StrCat("node ", node.name), [&] { weights->Get(primitive.weights); }));
      chosen = candidate;
      implementation = primitive.implementation;
      break;
    }
    if (!chosen) return failure;
    const auto [x_format, y_format] = *chosen;
    SetFloatImplementation(node, absl::StrCat("onednn:", implementation));
    program_.weight_bytes += weights->bytes() + bias_values.size() * sizeof(float);

    const int src = Get(node.inputs[0], x_format);
    const int residual = node.has_residual() ? Get(node.inputs[1], y_format) : -1;
    const int dst = NewBuffer(y_format, y);
    AddWeightedStep(node, src, residual, dst, w_dims, epilogue, x, y, weights, bias);
    StoreFloat(node.output, dst);
    return absl::OkStatus();
  }

  static memory::dims WeightDims(const Node& node, const Shape& w) {
    if (node.op == OpType::kFullyConnected) return {w[0], w[1]};
    const int64_t groups = node.conv.groups;
    if (groups == 1) return {w[0], w[1], w[2], w[3]};
    return {groups, w[0] / groups, w[1], w[2], w[3]};
  }
  static tag PlainTag(const Node& node) {
    if (node.op == OpType::kFullyConnected) return tag::oi;
    return node.conv.groups == 1 ? tag::oihw : tag::goihw;
  }

  // The oneDNN primitive of a weighted node. x is the input's sample shape, which for integer layers may be
  // padded already: then `node`'s own pads do not count. Throws dnnl::error.
  static onednn::Primitive MakeWeighted(const Node& node, Format x_format, Format y_format, const memory::dims& w_dims,
                                        const onednn::Epilogue& epilogue, const Shape& x, const Shape& y, int64_t batch,
                                        bool padded = false) {
    const auto type = x_format == Format::kU8 ? memory::data_type::s8 : memory::data_type::f32;
    const memory::desc weights(w_dims, type, tag::any);
    const memory::desc bias({y[0]}, memory::data_type::f32, tag::x);
    if (node.op == OpType::kFullyConnected) {
      return onednn::MakeInnerProduct(Desc(x_format, x, batch), weights, bias, Desc(y_format, y, batch), epilogue);
    }
    const auto& conv = node.conv;
    onednn::ConvolutionSpec spec;
    spec.src = Desc(x_format, x, batch);
    spec.weights = weights;
    spec.bias = bias;
    spec.dst = Desc(y_format, y, batch);
    spec.strides = {conv.stride_h, conv.stride_w};
    spec.dilations = {conv.dilation_h, conv.dilation_w};
    spec.pads_begin = padded ? memory::dims{0, 0} : memory::dims{conv.pad_top, conv.pad_left};
    spec.pads_end = padded ? memory::dims{0, 0} : memory::dims{conv.pad_bottom, conv.pad_right};
    return onednn::MakeConvolution(spec, epilogue);
  }

  void AddWeightedStep(const Node& node, int src, int residual, int dst, const memory::dims& w_dims,
                       const onednn::Epilogue& epilogue, const Shape& x, const Shape& y,
                       std::shared_ptr<PackedWeights> weights, std::shared_ptr<memory> bias, bool padded = false) {
    std::vector<int> reads{src};
    if (residual >= 0) reads.push_back(residual);
    Step& step = AddStep(std::move(reads), {dst});
    if (residual >= 0) {
      // The convolution reads pixels of `src` after it wrote others of dst.
      if (residual != src) step.in_place = {{residual, dst}};
      step.copy_from = residual;
      step.copy_to = dst;
    }
    const Format x_format = buffer(src).format, y_format = buffer(dst).format;
    // The node's name and attributes only: its weights are packed already.
    auto attributes = std::make_shared<Node>();
    attributes->name = node.name;
    attributes->op = node.op;
    attributes->conv = node.conv;
    step.make = [=](const RunContext& run) {
      const auto primitive = MakeWeighted(*attributes, x_format, y_format, w_dims, epilogue, x, y, run.batch, padded);
      Executable executable;
      executable.primitive = primitive.primitive;
      executable.args = primitive.constant_args;
      executable.args.insert({{DNNL_ARG_SRC, Wrap(run, src, primitive.src)},
                              {DNNL_ARG_WEIGHTS, weights->Get(primitive.weights)},
                              {DNNL_ARG_BIAS, *bias},
                              {DNNL_ARG_DST, Wrap(run, dst, primitive.dst)}});
      return executable;
    };
  }

  // ---- Convolution and fully connected, integer ----------------------------------------------

  absl::Status LowerIntegerWeighted(const Node& node) {
    const QuantParams x = *quant(node.inputs[0]);
    const bool codes_out = quant(node.output).has_value();
    const QuantParams y = codes_out ? *quant(node.output) : QuantParams{1.0f, 0};
    TERN_ASSIGN_OR_RETURN(const IntegerWeights weights, Expand(node));
    const QuantizedWeights& q = *node.quantized;
    const auto bias = node.bias.data<float>();
    const int64_t outputs = q.codes.shape()[0];
    double residual_ratio = 0, residual_zero = 0;
    if (node.has_residual()) {
      const QuantParams r = *quant(node.inputs[1]);
      residual_ratio = static_cast<double>(r.scale) / y.scale;
      residual_zero = r.zero_point;
    }
    std::vector<float> multiplier(outputs), offset(outputs);
    for (int64_t o = 0; o < outputs; ++o) {
      const double m = static_cast<double>(x.scale) * q.steps[o] / y.scale;
      multiplier[o] = static_cast<float>(m);
      offset[o] = static_cast<float>(static_cast<double>(bias[o]) / y.scale + y.zero_point -
                                     static_cast<double>(x.zero_point) * weights.sums[o] * m - residual_zero * residual_ratio);
    }
    graph::ClipRange clamp{0.0f, 255.0f};
    if (codes_out) {
      const auto [lo, hi] = ClipCodes(node.clip, y);
      clamp = {static_cast<float>(lo), static_cast<float>(hi)};
    } else {
      constexpr float kInfinity = std::numeric_limits<float>::infinity();
      clamp = node.clip.value_or(graph::ClipRange{-kInfinity, kInfinity});
    }
    const bool expands = q.scheme == WeightScheme::kTernaryCluster && options_.expand_ternary_on_vnni &&
                         options_.isa == kernels::Isa::kAvx512Vnni && onednn::ExactInt8();
    if (q.scheme != WeightScheme::kInt8 && !expands) {
      return LowerCluster(node, multiplier, offset, static_cast<float>(residual_ratio), clamp);
    }
    return LowerInt8(node, weights, multiplier, offset, residual_ratio, clamp);
  }

  absl::Status LowerInt8(const Node& node, const IntegerWeights& integers, const std::vector<float>& multiplier,
                         const std::vector<float>& offset, double residual_ratio, graph::ClipRange clamp) {
    if (integers.largest > 63 && !onednn::ExactInt8()) {
      return absl::FailedPreconditionError(
          absl::StrCat("node ", node.name, ": int8 weights reach ", integers.largest, ", but oneDNN on ", onednn::IsaName(),
                       " saturates above 63 (no VNNI); quantise with 7-bit weights"));
    }
    const bool codes_out = quant(node.output).has_value();
    const Format y_format = codes_out ? Format::kU8 : Format::kF32;
    const Shape& y = graph_.shape(node.output);
    Shape x = graph_.shape(node.inputs[0]);
    onednn::Epilogue epilogue;
    epilogue.scales = multiplier;
    epilogue.sum = node.has_residual();
    // A float result takes its residual as reals, whose zero point is gone.
    std::vector<float> bias = offset;
    epilogue.sum_scale = static_cast<float>(residual_ratio);
    if (node.has_residual() && !codes_out) {
      const QuantParams r = *quant(node.inputs[1]);
      for (float& b : bias) b += static_cast<float>(r.zero_point * residual_ratio);
      epilogue.sum_scale = 1.0f;
    }
    // u8 results saturate at 0 and 255 by themselves.
    const bool clamps = codes_out ? clamp.lo > 0.0f || clamp.hi < 255.0f : node.clip.has_value();
    if (clamps) epilogue.clip = clamp;

    // oneDNN pads with 0. Where the zero point is another code, the input is padded first.
    const auto& conv = node.conv;
    const int zero = quant(node.inputs[0])->zero_point;
    const bool has_pads = node.op == OpType::kConv && (conv.pad_top | conv.pad_left | conv.pad_bottom | conv.pad_right) != 0;
    const bool padded = zero != 0 && has_pads;
    if (padded) x = Shape{x[0], x[1] + conv.pad_top + conv.pad_bottom, x[2] + conv.pad_left + conv.pad_right};

    const memory::dims w_dims = WeightDims(node, node.quantized->codes.shape());
    onednn::Primitive primitive;
    TERN_RETURN_IF_ERROR(onednn::Guard(absl::StrCat("node ", node.name), [&] {
      primitive = MakeWeighted(node, Format::kU8, y_format, w_dims, epilogue, x, y, options_.max_batch, padded);
    }));
    if (absl::StartsWith(primitive.implementation, "ref")) {
      TERN_LOG_WARN("node {}: oneDNN has no fast int8 implementation ({}), it runs in float", node.name,
                    primitive.implementation);
      return LowerFloatWeighted(node);
    }
    auto weights = std::make_shared<PackedWeights>(memory::desc(w_dims, memory::data_type::s8, PlainTag(node)),
                                                   integers.values.data());
    TERN_RETURN_IF_ERROR(onednn::Guard(absl::StrCat("node ", node.name), [&] { weights->Get(primitive.weights); }));
    auto bias_memory = std::make_shared<memory>(FloatVector(onednn::BiasBesideScales(bias, multiplier)));
    layer().implementation = absl::StrCat("onednn:", primitive.implementation);
    program_.weight_bytes += weights->bytes() + bias.size() * sizeof(float);

    int src = Get(node.inputs[0], Format::kU8);
    if (padded) src = Pad(src, node, zero);
    const int residual = node.has_residual() ? Get(node.inputs[1], y_format) : -1;
    const int dst = NewBuffer(y_format, y);
    AddWeightedStep(node, src, residual, dst, w_dims, epilogue, x, y, weights, bias_memory, padded);
    Define(node.output, dst);
    return absl::OkStatus();
  }

  int Pad(int src, const Node& node, int zero) {
    const auto conv = node.conv;
    const Shape shape = buffer(src).shape;
    const int result = NewBuffer(Format::kU8, Shape{shape[0], shape[1] + conv.pad_top + conv.pad_bottom,
                                                    shape[2] + conv.pad_left + conv.pad_right});
    AddStep({src}, {result}).loop = [=](const RunContext& run) {
      PadCodes(run.at<uint8_t>(src), run.batch, shape, conv.pad_top, conv.pad_left, conv.pad_bottom, conv.pad_right,
               static_cast<uint8_t>(zero), run.at<uint8_t>(result));
    };
    return result;
  }

  absl::Status LowerCluster(const Node& node, const std::vector<float>& multiplier, const std::vector<float>& offset,
                            float residual_multiplier, graph::ClipRange clamp) {
    const Shape &x = graph_.shape(node.inputs[0]), &y = graph_.shape(node.output), &w = node.quantized->codes.shape();
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
    struct Layer {
      kernels::PackedClusterConv packed;
      std::vector<float> multiplier, offset;
    };
    auto cluster = std::make_shared<Layer>();
    cluster->packed = kernels::PackClusterConv(geometry, *node.quantized, options_.isa);
    cluster->multiplier = multiplier;
    cluster->offset = offset;
    layer().implementation = absl::StrCat("tern:", kernels::IsaName(cluster->packed.isa));
    program_.weight_bytes += cluster->packed.bytes() + (multiplier.size() + offset.size()) * sizeof(float);
    program_.scratch_bytes = std::max(program_.scratch_bytes, kernels::ClusterConvScratchBytes(cluster->packed));

    const bool codes_out = quant(node.output).has_value();
    const int src = Get(node.inputs[0], Format::kU8);
    const int residual = node.has_residual() ? Get(node.inputs[1], Format::kU8) : -1;
    const int dst = NewBuffer(codes_out ? Format::kU8 : Format::kF32, y);
    std::vector<int> reads{src};
    if (residual >= 0) reads.push_back(residual);
    const uint8_t zero = static_cast<uint8_t>(quant(node.inputs[0])->zero_point);
    Step& step = AddStep(std::move(reads), {dst});
    if (residual >= 0 && residual != src && codes_out) step.in_place = {{residual, dst}};
    step.loop = [=](const RunContext& run) {
      kernels::ClusterConvArgs args;
      args.src = run.at<uint8_t>(src);
      args.batch = run.batch;
      args.src_zero_point = zero;
      args.multiplier = cluster->multiplier.data();
      args.offset = cluster->offset.data();
      if (residual >= 0) args.residual = run.at<uint8_t>(residual);
      args.residual_multiplier = residual_multiplier;
      if (codes_out) {
        args.dst = run.at<uint8_t>(dst);
      } else {
        args.dst_f32 = run.at<float>(dst);
      }
      args.lo = clamp.lo;
      args.hi = clamp.hi;
      RunCluster(run, cluster->packed, args);
    };
    Define(node.output, dst);
    return absl::OkStatus();
  }

  // Cuts the layer for the team into a grid of pixel ranges and output-channel ranges, whichever is more even:
  // late layers have few pixels, early ones few channels.
  static void RunCluster(const RunContext& run, const kernels::PackedClusterConv& packed, kernels::ClusterConvArgs args) {
    const auto& g = packed.geometry;
    const int64_t pixels = int64_t{run.batch} * g.oh * g.ow;
    const int blocks = kernels::OutputBlocks(g);
    int parts = 1;  // of the pixels
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int p = 1; p <= run.threads; ++p) {
      if (run.threads % p != 0) continue;
      const int b = run.threads / p;
      const int64_t cost = ((pixels + p - 1) / p) * ((blocks + b - 1) / b);
      if (cost <= least) {
        least = cost;
        parts = p;
      }
    }
    const int channel_parts = run.threads / parts;
    if (run.threads == 1) {
      args.scratch = run.scratch;
      kernels::RunClusterConv(packed, args, 0, pixels, 0, blocks);
      return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(run.threads)
    for (int task = 0; task < parts * channel_parts; ++task) {
      const int64_t p = task % parts, b = task / parts;
      kernels::ClusterConvArgs own = args;
      own.scratch = run.thread_scratch();
      kernels::RunClusterConv(packed, own, pixels * p / parts, pixels * (p + 1) / parts,
                              static_cast<int>(blocks * b / channel_parts), static_cast<int>(blocks * (b + 1) / channel_parts));
    }
  }

  // ---- Other operators on codes --------------------------------------------------------------

  // An operand's place without its address, which only a run knows.
  struct Place {
    int buffer;
    Shape shape;
    Strides strides;
    int64_t batch_stride;

    template <typename T>
    Operand<T> At(const RunContext& run) const {
      using Plain = std::remove_const_t<T>;
      return {run.at<Plain>(buffer), shape, strides, batch_stride};
    }
  };
  Place PlaceOf(int b) {
    const Buffer& place = buffer(b);
    return {b, place.shape, FormatStrides(place.format, place.shape), place.constant >= 0 ? 0 : place.sample_elements};
  }

  // False if the operator has no integer form.
  bool LowerInteger(const Node& node) {
    const QuantParams y = *quant(node.output);
    const QuantParams x = *quant(node.inputs[0]);
    const Shape &xs = graph_.shape(node.inputs[0]), &ys = graph_.shape(node.output);
    const kernels::Isa isa = options_.isa;
    std::vector<int> sources;
    for (ValueId id : node.inputs) sources.push_back(Get(id, Format::kU8));
    const int src = sources[0];
    const int64_t elements = ys.elements();

    if (IsUnary(node.op) || node.op == OpType::kBatchNorm) {
      const int dst = NewBuffer(Format::kU8, ys);
      Step& step = AddStep({src}, {dst});
      step.in_place = {{src, dst}};
      layer().implementation = "tern:table";
      if (node.op == OpType::kBatchNorm) {
        const int64_t channels = xs[0];
        if (xs.rank() != 3 && xs.rank() != 1) {
          program_.steps.pop_back();
          program_.buffers.pop_back();
          return false;
        }
        step.loop = [=, tables = BatchNormTables(node, x, y)](const RunContext& run) {
          LookupPerChannel(run.at<uint8_t>(src), run.batch * elements / channels, channels, tables.data(), run.at<uint8_t>(dst));
        };
      } else {
        step.loop = [=, table = UnaryTable(node, x, y)](const RunContext& run) {
          Lookup(isa, run.at<uint8_t>(src), run.batch * elements, table, run.at<uint8_t>(dst));
        };
      }
      Define(node.output, dst);
      return true;
    }

    switch (node.op) {
      case OpType::kAdd:
      case OpType::kMul: {
        const QuantParams x1 = *quant(node.inputs[1]);
        const int dst = NewBuffer(Format::kU8, ys);
        const Place a = PlaceOf(sources[0]), b = PlaceOf(sources[1]), c = PlaceOf(dst);
        Step& step = AddStep(sources, {dst});
        if (node.op == OpType::kAdd) {
          for (const Place& place : {a, b}) {
            if (place.shape == ys) step.in_place.push_back({place.buffer, dst});
          }
        }
        step.loop = [=, add = node.op == OpType::kAdd, clip = node.clip](const RunContext& run) {
          const QuantizedOperand p{a.At<const uint8_t>(run), x}, q{b.At<const uint8_t>(run), x1};
          if (add) {
            AddCodes(isa, p, q, c.At<uint8_t>(run), y, clip, run.batch);
          } else {
            MultiplyCodes(isa, p, q, c.At<uint8_t>(run), y, run.batch);
          }
        };
        layer().implementation = absl::StrCat("tern:", kernels::IsaName(std::min(isa, kernels::Isa::kAvx2)));
        Define(node.output, dst);
        return true;
      }
      case OpType::kMaxPool: {
        const bool same = x == y;
        const int pooled = NewBuffer(Format::kU8, ys);
        if (!AddPooling(node, src, pooled)) return false;
        if (same) {
          Define(node.output, pooled);
          return true;
        }
        const int dst = NewBuffer(Format::kU8, ys);
        Step& step = AddStep({pooled}, {dst});
        step.in_place = {{pooled, dst}};
        step.loop = [=, table = RequantizeTable(x, y)](const RunContext& run) {
          Lookup(isa, run.at<uint8_t>(pooled), run.batch * elements, table, run.at<uint8_t>(dst));
        };
        Define(node.output, dst);
        return true;
      }
      case OpType::kAveragePool:
      case OpType::kGlobalAveragePool: {
        const int dst = NewBuffer(Format::kU8, ys);
        AveragePoolArgs args{node.pool, xs, ys, x, y, 1};
        program_.scratch_bytes = std::max<size_t>(program_.scratch_bytes, xs[0] * sizeof(int32_t));
        AddStep({src}, {dst}).loop = [=, global = node.op == OpType::kGlobalAveragePool](const RunContext& run) {
          AveragePoolArgs now = args;
          now.batch = run.batch;
          if (global) {
            GlobalAverageCodes(isa, now, run.at<uint8_t>(src), run.at<uint8_t>(dst), run.scratch, run.program->scratch_bytes);
          } else {
            AveragePoolCodes(now, run.at<uint8_t>(src), run.at<uint8_t>(dst), run.scratch, run.program->scratch_bytes);
          }
        };
        layer().implementation = "tern:loop";
        Define(node.output, dst);
        return true;
      }
      case OpType::kConcat: {
        const int dst = NewBuffer(Format::kU8, ys);
        const Place whole = PlaceOf(dst);
        struct Part {
          Place place;
          int64_t offset;
          std::optional<Table> table;
        };
        std::vector<Part> parts;
        int64_t offset = 0;
        for (size_t i = 0; i < sources.size(); ++i) {
          const QuantParams params = *quant(node.inputs[i]);
          Part part{PlaceOf(sources[i]), offset, {}};
          if (params != y) part.table = RequantizeTable(params, y);
          offset += part.place.shape[node.axis] * whole.strides[node.axis];
          parts.push_back(std::move(part));
        }
        AddStep(sources, {dst}).loop = [=](const RunContext& run) {
          for (const Part& part : parts) {
            CopyCodes(part.place.shape.WithBatch(run.batch).dims(), engine::WithBatch(whole.batch_stride, whole.strides),
                      run.at<uint8_t>(dst) + part.offset, engine::WithBatch(part.place.batch_stride, part.place.strides),
                      run.at<uint8_t>(part.place.buffer), part.table ? &*part.table : nullptr);
          }
        };
        layer().implementation = "tern:loop";
        Define(node.output, dst);
        return true;
      }
      case OpType::kReshape:
      case OpType::kTranspose:
      case OpType::kSlice:
      case OpType::kPad:
        return LowerIntegerCopy(node, src);
      default:
        return false;
    }
  }

  // Whether a reshape moves no byte: both sides lie in row-major order.
  static bool IsView(Format format, const Shape& in, const Shape& out) {
    const auto row_major = [&](const Shape& shape) {
      const Strides got = FormatStrides(format, shape), wanted = RowMajorStrides(shape);
      for (int i = 0; i < shape.rank(); ++i) {
        if (shape[i] != 1 && got[i] != wanted[i]) return false;
      }
      return true;
    };
    return row_major(in) && row_major(out);
  }

  // Another value over the same memory.
  void DefineView(const Node& node, int src) {
    const int view = NewBuffer(buffer(src).format, graph_.shape(node.output));
    buffer(view).view_of = buffer(src).view_of >= 0 ? buffer(src).view_of : src;
    layer().implementation = "view";
    Define(node.output, view);
  }

  bool LowerIntegerCopy(const Node& node, int src) {
    const QuantParams x = *quant(node.inputs[0]), y = *quant(node.output);
    const Shape &xs = graph_.shape(node.inputs[0]), &ys = graph_.shape(node.output);
    if (node.op == OpType::kReshape && x == y && IsView(Format::kU8, xs, ys)) {
      DefineView(node, src);
      return true;
    }
    const Strides xt = NhwcStrides(xs), yt = NhwcStrides(ys);
    std::vector<int64_t> dims = ys.dims();
    Strides from = xt, to = yt;
    int64_t from_offset = 0, to_offset = 0;
    int fill = -1;
    switch (node.op) {
      case OpType::kReshape:
        // NHWC to another NHWC shape takes two copies; no known network has it: it becomes an island.
        if (!ReshapeAsCopy(xs, xt, ys, yt, &dims, &from, &to)) return false;
        break;
      case OpType::kTranspose:
        for (int i = 0; i < ys.rank(); ++i) from[i] = xt[node.perm[i]];
        break;
      case OpType::kSlice:
        from_offset = node.start * xt[node.axis];
        from[node.axis] *= node.step;
        break;
      default:
        fill = y.Quantize(node.pad_value);
        dims = xs.dims();
        for (int i = 0; i < xs.rank(); ++i) to_offset += node.pads_before[i] * yt[i];
        break;
    }
    const int dst = NewBuffer(Format::kU8, ys);
    std::optional<Table> table;
    if (x != y) table = RequantizeTable(x, y);
    const int64_t x_elements = xs.elements(), y_elements = ys.elements();
    AddStep({src}, {dst}).loop = [=](const RunContext& run) {
      std::vector<int64_t> all{run.batch};
      all.insert(all.end(), dims.begin(), dims.end());
      if (fill >= 0) std::memset(run.at<uint8_t>(dst), fill, run.batch * y_elements);
      CopyCodes(all, engine::WithBatch(y_elements, to), run.at<uint8_t>(dst) + to_offset, engine::WithBatch(x_elements, from),
                run.at<uint8_t>(src) + from_offset, table ? &*table : nullptr);
    };
    layer().implementation = "tern:loop";
    Define(node.output, dst);
    return true;
  }

  // Max or average pooling over oneDNN in the formats of the two buffers; false if oneDNN refuses.
  bool AddPooling(const Node& node, int src, int dst) {
    const auto pool = node.pool;
    const Shape xs = buffer(src).shape, ys = buffer(dst).shape;
    const Format format = buffer(src).format;
    const auto algorithm = node.op == OpType::kMaxPool   ? dnnl::algorithm::pooling_max
                           : pool.count_include_pad ? dnnl::algorithm::pooling_avg_include_padding
                                                    : dnnl::algorithm::pooling_avg_exclude_padding;
    const auto make = [=](int64_t batch) {
      onednn::PoolingSpec spec;
      spec.algorithm = algorithm;
      spec.src = Desc(format, xs, batch);
      spec.dst = Desc(format, ys, batch);
      spec.kernel = {pool.kernel_h, pool.kernel_w};
      spec.strides = {pool.stride_h, pool.stride_w};
      spec.pads_begin = {pool.pad_top, pool.pad_left};
      // Ceil mode may look beyond the declared padding; oneDNN wants the padding that the output implies.
      spec.pads_end = {(ys[1] - 1) * pool.stride_h + pool.kernel_h - xs[1] - pool.pad_top,
                       (ys[2] - 1) * pool.stride_w + pool.kernel_w - xs[2] - pool.pad_left};
      return onednn::MakePooling(spec);
    };
    std::string implementation;
    const absl::Status status =
        onednn::Guard("pooling", [&] { implementation = make(options_.max_batch).implementation; });
    if (!status.ok()) return false;
    layer().implementation = absl::StrCat("onednn:", implementation);
    AddStep({src}, {dst}).make = [=](const RunContext& run) {
      const auto primitive = make(run.batch);
      Executable executable;
      executable.primitive = primitive.primitive;
      executable.args = {{DNNL_ARG_SRC, Wrap(run, src, primitive.src)}, {DNNL_ARG_DST, Wrap(run, dst, primitive.dst)}};
      return executable;
    };
    return true;
  }

  // ---- Channel shuffle -----------------------------------------------------------------------

  // reshape [c,h,w] -> [g,c/g,h,w], transpose, reshape back: one gather of channels. Recognised at its first node
  // (whose result and the next one's then exist nowhere); the other two are found done.
  bool TryShuffle(const Node& node) {
    if (program_.value_buffer[node.output] >= 0) {
      layer().implementation = "fused";
      return true;
    }
    if (fused_.count(node.output) != 0) {
      layer().implementation = "fused";
      return true;
    }
    if (node.op != OpType::kReshape) return false;
    const Shape &xs = graph_.shape(node.inputs[0]), &split = graph_.shape(node.output);
    if (xs.rank() != 3 || split.rank() != 4 || split[0] * split[1] != xs[0] || split[2] != xs[1] || split[3] != xs[2]) {
      return false;
    }
    const auto only_reader = [&](ValueId id) -> const Node* {
      const std::vector<int> readers = graph_.ConsumersOf(id);
      return readers.size() == 1 && id != graph_.output ? &graph_.nodes[readers[0]] : nullptr;
    };
    const Node* turn = only_reader(node.output);
    if (turn == nullptr || turn->op != OpType::kTranspose || turn->perm != std::vector<int>{1, 0, 2, 3}) return false;
    const Node* join = only_reader(turn->output);
    if (join == nullptr || join->op != OpType::kReshape || graph_.shape(join->output) != xs) return false;
    const auto& params = quant(node.inputs[0]);
    if (quant(node.output) != params || quant(turn->output) != params || quant(join->output) != params) return false;

    const Format format = params ? Format::kU8 : Format::kF32;
    const int src = Get(node.inputs[0], format), dst = NewBuffer(format, xs);
    const int64_t groups = split[0], rest = split[1], channels = xs[0], pixels = xs[1] * xs[2];
    std::vector<int32_t> from(channels);
    for (int64_t j = 0; j < rest; ++j) {
      for (int64_t g = 0; g < groups; ++g) from[j * groups + g] = static_cast<int32_t>(g * rest + j);
    }
    AddStep({src}, {dst}).loop = [=](const RunContext& run) {
      const auto gather = [&](auto* d, const auto* s) {
#pragma omp parallel for schedule(static) if (run.batch * pixels * channels > 16384)
        for (int64_t p = 0; p < run.batch * pixels; ++p) {
          for (int64_t c = 0; c < channels; ++c) d[p * channels + c] = s[p * channels + from[c]];
        }
      };
      if (format == Format::kU8) {
        gather(run.at<uint8_t>(dst), run.at<uint8_t>(src));
      } else {
        gather(run.at<float>(dst), run.at<float>(src));
      }
    };
    layer().implementation = "tern:loop";
    fused_.insert({node.output, 0});
    fused_.insert({turn->output, 0});
    Define(join->output, dst);
    return true;
  }

  // ---- Other operators in float --------------------------------------------------------------

  absl::Status LowerFloat(const Node& node) {
    const Shape &xs = graph_.shape(node.inputs[0]), &ys = graph_.shape(node.output);
    const bool same_shapes = std::all_of(node.inputs.begin(), node.inputs.end(), [&](ValueId id) {
      return graph_.shape(id) == ys && !graph_.values[id].constant;
    });
    const bool whole_blocks = xs.rank() == 3 && xs[0] % kChannelBlock == 0;
    bool blocked = whole_blocks && Current(node.inputs[0]) == Format::kF32Blocked && !quant(node.output);

    if ((node.op == OpType::kMaxPool || node.op == OpType::kAveragePool) &&
        !(node.pool.ceil_mode && node.pool.count_include_pad)) {
      const Format format = Current(node.inputs[0]);
      const int src = Get(node.inputs[0], format), dst = NewBuffer(format, ys);
      if (AddPooling(node, src, dst)) {
        SetFloatImplementation(node, layer().implementation);
        StoreFloat(node.output, dst);
        return absl::OkStatus();
      }
    }
    if (node.op == OpType::kReshape) {
      const int src = Get(node.inputs[0], Format::kF32);
      if (!quant(node.output) && IsView(Format::kF32, xs, ys)) {
        DefineView(node, src);
        return absl::OkStatus();
      }
    }

    // Blocked tensors pass through where the order of elements does not matter, or channels stay whole blocks.
    const bool elementwise = IsUnary(node.op) || ((node.op == OpType::kAdd || node.op == OpType::kSub ||
                                                   node.op == OpType::kMul || node.op == OpType::kDiv) && same_shapes);
    bool block_concat = node.op == OpType::kConcat && node.axis == 0 && ys.rank() == 3;
    for (ValueId id : node.inputs) block_concat = block_concat && graph_.shape(id)[0] % kChannelBlock == 0;
    blocked = blocked && (elementwise || block_concat || node.op == OpType::kBatchNorm || node.op == OpType::kGlobalAveragePool);

    const Format format = blocked ? Format::kF32Blocked : Format::kF32;
    std::vector<int> sources;
    std::vector<Place> inputs;
    // A blocked tensor is [c/8,h,w,8] row-major: channels outside, so that concatenation along axis 0 is what it
    // was; per-channel operators see the inner 8 as a dimension of its own.
    const auto place_of = [&](int b) {
      Place place = PlaceOf(b);
      if (!blocked) return place;
      const Shape& s = buffer(b).shape;
      place.shape = Shape{s[0] / kChannelBlock, s[1], s[2], kChannelBlock};
      place.strides = RowMajorStrides(place.shape);
      return place;
    };
    for (ValueId id : node.inputs) {
      sources.push_back(Get(id, format));
      inputs.push_back(place_of(sources.back()));
    }
    const bool pooled_blocks = blocked && node.op == OpType::kGlobalAveragePool;
    const int dst = NewBuffer(pooled_blocks ? Format::kF32 : format, ys);
    const Place output = pooled_blocks ? PlaceOf(dst) : place_of(dst);
    Step& step = AddStep(sources, {dst});
    if (elementwise) {
      for (size_t i = 0; i < inputs.size(); ++i) {
        if (graph_.shape(node.inputs[i]) == ys && sources[0] != sources.back()) step.in_place.push_back({sources[i], dst});
      }
      if (inputs.size() == 1) step.in_place = {{sources[0], dst}};
    }
    auto attributes = std::make_shared<Node>(node);
    if (pooled_blocks) {
      step.loop = [=, channels = xs[0], pixels = xs[1] * xs[2]](const RunContext& run) {
        const float* src = run.at<float>(sources[0]);
        float* means = run.at<float>(dst);
        const float inverse = 1.0f / static_cast<float>(pixels);
        const int64_t blocks = run.batch * channels / kChannelBlock;
#pragma omp parallel for schedule(static) if (blocks * pixels > 4096)
        for (int64_t b = 0; b < blocks; ++b) {
          float sums[kChannelBlock] = {};
          for (int64_t p = 0; p < pixels; ++p) {
            for (int c = 0; c < kChannelBlock; ++c) sums[c] += src[(b * pixels + p) * kChannelBlock + c];
          }
          for (int c = 0; c < kChannelBlock; ++c) means[b * kChannelBlock + c] = sums[c] * inverse;
        }
      };
    } else if (blocked && node.op == OpType::kBatchNorm) {
      step.loop = [=, channels = xs[0], pixels = xs[1] * xs[2]](const RunContext& run) {
        const float *src = run.at<float>(sources[0]), *scale = attributes->weight.data<float>().data(),
                    *shift = attributes->bias.data<float>().data();
        float* result = run.at<float>(dst);
        const float lo = attributes->clip ? attributes->clip->lo : -std::numeric_limits<float>::infinity();
        const float hi = attributes->clip ? attributes->clip->hi : std::numeric_limits<float>::infinity();
        const int64_t per_image = channels / kChannelBlock, blocks = run.batch * per_image;
#pragma omp parallel for schedule(static) if (blocks * pixels > 4096)
        for (int64_t b = 0; b < blocks; ++b) {
          const float *m = scale + b % per_image * kChannelBlock, *a = shift + b % per_image * kChannelBlock;
          for (int64_t i = b * pixels * kChannelBlock, p = 0; p < pixels; ++p) {
            for (int c = 0; c < kChannelBlock; ++c, ++i) result[i] = std::min(std::max(src[i] * m[c] + a[c], lo), hi);
          }
        }
      };
    } else {
      step.loop = [=](const RunContext& run) {
        std::vector<Operand<const float>> operands;
        operands.reserve(inputs.size());
        for (const Place& place : inputs) operands.push_back(place.At<const float>(run));
        // The status can only be UNIMPLEMENTED, for operators that do not come here.
        RunPlainFloat(*attributes, operands, output.At<float>(run), run.batch).IgnoreError();
      };
    }
    SetFloatImplementation(node, "tern:loop");
    StoreFloat(node.output, dst);
    return absl::OkStatus();
  }

  const graph::Graph& graph_;
  const PlanOptions& options_;
  Program program_;
  int node_ = 0;
  bool quantized_ = false;
  std::vector<std::map<Format, int>> formats_;  // by ValueId: its buffers
  std::map<ValueId, int> fused_;                // values that exist nowhere
};

}  // namespace

absl::StatusOr<Program> Lower(const graph::Graph& graph, const PlanOptions& options) {
  return Lowering(graph, options).Run();
}

}  // namespace tern::engine
