#include "server/onnx/export.h"

#include <onnx/onnx_pb.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/graph/fixed_point.h"
#include "server/tensor/cluster.h"

namespace tern::onnx {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::PoolAttributes;
using graph::ValueId;
using ::onnx::AttributeProto;
using ::onnx::NodeProto;
using ::onnx::TensorProto;

constexpr int kOpset = 13, kIrVersion = 7;  // of the same release, ONNX 1.8
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Attribute {
  Attribute(const char* name, int64_t value) {
    proto.set_name(name);
    proto.set_type(AttributeProto::INT);
    proto.set_i(value);
  }
  Attribute(const char* name, float value) {
    proto.set_name(name);
    proto.set_type(AttributeProto::FLOAT);
    proto.set_f(value);
  }
  Attribute(const char* name, const std::vector<int64_t>& values) {
    proto.set_name(name);
    proto.set_type(AttributeProto::INTS);
    for (int64_t value : values) proto.add_ints(value);
  }
  AttributeProto proto;
};
using Attributes = std::vector<Attribute>;

// The integer weights w = cluster scale * code, OIHW: at most 127 * 7.
std::vector<int32_t> IntegerWeights(const QuantizedWeights& weights) {
  const Shape& shape = weights.codes.shape();
  const absl::Span<const int8_t> codes = weights.codes.data<int8_t>();
  std::vector<int32_t> result(codes.begin(), codes.end());
  if (weights.scheme == WeightScheme::kInt8) return result;
  const int64_t channels = shape[1], taps = shape.elements() / (shape[0] * channels);
  const ClusterMap map(static_cast<int>(channels), weights.cluster_size);
  const absl::Span<const int8_t> scales = weights.cluster_scales.data<int8_t>();
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / taps;  // of output and input channel
    const int c = static_cast<int>(row % channels);
    result[i] *= scales[row / channels * map.clusters() + map.cluster_of(c)];
  }
  return result;
}

class Exporter {
 public:
  explicit Exporter(const Graph& graph) : graph_(graph), values_(graph.values.size()) {}

  ::onnx::ModelProto Run() {
    model_.set_ir_version(kIrVersion);
    model_.set_producer_name("tern");
    model_.add_opset_import()->set_version(kOpset);
    proto_.set_name(graph_.name.empty() ? "network" : graph_.name);
    // Input and output keep their names whatever else wants them.
    NameOf(graph_.input);
    NameOf(graph_.output);
    Declare(*proto_.add_input(), graph_.input);
    Declare(*proto_.add_output(), graph_.output);
    Quantise(graph_.input);
    for (const Node& node : graph_.nodes) {
      Add(node);
      Quantise(node.output);
    }
    return std::move(model_);
  }

 private:
  struct Names {
    std::string written;  // what the producer writes
    std::string read;     // what readers take: after DequantizeLinear, if the value is quantised
  };

  // `wanted`, with a number behind if a tensor or node has the name already.
  std::string Unique(const std::string& wanted) {
    int& next = used_[wanted];
    if (next++ == 0) return wanted;
    for (;; ++next) {
      const std::string name = absl::StrCat(wanted, "_", next);
      if (used_.emplace(name, 1).second) return name;
    }
  }

  // The output is declared under its name, so what is written before its codes gets another.
  const Names& NameOf(ValueId id) {
    Names& names = values_[id];
    if (!names.read.empty()) return names;
    const graph::Value& value = graph_.values[id];
    const std::string base = Unique(value.name.empty() ? absl::StrCat("value", id) : value.name);
    names = {base, base};
    if (value.quant && id == graph_.output) names.written = Unique(base + "/real");
    if (value.quant && id != graph_.output) names.read = Unique(base + "/dequantized");
    if (value.constant) Initializer(base, *value.constant, value.constant->shape().dims());
    return names;
  }
  std::string Read(ValueId id) { return NameOf(id).read; }

  void Declare(::onnx::ValueInfoProto& info, ValueId id) {
    info.set_name(id == graph_.input ? NameOf(id).written : NameOf(id).read);
    auto* type = info.mutable_type()->mutable_tensor_type();
    type->set_elem_type(TensorProto::FLOAT);
    type->mutable_shape()->add_dim()->set_dim_param("N");
    for (int64_t dim : graph_.shape(id).dims()) {
      type->mutable_shape()->add_dim()->set_dim_value(dim);
    }
  }

  // ---- constants ----

  void Initializer(const std::string& name, const void* data, size_t bytes,
                   TensorProto::DataType type, const std::vector<int64_t>& dims) {
    TensorProto& tensor = *proto_.add_initializer();
    tensor.set_name(name);
    tensor.set_data_type(type);
    for (int64_t dim : dims) tensor.add_dims(dim);
    tensor.set_raw_data(data, bytes);
  }
  void Initializer(const std::string& name, const Tensor& real, const std::vector<int64_t>& dims) {
    Initializer(name, real.raw(), real.size_bytes(), TensorProto::FLOAT, dims);
  }
  // Under a fresh name like `wanted`, which is returned.
  std::string Floats(const std::string& wanted, const Tensor& real) {
    const std::string name = Unique(wanted);
    Initializer(name, real, real.shape().dims());
    return name;
  }
  std::string Scalar(const std::string& wanted, float value) {
    const std::string name = Unique(wanted);
    Initializer(name, &value, sizeof(value), TensorProto::FLOAT, {});
    return name;
  }
  std::string Int8(const std::string& wanted, const std::vector<int8_t>& values,
                   const std::vector<int64_t>& dims) {
    const std::string name = Unique(wanted);
    Initializer(name, values.data(), values.size(), TensorProto::INT8, dims);
    return name;
  }
  std::string Ints(const std::string& wanted, const std::vector<int64_t>& values) {
    const std::string name = Unique(wanted);
    Initializer(name, values.data(), values.size() * sizeof(int64_t), TensorProto::INT64,
                {static_cast<int64_t>(values.size())});
    return name;
  }

  // ---- nodes ----

  std::string Emit(const std::string& type, const std::string& name,
                   const std::vector<std::string>& inputs, const std::string& output,
                   const Attributes& attributes = {}) {
    NodeProto& node = *proto_.add_node();
    node.set_op_type(type);
    node.set_name(name);
    for (const std::string& input : inputs) node.add_input(input);
    node.add_output(output);
    for (const Attribute& attribute : attributes) *node.add_attribute() = attribute.proto;
    return output;
  }
  // The ONNX node that stands for `node` or the first of several; the last one writes its output.
  std::string Main(const std::string& type, const Node& node,
                   const std::vector<std::string>& inputs, bool last,
                   const Attributes& attributes = {}) {
    const std::string output =
        last ? NameOf(node.output).written : Unique(absl::StrCat(node.name, "/product"));
    return Emit(type, node.name, inputs, output, attributes);
  }
  // A node that only this export needs.
  std::string Helper(const std::string& type, const Node& node, const char* what,
                     const std::vector<std::string>& inputs, bool last,
                     const Attributes& attributes = {}) {
    const std::string name = Unique(absl::StrCat(node.name, "/", what));
    const std::string output = last ? NameOf(node.output).written : Unique(name + "/result");
    return Emit(type, name, inputs, output, attributes);
  }

  // Rounds a value that is held as codes.
  void Quantise(ValueId id) {
    const std::optional<QuantParams>& quant = graph_.values[id].quant;
    if (!quant) return;
    const Names names = NameOf(id);
    const std::string& base = id == graph_.output ? names.read : names.written;
    const uint8_t zero = static_cast<uint8_t>(quant->zero_point);
    const std::string scale = Scalar(base + "/scale", quant->scale);
    const std::string zero_point = Unique(base + "/zero_point");
    Initializer(zero_point, &zero, 1, TensorProto::UINT8, {});
    const std::string codes = Emit("QuantizeLinear", Unique(base + "/quantize"),
                                   {names.written, scale, zero_point}, Unique(base + "/codes"));
    Emit("DequantizeLinear", Unique(base + "/dequantize"), {codes, scale, zero_point}, names.read);
  }

  // The weight of a convolution or fully connected layer as reals.
  std::string Weight(const Node& node) {
    const std::string base = node.name + "/weight";
    if (!node.quantized) return Floats(base, node.weight);
    const QuantizedWeights& weights = *node.quantized;
    const std::vector<int32_t> integers = IntegerWeights(weights);
    const std::vector<int64_t>& dims = weights.codes.shape().dims();
    const bool narrow = std::all_of(integers.begin(), integers.end(),
                                    [](int32_t w) { return w >= -128 && w <= 127; });
    const std::string steps = Floats(base + "/steps", Tensor::Of({dims[0]}, weights.steps));
    const std::string zeros = Int8(base + "/zero_points", std::vector<int8_t>(dims[0]), {dims[0]});
    if (narrow) {
      const std::vector<int8_t> products(integers.begin(), integers.end());
      return Emit("DequantizeLinear", Unique(base + "/dequantize"),
                  {Int8(base + "/codes", products, dims), steps, zeros}, Unique(base),
                  {{"axis", int64_t{0}}});
    }
    const absl::Span<const int8_t> codes = weights.codes.data<int8_t>();
    const std::string unscaled =
        Emit("DequantizeLinear", Unique(base + "/dequantize"),
             {Int8(base + "/codes", {codes.begin(), codes.end()}, dims), steps, zeros},
             Unique(base + "/unscaled"), {{"axis", int64_t{0}}});
    const ClusterMap map(static_cast<int>(dims[1]), weights.cluster_size);
    std::vector<int8_t> scales(dims[0] * dims[1]);
    for (size_t i = 0; i < scales.size(); ++i) {
      const int64_t o = static_cast<int64_t>(i) / dims[1];
      scales[i] =
          weights.cluster_scales.data<int8_t>()[o * map.clusters() + map.cluster_of(i % dims[1])];
    }
    std::vector<int64_t> scale_dims(dims.size(), 1);
    scale_dims[0] = dims[0];
    scale_dims[1] = dims[1];
    const std::string scale =
        Emit("DequantizeLinear", Unique(base + "/dequantize_scales"),
             {Int8(base + "/scales", scales, scale_dims), Scalar(base + "/one", 1.0f),
              Int8(base + "/zero_point", {0}, {})},
             Unique(base + "/scale"));
    return Emit("Mul", Unique(base + "/multiply"), {unscaled, scale}, Unique(base));
  }

  // The bias of a convolution or fully connected layer. A sum of fixed-point arithmetic that lies
  // half way between two codes goes up, QuantizeLinear takes it to the even one: half a unit of
  // those sums, which moves no sum past another rounding, makes it go up here too.
  std::string Bias(const Node& node) {
    Tensor bias = node.bias;
    if (graph_.arithmetic == graph::Arithmetic::kFixedPoint && graph_.values[node.output].quant) {
      const float half = std::ldexp(1.0f, graph::FixedPointOf(graph_, node).exponent - 1);
      for (float& b : bias.data<float>()) b += half;
    }
    return Floats(node.name + "/bias", bias);
  }

  void Clip(const Node& node, const std::string& x, bool fused) {
    const graph::ClipRange& range = *node.clip;
    const auto emit = [&](const std::string& type, const std::vector<std::string>& inputs) {
      if (fused) {
        Helper(type, node, "clip", inputs, true);
      } else {
        Main(type, node, inputs, true);
      }
    };
    if (range == graph::ClipRange{0.0f, kInfinity}) return emit("Relu", {x});
    const std::string lo = range.lo == -kInfinity ? "" : Scalar(node.name + "/lowest", range.lo);
    const std::string hi = range.hi == kInfinity ? "" : Scalar(node.name + "/highest", range.hi);
    if (!hi.empty()) return emit("Clip", {x, lo, hi});
    if (!lo.empty()) return emit("Clip", {x, lo});
    emit("Clip", {x});
  }

  // What follows the product of a weighted layer, a batch normalisation or an addition.
  void Epilogue(const Node& node, std::string y) {
    if (node.has_residual()) {
      y = Helper("Add", node, "residual", {y, Read(node.inputs[1])}, !node.clip);
    }
    if (node.clip) Clip(node, y, true);
  }
  static bool HasEpilogue(const Node& node) { return node.has_residual() || node.clip; }

  // ONNX pairs axes from the right with the batch among them: an operand of fewer axes than the
  // result gets axes of 1 behind its batch. Constants have no batch and fit as they are.
  std::string Operand(const Node& node, ValueId id) {
    const Shape& shape = graph_.shape(id);
    const int missing = graph_.shape(node.output).rank() - shape.rank();
    if (graph_.values[id].constant || missing == 0) return Read(id);
    std::vector<int64_t> target{0};
    target.insert(target.end(), missing, 1);
    target.insert(target.end(), shape.extents().begin(), shape.extents().end());
    return Helper("Reshape", node, "align", {Read(id), Ints(node.name + "/aligned", target)},
                  false);
  }

  void Pool(const Node& node) {
    const bool average = node.op == OpType::kAveragePool;
    const Shape &in = graph_.shape(node.inputs[0]), &out = graph_.shape(node.output);
    const PoolAttributes& pool = node.pool;
    std::vector<int64_t> pads{pool.pad_top, pool.pad_left, pool.pad_bottom, pool.pad_right};
    bool count_pads = average && pool.count_include_pad;
    std::string x = Read(node.inputs[0]);
    if (pool.ceil_mode) {
      if (count_pads) {
        // The declared zeros count in the mean, what ceil_mode adds does not.
        const std::vector<int64_t> all{0, 0, pads[0], pads[1], 0, 0, pads[2], pads[3]};
        if (all != std::vector<int64_t>(8, 0)) {
          x = Helper("Pad", node, "pad", {x, Ints(node.name + "/pads", all)}, false);
        }
        count_pads = false;
      }
      const bool written = average && pool.count_include_pad;
      const auto after = [&](int64_t extent, int64_t windows, int kernel, int stride,
                             int64_t before, int64_t behind) {
        return std::max<int64_t>(
            0, (windows - 1) * stride + kernel - extent - before - (written ? behind : 0));
      };
      pads = {written ? 0 : pads[0], written ? 0 : pads[1],
              after(in[1], out[1], pool.kernel_h, pool.stride_h, pads[0], pads[2]),
              after(in[2], out[2], pool.kernel_w, pool.stride_w, pads[1], pads[3])};
    }
    Attributes attributes{{"kernel_shape", std::vector<int64_t>{pool.kernel_h, pool.kernel_w}},
                          {"strides", std::vector<int64_t>{pool.stride_h, pool.stride_w}},
                          {"pads", pads}};
    if (count_pads) attributes.push_back({"count_include_pad", int64_t{1}});
    Main(average ? "AveragePool" : "MaxPool", node, {x}, true, attributes);
  }

  void Add(const Node& node) {
    switch (node.op) {
      case OpType::kConv: {
        const graph::ConvAttributes& conv = node.conv;
        const Shape& w = node.quantized ? node.quantized->codes.shape() : node.weight.shape();
        const Attributes attributes{
            {"kernel_shape", std::vector<int64_t>{w[2], w[3]}},
            {"strides", std::vector<int64_t>{conv.stride_h, conv.stride_w}},
            {"pads",
             std::vector<int64_t>{conv.pad_top, conv.pad_left, conv.pad_bottom, conv.pad_right}},
            {"dilations", std::vector<int64_t>{conv.dilation_h, conv.dilation_w}},
            {"group", int64_t{conv.groups}}};
        const std::vector<std::string> inputs{Read(node.inputs[0]), Weight(node), Bias(node)};
        Epilogue(node, Main("Conv", node, inputs, !HasEpilogue(node), attributes));
        return;
      }
      case OpType::kFullyConnected: {
        const std::vector<std::string> inputs{Read(node.inputs[0]), Weight(node), Bias(node)};
        Epilogue(node, Main("Gemm", node, inputs, !HasEpilogue(node), {{"transB", int64_t{1}}}));
        return;
      }
      case OpType::kBatchNorm: {
        // y = (x - 0) / sqrt(1 + 0) * scale + shift
        const int64_t channels = node.weight.elements();
        const std::vector<float> zeros(channels, 0.0f), ones(channels, 1.0f);
        const std::vector<std::string> inputs{
            Read(node.inputs[0]), Floats(node.name + "/scale", node.weight),
            Floats(node.name + "/shift", node.bias),
            Floats(node.name + "/mean", Tensor::Of({channels}, zeros)),
            Floats(node.name + "/variance", Tensor::Of({channels}, ones))};
        Epilogue(node, Main("BatchNormalization", node, inputs, !node.clip, {{"epsilon", 0.0f}}));
        return;
      }
      case OpType::kRelu:
        Main("Relu", node, {Read(node.inputs[0])}, true);
        return;
      case OpType::kClip:
        Clip(node, Read(node.inputs[0]), false);
        return;
      case OpType::kSigmoid:
        Main("Sigmoid", node, {Read(node.inputs[0])}, true);
        return;
      case OpType::kHardSigmoid:
        Main("HardSigmoid", node, {Read(node.inputs[0])}, true,
             {{"alpha", node.alpha}, {"beta", node.beta}});
        return;
      case OpType::kHardSwish: {  // an operator of its own only since opset 14
        const std::string x = Read(node.inputs[0]);
        const std::string gate = Helper("HardSigmoid", node, "gate", {x}, false,
                                        {{"alpha", 1.0f / 6.0f}, {"beta", 0.5f}});
        Main("Mul", node, {x, gate}, true);
        return;
      }
      case OpType::kSilu: {
        const std::string x = Read(node.inputs[0]);
        Main("Mul", node, {x, Helper("Sigmoid", node, "gate", {x}, false)}, true);
        return;
      }
      case OpType::kAdd:
      case OpType::kSub:
      case OpType::kMul:
      case OpType::kDiv: {
        const char* type = node.op == OpType::kAdd   ? "Add"
                           : node.op == OpType::kSub ? "Sub"
                           : node.op == OpType::kMul ? "Mul"
                                                     : "Div";
        const std::string a = Operand(node, node.inputs[0]), b = Operand(node, node.inputs[1]);
        Epilogue(node, Main(type, node, {a, b}, !node.clip));
        return;
      }
      case OpType::kConcat: {
        std::vector<std::string> parts;
        for (ValueId id : node.inputs) parts.push_back(Read(id));
        Main("Concat", node, parts, true, {{"axis", int64_t{node.axis} + 1}});
        return;
      }
      case OpType::kMaxPool:
      case OpType::kAveragePool:
        Pool(node);
        return;
      case OpType::kGlobalAveragePool:
        Main("GlobalAveragePool", node, {Read(node.inputs[0])}, true);
        return;
      case OpType::kReshape: {
        std::vector<int64_t> target = graph_.shape(node.output).WithBatch(0).dims();  // 0: as it is
        Main("Reshape", node, {Read(node.inputs[0]), Ints(node.name + "/shape", target)}, true);
        return;
      }
      case OpType::kTranspose: {
        std::vector<int64_t> perm{0};
        for (int axis : node.perm) perm.push_back(axis + 1);
        Main("Transpose", node, {Read(node.inputs[0])}, true, {{"perm", perm}});
        return;
      }
      case OpType::kSlice:
        Main("Slice", node,
             {Read(node.inputs[0]), Ints(node.name + "/start", {node.start}),
              Ints(node.name + "/end", {node.end}), Ints(node.name + "/axis", {node.axis + 1}),
              Ints(node.name + "/step", {node.step})},
             true);
        return;
      case OpType::kPad: {
        std::vector<int64_t> pads{0};
        pads.insert(pads.end(), node.pads_before.begin(), node.pads_before.end());
        pads.push_back(0);
        pads.insert(pads.end(), node.pads_after.begin(), node.pads_after.end());
        Main("Pad", node,
             {Read(node.inputs[0]), Ints(node.name + "/pads", pads),
              Scalar(node.name + "/value", node.pad_value)},
             true);
        return;
      }
      case OpType::kSoftmax:
        Main("Softmax", node, {Read(node.inputs[0])}, true, {{"axis", int64_t{node.axis} + 1}});
        return;
      case OpType::kReduceMean: {
        if (node.axes.empty()) {  // which ONNX takes for all axes
          Main("Identity", node, {Read(node.inputs[0])}, true);
          return;
        }
        std::vector<int64_t> axes;
        for (int axis : node.axes) axes.push_back(axis + 1);
        const bool keep = graph_.shape(node.output).rank() == graph_.shape(node.inputs[0]).rank();
        Main("ReduceMean", node, {Read(node.inputs[0])}, true,
             {{"axes", axes}, {"keepdims", int64_t{keep}}});
        return;
      }
    }
  }

  const Graph& graph_;
  ::onnx::ModelProto model_;
  ::onnx::GraphProto& proto_ = *model_.mutable_graph();
  std::vector<Names> values_;
  std::unordered_map<std::string, int> used_;  // name -> next number to try
};

}  // namespace

absl::StatusOr<std::string> Export(
    const Graph& graph, const std::vector<std::pair<std::string, std::string>>& metadata) {
  TERN_RETURN_IF_ERROR(graph::Validate(graph));
  ::onnx::ModelProto model = Exporter(graph).Run();
  for (const auto& [key, value] : metadata) {
    auto* entry = model.add_metadata_props();
    entry->set_key(key);
    entry->set_value(value);
  }
  const size_t bytes = model.ByteSizeLong();
  if (bytes > static_cast<size_t>(std::numeric_limits<int>::max())) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the network takes ", bytes, " bytes as ONNX; the format allows 2 GiB"));
  }
  return model.SerializeAsString();
}

}  // namespace tern::onnx
