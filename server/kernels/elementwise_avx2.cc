// AVX2 + FMA variants of elementwise.h; tails go to the scalar ones.
// No inline library code here: it would be compiled with these flags for everyone.
#include <immintrin.h>

#include "server/kernels/elementwise_variants.h"

namespace tern::kernels::avx2 {
namespace {

inline __m256 LoadU8AsF32(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Clamps, then rounds: the same as the other order for whole lo and hi, and never out of the
// range of the conversion. NaN gives lo.
inline __m256i ClampAndRound(__m256 v, __m256 lo, __m256 hi) {
  return _mm256_cvtps_epi32(_mm256_min_ps(hi, _mm256_max_ps(v, lo)));
}

// 8 values of 0..255.
inline void StoreU8(__m256i v, uint8_t* p) {
  const __m256i words = _mm256_packs_epi32(v, v);
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes);
  const __m128i high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
}

inline __m256i LoadU8AsS32(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i LoadS8AsS16(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// acc * multiplier + offset, 8 of each.
inline __m256i MulAddS32(const int32_t* acc, const int32_t* multiplier, const int32_t* offset) {
  const __m256i product =
      _mm256_mullo_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc)),
                         _mm256_loadu_si256(reinterpret_cast<const __m256i*>(multiplier)));
  return _mm256_add_epi32(product, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset)));
}

// 16 sums shifted right, saturated to u8 and clamped.
inline __m128i ShiftToU8(__m256i v0, __m256i v1, __m128i shift, __m128i lo, __m128i hi) {
  const __m256i words =
      _mm256_packs_epi32(_mm256_sra_epi32(v0, shift), _mm256_sra_epi32(v1, shift));
  __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  bytes = _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0));
  return _mm_min_epu8(_mm_max_epu8(bytes, lo), hi);
}

}  // namespace

void QuantizeF32(const float* src, size_t n, float scale, int zero_point, uint8_t* dst) {
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256 zero = _mm256_set1_ps(static_cast<float>(zero_point));
  const __m256 lo = _mm256_setzero_ps();
  const __m256 hi = _mm256_set1_ps(255.0f);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 real = _mm256_loadu_ps(src + i);
    __m256 q = _mm256_round_ps(_mm256_div_ps(real, divisor),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    q = _mm256_add_ps(q, zero);
    q = _mm256_blendv_ps(q, zero, _mm256_cmp_ps(real, real, _CMP_UNORD_Q));
    StoreU8(ClampAndRound(q, lo, hi), dst + i);
  }
  scalar::QuantizeF32(src + i, n - i, scale, zero_point, dst + i);
}

void DequantizeU8(const uint8_t* src, size_t n, float scale, int zero_point, float* dst) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256i zero = _mm256_set1_epi32(zero_point);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i q =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src + i)));
    _mm256_storeu_ps(dst + i, _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_sub_epi32(q, zero))));
  }
  scalar::DequantizeU8(src + i, n - i, scale, zero_point, dst + i);
}

void LookupU8(const uint8_t* src, size_t n, const uint8_t* table, uint8_t* dst) {
  // Row r of the table answers the codes 16r..16r+15: after code - 16r, adding 0x70 with
  // saturation leaves bit 7 clear for exactly those, and vpshufb gives 0 for all others.
  size_t i = 0;
  if (n >= 32) {
    __m256i rows[16];
    for (int r = 0; r < 16; ++r) {
      rows[r] = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * r)));
    }
    const __m256i bias = _mm256_set1_epi8(0x70);
    const __m256i row_size = _mm256_set1_epi8(16);
    for (; i + 32 <= n; i += 32) {
      __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
      __m256i result = _mm256_shuffle_epi8(rows[0], _mm256_adds_epu8(code, bias));
      for (int r = 1; r < 16; ++r) {
        code = _mm256_sub_epi8(code, row_size);
        result =
            _mm256_or_si256(result, _mm256_shuffle_epi8(rows[r], _mm256_adds_epu8(code, bias)));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), result);
    }
  }
  scalar::LookupU8(src + i, n - i, table, dst + i);
}

void AddU8(const uint8_t* a, float ma, const uint8_t* b, float mb, float offset, uint8_t lo,
           uint8_t hi, size_t n, uint8_t* dst) {
  const __m256 multiplier_a = _mm256_set1_ps(ma);
  const __m256 multiplier_b = _mm256_set1_ps(mb);
  const __m256 shift = _mm256_set1_ps(offset);
  const __m256 low = _mm256_set1_ps(lo);
  const __m256 high = _mm256_set1_ps(hi);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 inner = _mm256_fmadd_ps(LoadU8AsF32(b + i), multiplier_b, shift);
    const __m256 v = _mm256_fmadd_ps(LoadU8AsF32(a + i), multiplier_a, inner);
    StoreU8(ClampAndRound(v, low, high), dst + i);
  }
  scalar::AddU8(a + i, ma, b + i, mb, offset, lo, hi, n - i, dst + i);
}

void MulChannelsU8(const uint8_t* a, int za, const uint8_t* b, int zb, float m, int zy,
                   size_t pixels, size_t channels, uint8_t* dst) {
  // (a - za) and (b - zb) are whole numbers below 2^8 and their product below 2^16, so the
  // f32 product is exact.
  const __m256 zero_a = _mm256_set1_ps(static_cast<float>(za));
  const __m256 zero_b = _mm256_set1_ps(static_cast<float>(zb));
  const __m256 multiplier = _mm256_set1_ps(m);
  const __m256 shift = _mm256_set1_ps(static_cast<float>(zy));
  const __m256 lo = _mm256_setzero_ps();
  const __m256 hi = _mm256_set1_ps(255.0f);
  for (size_t p = 0; p < pixels; ++p, a += channels, dst += channels) {
    size_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      const __m256 product = _mm256_mul_ps(_mm256_sub_ps(LoadU8AsF32(a + c), zero_a),
                                           _mm256_sub_ps(LoadU8AsF32(b + c), zero_b));
      StoreU8(ClampAndRound(_mm256_fmadd_ps(product, multiplier, shift), lo, hi), dst + c);
    }
    if (c < channels) {
      scalar::MulChannelsU8(a + c, za, b + c, zb, m, zy, 1, channels - c, dst + c);
    }
  }
}

void ScaleChannelsU8(const uint8_t* src, const FloatEpilogue& scale, size_t pixels, size_t channels,
                     uint8_t* dst) {
  const __m256 lo = _mm256_set1_ps(scale.lo);
  const __m256 hi = _mm256_set1_ps(scale.hi);
  for (size_t p = 0; p < pixels; ++p, src += channels, dst += channels) {
    size_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      const __m256 v = _mm256_fmadd_ps(LoadU8AsF32(src + c), _mm256_loadu_ps(scale.multiplier + c),
                                       _mm256_loadu_ps(scale.offset + c));
      StoreU8(ClampAndRound(v, lo, hi), dst + c);
    }
    if (c < channels) {
      const FloatEpilogue tail = {scale.multiplier + c, scale.offset + c, 0.0f, scale.lo, scale.hi};
      scalar::ScaleChannelsU8(src + c, tail, 1, channels - c, dst + c);
    }
  }
}

void SumPixelsU8(const uint8_t* src, size_t pixels, size_t channels, int32_t* sums) {
  size_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    __m256i low = _mm256_setzero_si256();
    __m256i high = _mm256_setzero_si256();
    const uint8_t* p = src + c;
    for (size_t left = pixels; left > 0;) {
      // 257 * 255 = 65535: that many pixels fit the u16 sums.
      size_t run = left < 257 ? left : 257;
      left -= run;
      __m256i words = _mm256_setzero_si256();
      for (; run > 0; --run, p += channels) {
        words = _mm256_add_epi16(
            words, _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
      }
      low = _mm256_add_epi32(low, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)));
      high = _mm256_add_epi32(high, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c + 8), high);
  }
  for (; c < channels; ++c) {
    int32_t sum = 0;
    for (size_t p = 0; p < pixels; ++p) sum += src[p * channels + c];
    sums[c] = sum;
  }
}

void FinishS32(const int32_t* acc, const uint8_t* residual, const FloatEpilogue& epilogue,
               size_t pixels, size_t channels, uint8_t* dst, float* dst_f32) {
  const __m256 residual_multiplier = _mm256_set1_ps(epilogue.residual_multiplier);
  const __m256 lo = _mm256_set1_ps(epilogue.lo);
  const __m256 hi = _mm256_set1_ps(epilogue.hi);
  const size_t whole = channels / 8 * 8;
  for (size_t p = 0; p < pixels; ++p) {
    const size_t row = p * channels;
    for (size_t c = 0; c < whole; c += 8) {
      const size_t i = row + c;
      const __m256 sums =
          _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + i)));
      __m256 v = _mm256_fmadd_ps(sums, _mm256_loadu_ps(epilogue.multiplier + c),
                                 _mm256_loadu_ps(epilogue.offset + c));
      if (residual != nullptr) {
        v = _mm256_fmadd_ps(LoadU8AsF32(residual + i), residual_multiplier, v);
      }
      if (dst != nullptr) {
        StoreU8(ClampAndRound(v, lo, hi), dst + i);
      } else {
        _mm256_storeu_ps(dst_f32 + i, _mm256_min_ps(hi, _mm256_max_ps(v, lo)));
      }
    }
    if (whole < channels) {
      const FloatEpilogue tail = {epilogue.multiplier + whole, epilogue.offset + whole,
                                  epilogue.residual_multiplier, epilogue.lo, epilogue.hi};
      scalar::FinishS32(acc + row + whole, residual != nullptr ? residual + row + whole : nullptr,
                        tail, 1, channels - whole, dst != nullptr ? dst + row + whole : nullptr,
                        dst_f32 != nullptr ? dst_f32 + row + whole : nullptr);
    }
  }
}

void RequantizeS32(const int32_t* acc, const uint8_t* residual, const NarrowLayer& layer,
                   size_t pixels, size_t channels, uint8_t* dst) {
  const __m256i residual_multiplier = _mm256_set1_epi32(layer.residual_multiplier);
  const __m128i shift = _mm_cvtsi32_si128(layer.shift);
  const __m128i lo = _mm_set1_epi8(static_cast<char>(layer.lo));
  const __m128i hi = _mm_set1_epi8(static_cast<char>(layer.hi));
  const size_t eights = channels / 8 * 8;
  for (size_t p = 0; p < pixels; ++p, acc += channels, dst += channels) {
    size_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      __m256i v0 = MulAddS32(acc + c, layer.multiplier + c, layer.offset + c);
      __m256i v1 = MulAddS32(acc + c + 8, layer.multiplier + c + 8, layer.offset + c + 8);
      if (residual != nullptr) {
        v0 = _mm256_add_epi32(v0,
                              _mm256_mullo_epi32(LoadU8AsS32(residual + c), residual_multiplier));
        v1 = _mm256_add_epi32(
            v1, _mm256_mullo_epi32(LoadU8AsS32(residual + c + 8), residual_multiplier));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + c), ShiftToU8(v0, v1, shift, lo, hi));
    }
    if (c < eights) {
      __m256i v = MulAddS32(acc + c, layer.multiplier + c, layer.offset + c);
      if (residual != nullptr) {
        v = _mm256_add_epi32(v, _mm256_mullo_epi32(LoadU8AsS32(residual + c), residual_multiplier));
      }
      _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + c), ShiftToU8(v, v, shift, lo, hi));
    }
    if (eights < channels) {
      const NarrowLayer tail = {layer.multiplier + eights,
                                layer.offset + eights,
                                layer.residual_multiplier,
                                layer.shift,
                                layer.lo,
                                layer.hi};
      scalar::RequantizeS32(acc + eights, residual != nullptr ? residual + eights : nullptr, tail,
                            1, channels - eights, dst + eights);
    }
    if (residual != nullptr) residual += channels;
  }
}

void AddFixedU8(const uint8_t* a, const uint8_t* b, const NarrowSum& sum, size_t n, uint8_t* dst) {
  const __m256i multiplier_a = _mm256_set1_epi32(sum.multiplier_a);
  const __m256i multiplier_b = _mm256_set1_epi32(sum.multiplier_b);
  const __m256i offset = _mm256_set1_epi32(sum.offset);
  const __m128i shift = _mm_cvtsi32_si128(sum.shift);
  const __m128i lo = _mm_set1_epi8(static_cast<char>(sum.lo));
  const __m128i hi = _mm_set1_epi8(static_cast<char>(sum.hi));
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i v[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i p = _mm256_mullo_epi32(LoadU8AsS32(a + i + 8 * half), multiplier_a);
      const __m256i q = _mm256_mullo_epi32(LoadU8AsS32(b + i + 8 * half), multiplier_b);
      v[half] = _mm256_add_epi32(_mm256_add_epi32(p, q), offset);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), ShiftToU8(v[0], v[1], shift, lo, hi));
  }
  scalar::AddFixedU8(a + i, b + i, sum, n - i, dst + i);
}

void MulChannelsFixedU8(const uint8_t* a, int za, const uint8_t* b, int zb, const NarrowSum& sum,
                        size_t pixels, size_t channels, uint8_t* dst) {
  const __m256i zero_a = _mm256_set1_epi32(za);
  const __m256i zero_b = _mm256_set1_epi32(zb);
  const __m256i multiplier = _mm256_set1_epi32(sum.multiplier_a);
  const __m256i offset = _mm256_set1_epi32(sum.offset);
  const __m128i shift = _mm_cvtsi32_si128(sum.shift);
  const __m128i lo = _mm_set1_epi8(static_cast<char>(sum.lo));
  const __m128i hi = _mm_set1_epi8(static_cast<char>(sum.hi));
  const size_t whole = channels / 16 * 16;
  for (size_t p = 0; p < pixels; ++p, a += channels, dst += channels) {
    for (size_t c = 0; c < whole; c += 16) {
      __m256i v[2];
      for (int half = 0; half < 2; ++half) {
        const __m256i x = _mm256_sub_epi32(LoadU8AsS32(a + c + 8 * half), zero_a);
        const __m256i y = _mm256_sub_epi32(LoadU8AsS32(b + c + 8 * half), zero_b);
        const __m256i product = _mm256_mullo_epi32(_mm256_mullo_epi32(x, y), multiplier);
        v[half] = _mm256_add_epi32(product, offset);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + c), ShiftToU8(v[0], v[1], shift, lo, hi));
    }
    scalar::MulChannelsFixedU8(a + whole, za, b + whole, zb, sum, 1, channels - whole, dst + whole);
  }
}

void DotU8S8(const uint8_t* x, const int8_t* w, int64_t stride, int count, size_t n,
             int32_t* sums) {
  // Products in s16 pairs, |255 * 128 * 2| < 2^16, added in s32: exact for every s8.
  size_t c = 0;
  if (count == 4) {
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    for (; c + 16 <= n; c += 16) {
      const __m256i codes =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + c)));
      s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(codes, LoadS8AsS16(w + c)));
      s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(codes, LoadS8AsS16(w + stride + c)));
      s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(codes, LoadS8AsS16(w + 2 * stride + c)));
      s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(codes, LoadS8AsS16(w + 3 * stride + c)));
    }
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(s0, s1), _mm256_hadd_epi32(s2, s3));
    const __m128i quads =
        _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    __m128i* out = reinterpret_cast<__m128i*>(sums);
    _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), quads));
  }
  scalar::DotU8S8(x + c, w + c, stride, count, n - c, sums);
}

}  // namespace tern::kernels::avx2
