#include <algorithm>
#include <numeric>

#include "server/graph/passes.h"
#include "server/graph/rewrite.h"

namespace tern::graph {
namespace {

bool IsIdentity(const Graph& graph, const Node& node) {
  const Value& in = graph.values[node.inputs[0]];
  const Value& out = graph.values[node.output];
  if (in.shape != out.shape || in.quant != out.quant) return false;
  if (node.op == OpType::kReshape) return true;
  // torch writes an adaptive pool of the same size as a 1x1 average. Equal shapes and no pads
  // (which must be smaller than the kernel) leave only stride 1, or one element per axis.
  if (node.op == OpType::kAveragePool || node.op == OpType::kMaxPool) {
    return node.pool.kernel_h == 1 && node.pool.kernel_w == 1;
  }
  if (node.op != OpType::kTranspose) return false;
  return std::is_sorted(node.perm.begin(), node.perm.end());
}

// Readers of an identity read its input instead.
void BypassIdentities(Graph& graph, std::vector<bool>& removed) {
  std::vector<ValueId> source(graph.values.size());
  std::iota(source.begin(), source.end(), 0);
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    Node& node = graph.nodes[i];
    for (ValueId& id : node.inputs) id = source[id];
    if (!IsIdentity(graph, node)) continue;
    if (node.output == graph.output) {
      // The output must be written by a node, so an identity of the input stays.
      if (node.inputs[0] == graph.input) continue;
      graph.output = node.inputs[0];
      graph.values[graph.output].name = graph.values[node.output].name;
    }
    source[node.output] = node.inputs[0];
    removed[i] = true;
  }
}

void CompactValues(Graph& graph) {
  std::vector<bool> used(graph.values.size());
  used[graph.input] = used[graph.output] = true;
  for (const Node& node : graph.nodes) {
    used[node.output] = true;
    for (ValueId id : node.inputs) used[id] = true;
  }
  std::vector<ValueId> renumbered(graph.values.size(), kNoValue);
  std::vector<Value> kept;
  for (size_t id = 0; id < graph.values.size(); ++id) {
    if (!used[id]) continue;
    renumbered[id] = static_cast<ValueId>(kept.size());
    kept.push_back(std::move(graph.values[id]));
  }
  graph.values = std::move(kept);
  for (Node& node : graph.nodes) {
    node.output = renumbered[node.output];
    for (ValueId& id : node.inputs) id = renumbered[id];
  }
  graph.input = renumbered[graph.input];
  graph.output = renumbered[graph.output];
}

}  // namespace

int EraseNodes(Graph& graph, const std::vector<bool>& removed) {
  std::vector<Node> kept;
  kept.reserve(graph.nodes.size());
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (!removed[i]) kept.push_back(std::move(graph.nodes[i]));
  }
  const int erased = static_cast<int>(graph.nodes.size() - kept.size());
  graph.nodes = std::move(kept);
  return erased;
}

int RemoveDeadCode(Graph& graph) {
  std::vector<bool> removed(graph.nodes.size());
  BypassIdentities(graph, removed);
  std::vector<bool> wanted(graph.values.size());
  wanted[graph.output] = true;
  for (size_t i = graph.nodes.size(); i-- > 0;) {
    const Node& node = graph.nodes[i];
    if (removed[i] || !wanted[node.output]) {
      removed[i] = true;
      continue;
    }
    for (ValueId id : node.inputs) wanted[id] = true;
  }
  const int erased = EraseNodes(graph, removed);
  CompactValues(graph);
  return erased;
}

}  // namespace tern::graph
