// Graph rewrites. Each keeps the function of the network (to float rounding) and returns how
// many places it changed. They assume a valid graph and leave a valid one.
#ifndef TERN_SERVER_GRAPH_PASSES_H_
#define TERN_SERVER_GRAPH_PASSES_H_

#include "server/graph/graph.h"

namespace tern::graph {

// Batch normalisation (and constant per-channel Mul/Add) after a convolution or fully connected
// layer whose result nobody else reads goes into its weights and bias.
int FoldBatchNorm(Graph& graph);

// Recognises x*hardsigmoid(x), x*clip(x+3,0,6)/6 -> kHardSwish.
int RecogniseHardSwish(Graph& graph);

// Relu / Clip after Conv, FullyConnected, Add, BatchNorm becomes the producer's `clip`.
int FuseActivations(Graph& graph);

// Add(conv(x), skip) becomes the convolution's second input where shapes are equal, the
// convolution's result has no other reader, it has no activation of its own and `skip` is
// computed before it (the later of two convolutions takes the other as its residual).
// The Add's own activation moves with it.
int FuseResidualAdds(Graph& graph);

// Removes nodes whose results nobody reads, identity reshapes/transposes, and unused values.
int RemoveDeadCode(Graph& graph);

// All of the above in the right order: the form that executors and the quantiser take.
void Optimize(Graph& graph);

}  // namespace tern::graph

#endif  // TERN_SERVER_GRAPH_PASSES_H_
