#include <cmath>
#include <optional>

#include "server/graph/passes.h"
#include "server/graph/rewrite.h"

namespace tern::graph {
namespace {

class SwishPass {
 public:
  explicit SwishPass(Graph& graph) : graph_(graph), wiring_(graph) {}

  int Run() {
    int changed = 0;
    for (Node& node : graph_.nodes)
      changed += RewriteGate(node) || RewriteSwish(node) || RewriteSilu(node);
    return changed;
  }

 private:
  // The one element of a constant, or nothing.
  std::optional<float> Scalar(ValueId id) const {
    const std::optional<Tensor>& constant = graph_.values[id].constant;
    if (!constant || constant->elements() != 1) return std::nullopt;
    return constant->data<float>()[0];
  }

  // The node that computes `id` for its reader alone, or null.
  const Node* Private(ValueId id) const {
    return IsPrivate(graph_, wiring_, id) ? &graph_.nodes[wiring_.producer[id]] : nullptr;
  }

  // `node` = value / 6, as a division or a multiplication: the value; else kNoValue.
  ValueId SixthOf(const Node& node) const {
    if (node.op == OpType::kDiv) {
      return Scalar(node.inputs[1]) == 6.0f ? node.inputs[0] : kNoValue;
    }
    if (node.op != OpType::kMul) return kNoValue;
    for (int i : {0, 1}) {
      const std::optional<float> k = Scalar(node.inputs[i]);
      if (k && std::fabs(*k - 1.0f / 6.0f) < 1e-7f) return node.inputs[1 - i];
    }
    return kNoValue;
  }

  // `id` = clip(x + 3, 0, 6) for its reader alone, the clip fused or not: x; else kNoValue.
  ValueId ClippedPlusThree(ValueId id) const {
    const Node* node = Private(id);
    if (node == nullptr || node->clip != ClipRange{0.0f, 6.0f}) return kNoValue;
    if (node->op == OpType::kClip) {
      node = Private(node->inputs[0]);
      if (node == nullptr || node->clip) return kNoValue;
    }
    if (node->op != OpType::kAdd) return kNoValue;
    for (int i : {0, 1}) {
      if (Scalar(node->inputs[i]) == 3.0f) return node->inputs[1 - i];
    }
    return kNoValue;
  }

  bool KeepsShape(const Node& node, ValueId x) const {
    return x != kNoValue && graph_.shape(x) == graph_.shape(node.output);
  }

  void Become(Node& node, OpType op, ValueId x) {
    for (ValueId id : node.inputs) --wiring_.reads[id];
    ++wiring_.reads[x];
    node.op = op;
    node.inputs = {x};
  }

  // clip(x+3,0,6)/6
  bool RewriteGate(Node& node) {
    const ValueId gate = SixthOf(node);
    if (gate == kNoValue) return false;
    const ValueId x = ClippedPlusThree(gate);
    if (!KeepsShape(node, x)) return false;
    Become(node, OpType::kHardSigmoid, x);
    node.alpha = 1.0f / 6.0f;
    node.beta = 0.5f;
    return true;
  }

  // x*hardsigmoid(x), or (x*clip(x+3,0,6))/6
  bool RewriteSwish(Node& node) {
    if (node.op == OpType::kMul) {
      for (int i : {0, 1}) {
        const Node* gate = Private(node.inputs[i]);
        const ValueId x = node.inputs[1 - i];
        if (gate != nullptr && gate->op == OpType::kHardSigmoid && gate->inputs[0] == x &&
            std::fabs(gate->alpha - 1.0f / 6.0f) < 1e-7f && gate->beta == 0.5f) {
          Become(node, OpType::kHardSwish, x);
          return true;
        }
      }
    }
    const ValueId product = SixthOf(node);
    const Node* mul = product == kNoValue ? nullptr : Private(product);
    if (mul == nullptr || mul->op != OpType::kMul) return false;
    for (int i : {0, 1}) {
      const ValueId x = ClippedPlusThree(mul->inputs[i]);
      if (x != kNoValue && x == mul->inputs[1 - i] && KeepsShape(node, x)) {
        Become(node, OpType::kHardSwish, x);
        return true;
      }
    }
    return false;
  }

  // x*sigmoid(x)
  bool RewriteSilu(Node& node) {
    if (node.op != OpType::kMul) return false;
    for (int i : {0, 1}) {
      const Node* gate = Private(node.inputs[i]);
      if (gate != nullptr && gate->op == OpType::kSigmoid && !gate->clip &&
          gate->inputs[0] == node.inputs[1 - i]) {
        Become(node, OpType::kSilu, node.inputs[1 - i]);
        return true;
      }
    }
    return false;
  }

  Graph& graph_;
  Wiring wiring_;
};

}  // namespace

int RecogniseSwish(Graph& graph) {
  const int changed = SwishPass(graph).Run();
  if (changed > 0) RemoveDeadCode(graph);  // the gates that nobody reads any more
  return changed;
}

}  // namespace tern::graph
