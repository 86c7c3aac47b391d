#include "server/onnx/importer.h"

#include <algorithm>
#include <utility>

#include "server/base/status_macros.h"
#include "server/tensor/cluster.h"

namespace tern::onnx {
namespace {

using graph::Node;
using graph::OpType;
using graph::ValueId;
using ::onnx::NodeProto;
using ::onnx::TensorProto;

// Far above any network, far below what would make an import slow.
constexpr size_t kMaxNodes = 100000;
// 1 GiB of floats beyond the file's own weights.
constexpr int64_t kMaxCharged = int64_t{1} << 28;
constexpr size_t kMaxNameLength = 200;

// Names travel into reports, metrics and protobuf strings: printable ASCII of bounded length.
std::string CleanName(const std::string& name) {
  std::string clean = name.substr(0, kMaxNameLength);
  for (char& c : clean) {
    if (c < ' ' || c > '~') c = '_';
  }
  return clean;
}

const Operator* FindOperator(const std::string& type) {
  static const auto* const kOperators = [] {
    auto* operators = new std::unordered_map<std::string, const Operator*>;
    for (absl::Span<const Operator> table :
         {LayerOperators(), ArithmeticOperators(), MovementOperators(), QuantizationOperators()}) {
      for (const Operator& entry : table) operators->emplace(entry.type, &entry);
    }
    return operators;
  }();
  const auto found = kOperators->find(type);
  return found == kOperators->end() ? nullptr : found->second;
}

}  // namespace

absl::StatusOr<graph::Graph> Importer::Run() {
  ::onnx::GraphProto& proto = *model_.mutable_graph();
  if (static_cast<size_t>(proto.node_size()) > kMaxNodes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model has ", proto.node_size(), " nodes, more than ", kMaxNodes));
  }
  if (proto.sparse_initializer_size() > 0) {
    return absl::UnimplementedError("sparse initialisers are not supported");
  }
  graph_.name = CleanName(proto.name());
  TERN_RETURN_IF_ERROR(AddInitializers());
  TERN_RETURN_IF_ERROR(AddInput());
  for (const NodeProto& node : proto.node()) {
    for (const std::string& name : node.input()) ++mentions_[name];
  }
  for (NodeProto& node : *proto.mutable_node()) TERN_RETURN_IF_ERROR(AddNode(node));
  TERN_RETURN_IF_ERROR(SetOutput());
  return std::move(graph_);
}

absl::Status Importer::AddInitializers() {
  for (TensorProto& tensor : *model_.mutable_graph()->mutable_initializer()) {
    TERN_RETURN_IF_ERROR(Define(tensor.name(), {.initializer = &tensor}));
  }
  return absl::OkStatus();
}

absl::Status Importer::AddInput() {
  const ::onnx::ValueInfoProto* input = nullptr;
  for (const auto& candidate : model_.graph().input()) {
    // Older exporters list the weights among the inputs.
    const auto item = items_.find(candidate.name());
    if (item != items_.end() && item->second.initializer != nullptr) continue;
    if (input != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("the model has several inputs: '",
                                                     CleanName(input->name()), "', '",
                                                     CleanName(candidate.name()), "'"));
    }
    input = &candidate;
  }
  if (input == nullptr) return absl::InvalidArgumentError("the model has no input");
  const auto& type = input->type().tensor_type();
  if (type.elem_type() != TensorProto::FLOAT) {
    return absl::InvalidArgumentError(absl::StrCat("input '", CleanName(input->name()),
                                                   "' has element type ", type.elem_type(),
                                                   ", wanted float (1)"));
  }
  const auto& dims = type.shape().dim();
  if (dims.size() != 4) {
    return absl::InvalidArgumentError(absl::StrCat(
        "input '", CleanName(input->name()), "' has rank ", dims.size(), ", wanted 4: [N,c,h,w]"));
  }
  if (dims[0].has_dim_value()) {
    // Some exporters write 0 or -1 for "any".
    if (dims[0].dim_value() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("the batch of input '", CleanName(input->name()), "' is fixed to ",
                       dims[0].dim_value(), ", wanted a dynamic batch or 1"));
    }
    fixed_batch_ = dims[0].dim_value() == 1;
  }
  Shape shape{0, 0, 0};
  for (int i = 0; i < 3; ++i) shape[i] = dims[i + 1].dim_value();  // 0 if symbolic
  TERN_RETURN_IF_ERROR(
      Annotate(graph::CheckExtents(shape),
               absl::StrCat("input '", CleanName(input->name()), "' must have fixed c, h, w")));
  graph_.input = graph_.AddValue({.name = CleanName(input->name()), .shape = shape});
  return Define(input->name(), {.value = graph_.input});
}

absl::Status Importer::AddNode(NodeProto& proto) {
  const std::string type = CleanName(proto.op_type());
  const std::string name = UniqueName(proto.name().empty() ? type : proto.name());
  Op op(*this, proto, name);
  const bool standard = proto.domain().empty() || proto.domain() == "ai.onnx";
  const Operator* entry = standard ? FindOperator(proto.op_type()) : nullptr;
  if (entry == nullptr) {
    return absl::UnimplementedError(absl::StrCat("node '", name, "': operator ",
                                                 CleanName(proto.domain()), standard ? "" : ".",
                                                 type, " is not supported"));
  }
  if (proto.output_size() == 0 || proto.output(0).empty()) {
    return op.Invalid("has no output");
  }
  TERN_RETURN_IF_ERROR(op.Resolve(entry->least_inputs, entry->most_inputs));
  const absl::Status handled = entry->handler(op);
  // A mistyped attribute reads as its default, so that error explains any other.
  const absl::Status status = handled.ok() ? op.attributes().Finish() : op.attributes().status();
  if (!status.ok()) return absl::Status(status.code(), op.Prefix() + std::string(status.message()));
  TERN_RETURN_IF_ERROR(handled);
  for (const std::string& output : proto.output()) {
    if (!output.empty() && items_.count(output) == 0) {
      TERN_RETURN_IF_ERROR(Define(output, {.unsupported = true}));
    }
  }
  return absl::OkStatus();
}

absl::Status Importer::SetOutput() {
  const ::onnx::GraphProto& proto = model_.graph();
  if (proto.output_size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model has ", proto.output_size(), " outputs, wanted 1"));
  }
  const std::string name = CleanName(proto.output(0).name());
  TERN_ASSIGN_OR_RETURN(const Item* item, Find(proto.output(0).name()));
  if (item->code_type != 0) {
    return absl::UnimplementedError(
        absl::StrCat("output '", name, "' is codes of QuantizeLinear, wanted reals"));
  }
  if (item->value == graph::kNoValue || item->value == graph_.input) {
    return absl::InvalidArgumentError(
        absl::StrCat("output '", name, "' is not computed from the image"));
  }
  graph_.output = item->value;
  const Shape& shape = graph_.shape(item->value);
  if (shape.rank() == 1) return absl::OkStatus();
  if (shape.rank() == 3 && shape[1] == 1 && shape[2] == 1) {
    Node node{.name = UniqueName(name + "/flatten"), .op = OpType::kReshape};
    node.inputs = {graph_.output};
    node.output = graph_.AddValue({.name = name, .shape = {shape[0]}});
    graph_.output = node.output;
    graph_.nodes.push_back(std::move(node));
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("output '", name, "' has sample shape ",
                                                 shape.ToString(),
                                                 ", wanted [classes] or [classes,1,1]"));
}

absl::StatusOr<const Item*> Importer::Find(const std::string& name) {
  const auto found = items_.find(name);
  if (found == items_.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", CleanName(name), "' is read, but nothing before defines it"));
  }
  Item& item = found->second;
  if (item.unsupported) {
    return absl::UnimplementedError(
        absl::StrCat("'", CleanName(name), "' is an output that Tern does not compute"));
  }
  if (item.initializer != nullptr) {
    TERN_ASSIGN_OR_RETURN(Constant constant, ToConstant(*item.initializer));
    item.constant = std::make_shared<Constant>(std::move(constant));
    item.initializer = nullptr;
  }
  return &item;
}

absl::Status Importer::Define(const std::string& name, Item item) {
  if (name.empty()) return absl::InvalidArgumentError("a tensor has no name");
  if (!items_.emplace(name, std::move(item)).second) {
    return absl::InvalidArgumentError(absl::StrCat("'", CleanName(name), "' is defined twice"));
  }
  return absl::OkStatus();
}

std::string Importer::UniqueName(const std::string& wanted) {
  const std::string base = CleanName(wanted);
  int& next = names_[base];
  if (next == 0) {
    next = 2;
    return base;
  }
  // The next number to try is remembered per base, so many equal names cost no search.
  for (;;) {
    std::string name = absl::StrCat(base, "_", next++);
    if (names_.emplace(name, 2).second) return name;
  }
}

absl::Status Importer::Charge(int64_t elements) {
  charged_ += elements;  // at most kMaxCharged + 2^31
  if (charged_ <= kMaxCharged) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the model's shared and computed constants take more than ", kMaxCharged * 4, " bytes"));
}

// Fills scheme, cluster size and cluster scales. The file does not say N: any that the scales allow
// means the same, and larger ones have fewer scales. All channels and powers of two are tried,
// which bounds the time; N = 1 always fits.
void SetClusters(const Dequantized& source, QuantizedWeights& weights) {
  const int64_t outputs = source.cluster_scales.shape()[0];
  const int channels = static_cast<int>(source.cluster_scales.shape()[1]);
  const absl::Span<const int8_t> scales = source.cluster_scales.data<int8_t>();
  weights.scheme = source.largest > 3   ? WeightScheme::kInt4Cluster
                   : source.largest > 1 ? WeightScheme::kInt3Cluster
                                        : WeightScheme::kTernaryCluster;
  int next = 1;
  while (next < channels) next *= 2;
  for (weights.cluster_size = channels;; weights.cluster_size = next) {
    next /= 2;
    const ClusterMap map(channels, weights.cluster_size);
    weights.cluster_scales = Tensor(DType::kS8, {outputs, map.clusters()});
    const absl::Span<int8_t> found = weights.cluster_scales.data<int8_t>();
    bool fits = true;
    for (int64_t i = 0; i < outputs * channels && fits; ++i) {
      int8_t& scale =
          found[i / channels * map.clusters() + map.cluster_of(static_cast<int>(i % channels))];
      if (scale == 0) scale = scales[i];
      fits = scale == scales[i];
    }
    if (fits) return;
  }
}

// ---- Op ----

std::string Op::Prefix() const {
  return absl::StrCat("node '", name_, "' (", CleanName(proto_.op_type()), "): ");
}

absl::Status Op::Resolve(int least, int most) {
  if (proto_.input_size() > most) {
    return Invalid("has ", proto_.input_size(), " inputs, wanted at most ", most);
  }
  for (int i = 0; i < proto_.input_size(); ++i) {
    if (proto_.input(i).empty()) {
      inputs_.push_back(nullptr);
      continue;
    }
    absl::StatusOr<const Item*> item = importer_.Find(proto_.input(i));
    if (!item.ok()) {
      return absl::Status(item.status().code(), Prefix() + std::string(item.status().message()));
    }
    inputs_.push_back(*item);
  }
  for (int i = 0; i < least; ++i) {
    if (!Has(i)) return Invalid("input ", i, " is missing");
  }
  return absl::OkStatus();
}

bool Op::AllConstant() const {
  for (int i = 0; i < inputs(); ++i) {
    if (inputs_[i] != nullptr && !IsConstant(i)) return false;
  }
  return true;
}

absl::StatusOr<ValueId> Op::Variable(int i) const {
  if (IsConstant(i)) return Unimplemented("input ", i, " is a constant");
  if (inputs_[i]->code_type != 0) {
    return Unimplemented("input ", i,
                         " is codes of QuantizeLinear, which only DequantizeLinear may read");
  }
  return inputs_[i]->value;
}

absl::StatusOr<const Constant*> Op::ConstantInput(int i) const {
  if (!IsConstant(i)) return Unimplemented("input ", i, " is not a constant");
  if (inputs_[i]->dequantized == nullptr) {
    const Constant* constant = inputs_[i]->constant.get();
    if (!constant->codes.empty()) {
      return Unimplemented("input ", i, " holds ", tern::Name(constant->codes.dtype()),
                           " codes, which only DequantizeLinear may read");
    }
    return constant;
  }
  reals_.resize(inputs_.size());
  if (reals_[i] != nullptr) return reals_[i].get();
  const Dequantized& source = *inputs_[i]->dequantized;
  const Shape& shape = source.codes.shape();
  const int64_t n = source.codes.elements();
  TERN_RETURN_IF_ERROR(importer_.Charge(n));
  int64_t inner = 1;
  for (int d = source.axis + 1; d < shape.rank(); ++d) inner *= shape[d];
  auto constant = std::make_shared<Constant>();
  constant->dims = shape.dims();
  constant->floats = Tensor(DType::kF32, shape);
  const absl::Span<float> to = constant->floats.data<float>();
  const bool narrow = source.codes.dtype() == DType::kS8;
  for (int64_t k = 0; k < n; ++k) {
    const double code = narrow ? source.codes.data<int8_t>()[k] : source.codes.data<int32_t>()[k];
    const size_t j = source.scales.size() == 1 ? 0 : k / inner % source.scales.size();
    to[k] = static_cast<float>(code * source.scales[j]);
    if (!source.cluster_scales.empty()) {
      to[k] *= source.cluster_scales.data<int8_t>()[k / (n / source.cluster_scales.elements())];
    }
  }
  reals_[i] = std::move(constant);
  return reals_[i].get();
}

absl::StatusOr<Tensor> Op::Weights(int i) {
  TERN_ASSIGN_OR_RETURN(const Constant* constant, ConstantInput(i));
  if (constant->integer) return Invalid("input ", i, " holds integers, wanted floats");
  if (inputs_[i]->dequantized != nullptr) return std::move(reals_[i]->floats);
  const std::string& name = proto_.input(i);
  if (importer_.mentions_[name] == 1 && inputs_[i]->constant.use_count() == 1) {
    return std::move(inputs_[i]->constant->floats);
  }
  TERN_RETURN_IF_ERROR(importer_.Charge(constant->elements()));
  return constant->floats;
}

absl::StatusOr<std::optional<QuantizedWeights>> Op::CodedWeights(int i, int axis) const {
  if (inputs_[i]->dequantized == nullptr) return std::nullopt;
  const Dequantized& source = *inputs_[i]->dequantized;
  const Shape& shape = source.codes.shape();
  if (shape.rank() < 2) return Unimplemented("weight has shape ", shape.ToString());
  TERN_RETURN_IF_ERROR(Annotate(graph::CheckExtents(shape), Prefix() + "weight"));
  if (source.codes.dtype() != DType::kS8) {
    return Unimplemented("weight codes are up to ", source.largest,
                         " from their zero point, Tern takes symmetric weights of -128..127");
  }
  if (source.scales.size() != 1 && source.axis != axis) {
    return Unimplemented("weight scales lie along axis ", source.axis,
                         ", wanted one per output channel (axis ", axis, ")");
  }
  TERN_RETURN_IF_ERROR(importer_.Charge((source.codes.elements() + 3) / 4));
  QuantizedWeights weights;
  weights.codes = source.codes;
  if (!source.cluster_scales.empty()) {
    if (axis != 0 || source.largest > 7) {
      return Unimplemented("weights with cluster scales have codes up to ", source.largest,
                           " and output channels along axis ", axis, ", wanted 7 and axis 0");
    }
    SetClusters(source, weights);
  }
  if (axis == 1) {
    const int64_t rows = shape[0], columns = shape[1];
    weights.codes = Tensor(DType::kS8, {columns, rows});
    const absl::Span<int8_t> to = weights.codes.data<int8_t>();
    const absl::Span<const int8_t> from = source.codes.data<int8_t>();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
    }
  }
  weights.steps = source.scales;
  weights.steps.resize(shape[axis], source.scales[0]);
  return weights;
}

absl::StatusOr<std::vector<BatchInt>> Op::BatchInts(int i) const {
  TERN_ASSIGN_OR_RETURN(const Constant* constant, ConstantInput(i));
  if (!constant->integer) return Invalid("input ", i, " holds floats, wanted integers");
  return constant->ints;
}

absl::StatusOr<std::vector<int64_t>> Op::Ints(int i) const {
  TERN_ASSIGN_OR_RETURN(const std::vector<BatchInt> numbers, BatchInts(i));
  std::vector<int64_t> result;
  for (const BatchInt& number : numbers) {
    if (!number.plain()) return Unimplemented("input ", i, " depends on the batch");
    result.push_back(number.offset);
  }
  return result;
}

absl::StatusOr<float> Op::Scalar(int i) const {
  TERN_ASSIGN_OR_RETURN(const Constant* constant, ConstantInput(i));
  if (constant->integer || constant->elements() != 1) {
    return Invalid("input ", i, " must be one float");
  }
  return constant->floats.data<float>()[0];
}

absl::StatusOr<ValueId> Op::Between(Node node, std::optional<Shape> shape) {
  graph::Graph& graph = importer_.graph_;
  if (graph.nodes.size() >= kMaxNodes) return Invalid("makes more than ", kMaxNodes, " nodes");
  node.name = importer_.UniqueName(name_ + "/part");
  node.output = graph.AddValue({.name = node.name, .shape = shape.value_or(Shape())});
  TERN_ASSIGN_OR_RETURN(graph.values[node.output].shape, graph::InferShape(graph, node));
  const ValueId id = node.output;
  graph.nodes.push_back(std::move(node));
  return id;
}

absl::Status Op::Emit(Node node, int i, std::optional<Shape> shape) {
  graph::Graph& graph = importer_.graph_;
  node.name = i == 0 ? name_ : importer_.UniqueName(absl::StrCat(name_, "/", i));
  node.output =
      graph.AddValue({.name = CleanName(proto_.output(i)), .shape = shape.value_or(Shape())});
  TERN_ASSIGN_OR_RETURN(graph.values[node.output].shape, graph::InferShape(graph, node));
  TERN_RETURN_IF_ERROR(Define(i, node.output));
  graph.nodes.push_back(std::move(node));
  return absl::OkStatus();
}

absl::StatusOr<ValueId> Op::ConstantValue(int i, int rank) {
  TERN_ASSIGN_OR_RETURN(const Constant* constant, ConstantInput(i));
  if (constant->integer) return Invalid("input ", i, " holds integers, wanted floats");
  std::vector<int64_t> dims = constant->dims;
  if (static_cast<int>(dims.size()) >= rank) {
    if (static_cast<int>(dims.size()) > rank || dims[0] != 1) {
      return Unimplemented("a constant of shape ", Shape(dims).ToString(),
                           " would change the batch of a value of rank ", rank);
    }
    dims.erase(dims.begin());
  }
  TERN_RETURN_IF_ERROR(Annotate(graph::CheckExtents(Shape(dims)), proto_.input(i)));
  TERN_RETURN_IF_ERROR(importer_.Charge(constant->elements()));
  graph::Value value{.name = CleanName(proto_.input(i)), .shape = Shape(dims)};
  value.constant = constant->floats.Reshaped(Shape(dims));
  return importer_.graph_.AddValue(std::move(value));
}

absl::Status Op::Forward(int i) { return importer_.Define(proto_.output(0), *inputs_[i]); }

absl::Status Op::Define(int i, ValueId value) {
  return importer_.Define(proto_.output(i), {.value = value});
}

absl::Status Op::Define(int i, absl::StatusOr<Constant> constant) {
  if (!constant.ok()) {
    return absl::Status(constant.status().code(),
                        Prefix() + std::string(constant.status().message()));
  }
  // A BatchInt takes as much as four floats.
  TERN_RETURN_IF_ERROR(importer_.Charge(constant->elements() * (constant->integer ? 4 : 1)));
  return importer_.Define(proto_.output(i),
                          {.constant = std::make_shared<Constant>(*std::move(constant))});
}

absl::Status Op::Define(int i, std::shared_ptr<const Dequantized> dequantized) {
  return importer_.Define(proto_.output(i), {.dequantized = std::move(dequantized)});
}

// A copy that is rounded: graph::FuseQuantization lets what computes `x` write the codes instead
// where nobody else reads it.
absl::Status Op::Quantize(ValueId x, const QuantParams& quant, int code_type) {
  graph::Graph& graph = importer_.graph_;
  Node node{.name = name_, .op = OpType::kReshape, .inputs = {x}};
  node.output = graph.AddValue({.name = graph.values[x].name, .shape = graph.shape(x)});
  graph.values[node.output].quant = quant;
  TERN_RETURN_IF_ERROR(
      importer_.Define(proto_.output(0), {.value = node.output, .code_type = code_type}));
  graph.nodes.push_back(std::move(node));
  return absl::OkStatus();
}

absl::Status Op::Dequantize(ValueId codes, const QuantParams& quant) {
  const QuantParams& written = *importer_.graph_.values[codes].quant;
  if (written != quant) {
    return Unimplemented("codes of scale ", written.scale, " and zero point ", written.zero_point,
                         " (of u8) are read with scale ", quant.scale, " and zero point ",
                         quant.zero_point);
  }
  return Define(0, codes);
}

absl::StatusOr<int> Op::SampleAxis(int64_t axis, ValueId value) const {
  TERN_ASSIGN_OR_RETURN(const int plain, PlainAxis(axis, shape(value).rank() + 1));
  if (plain == 0) return Unimplemented("works along the batch");
  return plain - 1;
}

absl::StatusOr<int> Op::PlainAxis(int64_t axis, int rank) const {
  if (axis < -rank || axis >= rank) {
    return Invalid("axis ", axis, " is out of range for rank ", rank);
  }
  return static_cast<int>(axis < 0 ? axis + rank : axis);
}

}  // namespace tern::onnx
