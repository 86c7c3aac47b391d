// The variants behind cluster_conv.h: the same three functions per family.
#ifndef TERN_SERVER_KERNELS_CLUSTER_CONV_VARIANTS_H_
#define TERN_SERVER_KERNELS_CLUSTER_CONV_VARIANTS_H_

#include "server/kernels/cluster_conv.h"

// Any CPU: the definition, one output at a time.
namespace tern::kernels::scalar {

void Pack(const QuantizedWeights& weights, PackedClusterConv& conv);
size_t ScratchBytes(const PackedClusterConv& conv);
void Run(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
         int64_t pixel_end, int block_begin, int block_end);

}  // namespace tern::kernels::scalar

// Register-blocked SIMD tiles (cluster_conv_tiles.h).
namespace tern::kernels::tiled {

void Pack(const QuantizedWeights& weights, PackedClusterConv& conv);
size_t ScratchBytes(const PackedClusterConv& conv);
void Run(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
         int64_t pixel_end, int block_begin, int block_end);
double Int8Cycles(const PackedClusterConv& conv);

}  // namespace tern::kernels::tiled

#endif  // TERN_SERVER_KERNELS_CLUSTER_CONV_VARIANTS_H_
