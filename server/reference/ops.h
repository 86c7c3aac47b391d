// What the two executors share. Internal to this folder. Shapes are sample shapes.
#ifndef TERN_SERVER_REFERENCE_OPS_H_
#define TERN_SERVER_REFERENCE_OPS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "server/graph/graph.h"

namespace tern::reference {

// The element of a sample of shape `x` that element `i` of the result takes, for kReshape,
// kTranspose, kSlice and kPad; -1 where the result is padding.
int64_t SourceIndex(const graph::Node& node, const Shape& x, const Shape& out, int64_t i);

// The element of an operand of shape `x` that element `i` of a broadcast result takes.
int64_t BroadcastIndex(const Shape& x, const Shape& out, int64_t i);

// The input elements under one window of a pool: rows [h0,h1), columns [w0,w1), and what an
// average divides by.
struct PoolWindow {
  int64_t h0, h1, w0, w1, count;
};
PoolWindow WindowAt(const graph::PoolAttributes& pool, const Shape& x, int64_t oh, int64_t ow);

// The windows of an average pool: the node's own, or the whole plane of kGlobalAveragePool.
graph::PoolAttributes AveragePoolOf(const graph::Node& node, const Shape& x);
// The sum of the codes under a window of one plane; padding that counts is real zeros.
int64_t WindowSum(const PoolWindow& window, const uint8_t* plane, const Shape& x,
                  int32_t zero_point);

// The function of kRelu, kClip, kSigmoid, kHardSigmoid, kHardSwish and kSilu, in double.
double UnaryFunction(const graph::Node& node, double x);
bool IsUnary(graph::OpType op);

// Calls visit(index of the weight's element, index into the sample or -1 for padding) for
// every product of the convolution or fully connected layer at output position (o, oh, ow).
template <typename Visit>
void ForEachProduct(const graph::Node& node, const Shape& weight, const Shape& x, int64_t o,
                    int64_t oh, int64_t ow, Visit visit) {
  if (weight.rank() == 2) {
    for (int64_t c = 0; c < weight[1]; ++c) visit(o * weight[1] + c, c);
    return;
  }
  const graph::ConvAttributes& conv = node.conv;
  const int64_t group = o / (weight[0] / conv.groups);
  int64_t at = o * weight[1] * weight[2] * weight[3];
  for (int64_t c = 0; c < weight[1]; ++c) {
    for (int64_t kh = 0; kh < weight[2]; ++kh) {
      const int64_t h = oh * conv.stride_h - conv.pad_top + kh * conv.dilation_h;
      for (int64_t kw = 0; kw < weight[3]; ++kw, ++at) {
        const int64_t w = ow * conv.stride_w - conv.pad_left + kw * conv.dilation_w;
        const bool inside = h >= 0 && h < x[1] && w >= 0 && w < x[2];
        visit(at, inside ? ((group * weight[1] + c) * x[1] + h) * x[2] + w : -1);
      }
    }
  }
}

// Evaluates one node on f32 inputs [n, ...] (constants: their own shape), whatever the
// QuantParams of its values; quantised weights count as the reals they stand for.
Tensor EvaluateFloat(const graph::Graph& graph, const graph::Node& node,
                     const std::vector<const Tensor*>& inputs, int64_t n);

// INVALID_ARGUMENT unless `input` is f32 [n, ...] for the graph's input, n >= 1.
absl::Status CheckInput(const graph::Graph& graph, const Tensor& input);

}  // namespace tern::reference

#endif  // TERN_SERVER_REFERENCE_OPS_H_
