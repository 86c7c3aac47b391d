// AVX2 arithmetic of the Winograd convolutions. No library code here: it would be compiled with
// these flags for everyone.
#include <immintrin.h>

#include "server/kernels/winograd_conv_tiles.h"

namespace tern::kernels::winograd {
namespace {

#define TERN_INLINE inline __attribute__((always_inline))
#define TERN_UNROLL _Pragma("GCC unroll 16")

TERN_INLINE __m256i Load(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}
TERN_INLINE void Store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

TERN_INLINE __m256i Add16(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
TERN_INLINE __m256i Sub16(__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); }
TERN_INLINE __m256i Add32(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
TERN_INLINE __m256i Sub32(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }

// One dimension of m outputs.
template <int m>
struct Dimension;

template <>
struct Dimension<2> {
  static constexpr int kIn = 4;
  static constexpr int kShift[2] = {1, 1};
  static constexpr bool kThirds = false;

  static TERN_INLINE void Input(const __m256i (&x)[4], __m256i (&t)[4]) {
    t[0] = Sub16(x[0], x[2]);
    t[1] = Add16(x[1], x[2]);
    t[2] = Sub16(x[2], x[1]);
    t[3] = Sub16(x[1], x[3]);
  }
  static TERN_INLINE void Weights(const __m256i (&w)[3], __m256i (&g)[4]) {
    const __m256i outer = Add16(w[0], w[2]);
    g[0] = w[0];
    g[1] = Add16(outer, w[1]);
    g[2] = Sub16(outer, w[1]);
    g[3] = w[2];
  }
  // With rows of G times 1, 2, 2, 1.
  static TERN_INLINE void Output(const __m256i (&p)[4], __m256i (&y)[2]) {
    const __m256i p3 = Add32(p[3], p[3]);
    y[0] = Add32(Add32(p[0], p[0]), Add32(p[1], p[2]));
    y[1] = Sub32(Sub32(p[1], p[2]), p3);
  }
};

template <>
struct Dimension<4> {
  static constexpr int kIn = 6;
  static constexpr int kShift[4] = {3, 2, 1, 1};
  static constexpr bool kThirds = true;

  static TERN_INLINE void Input(const __m256i (&x)[6], __m256i (&t)[6]) {
    const __m256i a = Sub16(x[4], _mm256_slli_epi16(x[2], 2));
    const __m256i b = Sub16(x[3], _mm256_slli_epi16(x[1], 2));
    const __m256i c = Sub16(x[4], x[2]);
    const __m256i d = Sub16(x[3], x[1]);
    const __m256i e = Add16(d, d);
    t[0] = Add16(_mm256_slli_epi16(Sub16(x[0], x[2]), 2), c);
    t[1] = Add16(a, b);
    t[2] = Sub16(a, b);
    t[3] = Add16(c, e);
    t[4] = Sub16(c, e);
    t[5] = Sub16(Sub16(x[5], x[3]), Add16(e, e));
  }
  static TERN_INLINE void Weights(const __m256i (&w)[3], __m256i (&g)[6]) {
    const __m256i outer = Add16(w[0], w[2]), middle = Add16(w[1], w[1]);
    const __m256i wide = Add16(w[0], _mm256_slli_epi16(w[2], 2));
    g[0] = w[0];
    g[1] = Add16(outer, w[1]);
    g[2] = Sub16(outer, w[1]);
    g[3] = Add16(wide, middle);
    g[4] = Sub16(wide, middle);
    g[5] = w[2];
  }
  // With rows of G times 4, -6, -6, 24, 24, 1.
  static TERN_INLINE void Output(const __m256i (&p)[6], __m256i (&y)[4]) {
    const __m256i s = Add32(p[1], p[2]), d = Sub32(p[1], p[2]);
    const __m256i u = Add32(p[3], p[4]), v = Sub32(p[3], p[4]);
    const __m256i p0 = Add32(p[0], p[0]), p5 = Add32(p[5], p[5]);
    y[0] = Add32(Sub32(Add32(p0, _mm256_slli_epi32(p0, 1)), _mm256_slli_epi32(s, 2)), u);
    y[1] = Sub32(v, Add32(d, d));
    y[2] = Sub32(u, s);
    y[3] = Add32(Sub32(Add32(v, v), d), Add32(p5, _mm256_slli_epi32(p5, 1)));
  }
};

template <int kRows, int kColumns>
void TransformInputOf(const uint8_t* const* pixels, int channels, int16_t* out, int64_t stride) {
  using Down = Dimension<kRows>;
  using Across = Dimension<kColumns>;
  alignas(32) int16_t half[Down::kIn][Across::kIn][16];
  for (int c = 0; c < channels; c += 16) {
    for (int j = 0; j < Across::kIn; ++j) {
      __m256i x[Down::kIn], t[Down::kIn];
      TERN_UNROLL
      for (int i = 0; i < Down::kIn; ++i) {
        x[i] = _mm256_cvtepu8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels[i * Across::kIn + j] + c)));
      }
      Down::Input(x, t);
      TERN_UNROLL
      for (int i = 0; i < Down::kIn; ++i) Store(half[i][j], t[i]);
    }
    int16_t* to = out + c;
    for (int i = 0; i < Down::kIn; ++i) {
      __m256i x[Across::kIn], t[Across::kIn];
      TERN_UNROLL
      for (int j = 0; j < Across::kIn; ++j) x[j] = Load(half[i][j]);
      Across::Input(x, t);
      TERN_UNROLL
      for (int j = 0; j < Across::kIn; ++j, to += stride) Store(to, t[j]);
    }
  }
}

TERN_INLINE __m256i Widen(const int8_t* codes) {
  return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(codes)));
}

// Modulo 2^16: what comes out fits (WinogradConvFits). The compiler drops what row kRow does not
// need.
template <int kRows, int kColumns, int kRow>
void TransformWeightsOf(const int8_t* codes, const int8_t* scales, int64_t pairs, int16_t* out,
                        int64_t stride) {
  using Down = Dimension<kRows>;
  using Across = Dimension<kColumns>;
  if constexpr (kRow < Down::kIn) {
    for (int64_t half = 0; half < 2 * pairs; ++half) {
      const int8_t* w = codes + half / 2 * (9 * 32) + half % 2 * 16;
      __m256i row[3], t[Across::kIn];
      TERN_UNROLL
      for (int x = 0; x < 3; ++x) {
        const __m256i taps[3] = {Widen(w + 32 * x), Widen(w + 32 * (3 + x)),
                                 Widen(w + 32 * (6 + x))};
        __m256i all[Down::kIn];
        Down::Weights(taps, all);
        row[x] = all[kRow];
      }
      if (scales != nullptr) {
        const __m256i scale = Widen(scales + 16 * half);
        TERN_UNROLL
        for (int x = 0; x < 3; ++x) row[x] = _mm256_mullo_epi16(row[x], scale);
      }
      Across::Weights(row, t);
      int16_t* to = out + 16 * half;
      TERN_UNROLL
      for (int j = 0; j < Across::kIn; ++j, to += stride) Store(to, t[j]);
    }
  }
}

template <int kRows, int kColumns>
void TransformOutputOf(const int32_t* products, int64_t stride, int32_t* sums) {
  using Down = Dimension<kRows>;
  using Across = Dimension<kColumns>;
  // The inverse of the product of both dimensions' threes, modulo 2^32.
  constexpr int kThrees = Down::kThirds + Across::kThirds;
  constexpr uint32_t kInverse = kThrees == 2 ? 0x38E38E39u : kThrees == 1 ? 0xAAAAAAABu : 1u;
  static_assert(kInverse * (kThrees == 2 ? 9u : kThrees == 1 ? 3u : 1u) == 1u);
  const __m256i inverse = _mm256_set1_epi32(static_cast<int>(kInverse));
  for (int lanes = 0; lanes < 16; lanes += 8) {
    __m256i half[kRows][Across::kIn];
    TERN_UNROLL
    for (int j = 0; j < Across::kIn; ++j) {
      __m256i p[Down::kIn], y[kRows];
      TERN_UNROLL
      for (int i = 0; i < Down::kIn; ++i)
        p[i] = Load(products + (i * Across::kIn + j) * stride + lanes);
      Down::Output(p, y);
      TERN_UNROLL
      for (int i = 0; i < kRows; ++i) half[i][j] = y[i];
    }
    TERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      __m256i y[kColumns];
      Across::Output(half[i], y);
      TERN_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        if constexpr (kThrees > 0) y[j] = _mm256_mullo_epi32(y[j], inverse);
        y[j] = _mm256_srai_epi32(y[j], Down::kShift[i] + Across::kShift[j]);
        Store(sums + (i * kColumns + j) * 16 + lanes, y[j]);
      }
    }
  }
}

// acc += two channels, kAt bytes from channel c on, times their weights.
template <int kTiles, int kAt>
TERN_INLINE void AddPair(const int16_t* const (&x)[kTiles], int64_t c, const int16_t* w,
                         __m256i (&acc)[kTiles][2]) {
  const __m256i w0 = Load(w), w1 = Load(w + 16);
  TERN_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    __m256i b, u;
    asm("vpbroadcastd %c[at](%[x],%[c],2), %[b]\n\t"
        "vpmaddwd %[w0], %[b], %[u]\n\t"
        "vpmaddwd %[w1], %[b], %[b]\n\t"
        "vpaddd %[u], %[s0], %[s0]\n\t"
        "vpaddd %[b], %[s1], %[s1]"
        : [s0] "+x"(acc[t][0]), [s1] "+x"(acc[t][1]), [b] "=&x"(b), [u] "=&x"(u)
        : [x] "r"(x[t]), [c] "r"(c), [at] "i"(kAt), [w0] "x"(w0), [w1] "x"(w1));
  }
}

template <int kTiles>
void MultiplyTiles(const MultiplyArgs& k) {
  __m256i acc[kTiles][2];
  TERN_UNROLL
  for (int t = 0; t < kTiles; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
  const int16_t* x[kTiles];
  TERN_UNROLL
  for (int t = 0; t < kTiles; ++t) x[t] = k.input + t * k.channels;
  const int16_t* w = k.weights;
  for (int64_t c = 0; c != k.channels; c += 4, w += 64) {
    AddPair<kTiles, 0>(x, c, w, acc);
    AddPair<kTiles, 4>(x, c, w + 32, acc);
  }
  TERN_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    Store(k.out + 16 * t, acc[t][0]);
    Store(k.out + 16 * t + 8, acc[t][1]);
  }
}

}  // namespace

template <int kRows, int kColumns>
constexpr Kernels KernelsOf() {
  return {kRows,
          kColumns,
          TransformInputOf<kRows, kColumns>,
          {TransformWeightsOf<kRows, kColumns, 0>, TransformWeightsOf<kRows, kColumns, 1>,
           TransformWeightsOf<kRows, kColumns, 2>, TransformWeightsOf<kRows, kColumns, 3>,
           TransformWeightsOf<kRows, kColumns, 4>, TransformWeightsOf<kRows, kColumns, 5>},
          TransformOutputOf<kRows, kColumns>};
}

const Kernels kAvx2Kernels[3] = {KernelsOf<2, 2>(), KernelsOf<2, 4>(), KernelsOf<4, 4>()};

const Multiply kAvx2Multiply[kRegisterTiles + 1] = {
    nullptr,          MultiplyTiles<1>, MultiplyTiles<2>, MultiplyTiles<3>,
    MultiplyTiles<4>, MultiplyTiles<5>, MultiplyTiles<6>};

}  // namespace tern::kernels::winograd
