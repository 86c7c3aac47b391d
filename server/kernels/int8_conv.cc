#include "server/kernels/int8_conv.h"

#include <algorithm>
#include <cstring>

#include "server/kernels/elementwise_variants.h"

namespace tern::kernels {

PackedInt8Conv PackInt8Conv(const ConvGeometry& geometry, int groups,
                            absl::Span<const int8_t> weights, uint8_t zero_point, Isa isa) {
  PackedInt8Conv conv;
  conv.geometry = geometry;
  conv.groups = groups;
  conv.isa = isa;
  const int64_t channels = geometry.ic / groups, taps = int64_t{geometry.kh} * geometry.kw;
  conv.weights = AlignedBuffer(weights.size());
  int8_t* w = conv.weights.as<int8_t>();
  for (int64_t o = 0; o < geometry.oc; ++o) {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < channels; ++c) *w++ = weights[(o * channels + c) * taps + t];
    }
  }
  conv.padding = AlignedBuffer(channels);
  std::memset(conv.padding.as<uint8_t>(), zero_point, channels);
  return conv;
}

void RunInt8Conv(const PackedInt8Conv& conv, const uint8_t* src, int64_t pixel_begin,
                 int64_t pixel_end, int32_t* dst) {
  const ConvGeometry& g = conv.geometry;
  const int64_t channels = g.ic / conv.groups, taps = int64_t{g.kh} * g.kw;
  const int outputs = g.oc / conv.groups;
#if TERN_HAVE_AVX2
  const auto dot = conv.isa >= Isa::kAvx2 ? avx2::DotU8S8 : scalar::DotU8S8;
#else
  const auto dot = scalar::DotU8S8;
#endif
  for (int64_t p = pixel_begin; p < pixel_end; ++p) {
    const int64_t image = p / (int64_t{g.oh} * g.ow);
    const int oy = static_cast<int>(p / g.ow % g.oh), ox = static_cast<int>(p % g.ow);
    int32_t* sums = dst + p * g.oc;
    std::fill(sums, sums + g.oc, 0);
    for (int64_t t = 0; t < taps; ++t) {
      const int iy = oy * g.stride_h - g.pad_top + static_cast<int>(t / g.kw) * g.dilation_h;
      const int ix = ox * g.stride_w - g.pad_left + static_cast<int>(t % g.kw) * g.dilation_w;
      const bool inside = iy >= 0 && iy < g.ih && ix >= 0 && ix < g.iw;
      const uint8_t* pixel = inside ? src + ((image * g.ih + iy) * g.iw + ix) * g.ic : nullptr;
      for (int group = 0; group < conv.groups; ++group) {
        const uint8_t* x = inside ? pixel + group * channels : conv.padding.as<uint8_t>();
        for (int i = 0; i < outputs; i += 4) {
          const int64_t o = int64_t{group} * outputs + i;
          dot(x, conv.weights.as<int8_t>() + (o * taps + t) * channels, taps * channels,
              std::min(4, outputs - i), channels, sums + o);
        }
      }
    }
  }
}

}  // namespace tern::kernels
