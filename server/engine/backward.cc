#include "server/engine/backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
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

Tensor Like(const Tensor& t) { return Tensor(DType::kF32, t.shape()); }

// Sums over everything but the channel: bias[c] of [n, c, ...].
Tensor ChannelSums(const Tensor& g) {
  const int64_t n = g.shape()[0], channels = g.shape()[1], plane = g.elements() / (n * channels);
  Tensor sums(DType::kF32, Shape{channels});
  const float* data = g.data<float>().data();
  float* out = sums.data<float>().data();
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float* p = data + (i * channels + c) * plane;
      float part = 0;
      for (int64_t k = 0; k < plane; ++k) part += p[k];
      sum += part;
    }
    out[c] = static_cast<float>(sum);
  }
  return sums;
}

absl::Status BackwardConvolution(const Node& node, const Tensor& x, const Tensor& g, Tensor* dx,
                                 Tensor* dw) {
  const auto& conv = node.conv;
  const Shape& ws = node.weight.shape();
  return onednn::Guard(absl::StrCat("derivatives of node ", node.name), [&] {
    dnnl::stream stream(onednn::Engine());
    const memory::dims x_dims = x.shape().dims(), y_dims = g.shape().dims();
    const int64_t groups = conv.groups;
    const memory::dims w_dims = groups == 1
                                    ? memory::dims{ws[0], ws[1], ws[2], ws[3]}
                                    : memory::dims{groups, ws[0] / groups, ws[1], ws[2], ws[3]};
    const bool image = x_dims[1] < 8;
    onednn::ConvolutionSpec spec;
    spec.src = memory::desc(x_dims, kF32, image ? tag::nchw : tag::any);
    spec.weights = memory::desc(w_dims, kF32, tag::any);
    spec.dst = memory::desc(y_dims, kF32, tag::any);
    spec.grouped = groups != 1;
    spec.strides = {conv.stride_h, conv.stride_w};
    spec.dilations = {conv.dilation_h, conv.dilation_w};
    spec.pads_begin = {conv.pad_top, conv.pad_left};
    spec.pads_end = {conv.pad_bottom, conv.pad_right};
    const memory::desc x_plain(x_dims, kF32, tag::nchw), y_plain(y_dims, kF32, tag::nchw);
    const memory::desc w_plain(w_dims, kF32, groups == 1 ? tag::oihw : tag::goihw);
    const memory gradient = Wrap(y_plain, g.data<float>().data());
    // Runs `primitive` into `target`, whose plain layout is `plain`.
    const auto run = [&](const onednn::Primitive& primitive, onednn::Args args, int argument,
                         const memory::desc& wanted, const memory::desc& plain, Tensor& target) {
      const memory result = Wrap(plain, target.data<float>().data());
      const bool direct = wanted == plain;
      memory out = direct ? result : memory(wanted, onednn::Engine());
      args.insert({argument, out});
      primitive.primitive.execute(stream, args);
      stream.wait();
      if (!direct) onednn::Reorder(stream, out, result);
    };
    if (dx != nullptr) {
      onednn::ConvolutionSpec data = spec;
      data.src = memory::desc(x_dims, kF32, tag::any);
      const auto primitive = onednn::MakeConvolutionBackwardData(data);
      run(primitive,
          {{DNNL_ARG_DIFF_DST, InLayout(stream, gradient, primitive.dst)},
           {DNNL_ARG_WEIGHTS,
            InLayout(stream, Wrap(w_plain, node.weight.data<float>().data()), primitive.weights)}},
          DNNL_ARG_DIFF_SRC, primitive.src, x_plain, *dx);
    }
    if (dw != nullptr) {
      const auto primitive = onednn::MakeConvolutionBackwardWeights(spec);
      run(primitive,
          {{DNNL_ARG_DIFF_DST, InLayout(stream, gradient, primitive.dst)},
           {DNNL_ARG_SRC, InLayout(stream, Wrap(x_plain, x.data<float>().data()), primitive.src)}},
          DNNL_ARG_DIFF_WEIGHTS, primitive.weights, w_plain, *dw);
    }
  });
}

absl::Status BackwardFullyConnected(const Node& node, const Tensor& x, const Tensor& g, Tensor* dx,
                                    Tensor* dw) {
  const int64_t n = x.shape()[0], c = node.weight.shape()[1], o = node.weight.shape()[0];
  return onednn::Guard(absl::StrCat("derivatives of node ", node.name), [&] {
    const float* gradient = g.data<float>().data();
    if (dx != nullptr) {
      onednn::Sgemm('N', 'N', n, c, o, 1.0f, gradient, o, node.weight.data<float>().data(), c, 0.0f,
                    dx->data<float>().data(), c);
    }
    if (dw != nullptr) {
      onednn::Sgemm('T', 'N', o, c, n, 1.0f, gradient, o, x.data<float>().data(), c, 0.0f,
                    dw->data<float>().data(), c);
    }
  });
}

// Strides of `shape` inside a sample of `whole`: 0 where it is stretched.
Strides StretchedStrides(const Shape& shape, const Shape& whole) {
  const Strides own = RowMajorStrides(shape);
  Strides result(whole.rank(), 0);
  const int shift = whole.rank() - shape.rank();
  for (int i = 0; i < shape.rank(); ++i) {
    if (shape[i] != 1) result[i + shift] = own[i];
  }
  return result;
}

// Calls visit(element of the result, element of a, element of b) over the batch.
template <typename Visit>
void ForEachPair(const Shape& whole, int64_t batch, const Shape& a, int64_t a_batch, const Shape& b,
                 int64_t b_batch, Visit visit) {
  const Strides sa = StretchedStrides(a, whole), sb = StretchedStrides(b, whole);
  const int64_t elements = whole.elements();
  std::vector<int64_t> index(whole.rank(), 0);
  int64_t ia = 0, ib = 0;
  for (int64_t i = 0; i < elements; ++i) {
    for (int64_t n = 0; n < batch; ++n) visit(n * elements + i, n * a_batch + ia, n * b_batch + ib);
    for (int d = whole.rank() - 1; d >= 0; --d) {
      ia += sa[d];
      ib += sb[d];
      if (++index[d] < whole[d]) break;
      ia -= sa[d] * whole[d];
      ib -= sb[d] * whole[d];
      index[d] = 0;
    }
  }
}

// The same shape on both sides needs no index arithmetic.
void BackwardArithmetic(const graph::Graph& graph, const Node& node,
                        const std::vector<const Tensor*>& inputs, const Tensor& g, int64_t batch,
                        std::vector<Tensor>& dx) {
  const Shape& whole = graph.shape(node.output);
  const Shape &a = graph.shape(node.inputs[0]), &b = graph.shape(node.inputs[1]);
  const auto batch_stride = [&](int k) -> int64_t {
    return graph.values[node.inputs[k]].constant ? 0 : graph.shape(node.inputs[k]).elements();
  };
  const float* gradient = g.data<float>().data();
  const float* pa = inputs[0]->data<float>().data();
  const float* pb = inputs[1]->data<float>().data();
  float* da = dx[0].empty() ? nullptr : dx[0].data<float>().data();
  float* db = dx[1].empty() ? nullptr : dx[1].data<float>().data();
  const OpType op = node.op;
  if ((op == OpType::kAdd || op == OpType::kSub) && a == whole && b == whole &&
      batch_stride(0) != 0 && batch_stride(1) != 0) {
    const float sign = op == OpType::kAdd ? 1.0f : -1.0f;
    const int64_t count = g.elements();
    if (da != nullptr) std::memcpy(da, gradient, count * sizeof(float));
    if (db != nullptr) {
      for (int64_t i = 0; i < count; ++i) db[i] = sign * gradient[i];
    }
    return;
  }
  ForEachPair(whole, batch, a, batch_stride(0), b, batch_stride(1),
              [&](int64_t i, int64_t ia, int64_t ib) {
                const float v = gradient[i];
                switch (op) {
                  case OpType::kMul:
                    if (da != nullptr) da[ia] += v * pb[ib];
                    if (db != nullptr) db[ib] += v * pa[ia];
                    break;
                  case OpType::kDiv:
                    if (da != nullptr) da[ia] += v / pb[ib];
                    if (db != nullptr) db[ib] -= v * pa[ia] / (pb[ib] * pb[ib]);
                    break;
                  default:
                    if (da != nullptr) da[ia] += v;
                    if (db != nullptr) db[ib] += op == OpType::kSub ? -v : v;
                }
              });
}

void BackwardPool(const Node& node, const Tensor& x, const Tensor& g, Tensor& dx) {
  graph::PoolAttributes pool = node.pool;
  const int64_t planes = x.shape()[0] * x.shape()[1], height = x.shape()[2], width = x.shape()[3];
  const int64_t rows = g.shape()[2], columns = g.shape()[3];
  const bool max = node.op == OpType::kMaxPool;
#pragma omp parallel for schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const float* p = x.data<float>().data() + plane * height * width;
    const float* gp = g.data<float>().data() + plane * rows * columns;
    float* out = dx.data<float>().data() + plane * height * width;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t top = r * pool.stride_h - pool.pad_top;
      const int64_t y0 = std::max<int64_t>(0, top);
      const int64_t y1 = std::min<int64_t>(height, top + pool.kernel_h);
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t left = c * pool.stride_w - pool.pad_left;
        const int64_t x0 = std::max<int64_t>(0, left);
        const int64_t x1 = std::min<int64_t>(width, left + pool.kernel_w);
        const float v = gp[r * columns + c];
        if (max) {
          int64_t best = y0 * width + x0;
          for (int64_t i = y0; i < y1; ++i) {
            for (int64_t k = x0; k < x1; ++k) {
              if (p[i * width + k] > p[best]) best = i * width + k;
            }
          }
          out[best] += v;
          continue;
        }
        int64_t count = (y1 - y0) * (x1 - x0);
        if (pool.count_include_pad) {
          // Pads count, what ceil mode adds beyond them does not (graph.h).
          count = (std::min<int64_t>(top + pool.kernel_h, height + pool.pad_bottom) - top) *
                  (std::min<int64_t>(left + pool.kernel_w, width + pool.pad_right) - left);
        }
        const float share = v / static_cast<float>(count);
        for (int64_t i = y0; i < y1; ++i) {
          for (int64_t k = x0; k < x1; ++k) out[i * width + k] += share;
        }
      }
    }
  }
}

// Spreads g [batch, out] over dx [batch, in] where the operator copies or averages: out element
// with strides `out_strides` (0 where averaged) in the index space `dims` of the input.
void AddStrided(int64_t batch, const std::vector<int64_t>& dims, float* dx, int64_t dx_batch,
                const Strides& dx_strides, const float* g, int64_t g_batch,
                const Strides& g_strides, float factor) {
  std::vector<int64_t> extents{batch};
  extents.insert(extents.end(), dims.begin(), dims.end());
  ForEachRow<2>(extents, {WithBatch(dx_batch, dx_strides), WithBatch(g_batch, g_strides)},
                [&](const int64_t* offset, int64_t count, const int64_t* step) {
                  float* d = dx + offset[0];
                  const float* s = g + offset[1];
                  for (int64_t i = 0; i < count; ++i) d[i * step[0]] += factor * s[i * step[1]];
                });
}

void BackwardUnary(const Node& node, const Tensor& x, const Tensor& y, const Tensor& g,
                   Tensor& dx) {
  const float* px = x.data<float>().data();
  const float* py = y.data<float>().data();
  const float* pg = g.data<float>().data();
  float* out = dx.data<float>().data();
  const int64_t count = x.elements();
  const float alpha = node.alpha;
  const OpType op = node.op;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    float slope = 1.0f;
    if (op == OpType::kRelu) {
      slope = py[i] > 0.0f ? 1.0f : 0.0f;
    } else if (op == OpType::kSigmoid) {
      slope = py[i] * (1.0f - py[i]);
    } else if (op == OpType::kHardSigmoid) {
      slope = py[i] > 0.0f && py[i] < 1.0f ? alpha : 0.0f;
    } else if (op == OpType::kHardSwish) {
      slope = px[i] <= -3.0f ? 0.0f : px[i] >= 3.0f ? 1.0f : px[i] / 3.0f + 0.5f;
    } else if (op == OpType::kSilu) {
      const float gate = 1.0f / (1.0f + std::exp(-px[i]));
      slope = gate * (1.0f + px[i] * (1.0f - gate));
    }
    out[i] = slope * pg[i];
  }
}

void BackwardSoftmax(const Node& node, const Shape& sample, const Tensor& y, const Tensor& g,
                     Tensor& dx) {
  int64_t inner = 1;
  for (int d = node.axis + 1; d < sample.rank(); ++d) inner *= sample[d];
  const int64_t extent = sample[node.axis], outer = y.elements() / (inner * extent);
  const float* py = y.data<float>().data();
  const float* pg = g.data<float>().data();
  float* out = dx.data<float>().data();
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t at = o * extent * inner + i;
      double dot = 0;
      for (int64_t k = 0; k < extent; ++k)
        dot += static_cast<double>(py[at + k * inner]) * pg[at + k * inner];
      for (int64_t k = 0; k < extent; ++k) {
        out[at + k * inner] = py[at + k * inner] * (pg[at + k * inner] - static_cast<float>(dot));
      }
    }
  }
}

}  // namespace

absl::StatusOr<Gradients> RunBackward(const graph::Graph& graph, const Node& node,
                                      const std::vector<const Tensor*>& inputs,
                                      const Tensor& output, const Tensor& output_gradient,
                                      const BackwardOptions& options) {
  const auto wrong = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("derivatives of node ", node.name, ": ", what));
  };
  const size_t count = node.inputs.size();
  if (inputs.size() != count || options.inputs.size() != count) {
    return wrong(absl::StrCat("got ", inputs.size(), " inputs and ", options.inputs.size(),
                              " wishes, wanted ", count));
  }
  const Shape& whole = graph.shape(node.output);
  const int64_t batch = output.shape().rank() > 0 ? output.shape()[0] : 0;
  if (output.shape() != whole.WithBatch(batch) || output_gradient.shape() != output.shape()) {
    return wrong(absl::StrCat("got output ", output.shape().ToString(), " and gradient ",
                              output_gradient.shape().ToString(), ", wanted [n,...] of ",
                              whole.ToString()));
  }
  for (size_t k = 0; k < count; ++k) {
    const graph::Value& value = graph.values[node.inputs[k]];
    if (inputs[k]->shape() != (value.constant ? value.shape : value.shape.WithBatch(batch))) {
      return wrong(absl::StrCat("got input ", k, " of ", inputs[k]->shape().ToString(),
                                ", wanted it of ", value.shape.ToString()));
    }
  }

  onednn::ScopedThreads team(options.threads);
  Gradients result;
  result.inputs.resize(count);
  for (size_t k = 0; k < count; ++k) {
    if (options.inputs[k] && !graph.values[node.inputs[k]].constant)
      result.inputs[k] = Like(*inputs[k]);
  }

  // The derivative before the clip.
  Tensor masked;
  const Tensor* g = &output_gradient;
  if (node.clip) {
    masked = output_gradient;
    float* m = masked.data<float>().data();
    const float* y = output.data<float>().data();
    const float lo = node.clip->lo, hi = node.clip->hi;
    const int64_t elements = masked.elements();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < elements; ++i) m[i] = y[i] > lo && y[i] < hi ? m[i] : 0.0f;
    g = &masked;
  }

  std::vector<Tensor>& dx = result.inputs;
  const Shape in = graph.shape(node.inputs[0]);
  const float* gradient = g->data<float>().data();
  float* first = dx[0].empty() ? nullptr : dx[0].data<float>().data();
  switch (node.op) {
    case OpType::kConv:
    case OpType::kFullyConnected: {
      if (node.weight.empty()) return wrong("got no float weights");
      if (options.weight) {
        result.weight = Like(node.weight);
        result.bias = ChannelSums(*g);
      }
      Tensor* const to_x = first != nullptr ? &dx[0] : nullptr;
      Tensor* const to_w = options.weight ? &result.weight : nullptr;
      if (to_x != nullptr || to_w != nullptr) {
        TERN_RETURN_IF_ERROR(node.op == OpType::kConv
                                 ? BackwardConvolution(node, *inputs[0], *g, to_x, to_w)
                                 : BackwardFullyConnected(node, *inputs[0], *g, to_x, to_w));
      }
      if (count > 1 && !dx[1].empty()) dx[1] = *g;
      return result;
    }
    case OpType::kAdd:
    case OpType::kSub:
    case OpType::kMul:
    case OpType::kDiv:
      BackwardArithmetic(graph, node, inputs, *g, batch, dx);
      return result;
    case OpType::kConcat: {
      const Strides strides = RowMajorStrides(whole);
      int64_t offset = 0;
      for (size_t k = 0; k < count; ++k) {
        const Shape& part = graph.shape(node.inputs[k]);
        if (!dx[k].empty()) {
          AddStrided(batch, part.dims(), dx[k].data<float>().data(), part.elements(),
                     RowMajorStrides(part), gradient + offset * strides[node.axis],
                     whole.elements(), strides, 1.0f);
        }
        offset += part[node.axis];
      }
      return result;
    }
    default:
      break;
  }
  if (first == nullptr) return result;
  switch (node.op) {
    case OpType::kBatchNorm: {
      const int64_t plane = in.elements() / in[0];
      const float* scale = node.weight.data<float>().data();
      for (int64_t row = 0; row < batch * in[0]; ++row) {
        for (int64_t i = row * plane; i < (row + 1) * plane; ++i)
          first[i] = gradient[i] * scale[row % in[0]];
      }
      break;
    }
    case OpType::kRelu:
    case OpType::kClip:  // masked above
    case OpType::kSigmoid:
    case OpType::kHardSigmoid:
    case OpType::kHardSwish:
    case OpType::kSilu:
      BackwardUnary(node, *inputs[0], output, *g, dx[0]);
      break;
    case OpType::kMaxPool:
    case OpType::kAveragePool:
      BackwardPool(node, *inputs[0], *g, dx[0]);
      break;
    case OpType::kGlobalAveragePool:
      AddStrided(batch, in.dims(), first, in.elements(), RowMajorStrides(in), gradient,
                 whole.elements(), {1, 0, 0}, 1.0f / static_cast<float>(in[1] * in[2]));
      break;
    case OpType::kReshape:
      std::memcpy(first, gradient, g->size_bytes());
      break;
    case OpType::kTranspose: {
      const Strides strides = RowMajorStrides(in);
      Strides turned(in.rank());
      for (int i = 0; i < in.rank(); ++i) turned[i] = strides[node.perm[i]];
      AddStrided(batch, whole.dims(), first, in.elements(), turned, gradient, whole.elements(),
                 RowMajorStrides(whole), 1.0f);
      break;
    }
    case OpType::kSlice: {
      Strides strides = RowMajorStrides(in);
      const int64_t start = node.start * strides[node.axis];
      strides[node.axis] *= node.step;
      AddStrided(batch, whole.dims(), first + start, in.elements(), strides, gradient,
                 whole.elements(), RowMajorStrides(whole), 1.0f);
      break;
    }
    case OpType::kPad: {
      const Strides strides = RowMajorStrides(whole);
      int64_t start = 0;
      for (int i = 0; i < in.rank(); ++i) start += node.pads_before[i] * strides[i];
      AddStrided(batch, in.dims(), first, in.elements(), RowMajorStrides(in), gradient + start,
                 whole.elements(), strides, 1.0f);
      break;
    }
    case OpType::kSoftmax:
      BackwardSoftmax(node, in, output, *g, dx[0]);
      break;
    case OpType::kReduceMean: {
      // The output's strides along the kept dimensions, 0 along the reduced ones.
      Strides strides(in.rank(), 0);
      int64_t step = 1, reduced = 1;
      for (int i = in.rank() - 1; i >= 0; --i) {
        if (std::find(node.axes.begin(), node.axes.end(), i) != node.axes.end()) {
          reduced *= in[i];
        } else {
          strides[i] = step;
          step *= in[i];
        }
      }
      AddStrided(batch, in.dims(), first, in.elements(), RowMajorStrides(in), gradient,
                 whole.elements(), strides, 1.0f / static_cast<float>(reduced));
      break;
    }
    default:
      return wrong(absl::StrCat("no rule for ", graph::Name(node.op)));
  }
  return result;
}

}  // namespace tern::engine
