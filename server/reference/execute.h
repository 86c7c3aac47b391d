// Slow, obvious executors: the oracle of every other executor and the definition of Tern's
// arithmetic. Loops over NCHW, one element at a time, no threads.
#ifndef TERN_SERVER_REFERENCE_EXECUTE_H_
#define TERN_SERVER_REFERENCE_EXECUTE_H_

#include <vector>

#include "absl/status/statusor.h"
#include "server/graph/graph.h"

namespace tern::reference {

// Runs a float graph. `input` is f32 [n, ...sample shape], NCHW. Returns every value's tensor,
// indexed by ValueId, f32 NCHW with the batch in front (constants: their own shape). Sums in
// double. INVALID_ARGUMENT if the input's shape does not fit or the graph holds quantised nodes.
absl::StatusOr<std::vector<Tensor>> ExecuteFloat(const graph::Graph& graph, const Tensor& input);

// Runs a quantised graph by the integer definition of its arithmetic (docs/quantisation.md,
// "Inference arithmetic"). Values with QuantParams are u8 NCHW, others f32. The float input is
// quantised first if the input value has QuantParams.
//
// Conv / FullyConnected with quantised weights and u8 input x (zero point zx, padding = zx):
//   acc[o] = sum over j of w[o][j] * x[j]          s32, exact, w = cluster_scale * code
//   m[o]   = float(double(sx) * steps[o] / sy)
//   c[o]   = float(double(bias[o]) / sy + zy - double(zx) * sum_j(w[o][j]) * m_double[o] - residual
//   zero point term) v      = fma(float(acc), m[o], c[o]);  with a u8 residual r: v = fma(float(r),
//   float(double(sr)/sy), v),
//            its zero point folded into c: - double(zr) * sr / sy
//   y      = clamp(round_to_nearest_even(v), lo, hi), lo/hi = the clip range in codes, within
//   [0,255]
// A float output (no QuantParams; the logits): sy = 1, zy = 0, no rounding, clip in reals.
// Fixed-point graphs: integers only, by server/tensor/fixed_point.h.
absl::StatusOr<std::vector<Tensor>> ExecuteQuantized(const graph::Graph& graph,
                                                     const Tensor& input);

}  // namespace tern::reference

#endif  // TERN_SERVER_REFERENCE_EXECUTE_H_
