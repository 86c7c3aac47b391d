#include "server/engine/ops.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/engine/float_ops.h"
#include "server/engine/onednn.h"

namespace tern::engine {
namespace {

using dnnl::memory;
using graph::Node;
using graph::OpType;
using onednn::InLayout;
using onednn::Wrap;
using tag = memory::format_tag;
constexpr auto kF32 = memory::data_type::f32;

// The batch of `tensor`, whose sample shape must be that of `value`.
absl::StatusOr<int64_t> BatchOf(const graph::Graph& graph, const Node& node, graph::ValueId value,
                                const Tensor& tensor) {
  const Shape& sample = graph.shape(value);
  const int64_t n = tensor.shape().rank() > 0 ? tensor.shape()[0] : 0;
  if (tensor.dtype() != DType::kF32 || n < 1 || tensor.shape() != sample.WithBatch(n)) {
    return absl::InvalidArgumentError(absl::StrCat("node ", node.name, ": got ",
                                                   Name(tensor.dtype()), tensor.shape().ToString(),
                                                   ", wanted f32 [n,...] of ", sample.ToString()));
  }
  return n;
}

absl::Status RunConvolution(const Node& node, const Tensor& x, const Tensor* residual, Tensor& y) {
  const auto& conv = node.conv;
  const Shape &xs = x.shape(), &ys = y.shape(), &ws = node.weight.shape();
  return onednn::Guard(absl::StrCat("node ", std::string(node.name)), [&] {
    dnnl::stream stream(onednn::Engine());
    const memory::dims x_dims = xs.dims(), y_dims = ys.dims();
    const int64_t groups = conv.groups;
    const memory::dims w_dims = groups == 1
                                    ? memory::dims{ws[0], ws[1], ws[2], ws[3]}
                                    : memory::dims{groups, ws[0] / groups, ws[1], ws[2], ws[3]};
    onednn::ConvolutionSpec spec;
    // Three-channel images keep their layout: oneDNN has kernels for it and none that take it
    // blocked.
    const bool image = xs[1] < 8;
    spec.src = memory::desc(x_dims, kF32, image ? tag::nchw : tag::any);
    spec.weights = memory::desc(w_dims, kF32, tag::any);
    spec.bias = memory::desc({ws[0]}, kF32, tag::x);
    spec.dst = memory::desc(y_dims, kF32, tag::any);
    spec.grouped = groups != 1;
    spec.strides = {conv.stride_h, conv.stride_w};
    spec.dilations = {conv.dilation_h, conv.dilation_w};
    spec.pads_begin = {conv.pad_top, conv.pad_left};
    spec.pads_end = {conv.pad_bottom, conv.pad_right};
    onednn::Epilogue epilogue;
    epilogue.sum = residual != nullptr;
    epilogue.clip = node.clip;
    const auto primitive = onednn::MakeConvolution(spec, epilogue);
    const memory::desc x_plain(x_dims, kF32, tag::nchw), y_plain(y_dims, kF32, tag::nchw);
    const memory src = InLayout(stream, Wrap(x_plain, x.data<float>().data()), primitive.src);
    const memory weights =
        InLayout(stream,
                 Wrap(memory::desc(w_dims, kF32, groups == 1 ? tag::oihw : tag::goihw),
                      node.weight.data<float>().data()),
                 primitive.weights);
    const memory result = Wrap(y_plain, y.data<float>().data());
    const bool direct = primitive.dst == y_plain;
    memory dst = direct ? result : memory(primitive.dst, onednn::Engine());
    if (residual != nullptr)
      onednn::Reorder(stream, Wrap(y_plain, residual->data<float>().data()), dst);
    onednn::Args args = onednn::OwnArgs(primitive);
    args.insert({{DNNL_ARG_SRC, src},
                 {DNNL_ARG_WEIGHTS, weights},
                 {DNNL_ARG_BIAS, Wrap(primitive.bias, node.bias.data<float>().data())},
                 {DNNL_ARG_DST, dst}});
    primitive.primitive.execute(stream, args);
    stream.wait();
    if (!direct) onednn::Reorder(stream, dst, result);
  });
}

absl::Status RunFullyConnected(const Node& node, const Tensor& x, const Tensor* residual,
                               Tensor& y) {
  const int64_t n = x.shape()[0], c = node.weight.shape()[1], o = node.weight.shape()[0];
  float* out = y.data<float>().data();
  const float* bias = node.bias.data<float>().data();
  for (int64_t i = 0; i < n; ++i) std::copy(bias, bias + o, out + i * o);
  TERN_RETURN_IF_ERROR(onednn::Guard(absl::StrCat("node ", node.name), [&] {
    onednn::Sgemm('N', 'T', n, o, c, 1.0f, x.data<float>().data(), c,
                  node.weight.data<float>().data(), c, 1.0f, out, o);
  }));
  const float* r = residual != nullptr ? residual->data<float>().data() : nullptr;
  const float lo = node.clip ? node.clip->lo : -std::numeric_limits<float>::infinity();
  const float hi = node.clip ? node.clip->hi : std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n * o; ++i) {
    out[i] = std::min(std::max(r != nullptr ? out[i] + r[i] : out[i], lo), hi);
  }
  return absl::OkStatus();
}

absl::Status RunPooling(const Node& node, const Tensor& x, Tensor& y) {
  const auto& pool = node.pool;
  const memory::dims x_dims = x.shape().dims(), y_dims = y.shape().dims();
  return onednn::Guard(absl::StrCat("node ", node.name), [&] {
    dnnl::stream stream(onednn::Engine());
    onednn::PoolingSpec spec;
    spec.algorithm = node.op == OpType::kMaxPool ? dnnl::algorithm::pooling_max
                     : pool.count_include_pad    ? dnnl::algorithm::pooling_avg_include_padding
                                                 : dnnl::algorithm::pooling_avg_exclude_padding;
    spec.src = memory::desc(x_dims, kF32, tag::nchw);
    spec.dst = memory::desc(y_dims, kF32, tag::nchw);
    spec.kernel = {pool.kernel_h, pool.kernel_w};
    spec.strides = {pool.stride_h, pool.stride_w};
    spec.pads_begin = {pool.pad_top, pool.pad_left};
    // Ceil mode may look beyond the declared padding; oneDNN wants the padding that the output
    // implies.
    spec.pads_end = {(y_dims[2] - 1) * pool.stride_h + pool.kernel_h - x_dims[2] - pool.pad_top,
                     (y_dims[3] - 1) * pool.stride_w + pool.kernel_w - x_dims[3] - pool.pad_left};
    const auto primitive = onednn::MakePooling(spec);
    onednn::Args args = onednn::OwnArgs(primitive);
    args.insert({{DNNL_ARG_SRC, Wrap(primitive.src, x.data<float>().data())},
                 {DNNL_ARG_DST, Wrap(primitive.dst, y.data<float>().data())}});
    primitive.primitive.execute(stream, args);
    stream.wait();
  });
}

}  // namespace

absl::StatusOr<Tensor> RunFloatNode(const graph::Graph& graph, const Node& node,
                                    const std::vector<const Tensor*>& inputs, int threads) {
  if (inputs.size() != node.inputs.size()) {
    return absl::InvalidArgumentError(absl::StrCat("node ", node.name, ": got ", inputs.size(),
                                                   " inputs, wanted ", node.inputs.size()));
  }
  const bool weighted = node.op == OpType::kConv || node.op == OpType::kFullyConnected;
  if (weighted && node.weight.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("node ", node.name, ": got no float weights"));
  }
  int64_t batch = 0;
  std::vector<Operand<const float>> operands;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const graph::Value& value = graph.values[node.inputs[i]];
    Operand<const float> operand{inputs[i]->data<float>().data(), value.shape,
                                 RowMajorStrides(value.shape), 0};
    if (value.constant && inputs[i]->shape() == value.shape) {
      if (weighted)
        return absl::InvalidArgumentError(
            absl::StrCat("node ", node.name, ": got a constant input"));
    } else {
      TERN_ASSIGN_OR_RETURN(const int64_t n, BatchOf(graph, node, node.inputs[i], *inputs[i]));
      if (batch != 0 && n != batch) {
        return absl::InvalidArgumentError(
            absl::StrCat("node ", node.name, ": got batches ", batch, " and ", n));
      }
      batch = n;
      operand.batch_stride = value.shape.elements();
    }
    operands.push_back(std::move(operand));
  }
  if (batch == 0)
    return absl::InvalidArgumentError(
        absl::StrCat("node ", node.name, ": got constant inputs only"));

  onednn::ScopedThreads team(threads);
  const Shape& sample = graph.shape(node.output);
  Tensor y(DType::kF32, sample.WithBatch(batch));
  const Tensor* residual = node.has_residual() ? inputs[1] : nullptr;
  absl::Status status;
  if (node.op == OpType::kConv) {
    status = RunConvolution(node, *inputs[0], residual, y);
  } else if (node.op == OpType::kFullyConnected) {
    status = RunFullyConnected(node, *inputs[0], residual, y);
  } else if ((node.op == OpType::kMaxPool || node.op == OpType::kAveragePool) &&
             !(node.pool.ceil_mode && node.pool.count_include_pad) &&
             operands[0].batch_stride != 0) {
    status = RunPooling(node, *inputs[0], y);
  } else {
    status = RunPlainFloat(
        node, operands,
        {y.data<float>().data(), sample, RowMajorStrides(sample), sample.elements()}, batch);
  }
  if (!status.ok()) return status;
  return y;
}

void Sgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
           const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
           int64_t ldc) {
  const absl::Status status = onednn::Guard("sgemm", [&] {
    onednn::Sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, k, alpha, a, lda, b, ldb,
                  beta, c, ldc);
  });
  if (!status.ok()) TERN_LOG_ERROR("{}", std::string(status.message()));
}

}  // namespace tern::engine
