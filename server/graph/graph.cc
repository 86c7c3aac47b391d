#include "server/graph/graph.h"

#include <algorithm>

namespace tern::graph {

const char* Name(OpType op) {
  switch (op) {
    case OpType::kConv:
      return "Conv";
    case OpType::kFullyConnected:
      return "FullyConnected";
    case OpType::kBatchNorm:
      return "BatchNorm";
    case OpType::kRelu:
      return "Relu";
    case OpType::kClip:
      return "Clip";
    case OpType::kSigmoid:
      return "Sigmoid";
    case OpType::kHardSigmoid:
      return "HardSigmoid";
    case OpType::kHardSwish:
      return "HardSwish";
    case OpType::kSilu:
      return "Silu";
    case OpType::kAdd:
      return "Add";
    case OpType::kSub:
      return "Sub";
    case OpType::kMul:
      return "Mul";
    case OpType::kDiv:
      return "Div";
    case OpType::kConcat:
      return "Concat";
    case OpType::kMaxPool:
      return "MaxPool";
    case OpType::kAveragePool:
      return "AveragePool";
    case OpType::kGlobalAveragePool:
      return "GlobalAveragePool";
    case OpType::kReshape:
      return "Reshape";
    case OpType::kTranspose:
      return "Transpose";
    case OpType::kSlice:
      return "Slice";
    case OpType::kPad:
      return "Pad";
    case OpType::kSoftmax:
      return "Softmax";
    case OpType::kReduceMean:
      return "ReduceMean";
  }
  return "?";
}

int Graph::ProducerOf(ValueId id) const {
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].output == id) return static_cast<int>(i);
  }
  return -1;
}

std::vector<int> Graph::ConsumersOf(ValueId id) const {
  std::vector<int> consumers;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const std::vector<ValueId>& inputs = nodes[i].inputs;
    if (std::find(inputs.begin(), inputs.end(), id) != inputs.end()) {
      consumers.push_back(static_cast<int>(i));
    }
  }
  return consumers;
}

int64_t MultiplyAccumulates(const Graph& graph, const Node& node) {
  if (node.op != OpType::kConv && node.op != OpType::kFullyConnected) return 0;
  const Shape& weight = node.quantized ? node.quantized->codes.shape() : node.weight.shape();
  // One product per weight and output position; weight[0] is the number of output channels.
  return weight.elements() * (graph.shape(node.output).elements() / weight[0]);
}

}  // namespace tern::graph
