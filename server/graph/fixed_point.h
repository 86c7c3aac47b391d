// Fixed-point graphs (Graph::arithmetic == kFixedPoint): what their annotations must be, and the
// integers that they stand for. Executors take all their constants from here.
//
// A fixed-point graph has the same fields as any quantised graph, with numbers on a grid:
//   - the scale of every u8 value is 2^e, its zero point 0 or 128;
//   - the steps of a layer's weights are (1..127) x 2^e with one e per layer (cluster layers of
//     Tern's quantiser: all 2^e);
//   - its biases are whole multiples of the unit in which the layer is summed up.
// The real numbers are therefore exact, and everything that reads graphs goes on reading them.
#ifndef TERN_SERVER_GRAPH_FIXED_POINT_H_
#define TERN_SERVER_GRAPH_FIXED_POINT_H_

#include "absl/status/status.h"
#include "server/graph/graph.h"
#include "server/tensor/fixed_point.h"

namespace tern::graph {

// The promises above, and the limits of server/tensor/fixed_point.h, from which follows that no sum
// overflows: INVALID_ARGUMENT naming the node or value. Also: every convolution and fully connected
// layer has quantised weights and u8 inputs. For a graph that is valid otherwise; part of Validate.
absl::Status ValidateFixedPoint(const Graph& graph);

// Puts a quantised graph (valid, of either arithmetic) on the grid and sets its arithmetic: scales
// go up to powers of two, zero points to 0 or 128, the steps of each layer (and, where steps of a
// cluster layer differ, its cluster scales) and the biases to the nearest point. Numbers that are
// on the grid stay as they are, so that it may be called again after changes. Steps and scales that
// differ by more than the limits allow are raised: such weights or results are far below the
// rounding beside them. FAILED_PRECONDITION if a layer runs in float or the grid cannot hold it.
absl::Status RoundToFixedPoint(Graph& graph);

// The integers of an operator of a graph that passed ValidateFixedPoint; inputs (and, except for
// FixedPointOf, the result) are u8.
FixedPointLayer FixedPointOf(const Graph& graph, const Node& node);   // kConv, kFullyConnected
FixedPointAdd FixedPointAddOf(const Graph& graph, const Node& node);  // kAdd
// On (a - z_a) (b - z_b), kMul.
FixedPointMap FixedPointProduct(QuantParams a, QuantParams b, QuantParams y);
// On a code: another quantisation of the same real. The identity if x == y.
FixedPointMap FixedPointRescale(QuantParams x, QuantParams y);
// On the sum of `count` codes: their mean. 1 <= count <= 2^31.
FixedPointMap FixedPointMean(QuantParams x, QuantParams y, int64_t count);
// On a code of channel c, kBatchNorm.
FixedPointMap FixedPointBatchNorm(const Graph& graph, const Node& node, int64_t c);

}  // namespace tern::graph

#endif  // TERN_SERVER_GRAPH_FIXED_POINT_H_
