#include "server/kernels/elementwise.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "server/kernels/elementwise_variants.h"

// The AVX-512 machines run the AVX2 variants: these loops wait for memory.
#if TERN_HAVE_AVX2
#define TERN_DISPATCH(isa, call) return (isa) >= Isa::kAvx2 ? avx2::call : scalar::call
#else
#define TERN_DISPATCH(isa, call) return scalar::call
#endif

namespace tern::kernels {
namespace {

constexpr int64_t kMaxS32 = std::numeric_limits<int32_t>::max();

}  // namespace

void QuantizeF32(Isa isa, const float* src, size_t n, QuantParams params, uint8_t* dst) {
  TERN_DISPATCH(isa, QuantizeF32(src, n, params.scale, params.zero_point, dst));
}

void DequantizeU8(Isa isa, const uint8_t* src, size_t n, QuantParams params, float* dst) {
  TERN_DISPATCH(isa, DequantizeU8(src, n, params.scale, params.zero_point, dst));
}

void LookupU8(Isa isa, const uint8_t* src, size_t n, const uint8_t* table, uint8_t* dst) {
  TERN_DISPATCH(isa, LookupU8(src, n, table, dst));
}

void AddU8(Isa isa, const uint8_t* a, float ma, const uint8_t* b, float mb, float offset,
           uint8_t lo, uint8_t hi, size_t n, uint8_t* dst) {
  TERN_DISPATCH(isa, AddU8(a, ma, b, mb, offset, lo, hi, n, dst));
}

void MulChannelsU8(Isa isa, const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,
                   size_t pixels, size_t channels, uint8_t* dst) {
  TERN_DISPATCH(isa, MulChannelsU8(a, za, b, zb, m, zy, pixels, channels, dst));
}

void ScaleChannelsU8(Isa isa, const uint8_t* src, const FloatEpilogue& scale, size_t pixels,
                     size_t channels, uint8_t* dst) {
  TERN_DISPATCH(isa, ScaleChannelsU8(src, scale, pixels, channels, dst));
}

void SumPixelsU8(Isa isa, const uint8_t* src, size_t pixels, size_t channels, int32_t* sums) {
  TERN_DISPATCH(isa, SumPixelsU8(src, pixels, channels, sums));
}

void FinishS32(Isa isa, const int32_t* acc, const uint8_t* residual, const FloatEpilogue& epilogue,
               size_t pixels, size_t channels, uint8_t* dst, float* dst_f32) {
  TERN_DISPATCH(isa, FinishS32(acc, residual, epilogue, pixels, channels, dst, dst_f32));
}

void RequantizeS32(Isa isa, const int32_t* acc, const uint8_t* residual,
                   const FixedPointLayer& layer, size_t pixels, size_t channels, uint8_t* dst) {
  if (layer.narrow()) {
    const NarrowLayer narrow{layer.multiplier.data(),
                             layer.narrow_offset.data(),
                             static_cast<int32_t>(layer.residual_multiplier),
                             layer.shift,
                             static_cast<uint8_t>(layer.lo),
                             static_cast<uint8_t>(layer.hi)};
    TERN_DISPATCH(isa, RequantizeS32(acc, residual, narrow, pixels, channels, dst));
  }
  for (size_t p = 0, i = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c, ++i) {
      int64_t sum = int64_t{acc[i]} * layer.multiplier[c] + layer.offset[c];
      if (residual != nullptr) sum += residual[i] * layer.residual_multiplier;
      dst[i] = static_cast<uint8_t>(std::clamp<int64_t>(sum >> layer.shift, layer.lo, layer.hi));
    }
  }
}

void AddFixedU8(Isa isa, const uint8_t* a, const uint8_t* b, const FixedPointAdd& add, size_t n,
                uint8_t* dst) {
  if (255 * (add.multiplier_a + add.multiplier_b) + std::abs(add.offset) <= kMaxS32) {
    const NarrowSum narrow{
        static_cast<int32_t>(add.multiplier_a), static_cast<int32_t>(add.multiplier_b),
        static_cast<int32_t>(add.offset),       add.shift,
        static_cast<uint8_t>(add.lo),           static_cast<uint8_t>(add.hi)};
    TERN_DISPATCH(isa, AddFixedU8(a, b, narrow, n, dst));
  }
  for (size_t i = 0; i < n; ++i) dst[i] = add(a[i], b[i]);
}

void MulChannelsFixedU8(Isa isa, const uint8_t* a, int za, const uint8_t* b, int zb,
                        const FixedPointMap& map, size_t pixels, size_t channels, uint8_t* dst) {
  if (map.multiplier <= kMaxS32 / (255 * 255) &&
      255 * 255 * map.multiplier + std::abs(map.offset) <= kMaxS32) {
    const NarrowSum narrow{static_cast<int32_t>(map.multiplier), 0,
                           static_cast<int32_t>(map.offset),     map.shift,
                           static_cast<uint8_t>(map.lo),         static_cast<uint8_t>(map.hi)};
    TERN_DISPATCH(isa, MulChannelsFixedU8(a, za, b, zb, narrow, pixels, channels, dst));
  }
  for (size_t p = 0, i = 0; p < pixels; ++p) {
    for (size_t c = 0; c < channels; ++c, ++i) dst[i] = map(int64_t{a[i] - za} * (b[c] - zb));
  }
}

}  // namespace tern::kernels
