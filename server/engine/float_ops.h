// Float operators as plain loops over any strided layout: everything except convolutions and fully
// connected layers, which oneDNN runs.
#ifndef TERN_SERVER_ENGINE_FLOAT_OPS_H_
#define TERN_SERVER_ENGINE_FLOAT_OPS_H_

#include <cmath>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "server/engine/strided.h"
#include "server/graph/graph.h"

namespace tern::engine {

// Where the samples of one operand lie. batch_stride 0: one sample for the whole batch (constants).
template <typename T>
struct Operand {
  T* data = nullptr;
  Shape shape;
  Strides strides;
  int64_t batch_stride = 0;
};

// The functions of one variable: kRelu, kClip, kSigmoid, kHardSigmoid, kHardSwish, kSilu.
bool IsUnary(graph::OpType op);
// Evaluates one of them in double, for tables.
double EvaluateUnary(const graph::Node& node, double x);

// y = op(inputs) for `batch` samples. The output must not overlap an input, unless the operator is
// unary or an addition, subtraction, multiplication or division whose input has the output's
// layout. Uses the caller's OpenMP team. UNIMPLEMENTED for kConv and kFullyConnected.
absl::Status RunPlainFloat(const graph::Node& node, absl::Span<const Operand<const float>> inputs,
                           const Operand<float>& output, int64_t batch);

// How the samples of a reshape's two sides lie: the pair of index spaces that one strided copy
// needs. False if neither side is row-major, so that no such copy exists.
bool ReshapeAsCopy(const Shape& in, const Strides& in_strides, const Shape& out,
                   const Strides& out_strides, Extents* dims, Strides* src, Strides* dst);

// `strides` with the batch in front.
inline Strides WithBatch(int64_t batch_stride, const Strides& strides) {
  return strides.Behind(batch_stride);
}

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_FLOAT_OPS_H_
