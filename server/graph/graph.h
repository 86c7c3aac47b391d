// The intermediate representation of a classification network.
//
// A Graph is a list of nodes in topological order over values. Every value is a tensor
// with the batch as its leading, dynamic dimension; Shape fields hold the dimensions after
// it ("sample shape": [c,h,w] for an image, [c] for a vector). Layout semantics are NCHW, as
// in ONNX; executors choose their own memory layout. Axis attributes count sample
// dimensions from 0 (so channel axis = 0); no operator moves the batch.
//
// After import a graph is float and unfused; passes/ folds batch normalisation and fuses
// activations and residual additions into convolutions; the quantiser adds QuantParams to
// values and QuantizedWeights to nodes. One structure serves all three stages.
#ifndef TERN_SERVER_GRAPH_GRAPH_H_
#define TERN_SERVER_GRAPH_GRAPH_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/tensor/quant_params.h"
#include "server/tensor/quantized_weights.h"
#include "server/tensor/shape.h"
#include "server/tensor/tensor.h"

namespace tern::graph {

using ValueId = int32_t;
inline constexpr ValueId kNoValue = -1;

enum class OpType : uint8_t {
  kConv = 0,        // inputs x [, residual]; attributes `conv`; weight, bias
  kFullyConnected,  // inputs x [c] [, residual]; weight [o,c], bias [o]
  kBatchNorm,       // y = x * scale[c] + shift[c]; vectors in `weight` [c] and `bias` [c]
  kRelu,
  kClip,  // `clip` bounds
  kSigmoid,
  kHardSigmoid,  // max(0, min(1, alpha*x + beta)); alpha, beta
  kHardSwish,    // x * max(0, min(1, x/6 + 1/2))
  kAdd,          // inputs a, b (numpy broadcasting over sample dimensions)
  kSub,
  kMul,  // as kAdd
  kDiv,
  kConcat,             // `axis`
  kMaxPool,            // `pool`
  kAveragePool,        // `pool`
  kGlobalAveragePool,  // [c,h,w] -> [c,1,1]
  kReshape,            // output's shape; batch stays in front (flatten, squeeze, ... are this)
  kTranspose,          // `perm` of the sample dimensions
  kSlice,              // `axis`, `start`, `end`, `step` (1 slice axis per node; end exclusive)
  kPad,                // zero or constant `pad_value`; `pads_before`/`pads_after` per sample dim
  kSoftmax,            // `axis`
  kReduceMean,         // over `axes`; output's shape says whether dimensions are kept
  kSilu,               // x * sigmoid(x)
};

// "Conv", "FullyConnected", ...
const char* Name(OpType op);

// Rows first, then columns. pads: top, left, bottom, right, in elements.
struct ConvAttributes {
  int stride_h = 1, stride_w = 1;
  int pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  int dilation_h = 1, dilation_w = 1;
  int groups = 1;
  friend bool operator==(const ConvAttributes&, const ConvAttributes&) = default;
};

// Windows that would start beyond the input and its leading pad are dropped (as in torch),
// so every window covers at least one element. The divisor of an average is the number of
// elements of the input under the window; with count_include_pad also those of the pads, but
// never what ceil_mode adds beyond them.
struct PoolAttributes {
  int kernel_h = 1, kernel_w = 1;
  int stride_h = 1, stride_w = 1;
  int pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  bool ceil_mode = false;          // already applied in the output's shape
  bool count_include_pad = false;  // average only
  friend bool operator==(const PoolAttributes&, const PoolAttributes&) = default;
};

// A fused activation: y = min(max(x, lo), hi). ReLU: [0, inf); ReLU6: [0, 6].
struct ClipRange {
  float lo = 0.0f;
  float hi = 0.0f;
  friend bool operator==(const ClipRange&, const ClipRange&) = default;
};

struct Node {
  std::string name;  // as in the ONNX file; made unique; used in messages and reports
  OpType op = OpType::kRelu;
  std::vector<ValueId> inputs;
  ValueId output = kNoValue;

  ConvAttributes conv;
  PoolAttributes pool;
  std::optional<ClipRange> clip;  // kClip's bounds, or the activation fused into
                                  // kConv / kFullyConnected / kAdd / kBatchNorm
  int axis = 0;
  int64_t start = 0, end = 0, step = 1;
  std::vector<int> perm;
  std::vector<int> axes;
  std::vector<int64_t> pads_before, pads_after;
  float pad_value = 0.0f;
  float alpha = 0.0f, beta = 0.0f;

  Tensor weight;  // f32; kConv OIHW [o, c/groups, kh, kw]; empty once quantised
  Tensor bias;    // f32 [o]; always present on kConv / kFullyConnected / kBatchNorm

  // Set by the quantiser on kConv / kFullyConnected; then `weight` is empty.
  std::optional<QuantizedWeights> quantized;

  bool has_residual() const {
    return (op == OpType::kConv || op == OpType::kFullyConnected) && inputs.size() == 2;
  }
};

struct Value {
  std::string name;
  Shape shape;                       // sample shape (without the batch)
  std::optional<Tensor> constant;    // f32; broadcast over the batch; its shape == shape;
                                     // only an operand of kAdd, kSub, kMul, kDiv
  std::optional<QuantParams> quant;  // set: the tensor is held as u8 codes
};

// How a quantised graph computes between codes (docs/quantisation.md).
enum class Arithmetic : uint8_t {
  kFloatEpilogue = 0,  // integer sums, then f32 multiply-adds and one rounding
  kFixedPoint = 1,     // integers only; server/graph/fixed_point.h says what the graph promises
};

// A value type; thread compatible.
struct Graph {
  std::string name;
  std::vector<Value> values;
  std::vector<Node> nodes;  // topological order
  ValueId input = kNoValue;
  ValueId output = kNoValue;
  Arithmetic arithmetic = Arithmetic::kFloatEpilogue;  // of no meaning to a float graph

  ValueId AddValue(Value value) {
    values.push_back(std::move(value));
    return static_cast<ValueId>(values.size()) - 1;
  }
  const Shape& shape(ValueId id) const { return values[id].shape; }
  // The index of the node that writes `id`, or -1 (input, constant).
  int ProducerOf(ValueId id) const;
  // Indices of the nodes that read `id`, in order, each once.
  std::vector<int> ConsumersOf(ValueId id) const;

  // Number of classes: elements of the output's sample shape.
  int64_t classes() const { return values[output].shape.elements(); }
};

// Limits of every graph that Validate accepts.
inline constexpr int64_t kMaxElements = (int64_t{1} << 31) - 1;  // of one value or weight
inline constexpr int kMaxRank = 8;                               // of a sample shape

// OK if the rank is at most kMaxRank, every extent at least 1 and their product at most
// kMaxElements; INVALID_ARGUMENT otherwise. Never overflows: for shapes from outside, before
// Shape::elements() or a Tensor is made of them.
absl::Status CheckExtents(const Shape& shape);

// Whether `value` can be stretched to `target` by numpy's rules (right-aligned; 1 stretches).
bool BroadcastsTo(const Shape& value, const Shape& target);

// The output sample shape of `node` from its inputs' shapes and attributes (kReshape and
// kReduceMean: the declared output shape is checked, not inferred). INVALID_ARGUMENT naming
// node, got and wanted if they do not fit.
absl::StatusOr<Shape> InferShape(const Graph& graph, const Node& node);

// Everything an executor relies on: ids in range, topological order, each value written
// once, shapes agree with InferShape, weights and biases have the right sizes, they and the
// constants are finite, every shape passes CheckExtents, constants are f32 and only operands of
// element-wise arithmetic beside a value that is not constant, attributes lie in their ranges (clip
// bounds ordered, pads below the kernel in pooling), and quantised weights keep the promises of
// QuantizedWeights (codes and scales in range, s32 sums exact), and a fixed-point graph those of
// fixed_point.h. INVALID_ARGUMENT otherwise, naming node or value. Run on every graph that comes
// from outside (ONNX, artifact). Linear in the graph's size.
absl::Status Validate(const Graph& graph);

// Multiply-accumulates of one image through `node` (convolution, fully connected); else 0.
int64_t MultiplyAccumulates(const Graph& graph, const Node& node);

}  // namespace tern::graph

#endif  // TERN_SERVER_GRAPH_GRAPH_H_
