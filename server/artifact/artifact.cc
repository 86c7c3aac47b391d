#include "server/artifact/artifact.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/artifact/packing.h"
#include "server/base/file.h"
#include "server/base/status_macros.h"
#include "server/base/thread_pool.h"
#include "tern/v1/artifact.pb.h"

namespace tern::artifact {
namespace {

using graph::Node;
using graph::OpType;

// FORMAT.md describes every field.
constexpr absl::string_view kMagic("TERN", 4);
constexpr uint32_t kVersion = 2;
constexpr uint64_t kPreamble = 32;
constexpr uint64_t kAlignment = 64;
// Structure, names, labels and the report; the largest networks stay below 1 MiB. Bounds what
// parsing allocates.
constexpr uint64_t kMaxHeader = 4ull << 20;
// A node takes 1.1 kB of memory and as little as 2 bytes of the file.
constexpr int kMaxGraphItems = 100000;
// Ranks above this appear in no operator.
constexpr int kMaxRank = 8;

constexpr uint64_t Align(uint64_t offset) {
  return (offset + kAlignment - 1) / kAlignment * kAlignment;
}

void PutLittle(uint64_t value, int size, std::string& out) {
  for (int i = 0; i < size; ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

uint64_t GetLittle(absl::string_view bytes, size_t at, int size) {
  uint64_t value = 0;
  for (int i = 0; i < size; ++i)
    value |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[at + i])) << (8 * i);
  return value;
}

// ---------------------------------------------------------------- writing

// Collects sections in the order in which tensors are put.
class Writer {
 public:
  // `bits` is StoredForm's.
  void Put(const Tensor& tensor, int bits, v1::ArtifactTensor* out) {
    std::string content;
    if (bits == 0) {
      content = PackTernary(tensor.data<int8_t>());
    } else if (bits < 8) {
      content = Pack(tensor.data<int8_t>(), bits);
    } else if (tensor.size_bytes() > 0) {
      content.assign(static_cast<const char*>(tensor.raw()), tensor.size_bytes());
    }
    Add(tensor.dtype(), tensor.shape(), bits, std::move(content), out);
  }
  void Put(const Tensor& tensor, v1::ArtifactTensor* out) {
    Put(tensor, static_cast<int>(8 * SizeOf(tensor.dtype())), out);
  }
  void Put(const std::vector<float>& values, v1::ArtifactTensor* out) {
    Put(Tensor::Of<float>(Shape{static_cast<int64_t>(values.size())}, values), out);
  }

  const std::vector<std::string>& sections() const { return sections_; }

 private:
  void Add(DType dtype, const Shape& shape, int bits, std::string content,
           v1::ArtifactTensor* out) {
    out->set_dtype(static_cast<uint32_t>(dtype));
    for (int64_t dim : shape.dims()) out->add_shape(dim);
    out->set_section(static_cast<uint32_t>(sections_.size()));
    out->set_bits(bits);
    sections_.push_back(std::move(content));
  }

  std::vector<std::string> sections_;
};

void PutNode(const Node& node, Writer& writer, v1::ArtifactNode* out) {
  out->set_name(node.name);
  out->set_op(static_cast<uint32_t>(node.op));
  for (graph::ValueId id : node.inputs) out->add_inputs(id);
  out->set_output(node.output);
  if (node.conv != graph::ConvAttributes{}) {
    const auto& a = node.conv;
    for (int value : {a.stride_h, a.stride_w, a.pad_top, a.pad_left, a.pad_bottom, a.pad_right,
                      a.dilation_h, a.dilation_w, a.groups}) {
      out->add_conv(value);
    }
  }
  if (node.pool != graph::PoolAttributes{}) {
    const auto& a = node.pool;
    for (int value :
         {a.kernel_h, a.kernel_w, a.stride_h, a.stride_w, a.pad_top, a.pad_left, a.pad_bottom,
          a.pad_right, a.ceil_mode ? 1 : 0, a.count_include_pad ? 1 : 0}) {
      out->add_pool(value);
    }
  }
  if (node.clip) {
    out->add_clip(node.clip->lo);
    out->add_clip(node.clip->hi);
  }
  out->set_axis(node.axis);
  out->set_start(node.start);
  out->set_end(node.end);
  out->set_step(node.step);
  for (int value : node.perm) out->add_perm(value);
  for (int value : node.axes) out->add_axes(value);
  for (int64_t value : node.pads_before) out->add_pads_before(value);
  for (int64_t value : node.pads_after) out->add_pads_after(value);
  out->set_pad_value(node.pad_value);
  out->set_alpha(node.alpha);
  out->set_beta(node.beta);
  if (!node.weight.empty()) writer.Put(node.weight, out->mutable_weight());
  if (!node.bias.empty()) writer.Put(node.bias, out->mutable_bias());
  if (node.quantized) {
    const QuantizedWeights& weights = *node.quantized;
    v1::ArtifactWeights* to = out->mutable_quantized();
    to->set_scheme(static_cast<uint32_t>(weights.scheme));
    to->set_cluster_size(static_cast<uint32_t>(weights.cluster_size));
    const StoredForm form = FormOf(weights);
    writer.Put(weights.codes, form.code_bits, to->mutable_codes());
    if (!weights.cluster_scales.empty())
      writer.Put(weights.cluster_scales, form.scale_bits, to->mutable_cluster_scales());
    writer.Put(weights.steps, to->mutable_steps());
  }
}

std::string SerializeHeader(const v1::ArtifactHeader& header) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  {
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    header.SerializeToCodedStream(&coded);
  }
  return bytes;
}

// ---------------------------------------------------------------- reading

absl::Status Damaged(absl::string_view name, absl::string_view why) {
  return absl::DataLossError(absl::StrCat(name, ": damaged artifact: ", why));
}

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// Hands out the sections of a file whose checksums were verified. Every section belongs to exactly
// one tensor, in the order of the header, so what a file makes us allocate is bounded by its size
// (times 8 for 1-bit scales).
class Reader {
 public:
  // Hands out the sections from `next` on.
  Reader(absl::string_view file, const v1::ArtifactHeader& header, uint32_t next = 0)
      : file_(file), header_(&header), next_(next) {}

  // s8 codes: `bits` lists what their scheme may take.
  absl::StatusOr<Tensor> GetCodes(const v1::ArtifactTensor& tensor,
                                  std::initializer_list<uint32_t> bits) {
    if (std::find(bits.begin(), bits.end(), tensor.bits()) == bits.end())
      return Invalid(tensor.bits(), " bits per element");
    TERN_ASSIGN_OR_RETURN(Packed packed, Get(tensor, DType::kS8));
    const auto codes = packed.tensor.data<int8_t>();
    bool valid = true;
    if (tensor.bits() == 0) {
      valid = UnpackTernary(packed.content, codes);
    } else if (tensor.bits() < 8) {
      valid = UnpackCodes(packed.content, static_cast<int>(tensor.bits()), codes);
    } else {
      std::memcpy(codes.data(), packed.content.data(), codes.size());
    }
    if (!valid) {
      return Invalid("a ", tensor.bits() == 0 ? "ternary" : absl::StrCat(tensor.bits(), "-bit"),
                     " code is out of range");
    }
    return std::move(packed.tensor);
  }
  // s8 cluster scales.
  absl::StatusOr<Tensor> GetScales(const v1::ArtifactTensor& tensor) {
    if (tensor.bits() < 1 || tensor.bits() > 8) return Invalid(tensor.bits(), " bits per scale");
    TERN_ASSIGN_OR_RETURN(Packed packed, Get(tensor, DType::kS8));
    const auto scales = packed.tensor.data<int8_t>();
    if (tensor.bits() == 8) {
      std::memcpy(scales.data(), packed.content.data(), scales.size());
    } else if (!UnpackScales(packed.content, static_cast<int>(tensor.bits()), scales)) {
      return Invalid("a ", tensor.bits(), "-bit scale is out of range");
    }
    return std::move(packed.tensor);
  }
  absl::StatusOr<Tensor> GetFloats(const v1::ArtifactTensor& tensor) {
    if (tensor.bits() != 32) return Invalid(tensor.bits(), " bits per element");
    TERN_ASSIGN_OR_RETURN(Packed packed, Get(tensor, DType::kF32));
    const auto values = packed.tensor.data<float>();
    std::memcpy(values.data(), packed.content.data(), packed.content.size());
    for (float value : values) {
      if (!std::isfinite(value)) return Invalid("a stored number is not finite");
    }
    return std::move(packed.tensor);
  }

  uint32_t next() const { return next_; }

  absl::Status Finish() const {
    if (next_ != static_cast<uint32_t>(header_->sections_size())) {
      return Invalid(header_->sections_size(), " sections, ", next_, " are used");
    }
    return absl::OkStatus();
  }

 private:
  // A tensor of the stored shape, not filled yet, and the section that fills it.
  struct Packed {
    Tensor tensor;
    absl::string_view content;
  };

  // The dtype must be `dtype`; the caller knows `bits`.
  absl::StatusOr<Packed> Get(const v1::ArtifactTensor& tensor, DType dtype) {
    if (tensor.dtype() != static_cast<uint32_t>(dtype)) {
      return Invalid("dtype ", tensor.dtype(), ", want ", static_cast<int>(dtype), " (",
                     Name(dtype), ")");
    }
    if (tensor.section() != next_ ||
        tensor.section() >= static_cast<uint32_t>(header_->sections_size())) {
      return Invalid("section ", tensor.section(), ", want ", next_, " of ",
                     header_->sections_size());
    }
    const v1::ArtifactSection& section = header_->sections(static_cast<int>(next_++));
    if (tensor.shape_size() > kMaxRank)
      return Invalid("rank ", tensor.shape_size(), ", at most ", kMaxRank);
    // 2^40 elements are more than any file holds, and 64 bits hold their size in bits.
    uint64_t elements = 1;
    for (int64_t dim : tensor.shape()) {
      if (dim < 1 || static_cast<uint64_t>(dim) > (uint64_t{1} << 40) / elements) {
        return Invalid("extent ", dim, " of a stored tensor");
      }
      elements *= static_cast<uint64_t>(dim);
    }
    const uint64_t bytes = tensor.bits() == 0
                               ? PackedTernaryBytes(elements)
                               : PackedBytes(elements, static_cast<int>(tensor.bits()));
    if (bytes != section.bytes()) {
      return Invalid("section of ", section.bytes(), " bytes for ", elements, " elements of ",
                     tensor.bits(), " bits, want ", bytes);
    }
    return Packed{
        Tensor(dtype, Shape(std::vector<int64_t>(tensor.shape().begin(), tensor.shape().end()))),
        file_.substr(section.offset(), section.bytes())};
  }

  absl::string_view file_;
  const v1::ArtifactHeader* header_;
  uint32_t next_;
};

// What follows restores a graph as it is written; whether it is a model is graph::Validate's word,
// which also knows the promises of QuantizedWeights.

absl::StatusOr<graph::Value> GetValue(const v1::ArtifactValue& from, Reader& reader) {
  graph::Value value;
  value.name = from.name();
  if (from.shape_size() > kMaxRank)
    return Invalid("rank ", from.shape_size(), ", at most ", kMaxRank);
  value.shape = Shape(std::vector<int64_t>(from.shape().begin(), from.shape().end()));
  if (from.has_constant()) {
    TERN_ASSIGN_OR_RETURN(value.constant, reader.GetFloats(from.constant()));
  }
  if (from.has_quant()) value.quant = QuantParams{from.quant().scale(), from.quant().zero_point()};
  return value;
}

absl::StatusOr<QuantizedWeights> GetWeights(const v1::ArtifactWeights& from, Reader& reader) {
  QuantizedWeights weights;
  weights.scheme = static_cast<WeightScheme>(from.scheme());
  const auto bits = static_cast<uint32_t>(CodeBits(weights.scheme));
  if (bits == 0 || from.scheme() != static_cast<uint32_t>(weights.scheme)) {
    return Invalid("unknown weight scheme ", from.scheme());
  }
  // ClusterMap doubles it.
  if (from.cluster_size() > std::numeric_limits<int32_t>::max() / 2) {
    return Invalid("cluster size ", from.cluster_size());
  }
  weights.cluster_size = static_cast<int>(from.cluster_size());
  // 2-bit ternary codes and 8-bit scales are what version 1 wrote.
  TERN_ASSIGN_OR_RETURN(weights.codes, weights.scheme == WeightScheme::kTernaryCluster
                                           ? reader.GetCodes(from.codes(), {0, bits})
                                       : weights.scheme == WeightScheme::kInt8
                                           ? reader.GetCodes(from.codes(), {7, bits})
                                           : reader.GetCodes(from.codes(), {bits}));
  if (from.has_cluster_scales()) {
    TERN_ASSIGN_OR_RETURN(weights.cluster_scales, reader.GetScales(from.cluster_scales()));
  }
  TERN_ASSIGN_OR_RETURN(const Tensor steps, reader.GetFloats(from.steps()));
  const auto values = steps.data<float>();
  weights.steps.assign(values.begin(), values.end());
  return weights;
}

absl::StatusOr<Node> GetNode(const v1::ArtifactNode& from, Reader& reader) {
  Node node;
  node.name = from.name();
  if (from.op() > static_cast<uint32_t>(OpType::kSilu))
    return Invalid("unknown operator ", from.op());
  node.op = static_cast<OpType>(from.op());
  node.inputs.assign(from.inputs().begin(), from.inputs().end());
  node.output = from.output();
  if (from.conv_size() != 0) {
    if (from.conv_size() != 9) return Invalid("conv: ", from.conv_size(), " numbers, want 9");
    int i = 0;
    auto& a = node.conv;
    for (int* field : {&a.stride_h, &a.stride_w, &a.pad_top, &a.pad_left, &a.pad_bottom,
                       &a.pad_right, &a.dilation_h, &a.dilation_w, &a.groups}) {
      *field = from.conv(i++);
    }
  }
  if (from.pool_size() != 0) {
    if (from.pool_size() != 10) return Invalid("pool: ", from.pool_size(), " numbers, want 10");
    int i = 0;
    auto& a = node.pool;
    for (int* field : {&a.kernel_h, &a.kernel_w, &a.stride_h, &a.stride_w, &a.pad_top, &a.pad_left,
                       &a.pad_bottom, &a.pad_right}) {
      *field = from.pool(i++);
    }
    a.ceil_mode = from.pool(8) != 0;
    a.count_include_pad = from.pool(9) != 0;
  }
  if (from.clip_size() != 0) {
    if (from.clip_size() != 2) return Invalid("clip: ", from.clip_size(), " numbers, want 2");
    node.clip = graph::ClipRange{from.clip(0), from.clip(1)};
  }
  node.axis = from.axis();
  node.start = from.start();
  node.end = from.end();
  node.step = from.step();
  node.perm.assign(from.perm().begin(), from.perm().end());
  node.axes.assign(from.axes().begin(), from.axes().end());
  node.pads_before.assign(from.pads_before().begin(), from.pads_before().end());
  node.pads_after.assign(from.pads_after().begin(), from.pads_after().end());
  node.pad_value = from.pad_value();
  node.alpha = from.alpha();
  node.beta = from.beta();
  // The order of PutNode, which numbers the sections.
  if (from.has_weight()) {
    auto weight = reader.GetFloats(from.weight());
    if (!weight.ok()) return Annotate(weight.status(), "weight");
    node.weight = *std::move(weight);
  }
  if (from.has_bias()) {
    auto bias = reader.GetFloats(from.bias());
    if (!bias.ok()) return Annotate(bias.status(), "bias");
    node.bias = *std::move(bias);
  }
  if (from.has_quantized()) {
    auto weights = GetWeights(from.quantized(), reader);
    if (!weights.ok()) return Annotate(weights.status(), "quantised weights");
    node.quantized = *std::move(weights);
  }
  return node;
}

// How many sections GetNode takes.
uint32_t SectionsOf(const v1::ArtifactNode& node) {
  uint32_t count = node.has_weight() + node.has_bias();
  if (node.has_quantized()) count += 2 + node.quantized().has_cluster_scales();
  return count;
}

absl::Status GetSelfTest(const v1::ArtifactSelfTest& from, Reader& reader, Artifact& artifact) {
  if (!from.has_input() || !from.has_logits())
    return Invalid("self test: input and logits must both be present");
  TERN_ASSIGN_OR_RETURN(artifact.self_test_input, reader.GetFloats(from.input()));
  TERN_ASSIGN_OR_RETURN(artifact.self_test_logits, reader.GetFloats(from.logits()));
  const Shape& input = artifact.self_test_input.shape();
  const Shape& logits = artifact.self_test_logits.shape();
  const int64_t n = input.rank() > 0 ? input[0] : 0;
  const Shape want_input = artifact.graph.shape(artifact.graph.input).WithBatch(n);
  const Shape want_logits{n, artifact.graph.classes()};
  if (input != want_input || logits != want_logits) {
    return Invalid("self test: input ", input.ToString(), " and logits ", logits.ToString(),
                   ", want ", want_input.ToString(), " and ", want_logits.ToString());
  }
  return absl::OkStatus();
}

absl::StatusOr<Artifact> FromHeader(absl::string_view file, v1::ArtifactHeader& header,
                                    int threads) {
  Artifact artifact;
  Reader reader(file, header);
  graph::Graph& graph = artifact.graph;
  graph.name = header.graph().name();
  graph.input = header.graph().input();
  graph.output = header.graph().output();
  if (header.graph().arithmetic() > static_cast<uint32_t>(graph::Arithmetic::kFixedPoint)) {
    return Invalid("unknown arithmetic ", header.graph().arithmetic());
  }
  graph.arithmetic = static_cast<graph::Arithmetic>(header.graph().arithmetic());
  for (const auto& [what, items] : {std::pair("values", header.graph().values_size()),
                                    {"nodes", header.graph().nodes_size()}}) {
    if (items > kMaxGraphItems) {
      return Invalid("got ", items, " ", what, ", wanted at most ", kMaxGraphItems);
    }
  }
  for (const auto& from : header.graph().values()) {
    auto value = GetValue(from, reader);
    if (!value.ok()) return Annotate(value.status(), absl::StrCat("value '", from.name(), "'"));
    graph.values.push_back(*std::move(value));
  }
  // Most of the bytes are the nodes' weights. Each node knows where its sections begin, and Get
  // that they follow each other.
  const auto& from = header.graph().nodes();
  const size_t count = static_cast<size_t>(from.size());
  std::vector<uint32_t> first(count + 1, reader.next());
  for (size_t i = 0; i < count; ++i)
    first[i + 1] = first[i] + SectionsOf(from[static_cast<int>(i)]);
  graph.nodes.resize(count);
  std::vector<absl::Status> statuses(count);
  ParallelFor(threads, count, [&](size_t i) {
    Reader part(file, header, first[i]);
    auto node = GetNode(from[static_cast<int>(i)], part);
    if (node.ok()) {
      graph.nodes[i] = *std::move(node);
    } else {
      statuses[i] =
          Annotate(node.status(), absl::StrCat("node '", from[static_cast<int>(i)].name(), "'"));
    }
  });
  for (const absl::Status& status : statuses) TERN_RETURN_IF_ERROR(status);
  reader = Reader(file, header, first[count]);
  TERN_RETURN_IF_ERROR(graph::Validate(graph));
  if (header.has_self_test())
    TERN_RETURN_IF_ERROR(GetSelfTest(header.self_test(), reader, artifact));
  TERN_RETURN_IF_ERROR(reader.Finish());
  artifact.labels.assign(header.labels().begin(), header.labels().end());
  if (!artifact.labels.empty() && static_cast<int64_t>(artifact.labels.size()) != graph.classes()) {
    return Invalid(artifact.labels.size(), " labels for ", graph.classes(), " classes");
  }
  artifact.preprocessing = std::move(*header.mutable_preprocessing());
  artifact.report = std::move(*header.mutable_report());
  artifact.source_sha256 = header.source_sha256();
  return artifact;
}

bool IsZero(absl::string_view bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; });
}

}  // namespace

std::string Serialize(const Artifact& artifact) {
  v1::ArtifactHeader header;
  Writer writer;
  v1::ArtifactGraph* graph = header.mutable_graph();
  graph->set_name(artifact.graph.name);
  graph->set_input(artifact.graph.input);
  graph->set_output(artifact.graph.output);
  graph->set_arithmetic(static_cast<uint32_t>(artifact.graph.arithmetic));
  for (const graph::Value& value : artifact.graph.values) {
    v1::ArtifactValue* to = graph->add_values();
    to->set_name(value.name);
    for (int64_t dim : value.shape.dims()) to->add_shape(dim);
    if (value.constant) writer.Put(*value.constant, to->mutable_constant());
    if (value.quant) {
      to->mutable_quant()->set_scale(value.quant->scale);
      to->mutable_quant()->set_zero_point(value.quant->zero_point);
    }
  }
  for (const Node& node : artifact.graph.nodes) PutNode(node, writer, graph->add_nodes());
  *header.mutable_preprocessing() = artifact.preprocessing;
  for (const std::string& label : artifact.labels) header.add_labels(label);
  *header.mutable_report() = artifact.report;
  header.set_source_sha256(artifact.source_sha256);
  if (!artifact.self_test_input.empty()) {
    writer.Put(artifact.self_test_input, header.mutable_self_test()->mutable_input());
    writer.Put(artifact.self_test_logits, header.mutable_self_test()->mutable_logits());
  }

  // Offsets are varints, so the header's length depends on them and they on it: repeat until it
  // stands still. Lengths only grow with the offsets, so this ends after two or three rounds.
  for (const std::string& section : writer.sections()) {
    v1::ArtifactSection* to = header.add_sections();
    to->set_bytes(section.size());
    to->set_crc32c(Crc32c(section));
  }
  uint64_t header_bytes = 0;
  uint64_t end = 0;
  for (;;) {
    end = kPreamble + header_bytes;
    for (auto& section : *header.mutable_sections()) {
      section.set_offset(Align(end));
      end = section.offset() + section.bytes();
    }
    const uint64_t size = header.ByteSizeLong();
    if (size <= header_bytes) break;
    header_bytes = size;
  }
  std::string serialized = SerializeHeader(header);

  std::string file;
  file.reserve(end);
  file.append(kMagic.data(), kMagic.size());
  PutLittle(kVersion, 4, file);
  PutLittle(serialized.size(), 8, file);
  PutLittle(end, 8, file);
  PutLittle(Crc32c(serialized), 4, file);
  PutLittle(Crc32c(file), 4, file);
  file += serialized;
  for (size_t i = 0; i < writer.sections().size(); ++i) {
    file.resize(header.sections(static_cast<int>(i)).offset(), '\0');
    file += writer.sections()[i];
  }
  return file;
}

absl::StatusOr<Artifact> Parse(absl::string_view bytes, absl::string_view name, int threads) {
  if (bytes.size() < kPreamble) {
    return Damaged(name,
                   absl::StrCat(bytes.size(), " bytes, shorter than the preamble of ", kPreamble));
  }
  if (bytes.substr(0, 4) != kMagic) return Damaged(name, "it does not start with TERN");
  if (GetLittle(bytes, 28, 4) != Crc32c(bytes.substr(0, 28)))
    return Damaged(name, "checksum of the preamble");
  const uint64_t version = GetLittle(bytes, 4, 4);
  if (version > kVersion) {
    return absl::UnimplementedError(absl::StrCat(name, ": artifact format version ", version,
                                                 ", this program reads up to ", kVersion));
  }
  if (version < 1) return Invalid(name, ": artifact format version 0");
  const uint64_t header_bytes = GetLittle(bytes, 8, 8);
  const uint64_t file_bytes = GetLittle(bytes, 16, 8);
  if (file_bytes != bytes.size()) {
    return Damaged(name, absl::StrCat(bytes.size(), " bytes, want ", file_bytes));
  }
  if (header_bytes > kMaxHeader) {
    return Invalid(name, ": header of ", header_bytes, " bytes, the limit is ", kMaxHeader);
  }
  if (header_bytes > bytes.size() - kPreamble) {
    return Invalid(name, ": header of ", header_bytes, " bytes in a file of ", bytes.size());
  }
  const absl::string_view serialized = bytes.substr(kPreamble, header_bytes);
  if (GetLittle(bytes, 24, 4) != Crc32c(serialized)) return Damaged(name, "checksum of the header");
  v1::ArtifactHeader header;
  if (!header.ParseFromArray(serialized.data(), static_cast<int>(serialized.size()))) {
    return Invalid(name, ": the header is not an ArtifactHeader");
  }

  // Sections follow each other at the next multiple of 64, with zeros between, up to the end of the
  // file: no byte is outside a checksum or known to be zero.
  uint64_t end = kPreamble + header_bytes;
  for (int i = 0; i < header.sections_size(); ++i) {
    const v1::ArtifactSection& section = header.sections(i);
    const uint64_t offset = Align(end);
    if (section.offset() != offset || offset > bytes.size() ||
        section.bytes() > bytes.size() - offset) {
      return Invalid(name, ": section ", i, " of ", section.bytes(), " bytes at ", section.offset(),
                     ", want it at ", offset, " in a file of ", bytes.size(), " bytes");
    }
    if (!IsZero(bytes.substr(end, offset - end)))
      return Damaged(name, absl::StrCat("padding before section ", i));
    end = offset + section.bytes();
  }
  if (end != bytes.size())
    return Invalid(name, ": ", bytes.size() - end, " bytes after the last section");
  std::atomic<int> damaged{header.sections_size()};  // the first one
  ParallelFor(threads, static_cast<size_t>(header.sections_size()), [&](size_t i) {
    const v1::ArtifactSection& section = header.sections(static_cast<int>(i));
    if (Crc32c(bytes.substr(section.offset(), section.bytes())) == section.crc32c()) return;
    int known = damaged;
    while (static_cast<int>(i) < known &&
           !damaged.compare_exchange_weak(known, static_cast<int>(i))) {
    }
  });
  if (damaged < header.sections_size())
    return Damaged(name, absl::StrCat("checksum of section ", damaged.load()));

  absl::StatusOr<Artifact> artifact = FromHeader(bytes, header, threads);
  if (!artifact.ok()) {
    // Whatever the parts call it: the content is whole, but not a model.
    return Invalid(name, ": ", artifact.status().message());
  }
  return artifact;
}

absl::Status Write(const Artifact& artifact, const std::string& path) {
  const std::string bytes = Serialize(artifact);
  // What could not be loaded is not written.
  const absl::StatusOr<Artifact> back = Parse(bytes, path);
  if (!back.ok()) return Annotate(back.status(), "not written");
  const absl::string_view parts[] = {bytes};
  return WriteFileAtomically(path, parts);
}

absl::StatusOr<Artifact> Read(const std::string& path, int threads) {
  TERN_ASSIGN_OR_RETURN(const FileBytes bytes, ReadLargeFile(path));
  return Parse(bytes.view(), path, threads);
}

}  // namespace tern::artifact
