// Convolution, fully connected layers, normalisation, pooling, softmax.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "server/base/status_macros.h"
#include "server/onnx/importer.h"

namespace tern::onnx {
namespace {

using graph::Node;
using graph::OpType;
using graph::ValueId;

// What convolutions and pools share; index 0 is rows, 1 columns.
struct Window {
  int kernel[2], stride[2], dilation[2], pad_before[2], pad_after[2];
};

absl::Status ReadPair(Op& op, absl::string_view name, int64_t otherwise, int (&pair)[2]) {
  const std::vector<int64_t> values = op.attributes().Ints(name, {otherwise, otherwise});
  if (values.size() != 2) {
    return op.Unimplemented(name, " has ", values.size(), " numbers; only 2-D is supported");
  }
  for (int i : {0, 1}) {
    if (values[i] < 1 || values[i] > std::numeric_limits<int>::max()) {
      return op.Invalid(name, " holds ", values[i]);
    }
    pair[i] = static_cast<int>(values[i]);
  }
  return absl::OkStatus();
}

// `kernel` is the weight's, or 0 for pools, whose kernel_shape attribute is required.
absl::StatusOr<Window> ReadWindow(Op& op, const Shape& x, int64_t kernel_h, int64_t kernel_w) {
  if (x.rank() != 3) {
    return op.Unimplemented("input has sample shape ", x.ToString(), "; only 2-D is supported");
  }
  constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
  Window w;
  TERN_RETURN_IF_ERROR(ReadPair(op, "strides", 1, w.stride));
  TERN_RETURN_IF_ERROR(ReadPair(op, "dilations", 1, w.dilation));
  if (kernel_h > 0 && !op.attributes().Has("kernel_shape")) {
    w.kernel[0] = static_cast<int>(kernel_h);
    w.kernel[1] = static_cast<int>(kernel_w);
  } else {
    TERN_RETURN_IF_ERROR(ReadPair(op, "kernel_shape", 0, w.kernel));
    if (kernel_h > 0 && (w.kernel[0] != kernel_h || w.kernel[1] != kernel_w)) {
      return op.Invalid("kernel_shape is ", w.kernel[0], "x", w.kernel[1], ", the weight's is ",
                        kernel_h, "x", kernel_w);
    }
  }

  const std::string auto_pad = op.attributes().String("auto_pad", "NOTSET");
  const std::vector<int64_t> pads = op.attributes().Ints("pads", {0, 0, 0, 0});
  if (pads.size() != 4) {
    return op.Unimplemented("pads has ", pads.size(), " numbers; only 2-D is supported");
  }
  for (int i : {0, 1}) {
    int64_t before = 0, after = 0;
    if (auto_pad == "NOTSET") {
      before = pads[i];
      after = pads[i + 2];
    } else if (auto_pad == "SAME_UPPER" || auto_pad == "SAME_LOWER") {
      // As many outputs as input / stride, rounded up; an odd pad goes to the named side.
      const int64_t outputs = (x[i + 1] + w.stride[i] - 1) / w.stride[i];
      const int64_t extent = int64_t{w.dilation[i]} * (w.kernel[i] - 1) + 1;
      const int64_t total = std::max<int64_t>(0, (outputs - 1) * w.stride[i] + extent - x[i + 1]);
      before = auto_pad == "SAME_UPPER" ? total / 2 : total - total / 2;
      after = total - before;
    } else if (auto_pad != "VALID") {
      return op.Unimplemented("auto_pad is not known");
    }
    if (before < 0 || after < 0) return op.Unimplemented("negative pads are not supported");
    if (before > kMaxInt || after > kMaxInt) return op.Invalid("pads are too large");
    w.pad_before[i] = static_cast<int>(before);
    w.pad_after[i] = static_cast<int>(after);
  }
  return w;
}

Tensor Zeros(int64_t n) { return Tensor(DType::kF32, {n}); }

absl::Status Conv(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  Node node{.op = OpType::kConv, .inputs = {x}};
  TERN_ASSIGN_OR_RETURN(node.quantized, op.CodedWeights(1, 0));
  if (!node.quantized) {
    TERN_ASSIGN_OR_RETURN(node.weight, op.Weights(1));
  }
  const Shape w = node.quantized ? node.quantized->codes.shape() : node.weight.shape();
  if (w.rank() != 4) {
    return op.Unimplemented("weight has shape ", w.ToString(), "; only 2-D is supported");
  }
  TERN_RETURN_IF_ERROR(Annotate(graph::CheckExtents(w), op.Prefix() + "weight"));
  TERN_ASSIGN_OR_RETURN(const Window window, ReadWindow(op, op.shape(x), w[2], w[3]));
  const int64_t groups = op.attributes().Int("group", 1);
  if (groups < 1 || groups > w[0]) {
    return op.Invalid("group is ", groups, " for ", w[0], " output channels");
  }
  node.conv = {.stride_h = window.stride[0],
               .stride_w = window.stride[1],
               .pad_top = window.pad_before[0],
               .pad_left = window.pad_before[1],
               .pad_bottom = window.pad_after[0],
               .pad_right = window.pad_after[1],
               .dilation_h = window.dilation[0],
               .dilation_w = window.dilation[1],
               .groups = static_cast<int>(groups)};
  node.bias = Zeros(w[0]);
  if (op.Has(2)) {
    TERN_ASSIGN_OR_RETURN(node.bias, op.Weights(2));
    if (node.bias.shape() != Shape{w[0]}) {
      return op.Invalid("bias has shape ", node.bias.shape().ToString(), ", wanted [", w[0], "]");
    }
  }
  return op.Emit(std::move(node));
}

// [c,o] -> [o,c]
Tensor Transposed(const Tensor& matrix) {
  const int64_t rows = matrix.shape()[0], columns = matrix.shape()[1];
  Tensor out(DType::kF32, {columns, rows});
  const absl::Span<const float> from = matrix.data<float>();
  const absl::Span<float> to = out.data<float>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
  return out;
}

// The second operand of Gemm and MatMul as the weight [o,c] of `node`; returns o.
absl::StatusOr<int64_t> SetMatrix(Op& op, bool transposed, Node& node) {
  if (op.item(1).dequantized != nullptr) {
    const Shape& shape = op.item(1).dequantized->codes.shape();
    if (shape.rank() != 2) {
      return op.Unimplemented("input 1 has shape ", shape.ToString(), ", wanted a matrix");
    }
    TERN_ASSIGN_OR_RETURN(node.quantized, op.CodedWeights(1, transposed ? 0 : 1));
    return node.quantized->codes.shape()[0];
  }
  TERN_ASSIGN_OR_RETURN(Tensor weight, op.Weights(1));
  if (weight.shape().rank() != 2) {
    return op.Unimplemented("input 1 has shape ", weight.shape().ToString(), ", wanted a matrix");
  }
  TERN_RETURN_IF_ERROR(Annotate(graph::CheckExtents(weight.shape()), op.Prefix() + "weight"));
  node.weight = transposed ? std::move(weight) : Transposed(weight);
  return node.weight.shape()[0];
}

absl::StatusOr<ValueId> Vectors(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  if (op.shape(x).rank() != 1) {
    return op.Unimplemented("input has sample shape ", op.shape(x).ToString(),
                            "; only vectors are supported");
  }
  return x;
}

absl::Status MatMul(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, Vectors(op));
  Node node{.op = OpType::kFullyConnected, .inputs = {x}};
  TERN_ASSIGN_OR_RETURN(const int64_t o, SetMatrix(op, /*transposed=*/false, node));
  node.bias = Zeros(o);
  return op.Emit(std::move(node));
}

// alpha * x * W + beta * bias
absl::Status Gemm(Op& op) {
  if (op.attributes().Int("transA", 0) != 0) {
    return op.Unimplemented("transA would make the batch an inner dimension");
  }
  TERN_ASSIGN_OR_RETURN(const ValueId x, Vectors(op));
  Node node{.op = OpType::kFullyConnected, .inputs = {x}};
  TERN_ASSIGN_OR_RETURN(const int64_t o,
                        SetMatrix(op, op.attributes().Int("transB", 0) != 0, node));
  const float alpha = op.attributes().Float("alpha", 1.0f);
  const float beta = op.attributes().Float("beta", 1.0f);
  if (alpha != 1.0f && node.quantized) {
    if (!(alpha > 0)) return op.Unimplemented("quantised weights with alpha ", alpha);
    for (float& step : node.quantized->steps) step *= alpha;
  } else if (alpha != 1.0f) {
    for (float& w : node.weight.data<float>()) w *= alpha;
  }
  node.bias = Zeros(o);
  if (op.Has(2)) {
    TERN_ASSIGN_OR_RETURN(const Tensor bias, op.Weights(2));
    if (!graph::BroadcastsTo(bias.shape(), {1, o}) || bias.empty()) {
      return op.Unimplemented("bias has shape ", bias.shape().ToString(), ", wanted [", o, "]");
    }
    for (int64_t i = 0; i < o; ++i) {
      node.bias.data<float>()[i] = beta * bias.data<float>()[bias.elements() == 1 ? 0 : i];
    }
  }
  return op.Emit(std::move(node));
}

absl::Status BatchNormalization(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  const float epsilon = op.attributes().Float("epsilon", 1e-5f);
  op.attributes().Ignore("momentum");  // of training only
  if (op.attributes().Int("training_mode", 0) != 0) {
    return op.Unimplemented("is in training mode; export the network in eval mode");
  }
  if (op.attributes().Int("spatial", 1) != 1) {
    return op.Unimplemented("normalises every activation, not channels");
  }
  if (op.shape(x).rank() < 1) return op.Invalid("input has no channels");
  const int64_t channels = op.shape(x)[0];
  Tensor parts[4];  // scale, bias, mean, variance
  for (int i = 0; i < 4; ++i) {
    TERN_ASSIGN_OR_RETURN(parts[i], op.Weights(i + 1));
    if (parts[i].shape() != Shape{channels}) {
      return op.Invalid("input ", i + 1, " has shape ", parts[i].shape().ToString(), ", wanted [",
                        channels, "]");
    }
  }
  Node node{.op = OpType::kBatchNorm, .inputs = {x}};
  node.weight = Zeros(channels);
  node.bias = Zeros(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double variance = double{parts[3].data<float>()[c]} + epsilon;
    if (!(variance > 0)) return op.Invalid("channel ", c, " has variance ", variance);
    const double scale = parts[0].data<float>()[c] / std::sqrt(variance);
    node.weight.data<float>()[c] = static_cast<float>(scale);
    node.bias.data<float>()[c] =
        static_cast<float>(parts[1].data<float>()[c] - scale * parts[2].data<float>()[c]);
  }
  return op.Emit(std::move(node));
}

absl::Status Pool(Op& op) {
  const bool average = op.type() == "AveragePool";
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  TERN_ASSIGN_OR_RETURN(const Window window, ReadWindow(op, op.shape(x), 0, 0));
  if (window.dilation[0] != 1 || window.dilation[1] != 1) {
    return op.Unimplemented("dilated pooling is not supported");
  }
  op.attributes().Ignore("storage_order");  // of the indices only
  Node node{.op = average ? OpType::kAveragePool : OpType::kMaxPool, .inputs = {x}};
  node.pool = {.kernel_h = window.kernel[0],
               .kernel_w = window.kernel[1],
               .stride_h = window.stride[0],
               .stride_w = window.stride[1],
               .pad_top = window.pad_before[0],
               .pad_left = window.pad_before[1],
               .pad_bottom = window.pad_after[0],
               .pad_right = window.pad_after[1],
               .ceil_mode = op.attributes().Int("ceil_mode", 0) != 0,
               .count_include_pad = average && op.attributes().Int("count_include_pad", 0) != 0};
  return op.Emit(std::move(node));
}

absl::Status GlobalPool(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  if (op.shape(x).rank() != 3) return op.Unimplemented("only 2-D is supported");
  if (op.type() == "GlobalAveragePool") {
    return op.Emit({.op = OpType::kGlobalAveragePool, .inputs = {x}});
  }
  Node node{.op = OpType::kMaxPool, .inputs = {x}};
  node.pool.kernel_h = static_cast<int>(op.shape(x)[1]);
  node.pool.kernel_w = static_cast<int>(op.shape(x)[2]);
  return op.Emit(std::move(node));
}

absl::Status ReduceMean(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  const Shape& shape = op.shape(x);
  const bool keep = op.attributes().Int("keepdims", 1) != 0;
  Node node{.op = OpType::kReduceMean, .inputs = {x}};
  std::vector<bool> reduced(shape.rank());
  for (int64_t axis : op.attributes().Ints("axes", {0})) {  // none: all, the batch among them
    TERN_ASSIGN_OR_RETURN(const int sample_axis, op.SampleAxis(axis, x));
    if (reduced[sample_axis]) return op.Invalid("axis ", axis, " is given twice");
    reduced[sample_axis] = true;
    node.axes.push_back(sample_axis);
  }
  std::sort(node.axes.begin(), node.axes.end());
  std::vector<int64_t> dims;
  for (int d = 0; d < shape.rank(); ++d) {
    if (!reduced[d]) dims.push_back(shape[d]);
    if (reduced[d] && keep) dims.push_back(1);
  }
  if (shape.rank() == 3 && node.axes == std::vector<int>{1, 2}) {
    const int64_t channels = shape[0];
    node = {.op = OpType::kGlobalAveragePool, .inputs = {x}};
    if (keep) return op.Emit(std::move(node));
    TERN_ASSIGN_OR_RETURN(const ValueId pooled, op.Between(std::move(node)));
    return op.Emit({.op = OpType::kReshape, .inputs = {pooled}}, 0, Shape{channels});
  }
  return op.Emit(std::move(node), 0, Shape(std::move(dims)));
}

absl::Status Softmax(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  const Shape& shape = op.shape(x);
  const int64_t given = op.attributes().Int("axis", op.opset() >= 13 ? -1 : 1);
  TERN_ASSIGN_OR_RETURN(const int axis, op.SampleAxis(given, x));
  if (op.opset() < 13) {
    // Then softmax ran over all axes from this one on, which is the same if they are 1.
    for (int d = axis + 1; d < shape.rank(); ++d) {
      if (shape[d] != 1) return op.Unimplemented("softmax over several axes is not supported");
    }
  }
  Node node{.op = OpType::kSoftmax, .inputs = {x}};
  node.axis = axis;
  return op.Emit(std::move(node));
}

}  // namespace

absl::Span<const Operator> LayerOperators() {
  static constexpr Operator kOperators[] = {
      {"AveragePool", 1, 1, Pool},
      {"BatchNormalization", 5, 5, BatchNormalization},
      {"Conv", 2, 3, Conv},
      {"Gemm", 2, 3, Gemm},
      {"GlobalAveragePool", 1, 1, GlobalPool},
      {"GlobalMaxPool", 1, 1, GlobalPool},
      {"MatMul", 2, 2, MatMul},
      {"MaxPool", 1, 1, Pool},
      {"ReduceMean", 1, 1, ReduceMean},
      {"Softmax", 1, 1, Softmax},
  };
  return kOperators;
}

}  // namespace tern::onnx
