// 3x3 convolution of stride 1 by Winograd's minimal filtering, in integers and exact: the same sums
// as cluster_conv.h and int8_conv.h, bit for bit, with a half to a quarter of the multiplications.
// docs/kernels.md, "Winograd", has the design and the numbers.
//
// Pure functions: no allocation, no threads, no errors. The caller validated the shapes.
#ifndef TERN_SERVER_KERNELS_WINOGRAD_CONV_H_
#define TERN_SERVER_KERNELS_WINOGRAD_CONV_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/types/span.h"
#include "server/base/aligned_buffer.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"
#include "server/tensor/quantized_weights.h"

namespace tern::kernels {

// Output pixels that one set of products gives, rows x columns. Multiplications per output and
// channel pair, of nine: 4, 3, 2.25.
enum class WinogradTile { k2x2, k2x4, k4x4 };

// Whether the functions below take the shape: AVX2; 3x3 with stride and dilation 1, any padding;
// input channels a multiple of 16.
bool WinogradConvAccepts(const ConvGeometry& geometry, Isa isa);

// Weights in the order in which the kernels read them, built once per plan, shared by threads.
struct PackedWinogradConv {
  ConvGeometry geometry;
  WinogradTile tile = WinogradTile::k2x2;
  // s8 [block of 16 output channels][ic / 2][9 taps][16][2]; their transforms, which are 3.6 to 8
  // times as long, are made when a block is at work.
  AlignedBuffer codes;
  AlignedBuffer scales;  // s8 [block][ic / 2][16][2]; empty for int8
  // Small layers keep the transforms instead: s16 [block][product][ic / 2][16][2], padded.
  AlignedBuffer transformed;
  size_t bytes() const {
    return codes.size_bytes() + scales.size_bytes() + transformed.size_bytes();
  }
};

// The transformed weights of one row of products, for a block of output channels: beyond this, with
// the inputs of a chunk, they leave a second-level cache of 512 KB.
inline constexpr size_t kMaxWinogradRowBytes = 56 << 10;

// The bytes that they take.
size_t WinogradConvRowBytes(const ConvGeometry& geometry, WinogradTile tile);

// Whether the transformed weights and the sums stay in the range in which they are exact.
// WinogradConvAccepts() must hold. `weights` are [oc, ic, 3, 3], products of code and cluster
// scale.
bool WinogradConvFits(const ConvGeometry& geometry, absl::Span<const int16_t> weights,
                      WinogradTile tile);

// The largest tile that the weights and kMaxWinogradRowBytes allow; none if the functions below
// do not take the layer.
std::optional<WinogradTile> ChooseWinogradTile(const ConvGeometry& geometry,
                                               const QuantizedWeights& weights, Isa isa);

// Cycles that one image is expected to take on Zen 3 (docs/kernels.md).
double WinogradConvCycles(const ConvGeometry& geometry, WinogradTile tile);

// WinogradConvFits() must hold for the products of codes and scales.
PackedWinogradConv PackWinogradConv(const ConvGeometry& geometry, const QuantizedWeights& weights,
                                    WinogradTile tile);

// Scratch for one call of RunWinogradConv, any range: ClusterConvArgs::scratch.
size_t WinogradConvScratchBytes(const PackedWinogradConv& conv);

// The output pixels of `batch` images form this many tiles; their cost is equal.
int64_t WinogradConvTiles(const ConvGeometry& geometry, WinogradTile tile, int batch);
inline int64_t WinogradConvTiles(const PackedWinogradConv& conv, int batch) {
  return WinogradConvTiles(conv.geometry, conv.tile, batch);
}

// Computes tiles [tile_begin, tile_end) and output-channel blocks [block_begin, block_end) of
// OutputBlocks(). Calls on disjoint ranges may run at once; each transforms its input itself, so
// few blocks per call are costly.
void RunWinogradConv(const PackedWinogradConv& conv, const ClusterConvArgs& args,
                     int64_t tile_begin, int64_t tile_end, int block_begin, int block_end);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_WINOGRAD_CONV_H_
