#include "server/kernels/elementwise.h"

#include "server/kernels/elementwise_variants.h"

// The AVX-512 machines run the AVX2 variants: these loops wait for memory.
#if TERN_HAVE_AVX2
#define TERN_DISPATCH(isa, call) return (isa) >= Isa::kAvx2 ? avx2::call : scalar::call
#else
#define TERN_DISPATCH(isa, call) return scalar::call
#endif

namespace tern::kernels {

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

void RequantizeU8(Isa isa, const uint8_t* src, float m, float offset, size_t n, uint8_t* dst) {
  TERN_DISPATCH(isa, RequantizeU8(src, m, offset, n, dst));
}

void MulChannelsU8(Isa isa, const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,
                   size_t pixels, size_t channels, uint8_t* dst) {
  TERN_DISPATCH(isa, MulChannelsU8(a, za, b, zb, m, zy, pixels, channels, dst));
}

void SumPixelsU8(Isa isa, const uint8_t* src, size_t pixels, size_t channels, int32_t* sums) {
  TERN_DISPATCH(isa, SumPixelsU8(src, pixels, channels, sums));
}

}  // namespace tern::kernels
