#include "server/kernels/cluster_conv.h"

#include <limits>

#include "server/kernels/cluster_conv_variants.h"

namespace tern::kernels {

PackedClusterConv PackClusterConv(const ConvGeometry& geometry, const QuantizedWeights& weights,
                                  Isa isa) {
  PackedClusterConv conv;
  conv.geometry = geometry;
  conv.isa = isa;
  conv.cluster_size = weights.cluster_size;
  if (isa == Isa::kScalar) {
    scalar::Pack(weights, conv);
  } else {
#if TERN_HAVE_AVX2
    tiled::Pack(weights, conv);
#endif
  }
  return conv;
}

bool PrefersRowTaps(const ConvGeometry& g, Isa isa) {
  const auto waste = [](int channels) {
    return static_cast<double>((channels + 7) / 8 * 8) / channels;
  };
  return isa == Isa::kAvx2 && g.kw > 1 && g.kw * g.ic >= 8 && g.dilation_w == 1 &&
         waste(g.kw * g.ic) < waste(g.ic);
}

double Int8TileCycles(const PackedClusterConv& conv) {
#if TERN_HAVE_AVX2
  if (conv.isa == Isa::kAvx2) return tiled::Int8Cycles(conv);
#endif
  return std::numeric_limits<double>::infinity();
}

size_t ClusterConvScratchBytes(const PackedClusterConv& conv) {
#if TERN_HAVE_AVX2
  if (conv.isa != Isa::kScalar) return tiled::ScratchBytes(conv);
#endif
  return scalar::ScratchBytes(conv);
}

void RunClusterConv(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
                    int64_t pixel_end, int block_begin, int block_end) {
  if (pixel_begin >= pixel_end || block_begin >= block_end) return;
#if TERN_HAVE_AVX2
  if (conv.isa != Isa::kScalar) {
    tiled::Run(conv, args, pixel_begin, pixel_end, block_begin, block_end);
    return;
  }
#endif
  scalar::Run(conv, args, pixel_begin, pixel_end, block_begin, block_end);
}

}  // namespace tern::kernels
