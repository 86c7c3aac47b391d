// The definition of depthwise_conv.h for CPUs without a vector variant.
//
// weights: s8 [kh * kw][c].
#include <algorithm>

#include "server/kernels/depthwise_conv_variants.h"

namespace tern::kernels::scalar {

void Pack(absl::Span<const int8_t> weights, PackedDepthwiseConv& conv) {
  const ConvGeometry& g = conv.geometry;
  const int64_t taps = int64_t{g.kh} * g.kw;
  conv.weights = AlignedBuffer(weights.size());
  int8_t* w = conv.weights.as<int8_t>();
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < g.oc; ++c) *w++ = weights[c * taps + t];
  }
}

size_t ScratchBytes(const PackedDepthwiseConv& conv) { return 0; }

void Run(const PackedDepthwiseConv& conv, const ClusterConvArgs& args, int64_t row_begin,
         int64_t row_end, int32_t* sums, uint8_t* codes) {
  const ConvGeometry& g = conv.geometry;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t image = row / g.oh;
    const int oy = static_cast<int>(row % g.oh);
    for (int ox = 0; ox < g.ow; ++ox, sums += g.oc) {
      std::fill(sums, sums + g.oc, 0);
      const int8_t* w = conv.weights.as<int8_t>();
      for (int ky = 0; ky < g.kh; ++ky) {
        const int iy = oy * g.stride_h - g.pad_top + ky * g.dilation_h;
        for (int kx = 0; kx < g.kw; ++kx, w += g.oc) {
          const int ix = ox * g.stride_w - g.pad_left + kx * g.dilation_w;
          const bool inside = iy >= 0 && iy < g.ih && ix >= 0 && ix < g.iw;
          const uint8_t* x = inside ? args.src + ((image * g.ih + iy) * g.iw + ix) * g.ic : nullptr;
          for (int c = 0; c < g.oc; ++c) {
            sums[c] += w[c] * (inside ? x[c] : args.src_zero_point);
          }
        }
      }
    }
  }
}

}  // namespace tern::kernels::scalar
