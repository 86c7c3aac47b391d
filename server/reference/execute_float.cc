#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/reference/execute.h"
#include "server/reference/ops.h"

namespace tern::reference {

absl::StatusOr<std::vector<Tensor>> ExecuteFloat(const graph::Graph& graph, const Tensor& input) {
  TERN_RETURN_IF_ERROR(CheckInput(graph, input));
  for (const graph::Node& node : graph.nodes) {
    if (node.quantized) {
      return absl::InvalidArgumentError(
          absl::StrCat("node '", node.name, "' is quantised; this executor is for float graphs"));
    }
  }
  std::vector<Tensor> values(graph.values.size());
  for (size_t id = 0; id < values.size(); ++id) {
    if (graph.values[id].constant) values[id] = *graph.values[id].constant;
  }
  values[graph.input] = input;
  for (const graph::Node& node : graph.nodes) {
    std::vector<const Tensor*> inputs;
    for (graph::ValueId id : node.inputs) inputs.push_back(&values[id]);
    values[node.output] = EvaluateFloat(graph, node, inputs, input.shape()[0]);
  }
  return values;
}

}  // namespace tern::reference
