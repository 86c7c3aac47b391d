// AVX-512 (F, BW, VNNI) tiles of the depthwise convolutions: four rows per dword and vpdpbusd,
// which multiplies u8 codes with s8 weights into s32 without saturating.
//
// A block is 32 channels: the first vector's lanes begin at channels 0, 16, 8 and 24 with four
// channels each, the second one's four later. No library code here: it would be compiled with these
// flags for everyone.
#include <immintrin.h>

#include "server/kernels/depthwise_conv_tiles.h"

namespace tern::kernels::tiled {
namespace {

#define TERN_INLINE inline __attribute__((always_inline))
#define TERN_UNROLL _Pragma("GCC unroll 32")

using Vector = __m512i;
constexpr int kGroup = 4;
// 16 sums leave registers for two vectors of a column and most weights of a 3x3 kernel.
constexpr int kTilePixels = 8;
constexpr int kWeightBytes = 128;

TERN_INLINE Vector Zero() { return _mm512_setzero_si512(); }

TERN_INLINE __m512i LoadRow(const uint8_t* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Bytes of two rows side by side: lanes of channels 0-7, 16-23, 8-15, 24-31.
TERN_INLINE __m512i Interleave(__m512i a, __m512i b) {
  return _mm512_mask_unpackhi_epi8(_mm512_unpacklo_epi8(a, b), 0xFFFFFFFF00000000u, a, b);
}

template <int kRows>
TERN_INLINE void Expand(const uint8_t* src, int64_t row_stride, Vector (&x)[2]) {
  const __m512i zero = Zero();
  const __m512i a = Interleave(LoadRow(src), kRows > 1 ? LoadRow(src + row_stride) : zero);
  __m512i b = zero;
  if constexpr (kRows > 2) {
    b = Interleave(LoadRow(src + 2 * row_stride), kRows > 3 ? LoadRow(src + 3 * row_stride) : zero);
  }
  x[0] = _mm512_unpacklo_epi16(a, b);
  x[1] = _mm512_unpackhi_epi16(a, b);
}

TERN_INLINE Vector Multiply(Vector x, const void* weights) {
  return _mm512_dpbusd_epi32(Zero(), x, _mm512_load_si512(weights));
}

TERN_INLINE Vector MultiplyAdd(Vector sum, Vector x, const void* weights) {
  return _mm512_dpbusd_epi32(sum, x, _mm512_load_si512(weights));
}

// Of a float epilogue, or the same fields' bits as integers of a fixed-point one.
struct Constants {
  __m512i multiplier[2], offset[2];
};

// From the order of channels to the order of vectors.
TERN_INLINE __m512i LoadLanes(const void* values, int half) {
  const __m512i first = _mm512_loadu_si512(values);
  const __m512i second = _mm512_loadu_si512(static_cast<const __m512i*>(values) + 1);
  const __m512i index =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                       _mm512_set1_epi32(4 * half));
  return _mm512_permutex2var_epi32(first, index, second);
}

template <Mode kMode>
TERN_INLINE Constants LoadConstants(const DepthwiseTile& k) {
  Constants c{};
  if constexpr (kMode == kSums) return c;
  const bool fixed = kMode == kFixedPoint;
  const void* multiplier = fixed ? static_cast<const void*>(k.fixed_multiplier) : k.multiplier;
  const void* offset = fixed ? static_cast<const void*>(k.fixed_offset) : k.offset;
  for (int half = 0; half < 2; ++half) {
    c.multiplier[half] = LoadLanes(multiplier, half);
    c.offset[half] = LoadLanes(offset, half);
  }
  return c;
}

// 32 channels of two pixels as codes, one behind the other.
TERN_INLINE __m512i PackCodes(const DepthwiseTile& k, __m512i a0, __m512i a1, __m512i b0,
                              __m512i b1) {
  __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a0, a1), _mm512_packs_epi32(b0, b1));
  bytes = _mm512_max_epu8(bytes, _mm512_set1_epi8(static_cast<char>(k.lo)));
  bytes = _mm512_min_epu8(bytes, _mm512_set1_epi8(static_cast<char>(k.hi)));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 2, 6, 1, 5, 3, 7), bytes);
}

// Rounded to nearest even. What exceeds 255 stays a number that s32 holds; what is too small, or no
// number, becomes the least s32, which packs as 0.
TERN_INLINE __m512i Affine(const Constants& c, int half, __m512i sum) {
  const __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_castsi512_ps(c.multiplier[half]),
                                   _mm512_castsi512_ps(c.offset[half]));
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(255.0f), v));
}

TERN_INLINE __m512i Shifted(const DepthwiseTile& k, const Constants& c, int half, __m512i sum) {
  const __m512i v = _mm512_add_epi32(_mm512_mullo_epi32(sum, c.multiplier[half]), c.offset[half]);
  return _mm512_sra_epi32(v, _mm_cvtsi32_si128(k.shift));
}

template <Mode kMode, int kPixels>
TERN_INLINE void Finish(const DepthwiseTile& k, const Constants& c, int64_t at,
                        const Vector (&sums)[kPixels][2]) {
  if constexpr (kMode == kSums) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      int32_t* out = k.sums + at + p * k.pixel_elements;
      _mm512_storeu_si512(out, _mm512_permutex2var_epi32(sums[p][0], low, sums[p][1]));
      _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi32(sums[p][0], high, sums[p][1]));
    }
    return;
  }
  TERN_UNROLL
  for (int p = 0; p < kPixels; p += 2) {
    const int q = p + 1 < kPixels ? p + 1 : p;
    __m512i codes;
    if constexpr (kMode == kFixedPoint) {
      codes = PackCodes(k, Shifted(k, c, 0, sums[p][0]), Shifted(k, c, 1, sums[p][1]),
                        Shifted(k, c, 0, sums[q][0]), Shifted(k, c, 1, sums[q][1]));
    } else {
      codes = PackCodes(k, Affine(c, 0, sums[p][0]), Affine(c, 1, sums[p][1]),
                        Affine(c, 0, sums[q][0]), Affine(c, 1, sums[q][1]));
    }
    uint8_t* out = k.codes + at + p * k.pixel_elements;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(codes));
    if (q != p) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k.pixel_elements),
                          _mm512_extracti64x4_epi64(codes, 1));
    }
  }
}

#include "server/kernels/depthwise_conv_rows.h"

}  // namespace

const DepthwiseKernels kAvx512Depthwise = {
    32, kGroup, kTilePixels, {0, 16, 8, 24}, TERN_DEPTHWISE_KERNELS};

}  // namespace tern::kernels::tiled
