#include "server/kernels/depthwise_conv.h"

#include "server/kernels/depthwise_conv_variants.h"
#include "server/kernels/elementwise.h"

namespace tern::kernels {
namespace {

size_t VariantScratchBytes(const PackedDepthwiseConv& conv) {
#if TERN_HAVE_AVX2
  if (conv.isa != Isa::kScalar) return (tiled::ScratchBytes(conv) + 63) / 64 * 64;
#endif
  return (scalar::ScratchBytes(conv) + 63) / 64 * 64;
}

}  // namespace

PackedDepthwiseConv PackDepthwiseConv(const ConvGeometry& geometry,
                                      absl::Span<const int8_t> weights, Isa isa) {
  PackedDepthwiseConv conv;
  conv.geometry = geometry;
  conv.isa = isa;
  if (isa == Isa::kScalar) {
    scalar::Pack(weights, conv);
  } else {
#if TERN_HAVE_AVX2
    tiled::Pack(weights, conv);
#endif
  }
  return conv;
}

// The variant's, then the sums of one row.
size_t DepthwiseConvScratchBytes(const PackedDepthwiseConv& conv) {
  return VariantScratchBytes(conv) +
         sizeof(int32_t) * static_cast<size_t>(conv.geometry.ow) * conv.geometry.oc;
}

void RunDepthwiseConv(const PackedDepthwiseConv& conv, const ClusterConvArgs& args,
                      int64_t row_begin, int64_t row_end) {
#if TERN_HAVE_AVX2
  const auto run = conv.isa != Isa::kScalar ? tiled::Run : scalar::Run;
#else
  const auto run = scalar::Run;
#endif
  const ConvGeometry& g = conv.geometry;
  const int64_t row_elements = int64_t{g.ow} * g.oc;
  if (args.dst_s32 != nullptr) {
    run(conv, args, row_begin, row_end, args.dst_s32 + row_begin * row_elements, nullptr);
    return;
  }
  if (conv.isa != Isa::kScalar && args.dst != nullptr && args.residual == nullptr) {
    run(conv, args, row_begin, row_end, nullptr, args.dst + row_begin * row_elements);
    return;
  }
  // Rare: a residual or an f32 result. The sums of a row, then what follows them anywhere else.
  int32_t* sums =
      reinterpret_cast<int32_t*>(static_cast<uint8_t*>(args.scratch) + VariantScratchBytes(conv));
  const FloatEpilogue epilogue{args.multiplier, args.offset, args.residual_multiplier, args.lo,
                               args.hi};
  for (int64_t row = row_begin; row < row_end; ++row) {
    run(conv, args, row, row + 1, sums, nullptr);
    const int64_t at = row * row_elements;
    const uint8_t* residual = args.residual != nullptr ? args.residual + at : nullptr;
    if (args.fixed != nullptr) {
      RequantizeS32(conv.isa, sums, residual, *args.fixed, g.ow, g.oc, args.dst + at);
    } else {
      FinishS32(conv.isa, sums, residual, epilogue, g.ow, g.oc,
                args.dst != nullptr ? args.dst + at : nullptr,
                args.dst_f32 != nullptr ? args.dst_f32 + at : nullptr);
    }
  }
}

}  // namespace tern::kernels
