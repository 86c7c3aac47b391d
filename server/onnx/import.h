// ONNX bytes -> graph. The only folder that sees the ONNX protobuf.
#ifndef TERN_SERVER_ONNX_IMPORT_H_
#define TERN_SERVER_ONNX_IMPORT_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/graph/graph.h"

namespace tern::onnx {

// Imports a classification network: one float input [N,c,h,w] (N dynamic or 1), one float
// output [N,classes] (or [N,classes,1,1]), opset 7..17, weights inside the file. Constants
// are folded, including the shape arithmetic that torch's exporter writes (Shape, Gather,
// Unsqueeze, Concat, Reshape) with the batch kept symbolic. The result is valid (Validate) and not
// optimised (run Optimize). It is float unless the file is quantised.
//
// Quantised files are those with QuantizeLinear and DequantizeLinear around float operators
// ("QDQ"), as onnxruntime's quantize_static and Export() write them. Values between the two hold u8
// codes (int8 ones with 128 added to code and zero point) with one scale; constant codes of
// -128..127 around their zero points, with one scale or one per output channel, are the quantised
// weights of the convolution, Gemm or MatMul that reads them (4-bit and ternary ones where Export
// wrote cluster scales beside them); other constants are turned back into floats.
//
// INVALID_ARGUMENT: not an ONNX model, damaged, opset out of range, shapes that do not fit,
//   external data, several inputs/outputs; names the node.
// UNIMPLEMENTED: an operator or attribute that Tern lacks; quantisation that it cannot hold
//   (asymmetric or wider weights, scales per channel of an activation or per input channel, types
//   other than int8 and uint8, operators on codes such as QLinearConv); names operator and node.
absl::StatusOr<graph::Graph> Import(absl::string_view bytes);

}  // namespace tern::onnx

#endif  // TERN_SERVER_ONNX_IMPORT_H_
