// The operators of fixed-point graphs on codes: docs/quantisation.md, "Fixed-point arithmetic",
// with integers alone. Internal to this folder.
#ifndef TERN_SERVER_REFERENCE_FIXED_POINT_H_
#define TERN_SERVER_REFERENCE_FIXED_POINT_H_

#include <cstdint>
#include <vector>

#include "server/graph/graph.h"

namespace tern::reference {

// The integer weights w = cluster scale * code, in the order of the codes.
std::vector<int32_t> IntegerWeights(const QuantizedWeights& weights);

// u8 codes of a node's inputs, NCHW with the batch in front, in the order of node.inputs.
using Codes = std::vector<const uint8_t*>;

// kConv, kFullyConnected: the sums of FixedPointLayer, before the shift, for every element of the
// result of `n` samples.
std::vector<int64_t> FixedPointSums(const graph::Graph& graph, const graph::Node& node,
                                    const Codes& inputs, int64_t n);

// The same as codes; and the other operators that compute: kAdd, kMul, kAveragePool,
// kGlobalAveragePool. `out` takes n samples.
void FixedPointLinear(const graph::Graph& graph, const graph::Node& node, const Codes& inputs,
                      int64_t n, uint8_t* out);
void FixedPointAddition(const graph::Graph& graph, const graph::Node& node, const Codes& inputs,
                        int64_t n, uint8_t* out);
void FixedPointMultiplication(const graph::Graph& graph, const graph::Node& node,
                              const Codes& inputs, int64_t n, uint8_t* out);
void FixedPointAveragePool(const graph::Graph& graph, const graph::Node& node, const Codes& inputs,
                           int64_t n, uint8_t* out);

}  // namespace tern::reference

#endif  // TERN_SERVER_REFERENCE_FIXED_POINT_H_
