// Buffers, conversions between their formats, and which implementation gets a node.
#include <omp.h>

#include <algorithm>

#include "absl/strings/str_join.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/base/thread_pool.h"
#include "server/engine/lowering.h"
#include "server/kernels/elementwise.h"

namespace tern::engine {
namespace {

using dnnl::memory;
using graph::Node;
using graph::OpType;
using graph::ValueId;
using tag = memory::format_tag;

}  // namespace

char* RunContext::thread_scratch() const {
  return scratch + omp_get_thread_num() * program->scratch_bytes;
}

absl::StatusOr<Program> Lower(const graph::Graph& graph, const PlanOptions& options) {
  return Lowering(graph, options).Run();
}

absl::StatusOr<Program> Lowering::Run() {
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
    program_.layer_value.push_back(node.output);
  }

  integers_.resize(graph_.nodes.size());
  int8_kernels_.resize(graph_.nodes.size());
  int8_onednn_.resize(graph_.nodes.size());
  TERN_RETURN_IF_ERROR(SideBySide(graph_.nodes.size(), [&](size_t i) {
    const Node& node = graph_.nodes[i];
    // Codes of weights whose input is float are dequantised.
    if (!node.quantized || !IsInteger(node)) return;
    integers_[i] = Expand(node);
    int8_kernels_[i] = MakeInt8Kernel(node, integers_[i].largest);
    // oneDNN compiles each layer, which takes longer than all else here where VNNI exists. What it
    // refuses, LowerInt8 asks again and reports.
    if (RunsInt8OnOneDnn(static_cast<int>(i))) {
      onednn::Guard(node.name, [&] {
        int8_onednn_[i] = MakeInt8OneDnn(node, RescalingOf(node, integers_[i]));
      }).IgnoreError();
    }
  }));

  program_.input = NewBuffer(Format::kF32, program_.input_shape);
  program_.buffers[program_.input].pinned = true;
  StoreFloat(graph_.input, program_.input);
  for (node_ = 0; node_ < static_cast<int>(graph_.nodes.size()); ++node_) {
    const Node& node = graph_.nodes[node_];
    layer().implementation.clear();
    TERN_RETURN_IF_ERROR(LowerNode(node));
  }
  TERN_RETURN_IF_ERROR(SideBySide(packing_.size(), [&](size_t i) { packing_[i].work(); }));
  for (const Packing& packing : packing_) packing.done();
  if (!slow_int8_.empty()) {
    TERN_LOG_WARN(
        "{}: {} int8 layers run in float, oneDNN has only its reference for them on {}: {}",
        graph_.name, slow_int8_.size(), onednn::IsaName(), absl::StrJoin(slow_int8_, ", "));
  }
  node_ = static_cast<int>(graph_.nodes.size()) - 1;
  // Results leave in the graph's own order.
  program_.output = Get(graph_.output, Format::kF32Planar);
  program_.buffers[program_.output].pinned = true;
  for (const AlignedBuffer& constant : program_.constants)
    program_.weight_bytes += constant.size_bytes();
  return std::move(program_);
}

absl::Status Lowering::SideBySide(size_t n, const std::function<void(size_t)>& f) const {
  std::vector<absl::Status> statuses(n);
  ParallelFor(options_.load_threads, n, [&](size_t i) {
    onednn::ScopedThreads team(1);
    statuses[i] = onednn::Guard("making a plan", [&] { f(i); });
  });
  for (const absl::Status& status : statuses) TERN_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

int Lowering::NewBuffer(Format format, const Shape& shape) {
  Buffer b;
  b.format = format;
  b.shape = shape;
  b.sample_elements = shape.elements();
  if (format == Format::kF32Blocked) {
    b.sample_elements =
        (shape[0] + kChannelBlock - 1) / kChannelBlock * kChannelBlock * shape[1] * shape[2];
  }
  b.sample_bytes = b.sample_elements * (format == Format::kU8 ? 1 : sizeof(float));
  program_.buffers.push_back(std::move(b));
  return static_cast<int>(program_.buffers.size()) - 1;
}

Step& Lowering::AddStep(std::vector<int> reads, std::vector<int> writes,
                        std::optional<Conversion> conversion) {
  Step step;
  step.node = node_;
  step.conversion = conversion;
  step.reads = std::move(reads);
  step.writes = std::move(writes);
  program_.steps.push_back(std::move(step));
  return program_.steps.back();
}

void Lowering::Define(ValueId id, int b) {
  formats_[id][buffer(b).format] = b;
  program_.value_buffer[id] = b;
  program_.value_step[id] = static_cast<int>(program_.steps.size());
}

void Lowering::StoreFloat(ValueId id, int b) {
  if (!quant(id)) {
    Define(id, b);
    return;
  }
  const int dense = Convert(b, Format::kF32);
  const int codes = NewBuffer(Format::kU8, graph_.shape(id));
  const QuantParams params = *quant(id);
  const int64_t elements = buffer(dense).sample_elements;
  const kernels::Isa isa = options_.isa;
  AddStep({dense}, {codes}, Conversion::kQuantize).loop = [=](const RunContext& run) {
    const float* src = run.at<float>(dense);
    uint8_t* dst = run.at<uint8_t>(codes);
    const int64_t n = run.batch * elements,
                  chunks = std::max<int64_t>(1, std::min<int64_t>(run.threads, n / 16384));
    InRanges(chunks, chunks > 1, [&](int64_t begin_i, int64_t end_i) {
      for (int64_t i = begin_i; i < end_i; ++i) {
        const int64_t begin = n * i / chunks;
        kernels::QuantizeF32(isa, src + begin, n * (i + 1) / chunks - begin, params, dst + begin);
      }
    });
  };
  Define(id, codes);
}

Executable Lowering::Bind(std::shared_ptr<const onednn::Primitive> primitive, onednn::Args args) {
  Executable executable;
  executable.primitive = primitive->primitive;
  executable.args = std::move(args);
  executable.args.insert(primitive->constant_args.begin(), primitive->constant_args.end());
  executable.scratchpad = primitive->scratchpad;
  executable.shared = std::move(primitive);
  return executable;
}

int Lowering::Convert(int b, Format format) {
  if (buffer(b).format == format || (buffer(b).shape.rank() != 3 && format != Format::kU8))
    return b;
  const int result = NewBuffer(format, buffer(b).shape);
  const Shape shape = buffer(b).shape;
  const Format from = buffer(b).format;
  AddStep({b}, {result}, Conversion::kReorder).make = [=](const RunContext& run) {
    const memory src = Wrap(run, b, Desc(from, shape, run.batch)),
                 dst = Wrap(run, result, Desc(format, shape, run.batch));
    Executable executable;
    executable.primitive = dnnl::reorder(src, dst);
    executable.args = {{DNNL_ARG_FROM, src}, {DNNL_ARG_TO, dst}};
    return executable;
  };
  return result;
}

int Lowering::Get(ValueId id, Format format) {
  auto& known = formats_[id];
  const graph::Value& value = graph_.values[id];
  const bool one_order =
      value.shape.rank() != 3 || value.shape[1] * value.shape[2] == 1 || value.shape[0] == 1;
  if (one_order && format == Format::kF32Planar) format = Format::kF32;
  if (value.shape.rank() != 3 && format != Format::kU8) format = Format::kF32;
  if (value.constant && known.find(format) == known.end())
    return known[format] = Constant(value, format);
  const auto found = known.find(format);
  if (found != known.end()) return found->second;
  if (known.count(Format::kU8) != 0 && known.size() == 1) {
    const int codes = known[Format::kU8];
    const int dense = NewBuffer(Format::kF32, value.shape);
    const QuantParams params = *value.quant;
    const int64_t elements = buffer(codes).sample_elements;
    const kernels::Isa isa = options_.isa;
    AddStep({codes}, {dense}, Conversion::kDequantize).loop = [=](const RunContext& run) {
      kernels::DequantizeU8(isa, run.at<uint8_t>(codes), run.batch * elements, params,
                            run.at<float>(dense));
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

int Lowering::Constant(const graph::Value& value, Format format) {
  const int result = NewBuffer(format, value.shape);
  AlignedBuffer data(buffer(result).sample_bytes);
  StridedMap(value.shape.dims(), data.as<float>(), FormatStrides(format, value.shape),
             value.constant->data<float>().data(), RowMajorStrides(value.shape),
             [](float v) { return v; });
  buffer(result).constant = static_cast<int>(program_.constants.size());
  program_.constants.push_back(std::move(data));
  return result;
}

Format Lowering::Current(ValueId id) {
  const auto& known = formats_[id];
  if (known.count(Format::kF32Blocked) != 0) return Format::kF32Blocked;
  return Format::kF32;
}

memory::desc Lowering::Desc(Format format, const Shape& shape, int64_t batch) {
  const auto type = format == Format::kU8    ? memory::data_type::u8
                    : format == Format::kS32 ? memory::data_type::s32
                                             : memory::data_type::f32;
  const memory::dims dims = shape.WithBatch(batch).dims();
  if (shape.rank() == 1) return memory::desc(dims, type, tag::nc);
  if (shape.rank() != 3) return memory::desc({batch, shape.elements()}, type, tag::nc);
  const tag order = format == Format::kF32Planar    ? tag::nchw
                    : format == Format::kF32Blocked ? tag::nChw8c
                                                    : tag::nhwc;
  return memory::desc(dims, type, order);
}

memory Lowering::Wrap(const RunContext& run, int b, const memory::desc& desc) {
  return memory(desc, onednn::Engine(), run.at<void>(b));
}

absl::Status Lowering::LowerNode(const Node& node) {
  const bool weighted = node.op == OpType::kConv || node.op == OpType::kFullyConnected;
  if (weighted) {
    if (node.quantized) layer().scheme = Name(node.quantized->scheme);
    if (node.quantized && IsInteger(node)) {
      return graph_.arithmetic == graph::Arithmetic::kFixedPoint ? LowerFixedPoint(node)
                                                                 : LowerIntegerWeighted(node);
    }
    return LowerFloatWeighted(node);
  }
  if (TryShuffle(node)) return absl::OkStatus();
  if (quant(node.output) && IsInteger(node) && LowerInteger(node)) return absl::OkStatus();
  return LowerFloat(node);
}

bool Lowering::IsInteger(const Node& node) const {
  return std::all_of(node.inputs.begin(), node.inputs.end(), [&](ValueId id) {
    return quant(id).has_value() && !graph_.values[id].constant;
  });
}

void Lowering::SetFloatImplementation(const Node& node, const std::string& implementation) {
  const bool island = quantized_ && (quant(node.output) || IsInteger(node));
  layer().implementation = island ? absl::StrCat("float-island ", implementation) : implementation;
  if (node.quantized) layer().scheme = "fp32";
}

}  // namespace tern::engine
