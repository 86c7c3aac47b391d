// Between the driver of the SIMD depthwise convolutions (depthwise_conv_tiled.cc) and their
// register blocks (depthwise_conv_<isa>.cc). Included by files with their own instruction-set
// flags: keep it free of inline code and of library headers that have some.
#ifndef TERN_SERVER_KERNELS_DEPTHWISE_CONV_TILES_H_
#define TERN_SERVER_KERNELS_DEPTHWISE_CONV_TILES_H_

#include <cstddef>
#include <cstdint>

namespace tern::kernels::tiled {

// One block of channels of a rectangle of output pixels. No byte outside the pixels' channels is
// read or written.
struct DepthwiseTile {
  // The top left tap of the first pixel. Pixels are whole blocks of channels; any alignment.
  const uint8_t* src;
  int64_t row_stride, column_stride;  // bytes from one tap to the one below and to the right
  // [output row][kx][group][block channels][taps of a group], 64-byte aligned: a group is as many
  // rows as a dword holds weights. s16 for groups of two rows, s8 for groups of four; in the order
  // of DepthwiseKernels::channel. Taps outside the kernel weigh 0.
  const void* weights;
  // kAny only, whose columns are [pixel][kx]: no two pixels share one, and `groups` whole groups
  // of rows can be read.
  int32_t groups, kw;
  int32_t rows, pixels;                  // of the outputs; kAny: one row
  int64_t pixel_elements, row_elements;  // from one output to the next, and to the row below

  // One of the two: the sums themselves; or codes, by the float epilogue of cluster_conv.h without
  // a residual, or by the fixed-point one where fixed_multiplier is set. Constants: [block].
  int32_t* sums;
  uint8_t* codes;
  const float* multiplier;
  const float* offset;
  const int32_t* fixed_multiplier;
  const int32_t* fixed_offset;
  int32_t shift;
  uint8_t lo, hi;
};

using DepthwiseKernel = void (*)(const DepthwiseTile&);

enum DepthwiseShape : int32_t { k3x3, k3x3Stride2, k5x5, k5x5Stride2, kAny };
inline constexpr int kDepthwiseShapes = 5;

// What follows the sums: nothing, or one of the epilogues.
enum Mode { kSums, kFloat, kFixedPoint };

struct DepthwiseKernels {
  int block;        // channels; also the bytes of a pixel in a patch
  int group_rows;   // input rows whose weights share a dword: 2 (s16) or 4 (s8)
  int tile;         // outputs of a tile
  uint8_t lane[4];  // first channel of each 16-byte lane of the first half; the other half: + 4
  DepthwiseKernel run[kDepthwiseShapes];
};

extern const DepthwiseKernels kAvx2Depthwise;
extern const DepthwiseKernels kAvx512Depthwise;

}  // namespace tern::kernels::tiled

#endif  // TERN_SERVER_KERNELS_DEPTHWISE_CONV_TILES_H_
