// Graph rewrites. Each keeps the function of the network (to float rounding) and returns how
// many places it changed. They assume a valid graph and leave a valid one.
#ifndef TERN_SERVER_GRAPH_PASSES_H_
#define TERN_SERVER_GRAPH_PASSES_H_

#include "server/graph/graph.h"

namespace tern::graph {

// Batch normalisation (and constant per-channel Mul/Add) after a convolution or fully connected
// layer whose result nobody else reads goes into its weights (quantised ones: into the steps, and
// the codes' signs) and bias.
int FoldBatchNorm(Graph& graph);

// Recognises clip(x+3,0,6)/6 -> kHardSigmoid, then x*hardsigmoid(x) and x*clip(x+3,0,6)/6 ->
// kHardSwish; and x*sigmoid(x) -> kSilu.
int RecogniseSwish(Graph& graph);

// Relu / Clip after Conv, FullyConnected, Add, BatchNorm becomes the producer's `clip`.
int FuseActivations(Graph& graph);

// Zero padding of rows and columns before a convolution or average pool that alone reads it
// becomes the reader's own pads (torch writes padded average pools this way).
int FusePads(Graph& graph);

// Add(conv(x), skip) becomes the convolution's second input where shapes are equal, the
// convolution's result has no other reader and it has no activation of its own (the later of
// two convolutions takes the other as its residual). The convolution moves to the Add's place
// in the order, so that `skip` is computed before it; the Add's own activation moves with it.
int FuseResidualAdds(Graph& graph);

// A copy that only quantises (a reshape to the same shape whose result alone is held as codes) of
// a value that nobody else reads: what computes the value, or the image, becomes the codes itself.
// And what only moves codes (slice, reshape, transpose, zero padding, max pool) keeps them as
// codes. After the other fusions, which need a float value between their two nodes.
int FuseQuantization(Graph& graph);

// Removes nodes whose results nobody reads, identities (reshapes, transposes, 1x1 pools) and
// unused values.
int RemoveDeadCode(Graph& graph);

// All of the above in the right order: the form that executors and the quantiser take.
void Optimize(Graph& graph);

}  // namespace tern::graph

#endif  // TERN_SERVER_GRAPH_PASSES_H_
