// The loops that the SIMD depthwise kernels share, over vectors that each instruction set defines.
// Included by depthwise_conv_<isa>.cc inside their anonymous namespaces, after
//   Vector                                 a register of dwords; a block of channels is two
//   kGroup                                 rows of a group
//   kTilePixels                            sums of a tile, in blocks
//   kWeightBytes                           of one group of one column
//   Expand<rows>(src, row_stride, x[2])    the group's taps of every channel, a dword each; rows
//                                          past `rows` are not read and count as 0
//   Multiply(x, weights)                   the dwords' dot products
//   MultiplyAdd(sum, x, weights)           sum + these
//   Constants, LoadConstants<mode>(tile)   of the epilogue
//   Finish<mode, pixels>(tile, constants, at, sums[pixels][2])
// The same dwords serve every output that sees their column: kernel width / stride pixels of up to
// two rows.

// Sums of `kPixels` pixels of `kRows` rows for a square kernel.
template <int kKernel, int kStride, int kRows, int kPixels>
TERN_INLINE void SumTile(const DepthwiseTile& tile, const uint8_t* src,
                         Vector (&sums)[kRows][kPixels][2]) {
  // Of the packed weights, whatever kRows is here.
  constexpr int kPackedGroups = ((kStride == 1 ? 1 : 0) + kKernel + kGroup - 1) / kGroup;
  constexpr int kInputRows = (kRows - 1) * kStride + kKernel;
  constexpr int kGroups = (kInputRows + kGroup - 1) / kGroup;
  constexpr int kColumns = (kPixels - 1) * kStride + kKernel;
  const uint8_t* weights = static_cast<const uint8_t*>(tile.weights);
  // Else GCC 12 keeps the address of every weight across tiles, on the stack.
  asm("" : "+r"(weights));
  TERN_UNROLL
  for (int column = 0; column < kColumns; ++column) {
    TERN_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      Vector x[2];
      const uint8_t* at = src + column * tile.column_stride + g * kGroup * tile.row_stride;
      if (g + 1 < kGroups) {
        Expand<kGroup>(at, tile.row_stride, x);
      } else {
        Expand<kInputRows - (kGroups - 1) * kGroup>(at, tile.row_stride, x);
      }
      TERN_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int kx = column - p * kStride;
        if (kx < 0 || kx >= kKernel) continue;
        TERN_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* w =
              weights + ((r * kKernel + kx) * kPackedGroups + g) * int64_t{kWeightBytes};
          TERN_UNROLL
          for (int half = 0; half < 2; ++half) {
            Vector& sum = sums[r][p][half];
            const uint8_t* wh = w + half * (kWeightBytes / 2);
            sum = kx == 0 && g == 0 ? Multiply(x[half], wh) : MultiplyAdd(sum, x[half], wh);
          }
        }
      }
    }
  }
}

template <Mode kMode, int kKernel, int kStride, int kRows, int kPixels>
TERN_INLINE void RunTile(const DepthwiseTile& tile, const Constants& constants, const uint8_t* src,
                         int64_t at) {
  Vector sums[kRows][kPixels][2];
  SumTile<kKernel, kStride, kRows, kPixels>(tile, src, sums);
  TERN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    Finish<kMode, kPixels>(tile, constants, at + r * tile.row_elements, sums[r]);
  }
}

// The last `left` <= kPixels pixels.
template <Mode kMode, int kKernel, int kStride, int kRows, int kPixels>
TERN_INLINE void RunRest(const DepthwiseTile& tile, const Constants& constants, const uint8_t* src,
                         int64_t at, int left) {
  if constexpr (kPixels > 0) {
    if (left == kPixels) {
      RunTile<kMode, kKernel, kStride, kRows, kPixels>(tile, constants, src, at);
    } else {
      RunRest<kMode, kKernel, kStride, kRows, kPixels - 1>(tile, constants, src, at, left);
    }
  }
}

template <Mode kMode, int kKernel, int kStride, int kRows>
TERN_INLINE void RunRows(const DepthwiseTile& tile, const Constants& constants, const uint8_t* src,
                         int64_t at) {
  constexpr int kPixels = kTilePixels / kRows;
  int left = tile.pixels;
  for (; left >= kPixels; left -= kPixels) {
    RunTile<kMode, kKernel, kStride, kRows, kPixels>(tile, constants, src, at);
    src += kPixels * kStride * tile.column_stride;
    at += kPixels * tile.pixel_elements;
  }
  RunRest<kMode, kKernel, kStride, kRows, kPixels - 1>(tile, constants, src, at, left);
}

template <Mode kMode, int kKernel, int kStride>
void RunMode(const DepthwiseTile& tile) {
  constexpr int kRows = kStride == 1 ? 2 : 1;
  const DepthwiseTile t = tile;  // a copy, so that the stores cannot change it
  const Constants constants = LoadConstants<kMode>(t);
  int r = 0;
  for (; r + kRows <= t.rows; r += kRows) {
    RunRows<kMode, kKernel, kStride, kRows>(t, constants, t.src + r * kStride * t.row_stride,
                                            r * t.row_elements);
  }
  if (r < t.rows) {
    RunRows<kMode, kKernel, kStride, 1>(t, constants, t.src + r * kStride * t.row_stride,
                                        r * t.row_elements);
  }
}

template <Mode kMode, int kPixels>
TERN_INLINE void RunAnyTile(const DepthwiseTile& tile, const Constants& constants,
                            const uint8_t* src, int64_t at) {
  Vector sums[kPixels][2];
  TERN_UNROLL
  for (int p = 0; p < kPixels; ++p) sums[p][0] = sums[p][1] = Zero();
  const uint8_t* w = static_cast<const uint8_t*>(tile.weights);
  for (int kx = 0; kx < tile.kw; ++kx) {
    for (int g = 0; g < tile.groups; ++g, w += kWeightBytes) {
      TERN_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        Vector x[2];
        Expand<kGroup>(src + (p * tile.kw + kx) * tile.column_stride + g * kGroup * tile.row_stride,
                       tile.row_stride, x);
        sums[p][0] = MultiplyAdd(sums[p][0], x[0], w);
        sums[p][1] = MultiplyAdd(sums[p][1], x[1], w + kWeightBytes / 2);
      }
    }
  }
  Finish<kMode, kPixels>(tile, constants, at, sums);
}

template <Mode kMode>
void RunAnyMode(const DepthwiseTile& tile) {
  const DepthwiseTile t = tile;
  const Constants constants = LoadConstants<kMode>(t);
  const uint8_t* src = t.src;
  int64_t at = 0;
  int left = t.pixels;
  for (; left >= 4; left -= 4, at += 4 * t.pixel_elements) {
    RunAnyTile<kMode, 4>(t, constants, src, at);
    src += 4 * t.kw * t.column_stride;
  }
  for (; left > 0; --left, at += t.pixel_elements) {
    RunAnyTile<kMode, 1>(t, constants, src, at);
    src += t.kw * t.column_stride;
  }
}

template <int kKernel, int kStride>
void Run(const DepthwiseTile& tile) {
  if (tile.sums != nullptr) {
    RunMode<kSums, kKernel, kStride>(tile);
  } else if (tile.fixed_multiplier != nullptr) {
    RunMode<kFixedPoint, kKernel, kStride>(tile);
  } else {
    RunMode<kFloat, kKernel, kStride>(tile);
  }
}

void RunAny(const DepthwiseTile& tile) {
  if (tile.sums != nullptr) {
    RunAnyMode<kSums>(tile);
  } else if (tile.fixed_multiplier != nullptr) {
    RunAnyMode<kFixedPoint>(tile);
  } else {
    RunAnyMode<kFloat>(tile);
  }
}

#define TERN_DEPTHWISE_KERNELS \
  { Run<3, 1>, Run<3, 2>, Run<5, 1>, Run<5, 2>, RunAny }
