// 3x3 convolution of stride 1 by Winograd's minimal filtering, in integers and exact: the same sums
// as cluster_conv.h and int8_conv.h, bit for bit, with a half to a quarter of the multiplications.
// docs/kernels.md, "Winograd", has the design and the numbers.
//
// Pure functions: no allocation, no threads, no errors. The caller validated the shapes.
#ifndef TERN_SERVER_KERNELS_WINOGRAD_CONV_H_
#define TERN_SERVER_KERNELS_WINOGRAD_CONV_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "server/base/aligned_buffer.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"

namespace tern::kernels {

// Output pixels that one set of products gives, rows x columns. Multiplications per output and
// channel pair, of nine: 4, 3, 2.25. Bytes of packed weights per weight: 3.6, 5.3, 8.
enum class WinogradTile { k2x2, k2x4, k4x4 };

// Whether the functions below take the shape: AVX2; 3x3 with stride and dilation 1, any padding;
// input channels a multiple of 16.
bool WinogradConvAccepts(const ConvGeometry& geometry, Isa isa);

// Weights in the order in which the kernels read them, built once per plan, shared by threads.
struct PackedWinogradConv {
  ConvGeometry geometry;
  WinogradTile tile = WinogradTile::k2x2;
  // s16 [block of 16 output channels][product of the tile][ic / 2][16][2].
  AlignedBuffer weights;
  size_t bytes() const { return weights.size_bytes(); }
};

// Packed weights are wider and more than the layer's: beyond this they cost more memory, and more
// time to fetch, than the fewer products save.
inline constexpr size_t kMaxWinogradBytes = 2304 << 10;

// The bytes that packed weights take.
size_t WinogradConvBytes(const ConvGeometry& geometry, WinogradTile tile);

// Whether the transformed weights and the sums stay in the range in which they are exact.
// WinogradConvAccepts() must hold. `weights` are [oc, ic, 3, 3], products of code and cluster
// scale.
bool WinogradConvFits(const ConvGeometry& geometry, absl::Span<const int16_t> weights,
                      WinogradTile tile);

// WinogradConvFits() must hold.
PackedWinogradConv PackWinogradConv(const ConvGeometry& geometry, absl::Span<const int16_t> weights,
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
