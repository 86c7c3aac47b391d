// Element-wise integer kernels between convolutions. The same contract as cluster_conv.h:
// bit-exact in every variant, pure, any alignment, n elements; dst may equal a source of the
// same type and size.
// `isa` must be <= DetectIsa().
#ifndef TERN_SERVER_KERNELS_ELEMENTWISE_H_
#define TERN_SERVER_KERNELS_ELEMENTWISE_H_

#include <cstddef>
#include <cstdint>

#include "server/kernels/dispatch.h"
#include "server/kernels/elementwise_variants.h"
#include "server/tensor/fixed_point.h"
#include "server/tensor/quant_params.h"

namespace tern::kernels {

// dst[i] = params.Quantize(src[i]). NaN gives the zero point.
void QuantizeF32(Isa isa, const float* src, size_t n, QuantParams params, uint8_t* dst);

// dst[i] = params.Dequantize(src[i]).
void DequantizeU8(Isa isa, const uint8_t* src, size_t n, QuantParams params, float* dst);

// dst[i] = table[src[i]], table of 256 entries: any unary function of a u8 tensor.
void LookupU8(Isa isa, const uint8_t* src, size_t n, const uint8_t* table, uint8_t* dst);

// dst[i] = clamp(rint(fma(float(a[i]), ma, fma(float(b[i]), mb, offset))), lo, hi)
void AddU8(Isa isa, const uint8_t* a, float ma, const uint8_t* b, float mb, float offset,
           uint8_t lo, uint8_t hi, size_t n, uint8_t* dst);

// For pixels p < pixels: dst[p][c] = clamp(rint(fma(float((a[p][c] - za) * (b[c] - zb)), m,
// float(zy))), 0, 255): the squeeze-excite multiplication of an NHWC tensor by one factor per
// channel.
void MulChannelsU8(Isa isa, const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,
                   size_t pixels, size_t channels, uint8_t* dst);

// For pixels p < pixels: dst[p][c] = clamp(rint(fma(float(src[p][c]), multiplier[c], offset[c])),
// lo, hi): batch normalisation of codes. `scale` has no residual.
void ScaleChannelsU8(Isa isa, const uint8_t* src, const FloatEpilogue& scale, size_t pixels,
                     size_t channels, uint8_t* dst);

// sums[c] = sum over pixels of src[p][c] (NHWC, pixels <= 2^23): global average pooling's
// numerator.
void SumPixelsU8(Isa isa, const uint8_t* src, size_t pixels, size_t channels, int32_t* sums);

// What follows the s32 sums of a convolution: the float epilogue of cluster_conv.h, to codes or
// (dst null) to f32, [pixels][channels]. `residual` may be null, or be dst.
void FinishS32(Isa isa, const int32_t* acc, const uint8_t* residual, const FloatEpilogue& epilogue,
               size_t pixels, size_t channels, uint8_t* dst, float* dst_f32);

// ---- Fixed point (server/tensor/fixed_point.h): the same operators with integers alone ----------

// dst[p][c] = clamp((acc[p][c] * multiplier[c] + residual[p][c] * residual_multiplier + offset[c])
// >> shift, lo, hi) of `layer`, whose vectors have `channels` elements: what follows the s32 sums
// of a convolution. `residual` may be null, or be dst.
void RequantizeS32(Isa isa, const int32_t* acc, const uint8_t* residual,
                   const FixedPointLayer& layer, size_t pixels, size_t channels, uint8_t* dst);

// dst[i] = add(a[i], b[i])
void AddFixedU8(Isa isa, const uint8_t* a, const uint8_t* b, const FixedPointAdd& add, size_t n,
                uint8_t* dst);

// dst[p][c] = map((a[p][c] - za) * (b[c] - zb))
void MulChannelsFixedU8(Isa isa, const uint8_t* a, int za, const uint8_t* b, int zb,
                        const FixedPointMap& map, size_t pixels, size_t channels, uint8_t* dst);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_ELEMENTWISE_H_
