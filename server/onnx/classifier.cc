#include "server/onnx/classifier.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log_fields.h"
#include "server/base/status_macros.h"
#include "server/onnx/import.h"

namespace tern::onnx {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::ValueId;

// The node whose numbers the output has, whatever only changes their shape (or holds them as codes)
// in between; null if that is the image.
const Node* LastOperator(const Graph& graph) {
  int at = graph.ProducerOf(graph.output);
  while (at >= 0 && graph.nodes[at].op == OpType::kReshape) {
    at = graph.ProducerOf(graph.nodes[at].inputs[0]);
  }
  return at < 0 ? nullptr : &graph.nodes[at];
}

void EndBefore(Graph& graph, const Node& softmax) {
  const ValueId logits = softmax.inputs[0];
  TERN_LOG_INFO("network '{}': its last softmax, '{}', is left out: Tern computes it from the logits",
                graph.name, softmax.name);
  if (graph.shape(logits).rank() == 1) {
    graph.output = logits;
    return;
  }
  Node flatten{.name = absl::StrCat(softmax.name, "/logits"), .op = OpType::kReshape};
  flatten.inputs = {logits};
  flatten.output = graph.AddValue(
      {.name = graph.values[graph.output].name, .shape = Shape{graph.classes()}});
  graph.output = flatten.output;
  graph.nodes.push_back(std::move(flatten));
}

}  // namespace

absl::StatusOr<Graph> ImportClassifier(absl::string_view bytes) {
  TERN_ASSIGN_OR_RETURN(Graph graph, Import(bytes));
  if (graph.classes() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("the network has ", graph.classes(), " class, wanted 2 or more"));
  }
  const Node* last = LastOperator(graph);
  if (last == nullptr) return graph;
  if (last->op == OpType::kSigmoid || last->op == OpType::kHardSigmoid) {
    return absl::UnimplementedError(
        absl::StrCat("the network ends in ", Name(last->op), " ('", last->name,
                     "'), labels of their own; wanted the logits of classes that exclude each other"));
  }
  // Over another axis it is part of the network.
  if (last->op == OpType::kSoftmax &&
      graph.shape(last->inputs[0])[last->axis] == graph.classes() &&
      graph.ProducerOf(last->inputs[0]) >= 0) {
    EndBefore(graph, *last);
  }
  return graph;
}

}  // namespace tern::onnx
