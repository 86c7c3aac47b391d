// Convolution of u8 activations with s8 weights to s32 sums, exact for every s8 weight on every
// CPU: for grouped layers that oneDNN cannot run exactly (ungrouped ones are of conv_kernel.h).
//
//   out[p][o] = sum over channels c and taps t of w[o][c][t] * x[pixel(p, t)][c]
//
// The caller sees to it that no sum leaves s32. Pure: no allocation, no threads, no errors.
#ifndef TERN_SERVER_KERNELS_INT8_CONV_H_
#define TERN_SERVER_KERNELS_INT8_CONV_H_

#include <cstdint>

#include "absl/types/span.h"
#include "server/base/aligned_buffer.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"

namespace tern::kernels {

// Weights in the order in which the kernel reads them; shared by threads.
struct PackedInt8Conv {
  ConvGeometry geometry;
  int groups = 1;
  Isa isa = Isa::kScalar;
  AlignedBuffer weights;  // s8 [oc][kh * kw][ic / groups]
  AlignedBuffer padding;  // u8 [ic / groups]: a padding pixel
  size_t bytes() const { return weights.size_bytes() + padding.size_bytes(); }
};

// `weights` are [oc, ic / groups, kh, kw]; `groups` divides ic and oc. Padding pixels have the code
// `zero_point`. `isa` must be <= DetectIsa().
PackedInt8Conv PackInt8Conv(const ConvGeometry& geometry, int groups,
                            absl::Span<const int8_t> weights, uint8_t zero_point, Isa isa);

// Computes output pixels [pixel_begin, pixel_end) of batch * oh * ow. src: [n, ih, iw, ic], dst:
// [n, oh, ow, oc]. Calls on disjoint ranges may run at once.
void RunInt8Conv(const PackedInt8Conv& conv, const uint8_t* src, int64_t pixel_begin,
                 int64_t pixel_end, int32_t* dst);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_INT8_CONV_H_
