#include "server/quant/placement.h"

namespace tern::quant {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;

bool IsWeighted(const Node& node) {
  return node.op == OpType::kConv || node.op == OpType::kFullyConnected;
}

bool IsPerChannelOf(const Shape& small, const Shape& large) {
  return small.rank() == 3 && large.rank() == 3 && small[0] == large[0] && small[1] == 1 &&
         small[2] == 1;
}

}  // namespace

bool HasIntegerRule(const Graph& graph, const Node& node) {
  for (graph::ValueId id : node.inputs) {
    if (graph.values[id].constant) return false;
  }
  switch (node.op) {
    case OpType::kSoftmax:
    case OpType::kSub:
    case OpType::kDiv:
    case OpType::kReduceMean:
      return false;
    case OpType::kAdd:
    case OpType::kMul: {
      const Shape& a = graph.shape(node.inputs[0]);
      const Shape& b = graph.shape(node.inputs[1]);
      return a == b || IsPerChannelOf(a, b) || IsPerChannelOf(b, a);
    }
    default:
      return true;
  }
}

bool PassesParametersThrough(const Node& node) {
  switch (node.op) {
    case OpType::kMaxPool:
    case OpType::kSlice:
    case OpType::kReshape:
    case OpType::kTranspose:
      return true;
    case OpType::kPad:
      return node.pad_value == 0.0f;
    default:
      return false;
  }
}

Placement Place(const Graph& graph) {
  Placement placement;
  placement.values.assign(graph.values.size(), Codes::kFloat);
  placement.concat.assign(graph.values.size(), -1);
  placement.integer_node.assign(graph.nodes.size(), false);
  std::vector<bool> wanted(graph.values.size(), false);
  const int nodes = static_cast<int>(graph.nodes.size());
  for (int i = nodes - 1; i >= 0; --i) {
    const Node& node = graph.nodes[i];
    const bool weighted = IsWeighted(node);
    if (node.output == graph.output) wanted[node.output] = false;
    placement.integer_node[i] = weighted || (wanted[node.output] && HasIntegerRule(graph, node));
    if (!placement.integer_node[i]) continue;
    for (graph::ValueId id : node.inputs) {
      if (!graph.values[id].constant) wanted[id] = true;
    }
  }
  for (size_t id = 0; id < wanted.size(); ++id) {
    if (wanted[id]) placement.values[id] = Codes::kOwn;
  }
  for (int i = 0; i < nodes; ++i) {
    const Node& node = graph.nodes[i];
    if (!wanted[node.output]) continue;
    if (placement.integer_node[i] && PassesParametersThrough(node)) {
      placement.values[node.output] = Codes::kPassThrough;
      continue;
    }
    const std::vector<int> consumers = graph.ConsumersOf(node.output);
    if (consumers.size() == 1 && placement.integer_node[consumers[0]] &&
        graph.nodes[consumers[0]].op == OpType::kConcat) {
      placement.values[node.output] = Codes::kConcat;
      placement.concat[node.output] = consumers[0];
    }
  }
  return placement;
}

}  // namespace tern::quant
