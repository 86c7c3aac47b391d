#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/reference/ops.h"

namespace tern::reference {
namespace {

using graph::ClipRange;
using graph::Graph;
using graph::Node;
using graph::OpType;

// The node's fused activation, if it has one.
double Activate(const Node& node, double v) {
  if (!node.clip) return v;
  return std::min<double>(std::max<double>(v, node.clip->lo), node.clip->hi);
}

// Samples of one operand; a constant is the same for every image.
struct Operand {
  Operand(const Tensor& tensor, const Shape& shape)
      : data(tensor.data<float>().data()),
        stride(tensor.shape().rank() > shape.rank() ? shape.elements() : 0) {}
  const float* sample(int64_t image) const { return data + image * stride; }
  const float* data;
  int64_t stride;
};

void Linear(const Graph& graph, const Node& node, const std::vector<const Tensor*>& inputs,
            int64_t n, float* y) {
  const Tensor weight = node.quantized ? Dequantize(*node.quantized) : node.weight;
  const absl::Span<const float> w = weight.data<float>();
  const Shape& x_shape = graph.shape(node.inputs[0]);
  const Shape& out = graph.shape(node.output);
  const int64_t rows = out.rank() == 3 ? out[1] : 1, columns = out.rank() == 3 ? out[2] : 1;
  const Operand x(*inputs[0], x_shape);
  const float* residual = node.has_residual() ? inputs[1]->data<float>().data() : nullptr;
  for (int64_t image = 0; image < n; ++image) {
    const float* sample = x.sample(image);
    for (int64_t o = 0; o < out[0]; ++o) {
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t c = 0; c < columns; ++c, ++y) {
          double sum = 0;
          ForEachProduct(node, weight.shape(), x_shape, o, h, c, [&](int64_t wi, int64_t xi) {
            if (xi >= 0) sum += double{w[wi]} * sample[xi];
          });
          sum += node.bias.data<float>()[o];
          if (residual != nullptr) sum += *residual++;
          *y = static_cast<float>(Activate(node, sum));
        }
      }
    }
  }
}

double Arithmetic(OpType op, double a, double b) {
  switch (op) {
    case OpType::kAdd:
      return a + b;
    case OpType::kSub:
      return a - b;
    case OpType::kMul:
      return a * b;
    default:  // kDiv
      return a / b;
  }
}

void Pool(const Node& node, const Shape& x, const Shape& out, const float* from, float* to) {
  const bool average = node.op == OpType::kAveragePool;
  for (int64_t c = 0; c < out[0]; ++c, from += x[1] * x[2]) {
    for (int64_t oh = 0; oh < out[1]; ++oh) {
      for (int64_t ow = 0; ow < out[2]; ++ow, ++to) {
        const PoolWindow window = WindowAt(node.pool, x, oh, ow);
        double sum = 0, most = -std::numeric_limits<double>::infinity();
        for (int64_t h = window.h0; h < window.h1; ++h) {
          for (int64_t w = window.w0; w < window.w1; ++w) {
            sum += from[h * x[2] + w];
            most = std::max<double>(most, from[h * x[2] + w]);
          }
        }
        *to = static_cast<float>(average ? sum / static_cast<double>(window.count) : most);
      }
    }
  }
}

void ReduceMean(const Node& node, const Shape& x, const Shape& out, const float* from, float* to) {
  std::vector<double> sums(out.elements());
  for (int64_t i = 0; i < x.elements(); ++i) {
    int64_t target = 0, stride = 1, rest = i;
    for (int d = x.rank(); d-- > 0;) {
      const int64_t coordinate = rest % x[d];
      rest /= x[d];
      if (std::find(node.axes.begin(), node.axes.end(), d) != node.axes.end()) continue;
      target += coordinate * stride;
      stride *= x[d];
    }
    sums[target] += from[i];
  }
  const double count = static_cast<double>(x.elements() / out.elements());
  for (size_t i = 0; i < sums.size(); ++i) to[i] = static_cast<float>(sums[i] / count);
}

void Softmax(const Node& node, const Shape& x, const float* from, float* to) {
  int64_t outer = 1, inner = 1;
  for (int d = 0; d < node.axis; ++d) outer *= x[d];
  for (int d = node.axis + 1; d < x.rank(); ++d) inner *= x[d];
  const int64_t extent = x[node.axis];
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t base = o * extent * inner + i;
      double most = from[base], sum = 0;
      for (int64_t k = 1; k < extent; ++k) most = std::max<double>(most, from[base + k * inner]);
      for (int64_t k = 0; k < extent; ++k) sum += std::exp(from[base + k * inner] - most);
      for (int64_t k = 0; k < extent; ++k) {
        to[base + k * inner] = static_cast<float>(std::exp(from[base + k * inner] - most) / sum);
      }
    }
  }
}

}  // namespace

int64_t SourceIndex(const Node& node, const Shape& x, const Shape& out, int64_t i) {
  if (node.op == OpType::kReshape) return i;
  std::vector<int64_t> at(out.rank());  // coordinates in the result
  for (int d = out.rank(); d-- > 0; i /= out[d]) at[d] = i % out[d];
  std::vector<int64_t> from = at;  // coordinates in the input
  for (int d = 0; d < out.rank(); ++d) {
    switch (node.op) {
      case OpType::kTranspose:
        from[node.perm[d]] = at[d];
        break;
      case OpType::kSlice:
        if (d == node.axis) from[d] = node.start + at[d] * node.step;
        break;
      default:  // kPad
        from[d] = at[d] - node.pads_before[d];
        if (from[d] < 0 || from[d] >= x[d]) return -1;
    }
  }
  int64_t index = 0;
  for (int d = 0; d < x.rank(); ++d) index = index * x[d] + from[d];
  return index;
}

int64_t BroadcastIndex(const Shape& x, const Shape& out, int64_t i) {
  int64_t index = 0, stride = 1;
  for (int k = 1; k <= x.rank(); ++k) {  // k-th axis from the right
    const int64_t coordinate = i % out[out.rank() - k];
    i /= out[out.rank() - k];
    if (x[x.rank() - k] != 1) index += coordinate * stride;
    stride *= x[x.rank() - k];
  }
  return index;
}

PoolWindow WindowAt(const graph::PoolAttributes& pool, const Shape& x, int64_t oh, int64_t ow) {
  // Ends at the padded edge: what ceil_mode adds beyond it does not count.
  const int64_t h = oh * pool.stride_h - pool.pad_top, w = ow * pool.stride_w - pool.pad_left;
  const int64_t h_end = std::min(h + pool.kernel_h, x[1] + pool.pad_bottom);
  const int64_t w_end = std::min(w + pool.kernel_w, x[2] + pool.pad_right);
  PoolWindow window{std::max<int64_t>(h, 0), std::min(h_end, x[1]), std::max<int64_t>(w, 0),
                    std::min(w_end, x[2]), 0};
  window.count = pool.count_include_pad ? (h_end - h) * (w_end - w)
                                        : (window.h1 - window.h0) * (window.w1 - window.w0);
  return window;
}

graph::PoolAttributes AveragePoolOf(const Node& node, const Shape& x) {
  if (node.op != OpType::kGlobalAveragePool) return node.pool;
  return {.kernel_h = static_cast<int>(x[1]), .kernel_w = static_cast<int>(x[2])};
}

int64_t WindowSum(const PoolWindow& window, const uint8_t* plane, const Shape& x,
                  int32_t zero_point) {
  const int64_t inside = (window.h1 - window.h0) * (window.w1 - window.w0);
  int64_t sum = (window.count - inside) * zero_point;
  for (int64_t h = window.h0; h < window.h1; ++h) {
    for (int64_t w = window.w0; w < window.w1; ++w) sum += plane[h * x[2] + w];
  }
  return sum;
}

double UnaryFunction(const Node& node, double x) {
  switch (node.op) {
    case OpType::kRelu:
      return std::max(x, 0.0);
    case OpType::kClip:
      return Activate(node, x);
    case OpType::kSigmoid:
      return 1.0 / (1.0 + std::exp(-x));
    case OpType::kHardSigmoid:
      return std::max(0.0, std::min(1.0, node.alpha * x + node.beta));
    case OpType::kSilu:
      return x / (1.0 + std::exp(-x));
    default:  // kHardSwish
      return x * std::max(0.0, std::min(1.0, x / 6.0 + 0.5));
  }
}

bool IsUnary(OpType op) {
  return op == OpType::kRelu || op == OpType::kClip || op == OpType::kSigmoid ||
         op == OpType::kHardSigmoid || op == OpType::kHardSwish || op == OpType::kSilu;
}

Tensor EvaluateFloat(const Graph& graph, const Node& node, const std::vector<const Tensor*>& inputs,
                     int64_t n) {
  const Shape& out = graph.shape(node.output);
  Tensor result(DType::kF32, out.WithBatch(n));
  float* y = result.data<float>().data();
  if (node.op == OpType::kConv || node.op == OpType::kFullyConnected) {
    Linear(graph, node, inputs, n, y);
    return result;
  }
  std::vector<Operand> operands;
  for (size_t i = 0; i < inputs.size(); ++i) {
    operands.emplace_back(*inputs[i], graph.shape(node.inputs[i]));
  }
  const Shape& x_shape = graph.shape(node.inputs[0]);
  const int64_t elements = out.elements();
  for (int64_t image = 0; image < n; ++image, y += elements) {
    const float* x = operands[0].sample(image);
    switch (node.op) {
      case OpType::kConv:
      case OpType::kFullyConnected:
        break;  // above
      case OpType::kBatchNorm:
        for (int64_t i = 0; i < elements; ++i) {
          const int64_t c = i / (elements / out[0]);
          const double v = double{x[i]} * node.weight.data<float>()[c] + node.bias.data<float>()[c];
          y[i] = static_cast<float>(Activate(node, v));
        }
        break;
      case OpType::kRelu:
      case OpType::kClip:
      case OpType::kSigmoid:
      case OpType::kHardSigmoid:
      case OpType::kHardSwish:
      case OpType::kSilu:
        for (int64_t i = 0; i < elements; ++i) {
          y[i] = static_cast<float>(UnaryFunction(node, x[i]));
        }
        break;
      case OpType::kAdd:
      case OpType::kSub:
      case OpType::kMul:
      case OpType::kDiv:
        for (int64_t i = 0; i < elements; ++i) {
          const double a = x[BroadcastIndex(x_shape, out, i)];
          const double b =
              operands[1].sample(image)[BroadcastIndex(graph.shape(node.inputs[1]), out, i)];
          y[i] = static_cast<float>(Activate(node, Arithmetic(node.op, a, b)));
        }
        break;
      case OpType::kConcat: {
        // Runs of each input follow each other, once per index before the axis.
        int64_t outer = 1, done = 0;
        for (int d = 0; d < node.axis; ++d) outer *= out[d];
        for (size_t k = 0; k < operands.size(); ++k) {
          const int64_t run = graph.shape(node.inputs[k]).elements() / outer;
          for (int64_t o = 0; o < outer; ++o) {
            std::copy_n(operands[k].sample(image) + o * run, run,
                        y + o * (elements / outer) + done);
          }
          done += run;
        }
        break;
      }
      case OpType::kMaxPool:
      case OpType::kAveragePool:
        Pool(node, x_shape, out, x, y);
        break;
      case OpType::kGlobalAveragePool:
        for (int64_t c = 0; c < out[0]; ++c) {
          const int64_t area = x_shape[1] * x_shape[2];
          double sum = 0;
          for (int64_t i = 0; i < area; ++i) sum += x[c * area + i];
          y[c] = static_cast<float>(sum / static_cast<double>(area));
        }
        break;
      case OpType::kReshape:
      case OpType::kTranspose:
      case OpType::kSlice:
      case OpType::kPad:
        for (int64_t i = 0; i < elements; ++i) {
          const int64_t source = SourceIndex(node, x_shape, out, i);
          y[i] = source < 0 ? node.pad_value : x[source];
        }
        break;
      case OpType::kSoftmax:
        Softmax(node, x_shape, x, y);
        break;
      case OpType::kReduceMean:
        ReduceMean(node, x_shape, out, x, y);
        break;
    }
  }
  return result;
}

absl::Status CheckInput(const Graph& graph, const Tensor& input) {
  const Shape& wanted = graph.shape(graph.input);
  const Shape& got = input.shape();
  if (input.dtype() != DType::kF32 || got.rank() != wanted.rank() + 1 || got[0] < 1 ||
      got != wanted.WithBatch(got[0])) {
    return absl::InvalidArgumentError(absl::StrCat("the input is ", Name(input.dtype()),
                                                   got.ToString(), ", wanted f32 [n,...] with ",
                                                   wanted.ToString(), " per image"));
  }
  return absl::OkStatus();
}

}  // namespace tern::reference
