// Which values of a network are held as u8 codes, and where their parameters come from.
#ifndef TERN_SERVER_QUANT_PLACEMENT_H_
#define TERN_SERVER_QUANT_PLACEMENT_H_

#include <vector>

#include "server/graph/graph.h"

namespace tern::quant {

// True if docs/quantisation.md has an integer rule for the node: all but Softmax, Sub, Div,
// ReduceMean, operands that are constants, and Add / Mul whose shapes are neither equal nor [c,h,w]
// with [c,1,1].
bool HasIntegerRule(const graph::Graph& graph, const graph::Node& node);

// True if the node's result has the parameters of its first input: max pool, slice, reshape,
// transpose, and padding with zeros.
bool PassesParametersThrough(const graph::Node& node);

enum class Codes : uint8_t {
  kFloat,        // not quantised: the logits, constants, and values that only float nodes read
  kOwn,          // observed where the value is produced
  kPassThrough,  // those of the producer's first input
  kConcat,  // those of the concatenation that alone reads the value, so that it only copies codes;
            // they may in turn be those of a further concatenation
};

struct Placement {
  std::vector<Codes> values;       // by ValueId
  std::vector<int> concat;         // by ValueId: the node index of kConcat's concatenation, else -1
  std::vector<bool> integer_node;  // by node index; weighted nodes always
};

// A value is quantised if a convolution or fully connected layer reads it, or a node with an
// integer rule whose own result is quantised. So what leads to the logits without another weighted
// layer stays float.
Placement Place(const graph::Graph& graph);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_PLACEMENT_H_
