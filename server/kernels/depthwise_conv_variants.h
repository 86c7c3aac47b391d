// The variants behind depthwise_conv.h: the same three functions per family.
#ifndef TERN_SERVER_KERNELS_DEPTHWISE_CONV_VARIANTS_H_
#define TERN_SERVER_KERNELS_DEPTHWISE_CONV_VARIANTS_H_

#include "server/kernels/depthwise_conv.h"

#define TERN_DECLARE_DEPTHWISE(variant)                                                           \
  namespace tern::kernels::variant {                                                              \
  void Pack(absl::Span<const int8_t> weights, PackedDepthwiseConv& conv);                         \
  size_t ScratchBytes(const PackedDepthwiseConv& conv);                                           \
  /* Rows [row_begin, row_end) to one of the two, which points at the first of them: the sums, or \
     codes by the epilogue without a residual. Destinations and residual of `args` do not count.  \
   */                                                                                             \
  void Run(const PackedDepthwiseConv& conv, const ClusterConvArgs& args, int64_t row_begin,       \
           int64_t row_end, int32_t* sums, uint8_t* codes);                                       \
  }

// Any CPU: the definition. Sums only.
TERN_DECLARE_DEPTHWISE(scalar)
// Register-blocked SIMD tiles (depthwise_conv_tiles.h).
TERN_DECLARE_DEPTHWISE(tiled)

#undef TERN_DECLARE_DEPTHWISE

#endif  // TERN_SERVER_KERNELS_DEPTHWISE_CONV_VARIANTS_H_
