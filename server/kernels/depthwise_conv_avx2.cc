// AVX2 + FMA tiles of the depthwise convolutions: u8 codes and s8 weights widened to s16, pairs of
// rows per dword, vpmaddwd into s32: |2 * 255 * 128| < 2^17, so no weight saturates.
//
// A block is 16 channels: the first vector has channels 0-3 and 8-11, the second one 4-7 and
// 12-15, as vpunpck leaves them and vpackssdw wants them. No library code here: it would be
// compiled with these flags for everyone.
#include <immintrin.h>

#include "server/kernels/depthwise_conv_tiles.h"

namespace tern::kernels::tiled {
namespace {

#define TERN_INLINE inline __attribute__((always_inline))
#define TERN_UNROLL _Pragma("GCC unroll 32")

using Vector = __m256i;
constexpr int kGroup = 2;
// 8 sums, a column's four vectors, a product and spare ones are the 16 registers.
constexpr int kTilePixels = 4;
constexpr int kWeightBytes = 64;

TERN_INLINE Vector Zero() { return _mm256_setzero_si256(); }

TERN_INLINE __m256i LoadWords(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int kRows>
TERN_INLINE void Expand(const uint8_t* src, int64_t row_stride, Vector (&x)[2]) {
  const __m256i a = LoadWords(src);
  __m256i b = Zero();
  if constexpr (kRows > 1) b = LoadWords(src + row_stride);
  x[0] = _mm256_unpacklo_epi16(a, b);
  x[1] = _mm256_unpackhi_epi16(a, b);
}

TERN_INLINE Vector Multiply(Vector x, const void* weights) {
  return _mm256_madd_epi16(x, _mm256_load_si256(static_cast<const __m256i*>(weights)));
}

// Inline assembly, because GCC 12 moves all products before the additions and spills them.
TERN_INLINE Vector MultiplyAdd(Vector sum, Vector x, const void* weights) {
  __m256i product;
  asm("vpmaddwd %[w], %[x], %[product]\n\t"
      "vpaddd %[product], %[sum], %[sum]"
      : [sum] "+x"(sum), [product] "=&x"(product)
      : [x] "x"(x), [w] "m"(*static_cast<const __m256i*>(weights)));
  return sum;
}

// Of a float epilogue, or the same fields' bits as integers of a fixed-point one.
struct Constants {
  __m256i multiplier[2], offset[2];
};

TERN_INLINE __m256i LoadLanes(const void* values, int half) {
  const __m128i* p = static_cast<const __m128i*>(values) + half;
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(p)), _mm_loadu_si128(p + 2),
                                 1);
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

// 16 channels of two pixels as codes: packing undoes the lanes' order.
TERN_INLINE __m256i PackCodes(const DepthwiseTile& k, __m256i a0, __m256i a1, __m256i b0,
                              __m256i b1) {
  __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a0, a1), _mm256_packs_epi32(b0, b1));
  bytes = _mm256_max_epu8(bytes, _mm256_set1_epi8(static_cast<char>(k.lo)));
  bytes = _mm256_min_epu8(bytes, _mm256_set1_epi8(static_cast<char>(k.hi)));
  return _mm256_permute4x64_epi64(bytes, 0xD8);
}

// Rounded to nearest even. What exceeds 255 stays a number that s32 holds; what is too small, or no
// number, becomes the least s32, which packs as 0.
TERN_INLINE __m256i Affine(const Constants& c, int half, __m256i sum) {
  const __m256 v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_castsi256_ps(c.multiplier[half]),
                                   _mm256_castsi256_ps(c.offset[half]));
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(255.0f), v));
}

TERN_INLINE __m256i Shifted(const DepthwiseTile& k, const Constants& c, int half, __m256i sum) {
  const __m256i v = _mm256_add_epi32(_mm256_mullo_epi32(sum, c.multiplier[half]), c.offset[half]);
  return _mm256_sra_epi32(v, _mm_cvtsi32_si128(k.shift));
}

template <Mode kMode, int kPixels>
TERN_INLINE void Finish(const DepthwiseTile& k, const Constants& c, int64_t at,
                        const Vector (&sums)[kPixels][2]) {
  if constexpr (kMode == kSums) {
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      __m256i* out = reinterpret_cast<__m256i*>(k.sums + at + p * k.pixel_elements);
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(sums[p][0], sums[p][1], 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(sums[p][0], sums[p][1], 0x31));
    }
    return;
  }
  TERN_UNROLL
  for (int p = 0; p < kPixels; p += 2) {
    const int q = p + 1 < kPixels ? p + 1 : p;
    __m256i codes;
    if constexpr (kMode == kFixedPoint) {
      codes = PackCodes(k, Shifted(k, c, 0, sums[p][0]), Shifted(k, c, 1, sums[p][1]),
                        Shifted(k, c, 0, sums[q][0]), Shifted(k, c, 1, sums[q][1]));
    } else {
      codes = PackCodes(k, Affine(c, 0, sums[p][0]), Affine(c, 1, sums[p][1]),
                        Affine(c, 0, sums[q][0]), Affine(c, 1, sums[q][1]));
    }
    uint8_t* out = k.codes + at + p * k.pixel_elements;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(codes));
    if (q != p) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k.pixel_elements),
                       _mm256_extracti128_si256(codes, 1));
    }
  }
}

#include "server/kernels/depthwise_conv_rows.h"

}  // namespace

const DepthwiseKernels kAvx2Depthwise = {
    16, kGroup, kTilePixels, {0, 8, 0, 0}, TERN_DEPTHWISE_KERNELS};

}  // namespace tern::kernels::tiled
