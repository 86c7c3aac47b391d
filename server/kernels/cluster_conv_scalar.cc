// The definition of cluster_conv.h for CPUs without a vector variant. The cluster scale is
// multiplied into the code (|product| <= 127 * 7 fits s16): the same integer sum.
//
// weights: s16 [oc][kh * kw][ic]. scales and layout are unused.
// scratch: one row of ic zero points, the stand-in for padding pixels.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "server/kernels/cluster_conv_variants.h"
#include "server/tensor/cluster.h"

namespace tern::kernels::scalar {

void Pack(const QuantizedWeights& weights, PackedClusterConv& conv) {
  const ConvGeometry& g = conv.geometry;
  const int taps = g.kh * g.kw;
  const bool clustered = IsClustered(weights.scheme);
  const ClusterMap map(g.ic, clustered ? weights.cluster_size : g.ic);
  const auto codes = weights.codes.data<int8_t>();
  const auto scales = weights.cluster_scales.data<int8_t>();
  conv.weights = AlignedBuffer(sizeof(int16_t) * g.oc * taps * g.ic);
  int16_t* w = conv.weights.as<int16_t>();
  for (int64_t o = 0; o < g.oc; ++o) {
    for (int t = 0; t < taps; ++t) {
      for (int c = 0; c < g.ic; ++c) {
        const int scale = clustered ? scales[o * map.clusters() + map.cluster_of(c)] : 1;
        *w++ = static_cast<int16_t>(scale * codes[(o * g.ic + c) * taps + t]);
      }
    }
  }
}

size_t ScratchBytes(const PackedClusterConv& conv) { return conv.geometry.ic; }

void Run(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
         int64_t pixel_end, int block_begin, int block_end) {
  const ConvGeometry& g = conv.geometry;
  const int taps = g.kh * g.kw;
  uint8_t* padding = static_cast<uint8_t*>(args.scratch);
  std::memset(padding, args.src_zero_point, g.ic);
  const int o_end = std::min(g.oc, block_end * kOutputBlock);

  for (int64_t p = pixel_begin; p < pixel_end; ++p) {
    const int64_t image = p / (static_cast<int64_t>(g.oh) * g.ow);
    const int oy = static_cast<int>(p / g.ow % g.oh);
    const int ox = static_cast<int>(p % g.ow);
    for (int o = block_begin * kOutputBlock; o < o_end; ++o) {
      const int16_t* w = conv.weights.as<int16_t>() + static_cast<int64_t>(o) * taps * g.ic;
      int32_t acc = 0;
      for (int ky = 0; ky < g.kh; ++ky) {
        const int iy = oy * g.stride_h - g.pad_top + ky * g.dilation_h;
        for (int kx = 0; kx < g.kw; ++kx, w += g.ic) {
          const int ix = ox * g.stride_w - g.pad_left + kx * g.dilation_w;
          const bool inside = iy >= 0 && iy < g.ih && ix >= 0 && ix < g.iw;
          const uint8_t* x = inside ? args.src + ((image * g.ih + iy) * g.iw + ix) * g.ic : padding;
          for (int c = 0; c < g.ic; ++c) acc += static_cast<int32_t>(w[c]) * x[c];
        }
      }
      const int64_t i = p * g.oc + o;
      if (args.dst_s32 != nullptr) {
        args.dst_s32[i] = acc;
        continue;
      }
      if (args.fixed != nullptr) {
        const FixedPointLayer& layer = *args.fixed;
        int64_t sum = int64_t{acc} * layer.multiplier[o] + layer.offset[o];
        if (args.residual != nullptr) sum += args.residual[i] * layer.residual_multiplier;
        args.dst[i] =
            static_cast<uint8_t>(std::clamp<int64_t>(sum >> layer.shift, layer.lo, layer.hi));
        continue;
      }
      float v = std::fma(static_cast<float>(acc), args.multiplier[o], args.offset[o]);
      if (args.residual != nullptr) {
        v = std::fma(static_cast<float>(args.residual[i]), args.residual_multiplier, v);
      }
      if (args.dst != nullptr) v = std::nearbyint(v);
      // The order of the operands makes NaN give lo, as the vector min and max do.
      v = std::min(std::max(args.lo, v), args.hi);
      if (args.dst != nullptr) {
        args.dst[i] = static_cast<uint8_t>(v);
      } else {
        args.dst_f32[i] = v;
      }
    }
  }
}

}  // namespace tern::kernels::scalar
