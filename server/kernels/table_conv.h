// Ternary convolution by tables of sums: the same results as cluster_conv.h, bit for bit, another
// way to the sums. docs/kernels.md, "Sum tables", has the design and the numbers.
//
// Four channels have 81 ternary combinations. For a row of pixels a table holds all 81 sums in the
// first-level cache; an output channel then adds one row of it per four weights instead of
// multiplying. The table is built once for all output channels, so this pays for layers with many
// of them.
//
// Pure functions: no allocation, no threads, no errors. The caller validated the shapes.
#ifndef TERN_SERVER_KERNELS_TABLE_CONV_H_
#define TERN_SERVER_KERNELS_TABLE_CONV_H_

#include <cstddef>
#include <cstdint>

#include "server/base/aligned_buffer.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"
#include "server/tensor/quantized_weights.h"

namespace tern::kernels {

// Whether the functions below take the layer: AVX2, ternary weights, and
//   1x1 without padding, any stride: channels a multiple of 32; N = 4, 8, a multiple of 16, or
//     N >= channels;
//   3x3 with stride and dilation 1, any padding: channels a multiple of 16; N a multiple of 4, or
//     N >= channels.
bool TableConvAccepts(const ConvGeometry& geometry, const QuantizedWeights& weights, Isa isa);

// Weights in the order in which the kernels read them, built once per plan, shared by threads.
struct PackedTableConv {
  ConvGeometry geometry;
  int cluster_size = 0;  // N
  // Quads (four channels of one cluster, see table_conv.cc), output channels rounded up to blocks.
  // 3x3: states 0..80, u8 [quad][output channel][tap];
  // 1x1: byte offsets in the tables of eight quads, u16 [quad / 8][output channel][quad % 8].
  AlignedBuffer states;
  // Pairs of s16, the scales of a pair of clusters. 3x3: [pair][output channel];
  // 1x1: [quad / 8][output channel][pairs in 32 channels].
  AlignedBuffer scales;
  size_t bytes() const { return states.size_bytes() + scales.size_bytes(); }
};

// TableConvAccepts() must hold.
PackedTableConv PackTableConv(const ConvGeometry& geometry, const QuantizedWeights& weights);

// Scratch for one call of RunTableConv, any range: ClusterConvArgs::scratch.
size_t TableConvScratchBytes(const PackedTableConv& conv);

// The output pixels of `batch` images form this many tiles; their cost is about equal.
int64_t TableConvTiles(const PackedTableConv& conv, int batch);

// Computes tiles [tile_begin, tile_end) and output-channel blocks [block_begin, block_end) of
// OutputBlocks(). Calls on disjoint ranges may run at once; each builds its own tables, so few
// blocks per call are costly, and consecutive tiles are cheaper than scattered ones.
void RunTableConv(const PackedTableConv& conv, const ClusterConvArgs& args, int64_t tile_begin,
                  int64_t tile_end, int block_begin, int block_end);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_TABLE_CONV_H_
