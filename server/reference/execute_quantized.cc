#include <array>
#include <cmath>
#include <limits>

#include "server/base/status_macros.h"
#include "server/graph/fixed_point.h"
#include "server/reference/execute.h"
#include "server/reference/fixed_point.h"
#include "server/reference/ops.h"

namespace tern::reference {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;

// Limits of the final clamp: codes for a u8 result, reals for a float one.
struct Limits {
  float lo, hi;
  float Clamp(float v) const { return std::min(std::max(v, lo), hi); }
};

Limits LimitsOf(const Node& node, const std::optional<QuantParams>& y) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (!y) return node.clip ? Limits{node.clip->lo, node.clip->hi} : Limits{-kInfinity, kInfinity};
  if (!node.clip) return {0.0f, 255.0f};
  return {static_cast<float>(y->Quantize(node.clip->lo)),
          static_cast<float>(y->Quantize(node.clip->hi))};
}

uint8_t Round(float v, const Limits& limits) {
  return static_cast<uint8_t>(limits.Clamp(std::nearbyint(v)));
}

using Table = std::array<uint8_t, 256>;

// The code in quantisation y of the real that each code of x stands for: the code itself if x == y,
// else v = fma(q, multiplier, offset), or its integer counterpart.
Table RescaleTable(graph::Arithmetic arithmetic, const QuantParams& x, const QuantParams& y) {
  Table table;
  const double ratio = double{x.scale} / y.scale;
  for (int q = 0; q < 256; ++q) {
    if (x == y) {
      table[q] = static_cast<uint8_t>(q);
    } else if (arithmetic == graph::Arithmetic::kFixedPoint) {
      table[q] = graph::FixedPointRescale(x, y)(q);
    } else {
      const float offset = static_cast<float>(y.zero_point - x.zero_point * ratio);
      table[q] =
          Round(std::fma(static_cast<float>(q), static_cast<float>(ratio), offset), {0.0f, 255.0f});
    }
  }
  return table;
}

// Executes one quantised graph.
class Executor {
 public:
  Executor(const Graph& graph, int64_t n) : graph_(graph), n_(n), values_(graph.values.size()) {}

  std::vector<Tensor> Run(const Tensor& input) {
    for (size_t id = 0; id < values_.size(); ++id) {
      if (graph_.values[id].constant) values_[id] = *graph_.values[id].constant;
    }
    Store(graph_.input, input);
    for (const Node& node : graph_.nodes) {
      if (!RunInteger(node)) RunFloat(node);
    }
    return std::move(values_);
  }

 private:
  const std::optional<QuantParams>& quant(graph::ValueId id) const {
    return graph_.values[id].quant;
  }
  const uint8_t* codes(graph::ValueId id) const { return values_[id].data<uint8_t>().data(); }
  // The result's codes, allocated.
  absl::Span<uint8_t> NewCodes(const Node& node) {
    values_[node.output] = Tensor(DType::kU8, graph_.shape(node.output).WithBatch(n_));
    return values_[node.output].data<uint8_t>();
  }

  // Keeps a float result, as codes if the value is quantised.
  void Store(graph::ValueId id, Tensor real) {
    if (!quant(id)) {
      values_[id] = std::move(real);
      return;
    }
    values_[id] = Tensor(DType::kU8, real.shape());
    for (int64_t i = 0; i < real.elements(); ++i) {
      values_[id].data<uint8_t>()[i] = quant(id)->Quantize(real.data<float>()[i]);
    }
  }

  // No integer rule: dequantise, float operator, quantise.
  void RunFloat(const Node& node) {
    std::vector<Tensor> reals(node.inputs.size());
    std::vector<const Tensor*> inputs;
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      const Tensor& held = values_[node.inputs[k]];
      if (held.dtype() != DType::kU8) {
        inputs.push_back(&held);
        continue;
      }
      reals[k] = Tensor(DType::kF32, held.shape());
      for (int64_t i = 0; i < held.elements(); ++i) {
        reals[k].data<float>()[i] = quant(node.inputs[k])->Dequantize(held.data<uint8_t>()[i]);
      }
      inputs.push_back(&reals[k]);
    }
    Store(node.output, EvaluateFloat(graph_, node, inputs, n_));
  }

  // False if the node has no integer rule or a value is not u8.
  bool RunInteger(const Node& node) {
    for (graph::ValueId id : node.inputs) {
      if (!quant(id) || graph_.values[id].constant) return false;
    }
    if (node.op == OpType::kConv || node.op == OpType::kFullyConnected) {
      if (!node.quantized) return false;
      if (graph_.arithmetic == graph::Arithmetic::kFixedPoint) {
        FixedPoint(node);
      } else {
        Linear(node);
      }
      return true;
    }
    if (!quant(node.output)) return false;
    if (graph_.arithmetic == graph::Arithmetic::kFixedPoint && FixedPoint(node)) return true;
    if (IsUnary(node.op)) {
      Unary(node);
      return true;
    }
    switch (node.op) {
      case OpType::kBatchNorm:
        BatchNorm(node);
        return true;
      case OpType::kAdd:
        Add(node);
        return true;
      case OpType::kMul:
        Mul(node);
        return true;
      case OpType::kConcat:
        Concat(node);
        return true;
      case OpType::kMaxPool:
        MaxPool(node);
        return true;
      case OpType::kAveragePool:
      case OpType::kGlobalAveragePool:
        AveragePool(node);
        return true;
      case OpType::kReshape:
      case OpType::kTranspose:
      case OpType::kSlice:
      case OpType::kPad:
        Move(node);
        return true;
      default:
        return false;
    }
  }

  // Operators whose fixed-point rule is not a table; false for others.
  bool FixedPoint(const Node& node) {
    Codes inputs;
    for (graph::ValueId id : node.inputs) inputs.push_back(codes(id));
    const bool linear = node.op == OpType::kConv || node.op == OpType::kFullyConnected;
    if (linear && !quant(node.output)) {
      // Real numbers leave the integers here: one rounding to f32, and an exact power of two.
      const float unit = std::ldexp(1.0f, graph::FixedPointOf(graph_, node).exponent);
      const Limits limits = LimitsOf(node, {});
      const std::vector<int64_t> sums = FixedPointSums(graph_, node, inputs, n_);
      Tensor result(DType::kF32, graph_.shape(node.output).WithBatch(n_));
      for (size_t i = 0; i < sums.size(); ++i) {
        result.data<float>()[i] = limits.Clamp(static_cast<float>(sums[i]) * unit);
      }
      values_[node.output] = std::move(result);
      return true;
    }
    const auto run = linear                    ? FixedPointLinear
                     : node.op == OpType::kAdd ? FixedPointAddition
                     : node.op == OpType::kMul ? FixedPointMultiplication
                     : node.op == OpType::kAveragePool || node.op == OpType::kGlobalAveragePool
                         ? FixedPointAveragePool
                         : nullptr;
    if (run == nullptr) return false;
    run(graph_, node, inputs, n_, NewCodes(node).data());
    return true;
  }

  void Linear(const Node& node) {
    const QuantizedWeights& weights = *node.quantized;
    const Shape& weight = weights.codes.shape();
    const std::vector<int32_t> w = IntegerWeights(weights);
    const Shape& x_shape = graph_.shape(node.inputs[0]);
    const Shape& out = graph_.shape(node.output);
    const QuantParams x = *quant(node.inputs[0]);
    const std::optional<QuantParams>& y = quant(node.output);
    const double sy = y ? y->scale : 1.0, zy = y ? y->zero_point : 0.0;
    const Limits limits = LimitsOf(node, y);

    const uint8_t* residual = nullptr;
    double residual_scale = 0, residual_offset = 0;
    if (node.has_residual()) {
      const QuantParams r = *quant(node.inputs[1]);
      residual = codes(node.inputs[1]);
      residual_scale = double{r.scale} / sy;
      residual_offset = r.zero_point * residual_scale;
    }

    values_[node.output] = Tensor(y ? DType::kU8 : DType::kF32, out.WithBatch(n_));
    Tensor& result = values_[node.output];
    const int64_t rows = out.rank() == 3 ? out[1] : 1, columns = out.rank() == 3 ? out[2] : 1;
    const int64_t row = weight.elements() / weight[0];
    int64_t at = 0;
    for (int64_t image = 0; image < n_; ++image) {
      const uint8_t* sample = codes(node.inputs[0]) + image * x_shape.elements();
      for (int64_t o = 0; o < out[0]; ++o) {
        int64_t sum = 0;
        for (int64_t j = 0; j < row; ++j) sum += w[o * row + j];
        const double m = double{x.scale} * weights.steps[o] / sy;
        const double c = double{node.bias.data<float>()[o]} / sy + zy -
                         double(x.zero_point) * static_cast<double>(sum) * m - residual_offset;
        for (int64_t h = 0; h < rows; ++h) {
          for (int64_t col = 0; col < columns; ++col, ++at) {
            int32_t acc = 0;
            ForEachProduct(node, weight, x_shape, o, h, col, [&](int64_t wi, int64_t xi) {
              acc += w[wi] * (xi >= 0 ? sample[xi] : x.zero_point);
            });
            float v =
                std::fma(static_cast<float>(acc), static_cast<float>(m), static_cast<float>(c));
            if (residual != nullptr) {
              v = std::fma(static_cast<float>(residual[at]), static_cast<float>(residual_scale), v);
            }
            if (y) {
              result.data<uint8_t>()[at] = Round(v, limits);
            } else {
              result.data<float>()[at] = limits.Clamp(v);
            }
          }
        }
      }
    }
  }

  void Unary(const Node& node) {
    Table table;
    for (int q = 0; q < 256; ++q) {
      const float x = quant(node.inputs[0])->Dequantize(static_cast<uint8_t>(q));
      table[q] = quant(node.output)->Quantize(static_cast<float>(UnaryFunction(node, x)));
    }
    const uint8_t* x = codes(node.inputs[0]);
    for (uint8_t& q : NewCodes(node)) q = table[*x++];
  }

  void BatchNorm(const Node& node) {
    const QuantParams x = *quant(node.inputs[0]), y = *quant(node.output);
    const Limits limits = LimitsOf(node, y);
    const Shape& shape = graph_.shape(node.output);
    const int64_t area = shape.elements() / shape[0];
    const absl::Span<uint8_t> out = NewCodes(node);
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t c = static_cast<int64_t>(i) / area % shape[0];
      if (graph_.arithmetic == graph::Arithmetic::kFixedPoint) {
        out[i] = graph::FixedPointBatchNorm(graph_, node, c)(codes(node.inputs[0])[i]);
        continue;
      }
      const double m = double{node.weight.data<float>()[c]} * x.scale / y.scale;
      const double offset =
          double{node.bias.data<float>()[c]} / y.scale + y.zero_point - x.zero_point * m;
      out[i] = Round(std::fma(static_cast<float>(codes(node.inputs[0])[i]), static_cast<float>(m),
                              static_cast<float>(offset)),
                     limits);
    }
  }

  // The code of operand k that element i of the whole result (with batch) takes.
  uint8_t Operand(const Node& node, int k, int64_t i) const {
    const Shape& out = graph_.shape(node.output);
    const Shape& x = graph_.shape(node.inputs[k]);
    const int64_t image = i / out.elements();
    return codes(node.inputs[k])[image * x.elements() + BroadcastIndex(x, out, i % out.elements())];
  }

  void Add(const Node& node) {
    const QuantParams a = *quant(node.inputs[0]), b = *quant(node.inputs[1]);
    const QuantParams y = *quant(node.output);
    const double ma = double{a.scale} / y.scale, mb = double{b.scale} / y.scale;
    const float c = static_cast<float>(y.zero_point - a.zero_point * ma - b.zero_point * mb);
    const Limits limits = LimitsOf(node, y);
    const absl::Span<uint8_t> out = NewCodes(node);
    for (size_t i = 0; i < out.size(); ++i) {
      const float partial =
          std::fma(static_cast<float>(Operand(node, 1, i)), static_cast<float>(mb), c);
      out[i] =
          Round(std::fma(static_cast<float>(Operand(node, 0, i)), static_cast<float>(ma), partial),
                limits);
    }
  }

  void Mul(const Node& node) {
    const QuantParams a = *quant(node.inputs[0]), b = *quant(node.inputs[1]);
    const QuantParams y = *quant(node.output);
    const float m = static_cast<float>(double{a.scale} * b.scale / y.scale);
    const Limits limits = LimitsOf(node, y);
    const absl::Span<uint8_t> out = NewCodes(node);
    for (size_t i = 0; i < out.size(); ++i) {
      const int product =
          (Operand(node, 0, i) - a.zero_point) * (Operand(node, 1, i) - b.zero_point);
      out[i] =
          Round(std::fma(static_cast<float>(product), m, static_cast<float>(y.zero_point)), limits);
    }
  }

  void Concat(const Node& node) {
    const Shape& shape = graph_.shape(node.output);
    int64_t outer = 1;
    for (int d = 0; d < node.axis; ++d) outer *= shape[d];
    const absl::Span<uint8_t> out = NewCodes(node);
    int64_t done = 0;
    for (graph::ValueId id : node.inputs) {
      const Table rescale = RescaleTable(graph_.arithmetic, *quant(id), *quant(node.output));
      const int64_t run = graph_.shape(id).elements() / outer;
      for (int64_t o = 0; o < n_ * outer; ++o) {
        for (int64_t i = 0; i < run; ++i) {
          out[o * (shape.elements() / outer) + done + i] = rescale[codes(id)[o * run + i]];
        }
      }
      done += run;
    }
  }

  void MaxPool(const Node& node) {
    const Shape& x = graph_.shape(node.inputs[0]);
    const Shape& shape = graph_.shape(node.output);
    const Table rescale =
        RescaleTable(graph_.arithmetic, *quant(node.inputs[0]), *quant(node.output));
    const uint8_t* from = codes(node.inputs[0]);
    uint8_t* to = NewCodes(node).data();
    for (int64_t plane = 0; plane < n_ * shape[0]; ++plane, from += x[1] * x[2]) {
      for (int64_t oh = 0; oh < shape[1]; ++oh) {
        for (int64_t ow = 0; ow < shape[2]; ++ow) {
          const PoolWindow window = WindowAt(node.pool, x, oh, ow);
          uint8_t most = 0;
          for (int64_t h = window.h0; h < window.h1; ++h) {
            for (int64_t w = window.w0; w < window.w1; ++w) {
              most = std::max(most, from[h * x[2] + w]);
            }
          }
          *to++ = rescale[most];
        }
      }
    }
  }

  void AveragePool(const Node& node) {
    const Shape& x = graph_.shape(node.inputs[0]);
    const Shape& shape = graph_.shape(node.output);
    const QuantParams from_quant = *quant(node.inputs[0]), y = *quant(node.output);
    const graph::PoolAttributes pool = AveragePoolOf(node, x);
    const double ratio = double{from_quant.scale} / y.scale;
    const float c = static_cast<float>(y.zero_point - from_quant.zero_point * ratio);
    const uint8_t* from = codes(node.inputs[0]);
    uint8_t* to = NewCodes(node).data();
    for (int64_t plane = 0; plane < n_ * shape[0]; ++plane, from += x[1] * x[2]) {
      for (int64_t oh = 0; oh < shape[1]; ++oh) {
        for (int64_t ow = 0; ow < shape[2]; ++ow) {
          const PoolWindow window = WindowAt(pool, x, oh, ow);
          const int64_t sum = WindowSum(window, from, x, from_quant.zero_point);
          const float m = static_cast<float>(double{from_quant.scale} /
                                             (static_cast<double>(window.count) * y.scale));
          *to++ = Round(std::fma(static_cast<float>(sum), m, c), {0.0f, 255.0f});
        }
      }
    }
  }

  void Move(const Node& node) {
    const Shape& x = graph_.shape(node.inputs[0]);
    const Shape& shape = graph_.shape(node.output);
    const Table rescale =
        RescaleTable(graph_.arithmetic, *quant(node.inputs[0]), *quant(node.output));
    const uint8_t pad = quant(node.output)->Quantize(node.pad_value);
    const absl::Span<uint8_t> out = NewCodes(node);
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t image = static_cast<int64_t>(i) / shape.elements();
      const int64_t source =
          SourceIndex(node, x, shape, static_cast<int64_t>(i) % shape.elements());
      out[i] = source < 0 ? pad : rescale[codes(node.inputs[0])[image * x.elements() + source]];
    }
  }

  const Graph& graph_;
  const int64_t n_;
  std::vector<Tensor> values_;
};

}  // namespace

absl::StatusOr<std::vector<Tensor>> ExecuteQuantized(const Graph& graph, const Tensor& input) {
  TERN_RETURN_IF_ERROR(CheckInput(graph, input));
  return Executor(graph, input.shape()[0]).Run(input);
}

}  // namespace tern::reference
