// AVX2 + FMA tiles of the cluster convolutions.
//
// A step multiplies a broadcast dword of u8 activations with s8 codes (vpmaddubsw: pairs of
// products in s16 lanes) and adds into s16 sums (vpaddw); a flush multiplies the sums with
// their clusters' scales (vpmaddwd) and adds into s32 sums.
//
// The steps are inline assembly, one block per pixel: from intrinsics, GCC 12 reassociates and
// hoists the s16 additions and spills half the sums (docs/kernels.md). The blocks declare no
// memory that they read: nothing in this file writes to the activations. No library code here:
// it would be compiled with these flags for everyone.
#include <immintrin.h>

#include "server/kernels/cluster_conv_tiles.h"

namespace tern::kernels::tiled {
namespace {

#define TERN_INLINE inline __attribute__((always_inline))
#define TERN_UNROLL _Pragma("GCC unroll 16")

TERN_INLINE __m256i Load(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}

// The epilogue's constants for one tile.
struct Constants {
  __m256 multiplier[2], offset[2], residual_multiplier, lo, hi;
};

TERN_INLINE Constants LoadConstants(const EpilogueArgs& k) {
  return {{_mm256_load_ps(k.multiplier), _mm256_load_ps(k.multiplier + 8)},
          {_mm256_load_ps(k.offset), _mm256_load_ps(k.offset + 8)},
          _mm256_set1_ps(k.residual_multiplier),
          _mm256_set1_ps(k.lo),
          _mm256_set1_ps(k.hi)};
}

TERN_INLINE __m256 Affine(const Constants& k, int half, const int32_t* acc) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(Load(acc + 8 * half)), k.multiplier[half],
                         k.offset[half]);
}

TERN_INLINE __m256 AddResidual(const Constants& k, __m128i codes, __m256 v) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), k.residual_multiplier, v);
}

// NaN gives lo: vmaxps returns its second operand then.
TERN_INLINE __m256 Clamp(const Constants& k, __m256 v) {
  return _mm256_min_ps(k.hi, _mm256_max_ps(v, k.lo));
}

// 16 channels of two clamped vectors as s16, rounded to nearest even: 0-3, 8-11, 4-7, 12-15.
TERN_INLINE __m256i RoundToWords(__m256 v0, __m256 v1) {
  return _mm256_packs_epi32(_mm256_cvtps_epi32(v0), _mm256_cvtps_epi32(v1));
}

// As 16 codes.
TERN_INLINE __m128i RoundToU8(__m256 v0, __m256 v1) {
  const __m256i words = RoundToWords(v0, v1);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  return _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0));
}

// Two vectors of a pixel's sums, with the residual's codes, in the output's unit and range. Without
// kFloor lo is 0, and the conversions to u8 clamp to it: vcvtps2dq makes NaN and large negative
// numbers the most negative integer.
template <bool kResidual, bool kFloor>
TERN_INLINE __m256i PixelWords(const Constants& k, const uint8_t* residual, const int32_t* acc) {
  __m256 v0 = Affine(k, 0, acc);
  __m256 v1 = Affine(k, 1, acc);
  if constexpr (kResidual) {
    const __m128i r = _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual));
    v0 = AddResidual(k, r, v0);
    v1 = AddResidual(k, _mm_unpackhi_epi64(r, r), v1);
  }
  if constexpr (kFloor) {
    v0 = _mm256_max_ps(v0, k.lo);
    v1 = _mm256_max_ps(v1, k.lo);
  }
  return RoundToWords(_mm256_min_ps(k.hi, v0), _mm256_min_ps(k.hi, v1));
}

// The common case: 16 channels to u8.
template <bool kResidual, bool kFloor>
TERN_INLINE void FinishPixels(const Constants& k, int64_t stride, const uint8_t* residual,
                              uint8_t* y, const int32_t* acc, int pixels) {
  TERN_UNROLL
  for (int p = 0; p < pixels; ++p) {
    const __m256i words = PixelWords<kResidual, kFloor>(k, residual + p * stride, acc + 16 * p);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + p * stride),
                     _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0)));
  }
}

template <bool kResidual>
TERN_INLINE void FinishFull(const EpilogueArgs& args, const int32_t* acc, int pixels) {
  const Constants k = LoadConstants(args);
  if (args.lo == 0.0f) {
    FinishPixels<kResidual, false>(k, args.stride, args.residual, args.dst, acc, pixels);
  } else {
    FinishPixels<kResidual, true>(k, args.stride, args.residual, args.dst, acc, pixels);
  }
}

template <bool kResidual, bool kFloor>
void FinishFullRows(const EpilogueArgs& args, const int32_t* acc, int64_t acc_stride, int pixels,
                    int rows, int64_t row_stride) {
  const Constants k = LoadConstants(args);
  for (int r = 0; r < rows; ++r) {
    const uint8_t* residual = kResidual ? args.residual + r * row_stride : nullptr;
    uint8_t* y = args.dst + r * row_stride;
    // Whole tiles are four or two pixels wide.
    if (pixels == 4) {
      FinishPixels<kResidual, kFloor>(k, args.stride, residual, y, acc + r * acc_stride, 4);
    } else {
      FinishPixels<kResidual, kFloor>(k, args.stride, residual, y, acc + r * acc_stride, pixels);
    }
  }
}

// A short block of channels, or f32 output.
__attribute__((noinline)) void FinishAny(const EpilogueArgs& args, const int32_t* acc, int pixels) {
  const Constants k = LoadConstants(args);
  for (int p = 0; p < pixels; ++p) {
    __m256 v0 = Affine(k, 0, acc + 16 * p);
    __m256 v1 = Affine(k, 1, acc + 16 * p);
    if (args.residual != nullptr) {
      alignas(16) uint8_t r[16] = {};
      __m128i codes;
      if (args.channels == 8) {
        codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(args.residual + p * args.stride));
      } else {
        for (int i = 0; i < args.channels; ++i) r[i] = args.residual[p * args.stride + i];
        codes = _mm_load_si128(reinterpret_cast<const __m128i*>(r));
      }
      v0 = AddResidual(k, codes, v0);
      v1 = AddResidual(k, _mm_unpackhi_epi64(codes, codes), v1);
    }
    v0 = Clamp(k, v0);
    v1 = Clamp(k, v1);
    if (args.dst != nullptr && args.channels == 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(args.dst + p * args.stride), RoundToU8(v0, v1));
    } else if (args.dst != nullptr) {
      alignas(16) uint8_t y[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(y), RoundToU8(v0, v1));
      for (int i = 0; i < args.channels; ++i) args.dst[p * args.stride + i] = y[i];
    } else {
      alignas(32) float y[16];
      _mm256_store_ps(y, v0);
      _mm256_store_ps(y + 8, v1);
      for (int i = 0; i < args.channels; ++i) args.dst_f32[p * args.stride + i] = y[i];
    }
  }
}

// 8 sums of the fixed-point epilogue; `codes` are their residuals.
TERN_INLINE __m256i FixedSum(const EpilogueArgs& k, const int32_t* acc, int half) {
  return _mm256_add_epi32(
      _mm256_mullo_epi32(Load(acc + 8 * half), Load(k.fixed_multiplier + 8 * half)),
      Load(k.fixed_offset + 8 * half));
}
TERN_INLINE __m256i AddFixedResidual(const EpilogueArgs& k, __m128i codes, __m256i v) {
  return _mm256_add_epi32(v, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(codes),
                                                _mm256_set1_epi32(k.fixed_residual_multiplier)));
}
TERN_INLINE __m128i ShiftToU8(const EpilogueArgs& k, __m256i v0, __m256i v1) {
  const __m128i shift = _mm_cvtsi32_si128(k.shift);
  const __m256i words =
      _mm256_packs_epi32(_mm256_sra_epi32(v0, shift), _mm256_sra_epi32(v1, shift));
  __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  bytes = _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0));
  bytes = _mm_max_epu8(bytes, _mm_set1_epi8(static_cast<char>(k.fixed_lo)));
  return _mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(k.fixed_hi)));
}

// The fixed-point epilogue, or the sums themselves.
__attribute__((noinline)) void FinishFixed(const EpilogueArgs& args, const int32_t* acc,
                                           int pixels) {
  const EpilogueArgs k = args;  // a copy, so that the stores to dst cannot change it
  for (int p = 0; p < pixels; ++p, acc += 16) {
    const int64_t at = p * k.stride;
    if (k.dst_s32 != nullptr) {
      for (int i = 0; i < k.channels; ++i) k.dst_s32[at + i] = acc[i];
      continue;
    }
    __m256i v0 = FixedSum(k, acc, 0);
    __m256i v1 = FixedSum(k, acc, 1);
    const bool full = k.channels == 16;
    if (k.residual != nullptr) {
      alignas(16) uint8_t r[16] = {};
      if (!full) {
        for (int i = 0; i < k.channels; ++i) r[i] = k.residual[at + i];
      }
      const __m128i codes = full
                                ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(k.residual + at))
                                : _mm_load_si128(reinterpret_cast<const __m128i*>(r));
      v0 = AddFixedResidual(k, codes, v0);
      v1 = AddFixedResidual(k, _mm_unpackhi_epi64(codes, codes), v1);
    }
    const __m128i bytes = ShiftToU8(k, v0, v1);
    if (full) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(k.dst + at), bytes);
    } else {
      alignas(16) uint8_t y[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(y), bytes);
      for (int i = 0; i < k.channels; ++i) k.dst[at + i] = y[i];
    }
  }
}

// The epilogue of a tile whose s32 sums are acc[pixel][16], 32-byte aligned.
TERN_INLINE void Finish(const EpilogueArgs& args, const int32_t* acc, int pixels) {
  if (args.multiplier == nullptr || args.dst_s32 != nullptr) {
    FinishFixed(args, acc, pixels);
  } else if (args.channels == 16 && args.dst != nullptr) {
    if (args.residual != nullptr) {
      FinishFull<true>(args, acc, pixels);
    } else {
      FinishFull<false>(args, acc, pixels);
    }
  } else {
    FinishAny(args, acc, pixels);
  }
}

// s0, s1 += the dword at x + c + kAt times the weights w0, w1 of 8 output channels each. The
// address is spelled out: as a memory operand it costs one addition per pixel and step.
template <int kAt>
TERN_INLINE void MultiplyAdd(const uint8_t* x, int64_t c, __m256i w0, __m256i w1, __m256i& s0,
                             __m256i& s1) {
  __m256i b, t;
  asm("vpbroadcastd %c[at](%[x],%[c]), %[b]\n\t"
      "vpmaddubsw %[w0], %[b], %[t]\n\t"
      "vpmaddubsw %[w1], %[b], %[b]\n\t"
      "vpaddw %[t], %[s0], %[s0]\n\t"
      "vpaddw %[b], %[s1], %[s1]"
      : [s0] "+x"(s0), [s1] "+x"(s1), [b] "=&x"(b), [t] "=&x"(t)
      : [x] "r"(x), [c] "r"(c), [at] "i"(kAt), [w0] "x"(w0), [w1] "x"(w1));
}

// As MultiplyAdd, 8 output channels only.
template <int kAt>
TERN_INLINE void MultiplyAdd(const uint8_t* x, int64_t c, __m256i w0, __m256i& s0) {
  __m256i b;
  asm("vpbroadcastd %c[at](%[x],%[c]), %[b]\n\t"
      "vpmaddubsw %[w0], %[b], %[b]\n\t"
      "vpaddw %[b], %[s0], %[s0]"
      : [s0] "+x"(s0), [b] "=&x"(b)
      : [x] "r"(x), [c] "r"(c), [at] "i"(kAt), [w0] "x"(w0));
}

template <int kPixels, int kVectors, int kAt>
TERN_INLINE void AddStep(const uint8_t* const (&x)[kPixels], int64_t c, const int8_t* w,
                         __m256i (&s)[kPixels][kVectors]) {
  const __m256i w0 = Load(w);
  if constexpr (kVectors == 1) {
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) MultiplyAdd<kAt>(x[p], c, w0, s[p][0]);
  } else {
    const __m256i w1 = Load(w + 32);
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) MultiplyAdd<kAt>(x[p], c, w0, w1, s[p][0], s[p][1]);
  }
}

// The second halves of a tile's sums, which belong to no output channel.
TERN_INLINE void ClearUpper(int32_t* acc, int pixels) {
  for (int p = 0; p < pixels; ++p)
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + 16 * p + 8), _mm256_setzero_si256());
}

// 12 s16 sums, two weights and two temporaries are exactly the 16 registers; the s32 sums lie in
// memory (first-level cache). kVectors 1: of a block's first 8 output channels.
template <int kPixels, int kVectors>
void GeneralTile(const TileArgs& k) {
  alignas(32) int32_t acc[kPixels * 16];
  if constexpr (kVectors == 1) ClearUpper(acc, kPixels);
  const int8_t* w = k.weights;
  const int16_t* scales = k.scales;
  const int32_t* program = k.program;
  for (int32_t f = 0; f < k.flushes; ++f, scales += 32) {
    __m256i s[kPixels][kVectors];
    TERN_UNROLL
    for (int i = 0; i < kVectors * kPixels; ++i)
      s[i / kVectors][i % kVectors] = _mm256_setzero_si256();
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
        AddStep<kPixels, kVectors, 0>(x, c, w, s);
        w += 64;
        c += 4;
      }
      for (steps >>= 1; steps > 0; --steps) {
        AddStep<kPixels, kVectors, 0>(x, c, w, s);
        AddStep<kPixels, kVectors, 4>(x, c, w + 64, s);
        w += 128;
        c += 8;
      }
    } while (--runs > 0);
    const __m256i a0 = Load(scales), a1 = Load(scales + 16);
    // The sums' places are opaque: GCC would keep some of them in registers, and spill these.
    if (f == 0) {
      TERN_UNROLL
      for (int i = 0; i < kVectors * kPixels; ++i) {
        asm("vpmaddwd %[scale], %[s], %[s]\n\t"
            "vmovdqa %[s], %[acc]"
            : [s] "+x"(s[i / kVectors][i % kVectors]), [acc] "=m"(*reinterpret_cast<__m256i*>(
                                                           acc + 16 / kVectors * i))
            : [scale] "x"(i % kVectors == 0 ? a0 : a1));
      }
    } else {
      TERN_UNROLL
      for (int i = 0; i < kVectors * kPixels; ++i) {
        asm("vpmaddwd %[scale], %[s], %[s]\n\t"
            "vpaddd %[acc], %[s], %[s]\n\t"
            "vmovdqa %[s], %[acc]"
            : [s] "+x"(s[i / kVectors][i % kVectors]), [acc] "+m"(*reinterpret_cast<__m256i*>(
                                                           acc + 16 / kVectors * i))
            : [scale] "x"(i % kVectors == 0 ? a0 : a1));
      }
    }
  }
  Finish(k, acc, kPixels);
}

// Adds two steps of 4 input channels, at x[p] + c, to 8 output channels' s32 sums. The sum of both
// products stays in s16 (the packer sees to it), then is multiplied by `scale`.
template <int kPixels>
TERN_INLINE void AddPair(const uint8_t* const (&x)[kPixels], int64_t c, __m256i w0, __m256i w1,
                         __m256i scale, __m256i (&acc)[kPixels]) {
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    __m256i t, u;
    asm("vpbroadcastd (%[x],%[c]), %[t]\n\t"
        "vpbroadcastd 4(%[x],%[c]), %[u]\n\t"
        "vpmaddubsw %[w0], %[t], %[t]\n\t"
        "vpmaddubsw %[w1], %[u], %[u]\n\t"
        "vpaddw %[u], %[t], %[t]\n\t"
        "vpmaddwd %[scale], %[t], %[t]\n\t"
        "vpaddd %[t], %[acc], %[acc]"
        : [acc] "+x"(acc[p]), [t] "=&x"(t), [u] "=&x"(u)
        : [x] "r"(x[p]), [c] "r"(c), [w0] "x"(w0), [w1] "x"(w1), [scale] "x"(scale));
  }
}

// One half (8 output channels) of a pairs tile: 10 s32 sums, two weights, the scales and two
// temporaries. The sums go to `out`.
template <int kPixels>
TERN_INLINE void PairsHalf(const TileArgs& k, int half, const uint8_t* const (&x)[kPixels],
                           int32_t* out) {
  __m256i acc[kPixels];
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) acc[p] = _mm256_setzero_si256();
  const int8_t* w = k.weights + 32 * half;
  const int16_t* scales = k.scales + 16 * half;
  const int64_t end = int64_t{k.flushes} * 8;
  for (int64_t c = 0; c != end; c += 8, w += 128, scales += 32) {
    const __m256i w0 = Load(w);
    const __m256i w1 = Load(w + 64);
    const __m256i scale = Load(scales);
    AddPair<kPixels>(x, c, w0, w1, scale, acc);
  }
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * p + 8 * half), acc[p]);
  }
}

template <int kPixels>
void PairsTile(const TileArgs& k) {
  alignas(32) int32_t acc[kPixels * 16];
  const uint8_t* x[kPixels];
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) x[p] = k.inputs[p];
  PairsHalf<kPixels>(k, 0, x, acc);
  if (k.channels > 8) {
    PairsHalf<kPixels>(k, 1, x, acc);
  } else {
    ClearUpper(acc, kPixels);
  }
  Finish(k, acc, kPixels);
}

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// One half (8 output channels) of an int8 tile: 10 s32 sums, four weights and two temporaries.
template <int kPixels>
TERN_INLINE void Int8Half(const TileArgs& k, int half, int32_t* out) {
  __m256i acc[kPixels];
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) acc[p] = _mm256_setzero_si256();
  const int8_t* w = k.weights + 32 * half;
  const int32_t* program = k.program;
  for (int32_t run = 0; run < k.flushes; ++run) {
    const uint8_t* x[kPixels];
    const uint8_t* const* inputs = k.inputs + program[0] * k.tap_stride;
    TERN_UNROLL
    for (int p = 0; p < kPixels; ++p) x[p] = inputs[p];
    const int32_t* const quads_end = program + 3 + program[1];
    const int32_t* const end = quads_end + program[2];
    program += 3;
    for (; program != quads_end; ++program, w += 256) {
      const int64_t c = *program;
      const __m256i w0 = Load(w), w1 = Load(w + 64), w2 = Load(w + 128), w3 = Load(w + 192);
      TERN_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        __m256i t, u;
        asm("vpbroadcastd (%[x],%[c]), %[t]\n\t"
            "vpbroadcastd 4(%[x],%[c]), %[u]\n\t"
            "vpmaddubsw %[w0], %[t], %[t]\n\t"
            "vpmaddubsw %[w1], %[u], %[u]\n\t"
            "vpaddw %[u], %[t], %[t]\n\t"
            "vpbroadcastd 8(%[x],%[c]), %[u]\n\t"
            "vpmaddubsw %[w2], %[u], %[u]\n\t"
            "vpaddw %[u], %[t], %[t]\n\t"
            "vpbroadcastd 12(%[x],%[c]), %[u]\n\t"
            "vpmaddubsw %[w3], %[u], %[u]\n\t"
            "vpaddw %[u], %[t], %[t]\n\t"
            "vpmaddwd %[ones], %[t], %[t]\n\t"
            "vpaddd %[t], %[acc], %[acc]"
            : [acc] "+x"(acc[p]), [t] "=&x"(t), [u] "=&x"(u)
            : [x] "r"(x[p]), [c] "r"(c), [w0] "x"(w0), [w1] "x"(w1), [w2] "x"(w2), [w3] "x"(w3),
              [ones] "m"(kOnes));
      }
    }
    const __m256i ones = Load(kOnes);
    for (; program != end; ++program, w += 128) {
      const int64_t c = *program;
      const __m256i w0 = Load(w), w1 = Load(w + 64);
      AddPair<kPixels>(x, c, w0, w1, ones, acc);
    }
  }
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * p + 8 * half), acc[p]);
  }
}

template <int kPixels>
void Int8Tile(const TileArgs& k) {
  alignas(32) int32_t acc[kPixels * 16];
  Int8Half<kPixels>(k, 0, acc);
  if (k.channels > 8) {
    Int8Half<kPixels>(k, 1, acc);
  } else {
    ClearUpper(acc, kPixels);
  }
  Finish(k, acc, kPixels);
}

template <int kBits>
void ExpandCodes(const uint8_t* packed, int64_t bytes, int8_t* codes) {
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
  const __m256i bias = _mm256_set1_epi8(1 << (kBits - 1));
  auto* to = reinterpret_cast<__m256i*>(codes);
  for (const uint8_t* end = packed + bytes; packed != end; packed += 32) {
    const __m256i v = Load(packed);
    TERN_UNROLL
    for (int shift = 0; shift < 8; shift += kBits) {
      const __m256i biased = _mm256_and_si256(_mm256_srli_epi16(v, shift), mask);
      _mm256_store_si256(to++, _mm256_sub_epi8(biased, bias));
    }
  }
}

}  // namespace

void ExpandCodesAvx2(const uint8_t* packed, int64_t bytes, int bits, int8_t* codes) {
  (bits == 2 ? ExpandCodes<2> : ExpandCodes<4>)(packed, bytes, codes);
}

void ExpandScalesAvx2(const int8_t* packed, int64_t count, int16_t* scales) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(packed + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(scales + i), _mm256_cvtepi8_epi16(half));
  }
}

void FinishAvx2(const EpilogueArgs& args, const int32_t* acc, int pixels) {
  Finish(args, acc, pixels);
}

void FinishRowsAvx2(const EpilogueArgs& args, const int32_t* acc, int64_t acc_stride, int pixels,
                    int rows, int64_t row_stride) {
  if (args.multiplier != nullptr && args.dst != nullptr && args.channels == 16) {
    const bool floor = args.lo != 0.0f;
    const auto finish = args.residual != nullptr
                            ? floor ? FinishFullRows<true, true> : FinishFullRows<true, false>
                        : floor ? FinishFullRows<false, true>
                                : FinishFullRows<false, false>;
    finish(args, acc, acc_stride, pixels, rows, row_stride);
    return;
  }
  EpilogueArgs row = args;
  for (int r = 0; r < rows; ++r, acc += acc_stride) {
    Finish(row, acc, pixels);
    if (row.residual != nullptr) row.residual += row_stride;
    if (row.dst != nullptr) row.dst += row_stride;
    if (row.dst_f32 != nullptr) row.dst_f32 += row_stride;
    if (row.dst_s32 != nullptr) row.dst_s32 += row_stride;
  }
}

template <int kVectors>
constexpr TileKernels GeneralTiles() {
  return {6,
          {nullptr, GeneralTile<1, kVectors>, GeneralTile<2, kVectors>, GeneralTile<3, kVectors>,
           GeneralTile<4, kVectors>, GeneralTile<5, kVectors>, GeneralTile<6, kVectors>}};
}
constexpr TileKernels kPairsTiles = {
    10,
    {nullptr, PairsTile<1>, PairsTile<2>, PairsTile<3>, PairsTile<4>, PairsTile<5>, PairsTile<6>,
     PairsTile<7>, PairsTile<8>, PairsTile<9>, PairsTile<10>}};
constexpr TileKernels kInt8Tiles = {
    10,
    {nullptr, Int8Tile<1>, Int8Tile<2>, Int8Tile<3>, Int8Tile<4>, Int8Tile<5>, Int8Tile<6>,
     Int8Tile<7>, Int8Tile<8>, Int8Tile<9>, Int8Tile<10>}};

const TileKernels kAvx2Tiles[kKinds] = {GeneralTiles<2>(), kPairsTiles, kInt8Tiles};
const TileKernels kAvx2NarrowTiles[kKinds] = {GeneralTiles<1>(), kPairsTiles, kInt8Tiles};

}  // namespace tern::kernels::tiled
