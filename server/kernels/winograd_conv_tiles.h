// Between the driver of the Winograd convolutions (winograd_conv.cc) and their arithmetic
// (winograd_conv_avx2.cc). Included by a file with its own instruction-set flags: keep it free of
// inline code and of library headers that have some.
//
// One dimension, m outputs of three taps from m + 2 inputs: y = A ((G w) * (B x)), with
//
//   m = 2, B rows:  1  0 -1  0      m = 4, B rows:  4  0 -5  0  1  0
//                   0  1  1  0                      0 -4 -4  1  1  0
//                   0 -1  1  0                      0  4 -4 -1  1  0
//                   0  1  0 -1                      0 -2 -1  2  1  0
//                                                   0  2 -1 -2  1  0
//                                                   0  4  0 -5  0  1
//
// G has fractions; its rows are multiplied by integers that make them the small ones of
// winograd_conv.cc, and A's columns make up for that, which leaves m = 2 outputs that are 2y, and
// m = 4 ones that are 24y, 12y, 6y, 6y. All sums are modulo 2^32: factors of 3 are then divided
// out by multiplying with the inverse, which is exact, and powers of two by shifting, which is
// exact as long as the multiple of y fits s32.
#ifndef TERN_SERVER_KERNELS_WINOGRAD_CONV_TILES_H_
#define TERN_SERVER_KERNELS_WINOGRAD_CONV_TILES_H_

#include <cstddef>
#include <cstdint>

namespace tern::kernels::winograd {

inline constexpr int kMaxProducts = 36;
inline constexpr int kMaxOutputs = 16;
// Tiles in the registers of a multiplication.
inline constexpr int kRegisterTiles = 6;

// Transforms one tile of inputs. pixels: [m_rows + 2][m_columns + 2] pointers to `channels` (a
// multiple of 16) codes. out[product][channels], products `stride` elements apart.
using TransformInput = void (*)(const uint8_t* const* pixels, int channels, int16_t* out,
                                int64_t stride);

// Transforms the weights of one block of 16 output channels for one row of products:
// codes[pair of channels][9 taps][16][2] times scales[pair][16][2] (null: 1), 32-byte aligned.
// out[product of the row][pair][16][2], products `stride` elements apart.
using TransformWeights = void (*)(const int8_t* codes, const int8_t* scales, int64_t pairs,
                                  int16_t* out, int64_t stride);

// out[tile][16] = sum over channels of input[tile][channel] * weights[channel / 2][16][channel %
// 2], for `tiles` (1..kRegisterTiles) tiles `channels` elements apart.
struct MultiplyArgs {
  const int16_t* input;
  const int16_t* weights;  // 64-byte aligned
  int32_t* out;            // 64-byte aligned
  int64_t channels;
};
using Multiply = void (*)(const MultiplyArgs&);

// Turns products[product][16], `stride` elements apart, into sums[m_rows][m_columns][16].
using TransformOutput = void (*)(const int32_t* products, int64_t stride, int32_t* sums);

struct Kernels {
  int rows, columns;  // m of both dimensions
  TransformInput input;
  TransformWeights weights[6];  // by row, rows + 2 of them
  TransformOutput output;
};

extern const Kernels kAvx2Kernels[3];                     // by WinogradTile
extern const Multiply kAvx2Multiply[kRegisterTiles + 1];  // by the number of tiles, from 1

}  // namespace tern::kernels::winograd

#endif  // TERN_SERVER_KERNELS_WINOGRAD_CONV_TILES_H_
