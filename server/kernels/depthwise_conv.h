// Depthwise convolution of u8 activations with s8 weights, exact for every s8 weight on every CPU.
//
// out[p][c] = epilogue( sum over taps t of w[c][t] * x[pixel(p, t)][c] )
//
// with the epilogues and the bit-exactness of cluster_conv.h. Any kernel size, stride, dilation,
// padding and channel count; square 3x3 and 5x5 kernels with stride 1 or 2 are the fast ones
// (docs/kernels.md). The caller sees to it that no sum leaves s32, as
// server/tensor/quantized_weights.h does.
//
// Pure functions: no allocation outside packing, no threads, no errors.
#ifndef TERN_SERVER_KERNELS_DEPTHWISE_CONV_H_
#define TERN_SERVER_KERNELS_DEPTHWISE_CONV_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "server/base/aligned_buffer.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"

namespace tern::kernels {

// Weights in the order in which the kernels read them, built once per plan, shared by threads.
struct PackedDepthwiseConv {
  ConvGeometry geometry;   // ic == oc
  Isa isa = Isa::kScalar;  // the variant that must run it
  AlignedBuffer weights;   // variant-private; see the .cc files
  size_t bytes() const { return weights.size_bytes(); }
};

// `weights` are [oc, kh, kw]; geometry.ic == geometry.oc. `isa` must be <= DetectIsa().
PackedDepthwiseConv PackDepthwiseConv(const ConvGeometry& geometry,
                                      absl::Span<const int8_t> weights, Isa isa);

// ClusterConvArgs::scratch for one call of RunDepthwiseConv, any range.
size_t DepthwiseConvScratchBytes(const PackedDepthwiseConv& conv);

// Computes output rows [row_begin, row_end) of batch * oh. Calls on disjoint ranges may run at
// once.
void RunDepthwiseConv(const PackedDepthwiseConv& conv, const ClusterConvArgs& args,
                      int64_t row_begin, int64_t row_end);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_DEPTHWISE_CONV_H_
