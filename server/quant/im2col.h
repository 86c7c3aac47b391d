// Sampled columns of a convolution's input matrix.
#ifndef TERN_SERVER_QUANT_IM2COL_H_
#define TERN_SERVER_QUANT_IM2COL_H_

#include <cstdint>
#include <vector>

#include "server/graph/graph.h"
#include "server/quant/weights.h"
#include "server/tensor/tensor.h"

namespace tern::quant {

// Fills x [J, positions.size()] row-major with the inputs that the node's weights at each output
// position meet, rows in the layout's order. `input` is f32 [n, c, h, w] ([n, c] for a fully
// connected layer); positions are n * (oh * ow) + row * ow + column. Padding is 0. The node is an
// ungrouped kConv or a kFullyConnected.
void GatherColumns(const graph::Graph& graph, const graph::Node& node, const ClusterLayout& layout,
                   const Tensor& input, const std::vector<int64_t>& positions,
                   std::vector<float>& x);

// Fills z [O, positions.size()] with `output` f32 [n, o, oh, ow] ([n, o]) at the positions.
void GatherOutputs(const Tensor& output, const std::vector<int64_t>& positions,
                   std::vector<float>& z);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_IM2COL_H_
