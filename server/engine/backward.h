// Derivatives of single float operations, for training scales and biases (server/quant/distill.h).
#ifndef TERN_SERVER_ENGINE_BACKWARD_H_
#define TERN_SERVER_ENGINE_BACKWARD_H_

#include <vector>

#include "absl/status/statusor.h"
#include "server/graph/graph.h"

namespace tern::engine {

// Derivatives of a scalar loss. Tensors are f32 with the shapes of what they are derivatives of.
struct Gradients {
  std::vector<Tensor> inputs;  // by input of the node; empty where not wanted and for constants
  Tensor weight, bias;         // kConv, kFullyConnected; empty unless wanted
};

struct BackwardOptions {
  std::vector<bool> inputs;  // which inputs' derivatives are wanted; as many as the node has
  bool weight = false;       // also those of weight and bias
  int threads = 1;           // OpenMP threads
};

// The derivatives of a loss with respect to the inputs of one float node, given those with respect
// to its output. `inputs` and `output` are what RunFloatNode took and gave: f32 NCHW [n, ...],
// constants without the batch. A clip or ReLU passes nothing where the output lies on a bound.
// INVALID_ARGUMENT on shapes that do not fit, INTERNAL if oneDNN fails. Thread safe.
absl::StatusOr<Gradients> RunBackward(const graph::Graph& graph, const graph::Node& node,
                                      const std::vector<const Tensor*>& inputs,
                                      const Tensor& output, const Tensor& output_gradient,
                                      const BackwardOptions& options);

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_BACKWARD_H_
