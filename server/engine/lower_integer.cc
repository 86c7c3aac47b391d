// Operators on codes other than convolutions and fully connected layers.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "server/engine/lowering.h"
#include "server/graph/fixed_point.h"

namespace tern::engine {
namespace {

using dnnl::memory;
using graph::Node;
using graph::OpType;
using graph::ValueId;

}  // namespace

Lowering::Place Lowering::PlaceOf(int b) {
  const Buffer& place = buffer(b);
  return {b, place.shape, FormatStrides(place.format, place.shape),
          place.constant >= 0 ? 0 : place.sample_elements};
}

bool Lowering::LowerInteger(const Node& node) {
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
      if (graph_.arithmetic == graph::Arithmetic::kFixedPoint) {
        step.loop = [=, tables = BatchNormTables(graph_, node)](const RunContext& run) {
          LookupPerChannel(run.at<uint8_t>(src), run.batch * elements / channels, channels,
                           tables.data(), run.at<uint8_t>(dst));
        };
      } else {
        layer().implementation =
            absl::StrCat("tern:", kernels::IsaName(std::min(isa, kernels::Isa::kAvx2)));
        step.loop = [=, scale = BatchNormScale(graph_, node)](const RunContext& run) {
          ScaleChannels(isa, run.at<uint8_t>(src), run.batch * elements / channels, scale,
                        run.at<uint8_t>(dst));
        };
      }
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
      const bool fixed_point = graph_.arithmetic == graph::Arithmetic::kFixedPoint;
      if (node.op == OpType::kMul) {
        step.loop = [=](const RunContext& run) {
          MultiplyCodes(isa, {a.At<const uint8_t>(run), x}, {b.At<const uint8_t>(run), x1},
                        c.At<uint8_t>(run), y, fixed_point, run.batch);
        };
      } else if (fixed_point) {
        step.loop = [=, add = graph::FixedPointAddOf(graph_, node)](const RunContext& run) {
          AddCodes(isa, add, a.At<const uint8_t>(run), b.At<const uint8_t>(run), c.At<uint8_t>(run),
                   run.batch);
        };
      } else {
        step.loop = [=, clip = node.clip](const RunContext& run) {
          AddCodes(isa, {a.At<const uint8_t>(run), x}, {b.At<const uint8_t>(run), x1},
                   c.At<uint8_t>(run), y, clip, run.batch);
        };
      }
      layer().implementation =
          absl::StrCat("tern:", kernels::IsaName(std::min(isa, kernels::Isa::kAvx2)));
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
      step.loop = [=, table = RequantizeTable(graph_.arithmetic, x, y)](const RunContext& run) {
        Lookup(isa, run.at<uint8_t>(pooled), run.batch * elements, table, run.at<uint8_t>(dst));
      };
      Define(node.output, dst);
      return true;
    }
    case OpType::kAveragePool:
    case OpType::kGlobalAveragePool: {
      const int dst = NewBuffer(Format::kU8, ys);
      AveragePoolArgs args{
          node.pool, xs, ys, x, y, graph_.arithmetic == graph::Arithmetic::kFixedPoint, 1};
      program_.scratch_bytes =
          std::max<size_t>(program_.scratch_bytes, 3 * xs[0] * sizeof(int32_t));
      AddStep({src}, {dst}).loop = [=, global = node.op ==
                                                OpType::kGlobalAveragePool](const RunContext& run) {
        AveragePoolArgs now = args;
        now.batch = run.batch;
        if (global) {
          GlobalAverageCodes(isa, now, run.at<uint8_t>(src), run.at<uint8_t>(dst), run.scratch,
                             run.program->scratch_bytes);
        } else {
          AveragePoolCodes(isa, now, run.at<uint8_t>(src), run.at<uint8_t>(dst), run.scratch,
                           run.program->scratch_bytes);
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
        if (params != y) part.table = RequantizeTable(graph_.arithmetic, params, y);
        offset += part.place.shape[node.axis] * whole.strides[node.axis];
        parts.push_back(std::move(part));
      }
      AddStep(sources, {dst}).loop = [=](const RunContext& run) {
        for (const Part& part : parts) {
          CopyCodes(isa, part.place.shape.WithBatch(run.batch).extents(),
                    engine::WithBatch(whole.batch_stride, whole.strides),
                    run.at<uint8_t>(dst) + part.offset,
                    engine::WithBatch(part.place.batch_stride, part.place.strides),
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
      LowerIntegerCopy(node, src);
      return true;
    default:
      return false;
  }
}

bool Lowering::IsView(Format format, const Shape& in, const Shape& out) {
  const auto row_major = [&](const Shape& shape) {
    const Strides got = FormatStrides(format, shape), wanted = RowMajorStrides(shape);
    for (int i = 0; i < shape.rank(); ++i) {
      if (shape[i] != 1 && got[i] != wanted[i]) return false;
    }
    return true;
  };
  return row_major(in) && row_major(out);
}

void Lowering::DefineView(const Node& node, int src) {
  const int view = NewBuffer(buffer(src).format, graph_.shape(node.output));
  buffer(view).view_of = buffer(src).view_of >= 0 ? buffer(src).view_of : src;
  layer().implementation = "view";
  Define(node.output, view);
}

void Lowering::LowerIntegerCopy(const Node& node, int src) {
  const QuantParams x = *quant(node.inputs[0]), y = *quant(node.output);
  const Shape &xs = graph_.shape(node.inputs[0]), &ys = graph_.shape(node.output);
  if (node.op == OpType::kReshape && x == y && IsView(Format::kU8, xs, ys)) {
    DefineView(node, src);
    return;
  }
  const Strides xt = NhwcStrides(xs), yt = NhwcStrides(ys);
  Extents dims = ys.extents();
  Strides from = xt, to = yt;
  int64_t from_offset = 0, to_offset = 0;
  int fill = -1;
  switch (node.op) {
    case OpType::kReshape:
      // From one NHWC shape to another the way leads through row-major order.
      if (!ReshapeAsCopy(xs, xt, ys, yt, &dims, &from, &to)) {
        const Shape flat{xs.elements()};
        const int straight = NewBuffer(Format::kU8, flat);
        ReshapeAsCopy(xs, xt, flat, {1}, &dims, &from, &to);
        AddCopy(src, straight, dims, from, 0, to, 0, -1, {});
        src = straight;
        ReshapeAsCopy(flat, {1}, ys, yt, &dims, &from, &to);
      }
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
      dims = xs.extents();
      for (int i = 0; i < xs.rank(); ++i) to_offset += node.pads_before[i] * yt[i];
      break;
  }
  const int dst = NewBuffer(Format::kU8, ys);
  std::optional<Table> table;
  if (x != y) table = RequantizeTable(graph_.arithmetic, x, y);
  AddCopy(src, dst, dims, from, from_offset, to, to_offset, fill, table);
  layer().implementation = "tern:loop";
  Define(node.output, dst);
}

void Lowering::AddCopy(int src, int dst, Extents dims, const Strides& from, int64_t from_offset,
                       const Strides& to, int64_t to_offset, int fill, std::optional<Table> table) {
  const int64_t x_elements = buffer(src).sample_elements, y_elements = buffer(dst).sample_elements;
  const kernels::Isa isa = options_.isa;
  AddStep({src}, {dst}).loop = [=, all_from = engine::WithBatch(x_elements, from),
                                all_to = engine::WithBatch(y_elements, to)](const RunContext& run) {
    const Extents all = dims.Behind(run.batch);
    if (fill >= 0) std::memset(run.at<uint8_t>(dst), fill, run.batch * y_elements);
    CopyCodes(isa, all, all_to, run.at<uint8_t>(dst) + to_offset, all_from,
              run.at<uint8_t>(src) + from_offset, table ? &*table : nullptr);
  };
}

bool Lowering::AddPooling(const Node& node, int src, int dst) {
  const auto pool = node.pool;
  const Shape xs = buffer(src).shape, ys = buffer(dst).shape;
  const Format format = buffer(src).format;
  const auto algorithm = node.op == OpType::kMaxPool ? dnnl::algorithm::pooling_max
                         : pool.count_include_pad    ? dnnl::algorithm::pooling_avg_include_padding
                                                     : dnnl::algorithm::pooling_avg_exclude_padding;
  const auto make = [=](int64_t batch) {
    onednn::PoolingSpec spec;
    spec.algorithm = algorithm;
    spec.src = Desc(format, xs, batch);
    spec.dst = Desc(format, ys, batch);
    spec.kernel = {pool.kernel_h, pool.kernel_w};
    spec.strides = {pool.stride_h, pool.stride_w};
    spec.pads_begin = {pool.pad_top, pool.pad_left};
    // Ceil mode may look beyond the declared padding; oneDNN wants the padding that the output
    // implies.
    spec.pads_end = {(ys[1] - 1) * pool.stride_h + pool.kernel_h - xs[1] - pool.pad_top,
                     (ys[2] - 1) * pool.stride_w + pool.kernel_w - xs[2] - pool.pad_left};
    return onednn::MakePooling(spec);
  };
  std::string implementation;
  const absl::Status status =
      onednn::Guard("pooling", [&] { implementation = make(1).implementation; });
  if (!status.ok()) return false;
  layer().implementation = absl::StrCat("onednn:", implementation);
  const auto primitives = std::make_shared<onednn::SharedPrimitives>(make);
  AddStep({src}, {dst}).make = [=](const RunContext& run) {
    const auto made = primitives->Get(run.batch);
    return Bind(made, {{DNNL_ARG_SRC, Wrap(run, src, made->src)},
                       {DNNL_ARG_DST, Wrap(run, dst, made->dst)}});
  };
  return true;
}

}  // namespace tern::engine
