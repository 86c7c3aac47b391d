// Between the driver of the SIMD convolutions (cluster_conv_tiled.cc) and their register
// blocks (cluster_conv_<isa>.cc); the sum-table convolutions (table_conv.cc) share the epilogue.
// Included by files with their own instruction-set flags: keep it free of inline code and of
// library headers that have some.
#ifndef TERN_SERVER_KERNELS_CLUSTER_CONV_TILES_H_
#define TERN_SERVER_KERNELS_CLUSTER_CONV_TILES_H_

#include <cstddef>
#include <cstdint>

namespace tern::kernels::tiled {

// A step multiplies one dword of four channels of one tap, for each pixel, with 16 x 4 weights;
// a flush is the run of steps that share their scales.
enum Kind : int32_t {
  // Any flushes.
  kGeneral = 0,
  // One tap, and every flush exactly two steps on 8 consecutive channels: 1x1 with N = 4. The
  // s16 sums are temporaries.
  kPairs = 1,
  // int8 (scales are 1): flushes of four or two consecutive steps of a tap. AVX2 only.
  kInt8 = 2,
};
inline constexpr int kKinds = 3;

// The epilogue of cluster_conv.h for one block of 16 output channels.
struct EpilogueArgs {
  // Pointers are at the first pixel and the block's first output channel; the next pixel is
  // `stride` elements on.
  const float* multiplier;  // [16], 64-byte aligned, any value past `channels`
  const float* offset;
  const uint8_t* residual;  // or null
  uint8_t* dst;             // one of the two, or dst_s32
  float* dst_f32;
  int64_t stride;
  int32_t channels;  // of the block, 1..16; nothing past them is read or written
  float residual_multiplier, lo, hi;

  // Instead of the float constants (null then), for a fixed-point layer.
  const int32_t* fixed_multiplier;  // [16], 64-byte aligned, any value past `channels`
  const int32_t* fixed_offset;
  int32_t fixed_residual_multiplier, shift;
  uint8_t fixed_lo, fixed_hi;
  // Set: the sums themselves go there, and nothing else of the epilogue applies.
  int32_t* dst_s32;
};

// One tile: up to max_pixels consecutive output pixels x one block of 16 output channels.
struct TileArgs : EpilogueArgs {
  // Of tap t and pixel p of the tile, inputs[t * tap_stride + p] is the first channel.
  const uint8_t* const* inputs;
  int64_t tap_stride;
  const int8_t* weights;  // [steps][16 output channels][4 channels], 64-byte aligned
  // [flushes][16 output channels][2], 64-byte aligned; unused by kInt8.
  const int16_t* scales;
  // kGeneral: per flush the number of runs, then per run {first channel, tap << 8 | steps}; the
  // steps of a run are consecutive dwords. kPairs: unused. kInt8: per run {tap, flushes of four
  // steps, flushes of two, then the first channel of each flush}.
  const int32_t* program;
  int32_t flushes;  // kInt8: runs
};

// Weights wait in memory as narrow as they are and become a tile's when their block is at work: one
// pass over them that stays in the first-level cache, for all tiles of a chunk.
//
// Codes of 2 or 4 bits, plus 2^(bits - 1): byte i of each 32 packed ones has code i in its lowest
// bits, code 32 + i in the next ones, and so on. `bytes` is a multiple of 32; both 32-byte aligned.
void ExpandCodesAvx2(const uint8_t* packed, int64_t bytes, int bits, int8_t* codes);

// `count` is a multiple of 32; both 32-byte aligned.
void ExpandScalesAvx2(const int8_t* packed, int64_t count, int16_t* scales);

// Finishes `pixels` consecutive pixels whose sums are acc[pixel][16], 32-byte aligned.
void FinishAvx2(const EpilogueArgs& args, const int32_t* acc, int pixels);

// As FinishAvx2, of `rows` such runs, `row_stride` elements apart; `acc_stride` in the sums.
void FinishRowsAvx2(const EpilogueArgs& args, const int32_t* acc, int64_t acc_stride, int pixels,
                    int rows, int64_t row_stride);

using TileKernel = void (*)(const TileArgs&);

inline constexpr int kMaxTilePixels = 10;

struct TileKernels {
  int max_pixels;
  TileKernel run[kMaxTilePixels + 1];  // [pixels], 1..max_pixels
};

extern const TileKernels kAvx2Tiles[kKinds];
extern const TileKernels kAvx2NarrowTiles[kKinds];  // for blocks of up to 8 output channels
extern const TileKernels kAvx512Tiles[kKinds];

}  // namespace tern::kernels::tiled

#endif  // TERN_SERVER_KERNELS_CLUSTER_CONV_TILES_H_
