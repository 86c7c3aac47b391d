// What the passes share: who writes and who reads each value, kept up to date by the caller.
#ifndef TERN_SERVER_GRAPH_REWRITE_H_
#define TERN_SERVER_GRAPH_REWRITE_H_

#include <vector>

#include "server/graph/graph.h"

namespace tern::graph {

// Indices are into graph.nodes at the time of construction: passes mark nodes as removed and
// erase them at the end, so that indices stay valid. Not thread-safe.
class Wiring {
 public:
  explicit Wiring(const Graph& graph)
      : producer(graph.values.size(), -1), reads(graph.values.size(), 0) {
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      producer[graph.nodes[i].output] = static_cast<int>(i);
      for (ValueId id : graph.nodes[i].inputs) ++reads[id];
    }
    ++reads[graph.output];
  }

  std::vector<int> producer;  // the node that writes a value, or -1
  std::vector<int> reads;     // how often a value is read; being the graph's output counts once
};

// Whether a pass may merge the writer of `id` into its reader: nobody else sees the value,
// and it is not held as codes (then it is rounded, and merging would change the result).
inline bool IsPrivate(const Graph& graph, const Wiring& wiring, ValueId id) {
  return wiring.reads[id] == 1 && wiring.producer[id] >= 0 && !graph.values[id].quant;
}

// Erases the nodes whose flag is set; returns how many.
int EraseNodes(Graph& graph, const std::vector<bool>& removed);

}  // namespace tern::graph

#endif  // TERN_SERVER_GRAPH_REWRITE_H_
