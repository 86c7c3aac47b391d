// AVX2 loops of the sum-table convolutions. No library code here: it would be compiled with these
// flags for everyone.
#include <immintrin.h>

#include "server/kernels/table_conv_tiles.h"

namespace tern::kernels::tables {
namespace {

#define TERN_INLINE inline __attribute__((always_inline))
#define TERN_UNROLL _Pragma("GCC unroll 32")

TERN_INLINE __m256i Load(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}
TERN_INLINE __m256i LoadAny(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
TERN_INLINE void Store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

// All sums of four channels at 16 positions. The state of weights w0..w3 is the base-3 number
// (w0 + 1)(w1 + 1)(w2 + 1)(w3 + 1).
template <int kPitch>
TERN_INLINE void BuildRows(const uint8_t* planes, int64_t plane_stride, char* table) {
  __m256i x[4];
  TERN_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_cvtepu8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes + i * plane_stride)));
  }
  const __m256i zero = _mm256_setzero_si256();
  const __m256i minus1 = _mm256_sub_epi16(zero, x[1]);
  const __m256i minus2 = _mm256_sub_epi16(zero, x[2]);
  const __m256i minus3 = _mm256_sub_epi16(zero, x[3]);
  const __m256i low[9] = {
      _mm256_sub_epi16(minus2, x[3]), minus2, _mm256_sub_epi16(x[3], x[2]), minus3, zero, x[3],
      _mm256_sub_epi16(x[2], x[3]),   x[2],   _mm256_add_epi16(x[2], x[3])};
  TERN_UNROLL
  for (int i = 0; i < 9; ++i) {
    __m256i high = i % 3 == 0 ? minus1 : i % 3 == 1 ? zero : x[1];
    if (i / 3 == 0) high = _mm256_sub_epi16(high, x[0]);
    if (i / 3 == 2) high = _mm256_add_epi16(high, x[0]);
    TERN_UNROLL
    for (int j = 0; j < 9; ++j) {
      const __m256i sum = i == 4 ? low[j] : j == 4 ? high : _mm256_add_epi16(high, low[j]);
      Store(table + (9 * i + j) * kPitch, sum);
    }
  }
}

template <int kRows>
void BuildLinesOf(const uint8_t* planes, int slot, char* table) {
  for (int line = 0; line < kRows + 2; ++line) {
    const uint8_t* from = planes + (slot + line) % kSlots * kLinePositions;
    BuildRows<64 * (kRows + 2)>(from, kPlaneStride, table + 64 * line);
    BuildRows<64 * (kRows + 2)>(from + 16, kPlaneStride, table + 64 * line + 32);
  }
}

// l, h += the two sums of each position times their scales; lanes as in QuadArgs::acc.
TERN_INLINE void Flush(__m256i a, __m256i b, int32_t scales, __m256i& l, __m256i& h) {
  const __m256i scale = _mm256_set1_epi32(scales);
  l = _mm256_add_epi32(l, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), scale));
  h = _mm256_add_epi32(h, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), scale));
}

template <int kRows, int kVectors, bool kFirstQuad, bool kLastQuad>
void AddQuad(const QuadArgs& args) {
  constexpr int kSums = kRows * kVectors;
  constexpr int kPitch = 64 * (kRows + 2);
  const char* const table = args.table;
  const uint8_t* states = args.states;
  int16_t* sums = args.sums;
  const int16_t* partner = args.partner;
  const int32_t* scales = args.scales;
  int32_t* acc = args.acc;
  const bool clear = args.clear;
  for (int o = args.outputs; o > 0; --o, states += 9, sums += kLanes * kSums) {
    uint64_t packed;
    __builtin_memcpy(&packed, states, 8);
    const uint64_t ninth = states[8];
    __m256i s[kSums];
    if constexpr (!kFirstQuad) {
      TERN_UNROLL
      for (int v = 0; v < kSums; ++v) s[v] = Load(sums + kLanes * v);
    }
    TERN_UNROLL
    for (int t = 0; t < 9; ++t) {
      uint64_t at;
      if constexpr (kPitch == 256) {
        at = t == 0 ? packed << 8 & 0xff00 : t == 8 ? ninth << 8 : packed >> (8 * t - 8) & 0xff00;
      } else {
        at = (t == 8 ? ninth : packed >> (8 * t) & 0xff) * kPitch;
      }
      const char* row = table + at + 64 * (t / 3) + 2 * (t % 3);
      TERN_UNROLL
      for (int v = 0; v < kSums; ++v) {
        const __m256i m = LoadAny(row + 64 * (v / kVectors) + 2 * kSecondVector * (v % kVectors));
        s[v] = kFirstQuad && t == 0 ? m : _mm256_add_epi16(s[v], m);
      }
    }
    if constexpr (kLastQuad) {
      const int32_t scale = *scales++;
      TERN_UNROLL
      for (int v = 0; v < kSums; ++v) {
        __m256i l = _mm256_setzero_si256(), h = l;
        if (!clear) {
          l = Load(acc + 16 * v);
          h = Load(acc + 16 * v + 8);
        }
        Flush(Load(partner + kLanes * v), s[v], scale, l, h);
        Store(acc + 16 * v, l);
        Store(acc + 16 * v + 8, h);
      }
      partner += kLanes * kSums;
      acc += 16 * kSums;
    } else {
      TERN_UNROLL
      for (int v = 0; v < kSums; ++v) Store(sums + kLanes * v, s[v]);
    }
  }
}

// Takes the low 16 bits off `packed`. Assembly, because GCC copies the word for each of them: the
// loop is bound by the number of its instructions.
TERN_INLINE uint64_t TakeOffset(uint64_t& packed) {
  uint64_t at;
  asm("movzwl %w[packed], %k[at]\n\t"
      "shrq $16, %[packed]"
      : [at] "=&r"(at), [packed] "+r"(packed)
      :
      : "cc");
  return at;
}

// Four of a group's rows.
TERN_INLINE void FourRows(const char* table, const uint16_t* states, __m256i& a0, __m256i& b0,
                          __m256i& a1, __m256i& b1) {
  uint64_t packed;
  __builtin_memcpy(&packed, states, 8);
  a0 = Load(table + TakeOffset(packed));
  b0 = Load(table + TakeOffset(packed));
  a1 = Load(table + TakeOffset(packed));
  b1 = Load(table + packed);
}

// Even quads belong to the first cluster of their pair, odd ones to the second.
template <int kPairs, bool kClear>
TERN_INLINE void AddGroup(const GroupArgs& args) {
  const char* const table = args.table;
  const uint16_t* states = args.states;
  const int32_t* scales = args.scales;
  int32_t* acc = args.acc;
  for (int32_t* const end = acc + 16 * args.outputs; acc != end; acc += 16) {
    __m256i a[4], b[4];
    FourRows(table, states, a[0], b[0], a[1], b[1]);
    FourRows(table, states + 4, a[2], b[2], a[3], b[3]);
    states += kGroupQuads;
    __m256i l = _mm256_setzero_si256(), h = l;
    if constexpr (!kClear) {
      l = Load(acc);
      h = Load(acc + 8);
    }
    constexpr int kQuads = 4 / kPairs;  // of one cluster
    TERN_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      __m256i first = a[pair * kQuads], second = b[pair * kQuads];
      TERN_UNROLL
      for (int q = pair * kQuads + 1; q < (pair + 1) * kQuads; ++q) {
        first = _mm256_add_epi16(first, a[q]);
        second = _mm256_add_epi16(second, b[q]);
      }
      Flush(first, second, scales[pair], l, h);
    }
    scales += kPairs;
    Store(acc, l);
    Store(acc + 8, h);
  }
}

template <int kPairs>
void AddGroups(const GroupArgs& args) {
  if (args.clear) {
    AddGroup<kPairs, true>(args);
  } else {
    AddGroup<kPairs, false>(args);
  }
}

TERN_INLINE void Round(const __m128i (&from)[16], __m128i (&to)[16]) {
  TERN_UNROLL
  for (int i = 0; i < 8; ++i) {
    to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
    to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
  }
}

}  // namespace

void BuildLines(const uint8_t* planes, int slot, int rows, char* table) {
  switch (rows) {
    case 1:
      return BuildLinesOf<1>(planes, slot, table);
    case 2:
      return BuildLinesOf<2>(planes, slot, table);
    default:
      return BuildLinesOf<3>(planes, slot, table);
  }
}

void BuildGroup(const uint8_t* planes, char* table) {
  for (int quad = 0; quad < kGroupQuads; ++quad) {
    BuildRows<32>(planes + 4 * kLanes * quad, kLanes, table + 32 * kStates * quad);
  }
}

void GatherPlanes(const uint8_t* const* pixels, int channels, uint8_t* planes,
                  int64_t plane_stride) {
  constexpr int kPlaneOf[8] = {0, 1, 4, 5, 2, 3, 6, 7};
  for (int c = 0; c < channels; c += 16, planes += 16 * plane_stride) {
    __m128i a[16], b[16];
    TERN_UNROLL
    for (int i = 0; i < 16; ++i) {
      a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels[i] + c));
    }
    Round(a, b);
    Round(b, a);
    Round(a, b);
    Round(b, a);
    TERN_UNROLL
    for (int i = 0; i < 16; ++i) {
      _mm_store_si128(
          reinterpret_cast<__m128i*>(planes + (i / 8 * 8 + kPlaneOf[i % 8]) * plane_stride), a[i]);
    }
  }
}

void TransposeSums(const int32_t* acc, int64_t stride, int32_t* tile) {
  // 8 output channels x 8 pixels: lanes 0-3 are pixels p, p + 1, .., lanes 4-7 pixels p + 8, ..
  for (int part = 0; part < 4; ++part) {
    const int first_pixel = part % 2 * 4, first_output = part / 2 * 8;
    const int32_t* from = acc + first_output * stride + 8 * (part % 2);
    __m256i four[2][4];
    TERN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m256i r0 = Load(from + (4 * i) * stride), r1 = Load(from + (4 * i + 1) * stride);
      const __m256i r2 = Load(from + (4 * i + 2) * stride), r3 = Load(from + (4 * i + 3) * stride);
      const __m256i t0 = _mm256_unpacklo_epi32(r0, r1), t1 = _mm256_unpackhi_epi32(r0, r1);
      const __m256i t2 = _mm256_unpacklo_epi32(r2, r3), t3 = _mm256_unpackhi_epi32(r2, r3);
      four[i][0] = _mm256_unpacklo_epi64(t0, t2);
      four[i][1] = _mm256_unpackhi_epi64(t0, t2);
      four[i][2] = _mm256_unpacklo_epi64(t1, t3);
      four[i][3] = _mm256_unpackhi_epi64(t1, t3);
    }
    TERN_UNROLL
    for (int p = 0; p < 4; ++p) {
      int32_t* to = tile + 16 * (first_pixel + p) + first_output;
      Store(to, _mm256_permute2x128_si256(four[0][p], four[1][p], 0x20));
      Store(to + 16 * 8, _mm256_permute2x128_si256(four[0][p], four[1][p], 0x31));
    }
  }
}

#define TERN_STEPS(rows, vectors)                                               \
  {                                                                             \
    AddQuad<rows, vectors, false, false>, AddQuad<rows, vectors, true, false>,  \
        AddQuad<rows, vectors, false, true>, AddQuad<rows, vectors, true, true> \
  }
const QuadKernel kQuadKernels[kMaxRows][kMaxVectors][4] = {
    {TERN_STEPS(1, 1), TERN_STEPS(1, 2)},
    {TERN_STEPS(2, 1), TERN_STEPS(2, 2)},
    {TERN_STEPS(3, 1), TERN_STEPS(3, 2)},
};

const GroupKernel kGroupKernels[5] = {nullptr, AddGroups<1>, AddGroups<2>, nullptr, AddGroups<4>};

}  // namespace tern::kernels::tables
