// Single float operations over oneDNN, for the quantiser, which walks a network layer by layer.
#ifndef TERN_SERVER_ENGINE_OPS_H_
#define TERN_SERVER_ENGINE_OPS_H_

#include <vector>

#include "absl/status/statusor.h"
#include "server/graph/graph.h"

namespace tern::engine {

// Runs one float node on f32 NCHW tensors with the batch in front ([n, ...]); constant operands
// come without batch, as in the graph. `threads` OpenMP threads. Weighted nodes take
// node.weight/bias. The result is f32 NCHW. Includes the node's fused clip and residual.
// INVALID_ARGUMENT on shapes that do not fit, INTERNAL if oneDNN fails. Thread safe.
absl::StatusOr<Tensor> RunFloatNode(const graph::Graph& graph, const graph::Node& node,
                                    const std::vector<const Tensor*>& inputs, int threads);

// C = alpha * op(A) * op(B) + beta * C, row-major f32, over oneDNN's sgemm. op = transpose if the
// flag is set; lda/ldb/ldc are row strides in elements. m, n: rows and columns of C; k: the summed
// extent.
void Sgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
           const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
           int64_t ldc);

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_OPS_H_
