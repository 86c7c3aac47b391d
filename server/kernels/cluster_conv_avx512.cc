// AVX-512 (F, BW) tiles of the cluster convolutions: the arithmetic of cluster_conv_avx2.cc, one
// register for a block of 16 output channels, and enough registers for the s32 sums as well.
//
// The steps are inline assembly as there. No library code here: it would be
// compiled with these flags for everyone.
#include <immintrin.h>

#include "server/kernels/cluster_conv_tiles.h"

namespace tern::kernels::tiled {
namespace {

#define TERN_INLINE inline __attribute__((always_inline))
#define TERN_UNROLL _Pragma("GCC unroll 16")

// The fixed-point epilogue, or the sums themselves.
template <int kPixels>
TERN_INLINE void FinishFixed(const TileArgs& args, const __m512i (&acc)[kPixels]) {
  const TileArgs k = args;  // a copy, so that the stores cannot change it
  const __mmask16 lanes = static_cast<__mmask16>((1u << k.channels) - 1);
  if (k.dst_s32 != nullptr) {
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      _mm512_mask_storeu_epi32(k.dst_s32 + p * k.stride, lanes, acc[p]);
    }
    return;
  }
  const __m512i multiplier = _mm512_load_si512(k.fixed_multiplier);
  const __m512i offset = _mm512_load_si512(k.fixed_offset);
  const __m512i residual_multiplier = _mm512_set1_epi32(k.fixed_residual_multiplier);
  const __m128i shift = _mm_cvtsi32_si128(k.shift);
  const __m512i lo = _mm512_set1_epi32(k.fixed_lo);
  const __m512i hi = _mm512_set1_epi32(k.fixed_hi);
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    __m512i v = _mm512_add_epi32(_mm512_mullo_epi32(acc[p], multiplier), offset);
    if (k.residual != nullptr) {
      const __m128i r = _mm_maskz_loadu_epi8(lanes, k.residual + p * k.stride);
      v = _mm512_add_epi32(v, _mm512_mullo_epi32(_mm512_cvtepu8_epi32(r), residual_multiplier));
    }
    v = _mm512_min_epi32(hi, _mm512_max_epi32(_mm512_sra_epi32(v, shift), lo));
    _mm_mask_storeu_epi8(k.dst + p * k.stride, lanes, _mm512_cvtepi32_epi8(v));
  }
}

// The epilogue of a tile. Lanes past the block's channels are neither read nor written.
template <int kPixels>
TERN_INLINE void Finish(const TileArgs& args, const __m512i (&acc)[kPixels]) {
  if (args.multiplier == nullptr || args.dst_s32 != nullptr) {
    FinishFixed<kPixels>(args, acc);
    return;
  }
  const TileArgs k = args;  // a copy, so that the stores to y cannot change it
  const __mmask16 lanes = static_cast<__mmask16>((1u << k.channels) - 1);
  const __m512 multiplier = _mm512_load_ps(k.multiplier);
  const __m512 offset = _mm512_load_ps(k.offset);
  const __m512 residual_multiplier = _mm512_set1_ps(k.residual_multiplier);
  const __m512 lo = _mm512_set1_ps(k.lo);
  const __m512 hi = _mm512_set1_ps(k.hi);
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[p]), multiplier, offset);
    if (k.residual != nullptr) {
      const __m128i r = _mm_maskz_loadu_epi8(lanes, k.residual + p * k.stride);
      v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r)), residual_multiplier, v);
    }
    // NaN gives lo: vmaxps returns its second operand then.
    v = _mm512_min_ps(hi, _mm512_max_ps(v, lo));
    if (k.dst != nullptr) {
      const __m128i y = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
      if (k.channels == 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(k.dst + p * k.stride), y);
      } else {
        _mm_mask_storeu_epi8(k.dst + p * k.stride, lanes, y);
      }
    } else {
      _mm512_mask_storeu_ps(k.dst_f32 + p * k.stride, lanes, v);
    }
  }
}

template <int kPixels, int kAt>
TERN_INLINE void AddStep(const uint8_t* const (&x)[kPixels], int64_t c, const int8_t* weights,
                         __m512i (&s)[kPixels]) {
  const __m512i w = _mm512_load_si512(weights);
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    __m512i b;
    asm("vpbroadcastd %c[at](%[x],%[c]), %[b]\n\t"
        "vpmaddubsw %[w], %[b], %[b]\n\t"
        "vpaddw %[b], %[s], %[s]"
        : [s] "+v"(s[p]), [b] "=&v"(b)
        : [x] "r"(x[p]), [c] "r"(c), [at] "i"(kAt), [w] "v"(w));
  }
}

template <int kPixels>
void GeneralTile(const TileArgs& k) {
  __m512i acc[kPixels];
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) acc[p] = _mm512_setzero_si512();
  const int8_t* w = k.weights;
  const int16_t* scales = k.scales;
  const int32_t* program = k.program;
  for (int32_t f = 0; f < k.flushes; ++f, scales += 32) {
    __m512i s[kPixels];
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) s[p] = _mm512_setzero_si512();
    int32_t runs = *program++;
    do {
      int64_t c = program[0];
      const int32_t where = program[1];
      program += 2;
      const uint8_t* const* inputs = k.inputs + (where >> 8) * k.tap_stride;
      const uint8_t* x[kPixels];
      TERN_UNROLL
      for (int p = 0; p < kPixels; ++p) x[p] = inputs[p];
      int32_t steps = where & 255;
      if (steps & 1) {
        AddStep<kPixels, 0>(x, c, w, s);
        w += 64;
        c += 4;
      }
      for (steps >>= 1; steps > 0; --steps) {
        AddStep<kPixels, 0>(x, c, w, s);
        AddStep<kPixels, 4>(x, c, w + 64, s);
        w += 128;
        c += 8;
      }
    } while (--runs > 0);
    const __m512i scale = _mm512_load_si512(scales);
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      acc[p] = _mm512_add_epi32(acc[p], _mm512_madd_epi16(s[p], scale));
    }
  }
  Finish<kPixels>(k, acc);
}

template <int kPixels>
void PairsTile(const TileArgs& k) {
  __m512i acc[kPixels];
  const uint8_t* x[kPixels];
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    acc[p] = _mm512_setzero_si512();
    x[p] = k.inputs[p];
  }
  const int8_t* w = k.weights;
  const int16_t* scales = k.scales;
  const int64_t end = int64_t{k.flushes} * 8;
  for (int64_t c = 0; c != end; c += 8, w += 128, scales += 32) {
    const __m512i w0 = _mm512_load_si512(w);
    const __m512i w1 = _mm512_load_si512(w + 64);
    const __m512i scale = _mm512_load_si512(scales);
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      __m512i t, u;
      asm("vpbroadcastd (%[x],%[c]), %[t]\n\t"
          "vpbroadcastd 4(%[x],%[c]), %[u]\n\t"
          "vpmaddubsw %[w0], %[t], %[t]\n\t"
          "vpmaddubsw %[w1], %[u], %[u]\n\t"
          "vpaddw %[u], %[t], %[t]\n\t"
          "vpmaddwd %[scale], %[t], %[t]\n\t"
          "vpaddd %[t], %[acc], %[acc]"
          : [acc] "+v"(acc[p]), [t] "=&v"(t), [u] "=&v"(u)
          : [x] "r"(x[p]), [c] "r"(c), [w0] "v"(w0), [w1] "v"(w1), [scale] "v"(scale));
    }
  }
  Finish<kPixels>(k, acc);
}

}  // namespace

const TileKernels kAvx512Tiles[kKinds] = {
    {10,
     {nullptr, GeneralTile<1>, GeneralTile<2>, GeneralTile<3>, GeneralTile<4>, GeneralTile<5>,
      GeneralTile<6>, GeneralTile<7>, GeneralTile<8>, GeneralTile<9>, GeneralTile<10>}},
    {10,
     {nullptr, PairsTile<1>, PairsTile<2>, PairsTile<3>, PairsTile<4>, PairsTile<5>, PairsTile<6>,
      PairsTile<7>, PairsTile<8>, PairsTile<9>, PairsTile<10>}},
    {},
};

}  // namespace tern::kernels::tiled
