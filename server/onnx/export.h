// Graph -> ONNX bytes, for other runtimes and as an independent check of the arithmetic.
#ifndef TERN_SERVER_ONNX_EXPORT_H_
#define TERN_SERVER_ONNX_EXPORT_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/graph/graph.h"

namespace tern::onnx {

// A valid graph of any stage as an ONNX model of opset 13 with standard operators only: one input
// f32 [N,c,h,w], one output f32 [N,...] with the graph's own shape, both with the graph's names.
//
// A value held as codes passes QuantizeLinear and DequantizeLinear (u8, its scale and zero point)
// where it is produced, and every reader takes the latter's result. Quantised weights are
// DequantizeLinear of int8 along axis 0 with the steps as scales and zero points 0: of cluster
// scale x code where all products of the layer fit int8; else of the codes alone, and a Mul with
// the cluster scales [o,c,1,1], int8 dequantised with scale 1, follows. (int32 products would be
// the same, but onnxruntime's optimiser turns them into an operator that does not take them.)
// Biases stay float; those of a fixed-point graph carry half a unit of their layer's sums, so that
// ties round up as they do in the engine. A fused residual is an Add, a fused activation a Relu or
// Clip; ceil_mode is written as the pads that it comes to, so that the runtimes' different readings
// of it do not matter.
//
// `metadata` becomes the model's metadata_props. Deterministic. INVALID_ARGUMENT if the graph is
// not valid; RESOURCE_EXHAUSTED beyond protobuf's 2 GiB. Thread safe.
absl::StatusOr<std::string> Export(
    const graph::Graph& graph, const std::vector<std::pair<std::string, std::string>>& metadata);

}  // namespace tern::onnx

#endif  // TERN_SERVER_ONNX_EXPORT_H_
