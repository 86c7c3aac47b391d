#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/status_macros.h"
#include "server/graph/graph.h"

namespace tern::graph {
namespace {

template <typename... Args>
absl::Status Bad(const Node& node, const Args&... what) {
  return absl::InvalidArgumentError(
      absl::StrCat("node '", node.name, "' (", Name(node.op), "): ", what...));
}

absl::Status CheckInputs(const Graph& graph, const Node& node, size_t least, size_t most) {
  if (node.inputs.size() < least || node.inputs.size() > most) {
    return Bad(node, "got ", node.inputs.size(), " inputs, wanted ", least,
               most == least ? "" : absl::StrCat(" to ", most));
  }
  for (ValueId id : node.inputs) {
    if (id < 0 || static_cast<size_t>(id) >= graph.values.size()) {
      return Bad(node, "input value ", id, " does not exist");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckRank(const Node& node, const Shape& x, int rank) {
  if (x.rank() == rank) return absl::OkStatus();
  return Bad(node, "input has sample shape ", x.ToString(), ", wanted rank ", rank);
}

// Far above any network's. oneDNN unrolls the taps of pools, and would write code for minutes.
constexpr int64_t kMaxWindow = 1 << 16;

// One spatial extent of a convolution or pool. The input is below 2^31 and what else is used at most
// kMaxWindow, so the arithmetic cannot overflow.
struct Window {
  int64_t input, kernel, stride, dilation, pad_before, pad_after;
  bool ceil = false;
};

absl::StatusOr<int64_t> OutputExtent(const Node& node, const char* side, const Window& w) {
  if (w.kernel < 1 || w.stride < 1 || w.dilation < 1) {
    return Bad(node, side, ": kernel ", w.kernel, ", stride ", w.stride, " and dilation ",
               w.dilation, " must be positive");
  }
  if (w.pad_before < 0 || w.pad_after < 0) {
    return Bad(node, side, ": pads ", w.pad_before, ",", w.pad_after, " must not be negative");
  }
  for (int64_t size : {w.kernel, w.stride, w.dilation, w.pad_before, w.pad_after}) {
    if (size > kMaxWindow) {
      return Bad(node, side, ": got a kernel, stride, dilation or pad of ", size,
                 ", wanted at most ", kMaxWindow);
    }
  }
  const int64_t extent = w.dilation * (w.kernel - 1) + 1;
  const int64_t room = w.input + w.pad_before + w.pad_after - extent;
  // With ceil_mode a kernel larger than the padded input still has one (cut) window.
  if (room < 0 && !(w.ceil && room > -w.stride)) {
    return Bad(node, side, ": a kernel spanning ", extent, " does not fit in ", w.input, " + pads ",
               w.pad_before, ",", w.pad_after);
  }
  if (!w.ceil) return room / w.stride + 1;
  int64_t count = (room + w.stride - 1) / w.stride + 1;
  if ((count - 1) * w.stride >= w.input + w.pad_before) --count;
  return count;
}

const Shape& WeightShape(const Node& node) {
  return node.quantized ? node.quantized->codes.shape() : node.weight.shape();
}

absl::StatusOr<Shape> InferConv(const Graph& graph, const Node& node) {
  const Shape& x = graph.shape(node.inputs[0]);
  TERN_RETURN_IF_ERROR(CheckRank(node, x, 3));
  const Shape& weight = WeightShape(node);
  if (weight.rank() != 4) {
    return Bad(node, "weight has shape ", weight.ToString(), ", wanted [o,c/groups,kh,kw]");
  }
  const ConvAttributes& conv = node.conv;
  if (conv.groups < 1 || x[0] % conv.groups != 0 || weight[0] % conv.groups != 0) {
    return Bad(node, conv.groups, " groups do not divide ", x[0], " input and ", weight[0],
               " output channels");
  }
  if (weight[1] != x[0] / conv.groups) {
    return Bad(node, "weight ", weight.ToString(), " takes ", weight[1],
               " channels per group, the input ", x.ToString(), " has ", x[0] / conv.groups);
  }
  TERN_ASSIGN_OR_RETURN(const int64_t h,
                        OutputExtent(node, "rows",
                                     {x[1], weight[2], conv.stride_h, conv.dilation_h, conv.pad_top,
                                      conv.pad_bottom}));
  TERN_ASSIGN_OR_RETURN(
      const int64_t w, OutputExtent(node, "columns",
                                    {x[2], weight[3], conv.stride_w, conv.dilation_w, conv.pad_left,
                                     conv.pad_right}));
  return Shape{weight[0], h, w};
}

absl::StatusOr<Shape> InferFullyConnected(const Graph& graph, const Node& node) {
  const Shape& x = graph.shape(node.inputs[0]);
  TERN_RETURN_IF_ERROR(CheckRank(node, x, 1));
  const Shape& weight = WeightShape(node);
  if (weight.rank() != 2 || weight[1] != x[0]) {
    return Bad(node, "weight has shape ", weight.ToString(), ", wanted [o,", x[0], "]");
  }
  return Shape{weight[0]};
}

absl::StatusOr<Shape> InferPool(const Graph& graph, const Node& node) {
  const Shape& x = graph.shape(node.inputs[0]);
  TERN_RETURN_IF_ERROR(CheckRank(node, x, 3));
  const PoolAttributes& pool = node.pool;
  // Else a window could lie in the padding alone and have no maximum or mean.
  if (std::max(pool.pad_top, pool.pad_bottom) >= pool.kernel_h ||
      std::max(pool.pad_left, pool.pad_right) >= pool.kernel_w) {
    return Bad(node, "pads ", pool.pad_top, ",", pool.pad_left, ",", pool.pad_bottom, ",",
               pool.pad_right, " must be smaller than the kernel ", pool.kernel_h, "x",
               pool.kernel_w);
  }
  TERN_ASSIGN_OR_RETURN(const int64_t h,
                        OutputExtent(node, "rows",
                                     {x[1], pool.kernel_h, pool.stride_h, 1, pool.pad_top,
                                      pool.pad_bottom, pool.ceil_mode}));
  TERN_ASSIGN_OR_RETURN(const int64_t w,
                        OutputExtent(node, "columns",
                                     {x[2], pool.kernel_w, pool.stride_w, 1, pool.pad_left,
                                      pool.pad_right, pool.ceil_mode}));
  return Shape{x[0], h, w};
}

absl::StatusOr<Shape> InferBroadcast(const Graph& graph, const Node& node) {
  const Shape& a = graph.shape(node.inputs[0]);
  const Shape& b = graph.shape(node.inputs[1]);
  std::vector<int64_t> dims(std::max(a.rank(), b.rank()));
  for (int i = 1; i <= static_cast<int>(dims.size()); ++i) {  // i-th from the right
    const int64_t da = i <= a.rank() ? a[a.rank() - i] : 1;
    const int64_t db = i <= b.rank() ? b[b.rank() - i] : 1;
    if (da != db && da != 1 && db != 1) {
      return Bad(node, "shapes ", a.ToString(), " and ", b.ToString(), " do not broadcast");
    }
    dims[dims.size() - i] = da == 1 ? db : da;
  }
  return Shape(std::move(dims));
}

absl::StatusOr<Shape> InferConcat(const Graph& graph, const Node& node) {
  Shape out = graph.shape(node.inputs[0]);
  if (node.axis < 0 || node.axis >= out.rank()) {
    return Bad(node, "axis ", node.axis, " is not one of ", out.ToString());
  }
  for (size_t i = 1; i < node.inputs.size(); ++i) {
    const Shape& x = graph.shape(node.inputs[i]);
    bool fits = x.rank() == out.rank();
    for (int d = 0; fits && d < out.rank(); ++d) fits = d == node.axis || x[d] == out[d];
    if (!fits) {
      return Bad(node, "input ", i, " has sample shape ", x.ToString(), ", wanted ", out.ToString(),
                 " but for axis ", node.axis);
    }
    if (x[node.axis] > kMaxElements - out[node.axis]) return Bad(node, "the result is too large");
    out[node.axis] += x[node.axis];
  }
  return out;
}

absl::StatusOr<Shape> DeclaredOutput(const Graph& graph, const Node& node) {
  if (node.output < 0 || static_cast<size_t>(node.output) >= graph.values.size()) {
    return Bad(node, "output value ", node.output, " does not exist");
  }
  const Shape& out = graph.shape(node.output);
  TERN_RETURN_IF_ERROR(Annotate(CheckExtents(out), absl::StrCat("node '", node.name, "'")));
  return out;
}

absl::StatusOr<Shape> InferReshape(const Graph& graph, const Node& node) {
  TERN_ASSIGN_OR_RETURN(Shape out, DeclaredOutput(graph, node));
  const Shape& x = graph.shape(node.inputs[0]);
  if (out.elements() != x.elements()) {
    return Bad(node, "cannot turn ", x.ToString(), " into ", out.ToString());
  }
  return out;
}

absl::StatusOr<Shape> InferReduceMean(const Graph& graph, const Node& node) {
  TERN_ASSIGN_OR_RETURN(Shape out, DeclaredOutput(graph, node));
  const Shape& x = graph.shape(node.inputs[0]);
  std::vector<bool> reduced(x.rank());
  for (int axis : node.axes) {
    if (axis < 0 || axis >= x.rank() || reduced[axis]) {
      return Bad(node, "axes [", absl::StrJoin(node.axes, ","), "] do not name distinct axes of ",
                 x.ToString());
    }
    reduced[axis] = true;
  }
  std::vector<int64_t> kept, dropped;
  for (int d = 0; d < x.rank(); ++d) {
    kept.push_back(reduced[d] ? 1 : x[d]);
    if (!reduced[d]) dropped.push_back(x[d]);
  }
  if (out.dims() != kept && out.dims() != dropped) {
    return Bad(node, "result has shape ", out.ToString(), ", wanted ", Shape(kept).ToString(),
               " or ", Shape(dropped).ToString());
  }
  return out;
}

absl::StatusOr<Shape> InferTranspose(const Graph& graph, const Node& node) {
  const Shape& x = graph.shape(node.inputs[0]);
  std::vector<bool> seen(x.rank());
  std::vector<int64_t> dims;
  for (int axis : node.perm) {
    if (axis < 0 || axis >= x.rank() || seen[axis]) break;
    seen[axis] = true;
    dims.push_back(x[axis]);
  }
  if (static_cast<int>(dims.size()) != x.rank() || node.perm.size() != dims.size()) {
    return Bad(node, "[", absl::StrJoin(node.perm, ","), "] does not permute the axes of ",
               x.ToString());
  }
  return Shape(std::move(dims));
}

absl::StatusOr<Shape> InferSlice(const Graph& graph, const Node& node) {
  Shape out = graph.shape(node.inputs[0]);
  if (node.axis < 0 || node.axis >= out.rank()) {
    return Bad(node, "axis ", node.axis, " is not one of ", out.ToString());
  }
  if (node.step < 1 || node.start < 0 || node.start >= node.end || node.end > out[node.axis]) {
    return Bad(node, "range ", node.start, ":", node.end, ":", node.step, " does not select from ",
               out[node.axis], " elements");
  }
  // (end - start - 1) / step + 1 does not overflow for a huge step.
  out[node.axis] = (node.end - node.start - 1) / node.step + 1;
  return out;
}

absl::StatusOr<Shape> InferPad(const Graph& graph, const Node& node) {
  Shape out = graph.shape(node.inputs[0]);
  const size_t rank = static_cast<size_t>(out.rank());
  if (node.pads_before.size() != rank || node.pads_after.size() != rank) {
    return Bad(node, "got pads for ", node.pads_before.size(), " and ", node.pads_after.size(),
               " axes, wanted ", rank);
  }
  for (size_t d = 0; d < rank; ++d) {
    const int64_t before = node.pads_before[d], after = node.pads_after[d];
    if (before < 0 || after < 0 || before > kMaxElements || after > kMaxElements) {
      return Bad(node, "pads ", before, ",", after, " of axis ", d, " are out of range");
    }
    out[static_cast<int>(d)] += before + after;
  }
  return out;
}

absl::StatusOr<Shape> Infer(const Graph& graph, const Node& node) {
  constexpr size_t kAny = std::numeric_limits<size_t>::max();
  switch (node.op) {
    case OpType::kConv:
    case OpType::kFullyConnected: {
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 2));
      TERN_ASSIGN_OR_RETURN(Shape out, node.op == OpType::kConv ? InferConv(graph, node)
                                                                : InferFullyConnected(graph, node));
      if (node.has_residual() && graph.shape(node.inputs[1]) != out) {
        return Bad(node, "residual has sample shape ", graph.shape(node.inputs[1]).ToString(),
                   ", wanted ", out.ToString());
      }
      return out;
    }
    case OpType::kBatchNorm: {
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      const Shape& x = graph.shape(node.inputs[0]);
      if (x.rank() < 1) return Bad(node, "input has no channels");
      if (node.weight.shape() != Shape{x[0]}) {
        return Bad(node, "scale has shape ", node.weight.shape().ToString(), ", wanted [", x[0],
                   "]");
      }
      return x;
    }
    case OpType::kRelu:
    case OpType::kClip:
    case OpType::kSigmoid:
    case OpType::kHardSigmoid:
    case OpType::kHardSwish:
    case OpType::kSilu:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return graph.shape(node.inputs[0]);
    case OpType::kSoftmax: {
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      const Shape& x = graph.shape(node.inputs[0]);
      if (node.axis < 0 || node.axis >= x.rank()) {
        return Bad(node, "axis ", node.axis, " is not one of ", x.ToString());
      }
      return x;
    }
    case OpType::kAdd:
    case OpType::kSub:
    case OpType::kMul:
    case OpType::kDiv:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 2, 2));
      return InferBroadcast(graph, node);
    case OpType::kConcat:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, kAny));
      return InferConcat(graph, node);
    case OpType::kMaxPool:
    case OpType::kAveragePool:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return InferPool(graph, node);
    case OpType::kGlobalAveragePool: {
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      const Shape& x = graph.shape(node.inputs[0]);
      TERN_RETURN_IF_ERROR(CheckRank(node, x, 3));
      return Shape{x[0], 1, 1};
    }
    case OpType::kReshape:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return InferReshape(graph, node);
    case OpType::kTranspose:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return InferTranspose(graph, node);
    case OpType::kSlice:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return InferSlice(graph, node);
    case OpType::kPad:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return InferPad(graph, node);
    case OpType::kReduceMean:
      TERN_RETURN_IF_ERROR(CheckInputs(graph, node, 1, 1));
      return InferReduceMean(graph, node);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("node '", node.name, "': unknown operator ", static_cast<int>(node.op)));
}

}  // namespace

absl::Status CheckExtents(const Shape& shape) {
  if (shape.rank() > kMaxRank) {
    return absl::InvalidArgumentError(
        absl::StrCat("a shape has rank ", shape.rank(), ", more than ", kMaxRank));
  }
  int64_t product = 1;
  for (int64_t dim : shape.dims()) {
    if (dim < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("shape ", shape.ToString(), " has an extent below 1"));
    }
    if (dim > kMaxElements / product) {
      return absl::InvalidArgumentError(
          absl::StrCat("shape ", shape.ToString(), " exceeds ", kMaxElements, " elements"));
    }
    product *= dim;
  }
  return absl::OkStatus();
}

bool BroadcastsTo(const Shape& value, const Shape& target) {
  if (value.rank() > target.rank()) return false;
  for (int i = 1; i <= value.rank(); ++i) {
    const int64_t dim = value[value.rank() - i];
    if (dim != 1 && dim != target[target.rank() - i]) return false;
  }
  return true;
}

absl::StatusOr<Shape> InferShape(const Graph& graph, const Node& node) {
  TERN_ASSIGN_OR_RETURN(Shape out, Infer(graph, node));
  TERN_RETURN_IF_ERROR(
      Annotate(CheckExtents(out), absl::StrCat("node '", node.name, "' (", Name(node.op), ")")));
  return out;
}

}  // namespace tern::graph
