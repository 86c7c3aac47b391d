// Operators that rearrange elements or compute shapes.

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "server/base/status_macros.h"
#include "server/onnx/importer.h"

namespace tern::onnx {
namespace {

using graph::Node;
using graph::OpType;
using graph::ValueId;

absl::Status EmitReshape(Op& op, ValueId x, Shape shape) {
  return op.Emit({.op = OpType::kReshape, .inputs = {x}}, 0, std::move(shape));
}

Node SliceNode(ValueId x, int axis, int64_t start, int64_t end, int64_t step) {
  Node node{.op = OpType::kSlice, .inputs = {x}};
  node.axis = axis;
  node.start = start;
  node.end = end;
  node.step = step;
  return node;
}

// ---- shapes ----

absl::Status ShapeOf(Op& op) {
  std::vector<BatchInt> extents;
  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
    for (int64_t dim : x->dims) extents.push_back({0, dim});
  } else {
    TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
    extents.push_back({1, 0});
    for (int64_t dim : op.shape(x).dims()) extents.push_back({0, dim});
  }
  // start and end are clamped to the rank, counted from the end if negative.
  const int64_t rank = static_cast<int64_t>(extents.size());
  int64_t start = op.attributes().Int("start", 0), end = op.attributes().Int("end", rank);
  start = std::clamp<int64_t>(start < 0 ? start + rank : start, 0, rank);
  end = std::clamp<int64_t>(end < 0 ? end + rank : end, start, rank);
  return op.Define(0, Constant::Ints({extents.begin() + start, extents.begin() + end}));
}

absl::Status ConstantNode(Op& op) {
  Attributes& attributes = op.attributes();
  if (::onnx::TensorProto* tensor = attributes.Tensor("value")) {
    return op.Define(0, ToConstant(*tensor));
  }
  Constant out;
  if (attributes.Has("value_int") || attributes.Has("value_ints")) {
    out.integer = true;
    std::vector<int64_t> values = attributes.Ints("value_ints");
    if (attributes.Has("value_int")) {
      values = {attributes.Int("value_int", 0)};
    } else {
      out.dims = {static_cast<int64_t>(values.size())};
    }
    if (static_cast<int64_t>(values.size()) > kMaxInts) {
      return op.Unimplemented("holds ", values.size(), " integers");
    }
    for (int64_t value : values) out.ints.push_back({0, value});
    return op.Define(0, std::move(out));
  }
  if (attributes.Has("value_float") || attributes.Has("value_floats")) {
    std::vector<float> values = attributes.Floats("value_floats");
    if (attributes.Has("value_float")) {
      values = {attributes.Float("value_float", 0)};
    } else {
      out.dims = {static_cast<int64_t>(values.size())};
    }
    out.floats = Tensor::Of(Shape(out.dims), values);
    return op.Define(0, std::move(out));
  }
  return op.Unimplemented("has no value of a known kind");
}

absl::Status ConstantOfShape(Op& op) {
  TERN_ASSIGN_OR_RETURN(std::vector<int64_t> dims, op.Ints(0));
  Constant value{.dims = {1}, .floats = Tensor(DType::kF32, {1})};  // 0.0 if none is given
  if (::onnx::TensorProto* tensor = op.attributes().Tensor("value")) {
    absl::StatusOr<Constant> given = ToConstant(*tensor);
    if (!given.ok()) return op.Define(0, std::move(given));
    value = *std::move(given);
    if (value.elements() != 1) return op.Invalid("value must be one element");
    if (!value.codes.empty()) {
      return op.Define(0, absl::UnimplementedError(absl::StrCat(
                              "a constant of ", tern::Name(value.codes.dtype()), " codes")));
    }
    value.dims = {};
    if (!value.integer) value.floats = value.floats.Reshaped(Shape());
  }
  // Zero of the same kind, stretched to the shape, plus the value.
  const absl::StatusOr<int64_t> n = CheckedElements(dims);
  if (!n.ok()) return op.Invalid(n.status().message());
  if (*n > (value.integer ? kMaxInts : kMaxFolded)) {
    return op.Unimplemented("makes a constant of ", *n, " elements");
  }
  Constant zeros{.dims = dims, .integer = value.integer};
  if (zeros.integer) {
    zeros.ints.resize(*n);
  } else {
    zeros.floats = Tensor(DType::kF32, Shape(dims));
    if (value.dims.size() == 1) return op.Define(0, std::move(zeros));
  }
  return op.Define(0, Binary('+', zeros, value));
}

// ---- reshapes ----

// The sample shape that a Reshape target gives a value, whose batch must stay in front.
absl::StatusOr<Shape> ResolveTarget(Op& op, const Shape& x, std::vector<BatchInt> target) {
  constexpr BatchInt kBatch{1, 0}, kInferred{0, -1};
  if (target.empty()) return op.Invalid("drops the batch");
  std::string text;
  for (const BatchInt& t : target) {
    absl::StrAppend(&text, text.empty() ? "" : ",",
                    t == kBatch ? "N"
                    : t.plain() ? absl::StrCat(t.offset)
                                : "f(N)");
  }
  // 0 copies an extent of the input.
  for (size_t i = 0; i < target.size(); ++i) {
    if (target[i] != BatchInt{}) continue;
    if (op.attributes().Int("allowzero", 0) != 0) return op.Invalid("makes an empty tensor");
    if (i > static_cast<size_t>(x.rank())) return op.Invalid("[", text, "] copies no extent");
    target[i] = i == 0 ? kBatch : BatchInt{0, x[static_cast<int>(i) - 1]};
  }
  op.attributes().Ignore("allowzero");
  int inferred = -1;
  std::vector<int64_t> dims;
  int64_t product = 1;
  for (size_t i = 1; i < target.size(); ++i) {
    int64_t dim = target[i].offset;
    if (!target[i].plain()) return op.Unimplemented("[", text, "] moves the batch");
    if (target[i] == kInferred) {
      if (inferred >= 0) return op.Invalid("[", text, "] leaves two extents open");
      inferred = static_cast<int>(i) - 1;
      dim = 1;
    }
    if (dim < 1 || dim > graph::kMaxElements / product) {
      return op.Invalid("cannot reshape ", x.ToString(), " with a batch to [", text, "]");
    }
    product *= dim;
    dims.push_back(dim);
  }
  if (inferred >= 0) {
    dims[inferred] = x.elements() / product;
    product *= std::max<int64_t>(dims[inferred], 1);
  }
  const bool keeps_batch = target[0] == kBatch || (target[0] == kInferred && inferred < 0) ||
                           (op.fixed_batch() && target[0] == BatchInt{0, 1});
  if (!keeps_batch || product != x.elements()) {
    return op.Invalid("cannot reshape ", x.ToString(), " with a batch to [", text, "]");
  }
  return Shape(std::move(dims));
}

absl::Status Reshape(Op& op) {
  TERN_ASSIGN_OR_RETURN(const std::vector<BatchInt> target, op.BatchInts(1));
  if (!op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
    TERN_ASSIGN_OR_RETURN(Shape shape, ResolveTarget(op, op.shape(x), target));
    return EmitReshape(op, x, std::move(shape));
  }
  op.attributes().Ignore("allowzero");
  TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
  TERN_ASSIGN_OR_RETURN(std::vector<int64_t> dims, op.Ints(1));
  int inferred = -1;
  int64_t product = 1;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] == 0 && i < x->dims.size()) dims[i] = x->dims[i];
    if (dims[i] == -1 && inferred < 0) {
      inferred = static_cast<int>(i);
      continue;
    }
    if (dims[i] < 0 || (product > 0 && dims[i] > graph::kMaxElements / product)) {
      return op.Invalid("extent ", i, " is ", dims[i]);
    }
    product *= dims[i];
  }
  if (inferred >= 0) dims[inferred] = product == 0 ? 0 : x->elements() / product;
  return op.Define(0, Reshaped(*x, std::move(dims)));
}

absl::Status Flatten(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  const Shape& shape = op.shape(x);
  // The axis may also be the rank, which SampleAxis does not know.
  const int64_t axis = op.attributes().Int("axis", 1);
  if (axis != 1 && axis != -shape.rank()) return op.Unimplemented("axis ", axis, ", wanted 1");
  return EmitReshape(op, x, {shape.elements()});
}

// The axes of Squeeze and Unsqueeze: an attribute, since opset 13 an input.
absl::StatusOr<std::vector<int64_t>> Axes(Op& op) {
  if (op.opset() < 13) return op.attributes().Ints("axes");
  if (!op.Has(1)) return std::vector<int64_t>();
  return op.Ints(1);
}

absl::Status Unsqueeze(Op& op) {
  TERN_ASSIGN_OR_RETURN(const std::vector<int64_t> axes, Axes(op));
  const Constant* constant = nullptr;
  ValueId x = graph::kNoValue;
  std::vector<int64_t> dims;
  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(constant, op.ConstantInput(0));
    dims = constant->dims;
  } else {
    TERN_ASSIGN_OR_RETURN(x, op.Variable(0));
    dims = op.shape(x).WithBatch(1).dims();
  }
  const size_t rank = dims.size() + axes.size();
  if (rank > graph::kMaxRank + 1) return op.Invalid("makes rank ", rank);
  std::vector<bool> inserted(rank);
  for (int64_t axis : axes) {
    TERN_ASSIGN_OR_RETURN(const int plain, op.PlainAxis(axis, static_cast<int>(rank)));
    if (inserted[plain]) return op.Invalid("axis ", axis, " is given twice");
    inserted[plain] = true;
  }
  if (constant == nullptr && inserted[0]) return op.Unimplemented("moves the batch");
  std::vector<int64_t> out;
  size_t next = 0;
  for (size_t i = 0; i < rank; ++i) out.push_back(inserted[i] ? 1 : dims[next++]);
  if (constant != nullptr) return op.Define(0, Reshaped(*constant, std::move(out)));
  return EmitReshape(op, x, Shape(std::vector<int64_t>(out.begin() + 1, out.end())));
}

absl::Status Squeeze(Op& op) {
  TERN_ASSIGN_OR_RETURN(const std::vector<int64_t> axes, Axes(op));
  const Constant* constant = nullptr;
  ValueId x = graph::kNoValue;
  std::vector<int64_t> dims;
  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(constant, op.ConstantInput(0));
    dims = constant->dims;
  } else {
    TERN_ASSIGN_OR_RETURN(x, op.Variable(0));
    dims = op.shape(x).WithBatch(0).dims();  // never 1, whatever the batch
    if (axes.empty() && op.fixed_batch()) {
      return op.Unimplemented("without axes would drop the batch of 1");
    }
  }
  std::vector<bool> dropped(dims.size());
  for (int64_t axis : axes) {
    TERN_ASSIGN_OR_RETURN(const int plain, op.PlainAxis(axis, static_cast<int>(dims.size())));
    if (dims[plain] != 1) return op.Invalid("axis ", axis, " has not extent 1");
    dropped[plain] = true;
  }
  std::vector<int64_t> out;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (axes.empty() ? dims[i] != 1 : !dropped[i]) out.push_back(dims[i]);
  }
  if (constant != nullptr) return op.Define(0, Reshaped(*constant, std::move(out)));
  return EmitReshape(op, x, Shape(std::vector<int64_t>(out.begin() + 1, out.end())));
}

absl::Status Transpose(Op& op) {
  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
    std::vector<int64_t> reversed(x->dims.size());
    std::iota(reversed.rbegin(), reversed.rend(), 0);
    return op.Define(0, Transpose(*x, op.attributes().Ints("perm", reversed)));
  }
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  const std::vector<int64_t> perm = op.attributes().Ints("perm");
  if (perm.empty() || perm[0] != 0) return op.Unimplemented("moves the batch");
  Node node{.op = OpType::kTranspose, .inputs = {x}};
  for (size_t i = 1; i < perm.size(); ++i) {
    if (perm[i] < 1 || perm[i] > op.shape(x).rank()) return op.Invalid("perm holds ", perm[i]);
    node.perm.push_back(static_cast<int>(perm[i]) - 1);
  }
  return op.Emit(std::move(node));
}

// ---- selections ----

absl::Status Gather(Op& op) {
  const int64_t given_axis = op.attributes().Int("axis", 0);
  TERN_ASSIGN_OR_RETURN(const Constant* where, op.ConstantInput(1));
  TERN_ASSIGN_OR_RETURN(std::vector<int64_t> indices, op.Ints(1));
  if (where->rank() > 1) return op.Unimplemented("gathers by a table of rank ", where->rank());
  const bool scalar = where->rank() == 0;
  const auto normalise = [&](int64_t extent) {
    for (int64_t& index : indices) {
      if (index < -extent || index >= extent) {
        return op.Invalid("index ", index, " is out of range for ", extent);
      }
      if (index < 0) index += extent;
    }
    return absl::OkStatus();
  };

  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
    TERN_ASSIGN_OR_RETURN(const int axis, op.PlainAxis(given_axis, x->rank()));
    TERN_RETURN_IF_ERROR(normalise(x->dims[axis]));
    absl::StatusOr<Constant> out = Select(*x, axis, indices);
    if (!scalar || !out.ok()) return op.Define(0, std::move(out));
    std::vector<int64_t> dims = out->dims;
    dims.erase(dims.begin() + axis);
    return op.Define(0, Reshaped(*out, std::move(dims)));
  }

  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  TERN_ASSIGN_OR_RETURN(const int axis, op.SampleAxis(given_axis, x));
  const Shape shape = op.shape(x);
  TERN_RETURN_IF_ERROR(normalise(shape[axis]));
  if (scalar) {
    TERN_ASSIGN_OR_RETURN(const ValueId slice,
                          op.Between(SliceNode(x, axis, indices[0], indices[0] + 1, 1)));
    std::vector<int64_t> dims = shape.dims();
    dims.erase(dims.begin() + axis);
    return EmitReshape(op, slice, Shape(std::move(dims)));
  }
  // A handful of channels in another order (BGR): slices, joined.
  constexpr size_t kMaxIndices = 4096;
  if (indices.empty() || indices.size() > kMaxIndices) {
    return op.Unimplemented("gathers ", indices.size(), " indices");
  }
  if (indices.size() == 1) {
    return op.Emit(SliceNode(x, axis, indices[0], indices[0] + 1, 1));
  }
  Node concat{.op = OpType::kConcat};
  concat.axis = axis;
  for (int64_t index : indices) {
    TERN_ASSIGN_OR_RETURN(const ValueId slice, op.Between(SliceNode(x, axis, index, index + 1, 1)));
    concat.inputs.push_back(slice);
  }
  return op.Emit(std::move(concat));
}

// One start:end:step as ONNX clamps it.
struct Range {
  int64_t start, end, step;
};

Range Clamp(Range range, int64_t extent) {
  const auto from_front = [extent](int64_t at) { return at < 0 ? at + extent : at; };
  // A negative step may end before the first element, at -1.
  const int64_t least = range.step < 0 ? -1 : 0;
  const int64_t most = range.step < 0 ? extent - 1 : extent;
  range.start = std::clamp<int64_t>(from_front(range.start), range.step < 0 ? least : 0, most);
  range.end = std::clamp<int64_t>(from_front(range.end), least, most);
  return range;
}

absl::StatusOr<std::vector<int64_t>> SliceNumbers(Op& op, const char* attribute, int input) {
  if (op.opset() < 10) return op.attributes().Ints(attribute);
  if (!op.Has(input)) return std::vector<int64_t>();
  return op.Ints(input);
}

absl::Status Slice(Op& op) {
  if (op.opset() < 10) {
    if (op.inputs() != 1) return op.Invalid("has ", op.inputs(), " inputs, wanted 1");
  } else if (!op.Has(1) || !op.Has(2)) {
    return op.Invalid("starts or ends are missing");
  }
  TERN_ASSIGN_OR_RETURN(const std::vector<int64_t> starts, SliceNumbers(op, "starts", 1));
  TERN_ASSIGN_OR_RETURN(std::vector<int64_t> axes, SliceNumbers(op, "axes", 3));
  TERN_ASSIGN_OR_RETURN(std::vector<int64_t> steps, SliceNumbers(op, "steps", 4));
  std::vector<int64_t> ends;
  std::vector<bool> ends_at_batch;
  if (op.opset() < 10) {
    ends = op.attributes().Ints("ends");
    ends_at_batch.resize(ends.size());
  } else {
    TERN_ASSIGN_OR_RETURN(const std::vector<BatchInt> numbers, op.BatchInts(2));
    for (const BatchInt& number : numbers) {
      if (!number.plain() && number != BatchInt{1, 0}) {
        return op.Unimplemented("ends depend on the batch");
      }
      ends.push_back(number.offset);
      ends_at_batch.push_back(!number.plain());
    }
  }
  if (axes.empty()) {
    axes.resize(starts.size());
    std::iota(axes.begin(), axes.end(), 0);
  }
  if (steps.empty()) steps.assign(starts.size(), 1);
  if (ends.size() != starts.size() || axes.size() != starts.size() ||
      steps.size() != starts.size()) {
    return op.Invalid("starts, ends, axes and steps have different lengths");
  }
  if (std::count(steps.begin(), steps.end(), 0) > 0) return op.Invalid("a step is 0");

  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
    Constant out = *x;
    for (size_t i = 0; i < starts.size(); ++i) {
      if (ends_at_batch[i]) return op.Unimplemented("slices a constant up to the batch");
      TERN_ASSIGN_OR_RETURN(const int axis, op.PlainAxis(axes[i], x->rank()));
      const Range range = Clamp({starts[i], ends[i], steps[i]}, out.dims[axis]);
      // The list of positions, 8 bytes each, is not in the file.
      TERN_RETURN_IF_ERROR(op.Charge(2 * out.dims[axis]));
      std::vector<int64_t> positions;
      // Compared before stepping, for a huge step would overflow.
      for (int64_t at = range.start; range.step > 0 ? at < range.end : at > range.end;) {
        positions.push_back(at);
        const int64_t left = range.end - at;
        if (range.step > 0 ? range.step >= left : range.step <= left) break;
        at += range.step;
      }
      absl::StatusOr<Constant> part = Select(out, axis, positions);
      if (!part.ok()) return op.Define(0, std::move(part));
      out = *std::move(part);
    }
    return op.Define(0, std::move(out));
  }

  TERN_ASSIGN_OR_RETURN(ValueId x, op.Variable(0));
  std::vector<Node> slices;
  std::vector<bool> seen(op.shape(x).rank() + 1);
  for (size_t i = 0; i < starts.size(); ++i) {
    TERN_ASSIGN_OR_RETURN(const int plain, op.PlainAxis(axes[i], op.shape(x).rank() + 1));
    if (seen[plain]) return op.Invalid("axis ", axes[i], " is given twice");
    seen[plain] = true;
    if (plain == 0) {
      // 2^31 - 1 and above mean "to the end" in every exporter.
      const bool to_end = ends_at_batch[i] || ends[i] >= std::numeric_limits<int32_t>::max();
      if (starts[i] == 0 && steps[i] == 1 && to_end) continue;
      return op.Unimplemented("slices the batch");
    }
    if (ends_at_batch[i]) return op.Unimplemented("ends depend on the batch");
    if (steps[i] < 0) return op.Unimplemented("has step ", steps[i]);
    const int64_t extent = op.shape(x)[plain - 1];
    const Range range = Clamp({starts[i], ends[i], steps[i]}, extent);
    if (range.start >= range.end) {
      return op.Invalid("range ", starts[i], ":", ends[i], " of ", extent, " elements is empty");
    }
    if (range.start == 0 && range.end == extent && range.step == 1) continue;
    slices.push_back(SliceNode(x, plain - 1, range.start, range.end, range.step));
  }
  if (slices.empty()) return op.Forward();
  for (size_t i = 0; i < slices.size(); ++i) {
    slices[i].inputs = {x};
    if (i + 1 == slices.size()) return op.Emit(std::move(slices[i]));
    TERN_ASSIGN_OR_RETURN(x, op.Between(std::move(slices[i])));
  }
  return absl::OkStatus();
}

absl::Status Split(Op& op) {
  const int64_t given_axis = op.attributes().Int("axis", 0);
  const Constant* constant = nullptr;
  ValueId x = graph::kNoValue;
  int axis = 0;
  int64_t extent = 0;
  if (op.IsConstant(0)) {
    TERN_ASSIGN_OR_RETURN(constant, op.ConstantInput(0));
    TERN_ASSIGN_OR_RETURN(axis, op.PlainAxis(given_axis, constant->rank()));
    extent = constant->dims[axis];
  } else {
    TERN_ASSIGN_OR_RETURN(x, op.Variable(0));
    TERN_ASSIGN_OR_RETURN(axis, op.SampleAxis(given_axis, x));
    extent = op.shape(x)[axis];
  }
  std::vector<int64_t> parts;
  if (op.opset() < 13) {
    parts = op.attributes().Ints("split");
  } else if (op.Has(1)) {
    TERN_ASSIGN_OR_RETURN(parts, op.Ints(1));
  }
  if (parts.empty()) {
    if (extent % op.outputs() != 0) {
      return op.Invalid("cannot split ", extent, " into ", op.outputs(), " equal parts");
    }
    parts.assign(op.outputs(), extent / op.outputs());
  }
  if (static_cast<int>(parts.size()) != op.outputs()) {
    return op.Invalid("has ", op.outputs(), " outputs and ", parts.size(), " parts");
  }
  int64_t start = 0;
  for (int i = 0; i < op.outputs(); ++i) {
    if (parts[i] < 1 || parts[i] > extent - start) {
      return op.Invalid("part ", i, " has extent ", parts[i], "; ", extent - start, " are left");
    }
    if (constant != nullptr) {
      TERN_RETURN_IF_ERROR(op.Charge(2 * parts[i]));
      std::vector<int64_t> positions(parts[i]);
      std::iota(positions.begin(), positions.end(), start);
      TERN_RETURN_IF_ERROR(op.Define(i, Select(*constant, axis, positions)));
    } else {
      TERN_RETURN_IF_ERROR(op.Emit(SliceNode(x, axis, start, start + parts[i], 1), i));
    }
    start += parts[i];
  }
  if (start != extent) return op.Invalid("parts end at ", start, " of ", extent);
  return absl::OkStatus();
}

absl::Status Concat(Op& op) {
  const int64_t given_axis = op.attributes().Int("axis", 1);
  if (op.AllConstant()) {
    std::vector<const Constant*> parts;
    for (int i = 0; i < op.inputs(); ++i) {
      if (!op.Has(i)) return op.Invalid("input ", i, " is missing");
      TERN_ASSIGN_OR_RETURN(const Constant* part, op.ConstantInput(i));
      parts.push_back(part);
    }
    TERN_ASSIGN_OR_RETURN(const int axis, op.PlainAxis(given_axis, parts[0]->rank()));
    return op.Define(0, Concat(parts, axis));
  }
  Node node{.op = OpType::kConcat};
  for (int i = 0; i < op.inputs(); ++i) {
    if (!op.Has(i)) return op.Invalid("input ", i, " is missing");
    TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(i));
    node.inputs.push_back(x);
  }
  TERN_ASSIGN_OR_RETURN(node.axis, op.SampleAxis(given_axis, node.inputs[0]));
  if (node.inputs.size() == 1) return op.Forward();
  return op.Emit(std::move(node));
}

absl::Status Pad(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  if (op.attributes().String("mode", "constant") != "constant") {
    return op.Unimplemented("only constant padding is supported");
  }
  Node node{.op = OpType::kPad, .inputs = {x}};
  std::vector<int64_t> pads;
  if (op.opset() < 11) {
    pads = op.attributes().Ints("pads");
    node.pad_value = op.attributes().Float("value", 0.0f);
  } else {
    if (!op.Has(1)) return op.Invalid("pads are missing");
    TERN_ASSIGN_OR_RETURN(pads, op.Ints(1));
    if (op.Has(2)) {
      TERN_ASSIGN_OR_RETURN(node.pad_value, op.Scalar(2));
    }
  }
  const size_t rank = op.shape(x).rank() + 1;
  if (pads.size() != 2 * rank) {
    return op.Invalid("has ", pads.size(), " pads, wanted ", 2 * rank);
  }
  if (pads[0] != 0 || pads[rank] != 0) return op.Unimplemented("pads the batch");
  if (*std::min_element(pads.begin(), pads.end()) < 0) {
    return op.Unimplemented("negative pads are not supported");
  }
  if (*std::max_element(pads.begin(), pads.end()) == 0) return op.Forward();
  node.pads_before.assign(pads.begin() + 1, pads.begin() + rank);
  node.pads_after.assign(pads.begin() + rank + 1, pads.end());
  return op.Emit(std::move(node));
}

}  // namespace

absl::Span<const Operator> MovementOperators() {
  constexpr int kMany = std::numeric_limits<int>::max();
  static constexpr Operator kOperators[] = {
      {"Concat", 1, kMany, Concat},
      {"Constant", 0, 0, ConstantNode},
      {"ConstantOfShape", 1, 1, ConstantOfShape},
      {"Flatten", 1, 1, Flatten},
      {"Gather", 2, 2, Gather},
      {"Pad", 1, 3, Pad},
      {"Reshape", 2, 2, Reshape},
      {"Shape", 1, 1, ShapeOf},
      {"Slice", 1, 5, Slice},
      {"Split", 1, 2, Split},
      {"Squeeze", 1, 2, Squeeze},
      {"Transpose", 1, 1, Transpose},
      {"Unsqueeze", 1, 2, Unsqueeze},
  };
  return kOperators;
}

}  // namespace tern::onnx
