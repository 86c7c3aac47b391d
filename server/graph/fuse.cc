#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "server/graph/passes.h"
#include "server/graph/rewrite.h"

namespace tern::graph {
namespace {

bool TakesActivation(const Node& node) {
  return node.op == OpType::kConv || node.op == OpType::kFullyConnected ||
         node.op == OpType::kAdd || node.op == OpType::kBatchNorm;
}

// Every element of the result is one of the input, or zero.
bool MovesCodes(const Node& node) {
  return node.op == OpType::kSlice || node.op == OpType::kReshape ||
         node.op == OpType::kTranspose || node.op == OpType::kMaxPool ||
         (node.op == OpType::kPad && node.pad_value == 0.0f);
}

// `outer` after `inner`. Clipping is monotone, so clipping the bounds composes the two.
ClipRange Compose(const ClipRange& inner, const ClipRange& outer) {
  return {std::clamp(inner.lo, outer.lo, outer.hi), std::clamp(inner.hi, outer.lo, outer.hi)};
}

}  // namespace

int FuseActivations(Graph& graph) {
  Wiring wiring(graph);
  std::vector<bool> removed(graph.nodes.size());
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    if (node.op != OpType::kRelu && node.op != OpType::kClip) continue;
    const ValueId x = node.inputs[0];
    if (!IsPrivate(graph, wiring, x)) continue;
    Node& producer = graph.nodes[wiring.producer[x]];
    if (!TakesActivation(producer)) continue;
    const ClipRange range = node.op == OpType::kClip
                                ? *node.clip
                                : ClipRange{0.0f, std::numeric_limits<float>::infinity()};
    producer.clip = producer.clip ? Compose(*producer.clip, range) : range;
    producer.output = node.output;
    wiring.producer[node.output] = wiring.producer[x];
    removed[i] = true;
  }
  return EraseNodes(graph, removed);
}

int FusePads(Graph& graph) {
  Wiring wiring(graph);
  std::vector<bool> removed(graph.nodes.size());
  for (Node& node : graph.nodes) {
    if (node.op != OpType::kConv && node.op != OpType::kAveragePool) continue;
    const ValueId x = node.inputs[0];
    if (!IsPrivate(graph, wiring, x)) continue;
    const int producer = wiring.producer[x];
    const Node& pad = graph.nodes[producer];
    if (pad.op != OpType::kPad || pad.pad_value != 0.0f || pad.pads_before.size() != 3 ||
        pad.pads_before[0] != 0 || pad.pads_after[0] != 0) {
      continue;
    }
    const Shape& padded = graph.shape(x);
    // Adds the pads to the reader's own, unless an extent would leave 31 bits.
    const auto take = [&](auto& own) {
      if (padded[1] + own.pad_top + own.pad_bottom > kMaxElements ||
          padded[2] + own.pad_left + own.pad_right > kMaxElements) {
        return false;
      }
      own.pad_top += static_cast<int>(pad.pads_before[1]);
      own.pad_left += static_cast<int>(pad.pads_before[2]);
      own.pad_bottom += static_cast<int>(pad.pads_after[1]);
      own.pad_right += static_cast<int>(pad.pads_after[2]);
      return true;
    };
    if (node.op == OpType::kConv) {
      if (!take(node.conv)) continue;
    } else {
      PoolAttributes pool = node.pool;
      const bool has_pads =
          pool.pad_top != 0 || pool.pad_left != 0 || pool.pad_bottom != 0 || pool.pad_right != 0;
      // Zeros of the Pad count in the mean, so the pool's own pads must count too; and with
      // ceil_mode a window cut at the padded edge would be another one.
      if (pool.ceil_mode || (has_pads && !pool.count_include_pad) || !take(pool)) continue;
      if (std::max(pool.pad_top, pool.pad_bottom) >= pool.kernel_h ||
          std::max(pool.pad_left, pool.pad_right) >= pool.kernel_w) {
        continue;
      }
      pool.count_include_pad = true;
      node.pool = pool;
    }
    node.inputs[0] = pad.inputs[0];
    removed[producer] = true;
  }
  return EraseNodes(graph, removed);
}

int FuseResidualAdds(Graph& graph) {
  Wiring wiring(graph);
  std::vector<bool> removed(graph.nodes.size());
  const auto can_absorb = [&](ValueId id, const Node& add) {
    if (!IsPrivate(graph, wiring, id) || graph.shape(id) != graph.shape(add.output)) return false;
    const Node& node = graph.nodes[wiring.producer[id]];
    return (node.op == OpType::kConv || node.op == OpType::kFullyConnected) &&
           !node.has_residual() && !node.clip;
  };
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& add = graph.nodes[i];
    if (add.op != OpType::kAdd) continue;
    const ValueId a = add.inputs[0], b = add.inputs[1];
    if (graph.values[a].constant || graph.values[b].constant || graph.shape(a) != graph.shape(b)) {
      continue;
    }
    const bool first = can_absorb(a, add), second = can_absorb(b, add);
    if (!first && !second) continue;
    const bool take_first = first && (!second || wiring.producer[a] > wiring.producer[b]);
    const int source = wiring.producer[take_first ? a : b];
    // Only the Add reads the convolution, so `skip` cannot depend on it and the convolution
    // may wait until the Add's place, where both its own inputs and `skip` exist.
    Node fused = std::move(graph.nodes[source]);
    fused.inputs.push_back(take_first ? b : a);
    fused.clip = add.clip;
    fused.output = add.output;
    graph.nodes[i] = std::move(fused);
    removed[source] = true;
  }
  return EraseNodes(graph, removed);
}

int FuseQuantization(Graph& graph) {
  Wiring wiring(graph);
  std::vector<bool> removed(graph.nodes.size());
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    if (node.op != OpType::kReshape) continue;
    const ValueId x = node.inputs[0], y = node.output;
    if (graph.shape(x) != graph.shape(y) || !graph.values[y].quant || graph.values[x].quant ||
        wiring.reads[x] != 1) {
      continue;
    }
    if (x == graph.input) {
      graph.input = y;
    } else {
      graph.nodes[wiring.producer[x]].output = y;
      wiring.producer[y] = wiring.producer[x];
    }
    removed[i] = true;
  }
  int changed = EraseNodes(graph, removed);
  for (const Node& node : graph.nodes) {
    const std::optional<QuantParams>& x = graph.values[node.inputs[0]].quant;
    std::optional<QuantParams>& y = graph.values[node.output].quant;
    if (!MovesCodes(node) || !x || y || node.output == graph.output) continue;
    y = x;
    ++changed;
  }
  return changed;
}

void Optimize(Graph& graph) {
  RemoveDeadCode(graph);
  RecogniseSwish(graph);
  FusePads(graph);
  FoldBatchNorm(graph);
  FuseActivations(graph);
  FuseResidualAdds(graph);
  FuseQuantization(graph);
  RemoveDeadCode(graph);
}

}  // namespace tern::graph
