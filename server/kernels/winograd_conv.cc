// Packing, tiling and loop order of the Winograd convolutions; the arithmetic is in
// winograd_conv_avx2.cc.
#include "server/kernels/winograd_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "server/tensor/cluster.h"

#if TERN_HAVE_AVX2
#include "server/kernels/cluster_conv_epilogue.h"
#include "server/kernels/scratch_parts.h"
#include "server/kernels/winograd_conv_tiles.h"
#endif

namespace tern::kernels {

#if TERN_HAVE_AVX2

namespace {

using namespace winograd;  // NOLINT(build/namespaces): the other half of this file

// Transformed inputs of the tiles that are computed together: with the products of a block they
// stay in a second-level cache of 512 KB.
constexpr int64_t kInputBytes = 336 * 1024;

// Of a pair of input channels and a block of output channels.
constexpr int kPairScales = 2 * kOutputBlock, kPairCodes = 9 * kPairScales;

// Rows of G, times the integers that winograd_conv_tiles.h names.
constexpr int kG2[4][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 1}};
constexpr int kG4[6][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};

const Kernels& KernelsOf(WinogradTile tile) { return kAvx2Kernels[static_cast<int>(tile)]; }

int Products(const Kernels& k) { return (k.rows + 2) * (k.columns + 2); }

// The weights of all products, [rows + 2][columns + 2], of the nine of an input and an output
// channel.
void TransformNine(const Kernels& k, const int16_t* w, int32_t* out) {
  const auto g = [](int m, int i) { return m == 2 ? kG2[i] : kG4[i]; };
  for (int i = 0; i < k.rows + 2; ++i) {
    const int* down = g(k.rows, i);
    int32_t half[3];
    for (int x = 0; x < 3; ++x) half[x] = down[0] * w[x] + down[1] * w[3 + x] + down[2] * w[6 + x];
    for (int j = 0; j < k.columns + 2; ++j) {
      const int* across = g(k.columns, j);
      *out++ = across[0] * half[0] + across[1] * half[1] + across[2] * half[2];
    }
  }
}

// Products of code and scale, [oc, ic, 3, 3].
std::vector<int16_t> IntegerWeights(const ConvGeometry& g, const QuantizedWeights& weights) {
  const auto codes = weights.codes.data<int8_t>();
  std::vector<int16_t> products(codes.begin(), codes.end());
  if (!IsClustered(weights.scheme)) return products;
  const auto scales = weights.cluster_scales.data<int8_t>();
  const ClusterMap map(g.ic, weights.cluster_size);
  int16_t* w = products.data();
  for (int64_t o = 0; o < g.oc; ++o) {
    for (int c = 0; c < g.ic; ++c) {
      const int scale = scales[o * map.clusters() + map.cluster_of(c)];
      for (int t = 0; t < 9; ++t, ++w) *w = static_cast<int16_t>(*w * scale);
    }
  }
  return products;
}

// Whether 2^shift times every sum fits s32, with the shift of the tile's first output.
bool SumsFit(const ConvGeometry& g, const Kernels& kernels, absl::Span<const int16_t> weights) {
  const int shift = (kernels.rows == 4 ? 3 : 1) + (kernels.columns == 4 ? 3 : 1);
  for (int64_t o = 0; o < g.oc; ++o) {
    int64_t positive = 0, negative = 0;
    // In s32 over 16 channels (WinogradConvAccepts), so that vectors can be used.
    constexpr int kPart = 16 * 9;
    const int16_t* own = weights.data() + o * g.ic * 9;
    for (int64_t i = 0; i < int64_t{g.ic} * 9; i += kPart, own += kPart) {
      int sum = 0, magnitudes = 0;
      for (int k = 0; k < kPart; ++k) {
        sum += own[k];
        magnitudes += std::abs(int{own[k]});
      }
      positive += (magnitudes + sum) / 2;
      negative += (magnitudes - sum) / 2;
    }
    if (255 * std::max(positive, negative) > INT32_MAX >> shift) return false;
  }
  return true;
}

int64_t ChunkTiles(const ConvGeometry& g, WinogradTile tile) {
  const int64_t tile_bytes = int64_t{2} * Products(KernelsOf(tile)) * g.ic;
  return std::max<int64_t>(kInputBytes / tile_bytes / kRegisterTiles, 2) * kRegisterTiles;
}

// Elements from one product's tiles to the next one's: an odd number of cache lines, so that the
// products of a tile spread over all sets of the first-level cache.
template <typename T>
int64_t ProductStride(int64_t tiles, int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((tiles * channels + kLine - 1) / kLine | 1) * kLine;
}

// Of the transformed weights of a block, likewise.
int64_t WeightStride(const ConvGeometry& g) { return ProductStride<int16_t>(g.ic, kOutputBlock); }

// Layers of up to 64 channels keep their transformed weights: these have few tiles or are cheap to
// keep, and a transform for each call took 8 % of ResNet-20's time.
constexpr int64_t kMaxStoredBytes = 320 * 1024;

// Of all transformed weights.
int64_t TransformedBytes(const ConvGeometry& g, WinogradTile tile) {
  return static_cast<int64_t>(sizeof(int16_t)) * OutputBlocks(g) * Products(KernelsOf(tile)) *
         WeightStride(g);
}

// The parts of a call's scratch, each at a multiple of 64 bytes.
struct Scratch : ScratchParts {
  Scratch(const PackedWinogradConv& conv, void* memory) : ScratchParts(memory) {
    const int64_t tiles = ChunkTiles(conv.geometry, conv.tile),
                  products = Products(KernelsOf(conv.tile));
    padding = Take<uint8_t>(conv.geometry.ic);
    inputs = Take<int16_t>(products * ProductStride<int16_t>(tiles, conv.geometry.ic));
    weights = Take<int16_t>((KernelsOf(conv.tile).columns + 2) * WeightStride(conv.geometry));
    outputs = Take<int32_t>(products * ProductStride<int32_t>(tiles, kOutputBlock));
  }

  uint8_t* padding;  // one pixel
  int16_t* inputs;   // [product][tile][ic], products ProductStride apart
  int16_t* weights;  // [product of a row][ic / 2][16][2] of one block, the same
  int32_t* outputs;  // [product][tile][16] of one block, the same
};

// One call.
class Runner {
 public:
  Runner(const PackedWinogradConv& conv, const ClusterConvArgs& args)
      : conv_(conv),
        g_(conv.geometry),
        args_(args),
        kernels_(KernelsOf(conv.tile)),
        products_(Products(kernels_)),
        tile_rows_((g_.oh + kernels_.rows - 1) / kernels_.rows),
        tile_columns_((g_.ow + kernels_.columns - 1) / kernels_.columns),
        scratch_(conv, args.scratch),
        epilogue_(g_, args, finish_) {
    std::memset(scratch_.padding, args.src_zero_point, g_.ic);
  }

  int64_t tiles() const { return int64_t{args_.batch} * tile_rows_ * tile_columns_; }

  void Run(int64_t tile_begin, int64_t tile_end, int block_begin, int block_end) {
    // Chunks of about equal size.
    const int64_t count = tile_end - tile_begin, most = ChunkTiles(conv_.geometry, conv_.tile);
    const int64_t chunks = (count + most - 1) / most;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = tile_begin + count * c / chunks;
      const int64_t n = tile_begin + count * (c + 1) / chunks - first;
      input_stride_ = ProductStride<int16_t>(n, g_.ic);
      output_stride_ = ProductStride<int32_t>(n, kOutputBlock);
      for (int64_t t = 0; t < n; ++t) TransformTile(first + t, t);
      for (int block = block_begin; block < block_end; ++block) {
        MultiplyBlock(block, static_cast<int>(n));
        epilogue_.SetBlock(block);
        for (int64_t t = 0; t < n; ++t) FinishTile(first + t, t);
      }
    }
  }

 private:
  struct Place {
    int64_t image;
    int y, x;  // of the first output pixel
  };

  Place PlaceOf(int64_t tile) const {
    const auto index = static_cast<uint32_t>(tile);  // 32-bit divisions are quicker
    const uint32_t row = index / static_cast<uint32_t>(tile_columns_);
    const uint32_t image = row / static_cast<uint32_t>(tile_rows_);
    return {image, static_cast<int>(row - image * tile_rows_) * kernels_.rows,
            static_cast<int>(index - row * tile_columns_) * kernels_.columns};
  }

  void TransformTile(int64_t tile, int64_t t) {
    const Place at = PlaceOf(tile);
    const uint8_t* pixels[kMaxProducts];
    const uint8_t** to = pixels;
    const int columns = kernels_.columns + 2, x0 = at.x - g_.pad_left;
    for (int y = at.y - g_.pad_top; y < at.y - g_.pad_top + kernels_.rows + 2; ++y) {
      if (y < 0 || y >= g_.ih) {
        to = std::fill_n(to, columns, scratch_.padding);
        continue;
      }
      const uint8_t* row = args_.src + (at.image * g_.ih + y) * g_.iw * g_.ic;
      if (x0 >= 0 && x0 + columns <= g_.iw) {
        const uint8_t* pixel = row + int64_t{x0} * g_.ic;
        for (int i = 0; i < columns; ++i, pixel += g_.ic) *to++ = pixel;
        continue;
      }
      for (int x = x0; x < x0 + columns; ++x)
        *to++ = x >= 0 && x < g_.iw ? row + int64_t{x} * g_.ic : scratch_.padding;
    }
    kernels_.input(pixels, g_.ic, scratch_.inputs + t * g_.ic, input_stride_);
  }

  // The products of `n` tiles with a block's weights.
  void MultiplyBlock(int block, int n) {
    const int groups = (n + kRegisterTiles - 1) / kRegisterTiles;
    const int tiles = n / groups, longer = n % groups;  // the first ones have one tile more
    const int64_t pairs = g_.ic / 2, stride = WeightStride(g_);
    const int16_t* stored = conv_.transformed.size_bytes() == 0
                                ? nullptr
                                : conv_.transformed.as<int16_t>() + block * products_ * stride;
    const int8_t* codes = conv_.codes.as<int8_t>() + block * pairs * kPairCodes;
    const int8_t* scales = conv_.scales.size_bytes() == 0
                               ? nullptr
                               : conv_.scales.as<int8_t>() + block * pairs * kPairScales;
    MultiplyArgs multiply{};
    multiply.channels = g_.ic;
    for (int p = 0; p < products_; ++p) {
      const int row = p / (kernels_.columns + 2), column = p % (kernels_.columns + 2);
      // A row at a time stays in the first-level cache for up to 128 channels.
      if (stored == nullptr && column == 0)
        kernels_.weights[row](codes, scales, pairs, scratch_.weights, stride);
      multiply.weights =
          stored != nullptr ? stored + p * stride : scratch_.weights + column * stride;
      multiply.input = scratch_.inputs + p * input_stride_;
      multiply.out = scratch_.outputs + p * output_stride_;
      for (int group = 0; group < groups; ++group) {
        const int count = tiles + (group < longer);
        kAvx2Multiply[count](multiply);
        multiply.input += int64_t{count} * g_.ic;
        multiply.out += count * kOutputBlock;
      }
    }
  }

  void FinishTile(int64_t tile, int64_t t) {
    kernels_.output(scratch_.outputs + t * kOutputBlock, output_stride_, sums_);
    const Place at = PlaceOf(tile);
    const int rows = std::min(kernels_.rows, g_.oh - at.y);
    const int columns = std::min(kernels_.columns, g_.ow - at.x);
    epilogue_.SetPixel((at.image * g_.oh + at.y) * g_.ow + at.x);
    tiled::FinishRowsAvx2(finish_, sums_, int64_t{kernels_.columns} * kOutputBlock, columns, rows,
                          int64_t{g_.ow} * g_.oc);
  }

  const PackedWinogradConv& conv_;
  const ConvGeometry& g_;
  const ClusterConvArgs& args_;
  const Kernels& kernels_;
  const int products_, tile_rows_, tile_columns_;
  Scratch scratch_;
  int64_t input_stride_ = 0, output_stride_ = 0;
  tiled::EpilogueArgs finish_{};
  tiled::BlockEpilogue epilogue_;
  alignas(64) int32_t sums_[kMaxOutputs * kOutputBlock];
};

}  // namespace

bool WinogradConvAccepts(const ConvGeometry& g, Isa isa) {
  return isa >= Isa::kAvx2 && g.kh == 3 && g.kw == 3 && g.stride_h == 1 && g.stride_w == 1 &&
         g.dilation_h == 1 && g.dilation_w == 1 && g.ic % 16 == 0;
}

size_t WinogradConvRowBytes(const ConvGeometry& g, WinogradTile tile) {
  return sizeof(int16_t) * (KernelsOf(tile).columns + 2) * WeightStride(g);
}

bool WinogradConvFits(const ConvGeometry& g, absl::Span<const int16_t> weights, WinogradTile tile) {
  const Kernels& k = KernelsOf(tile);
  if (!SumsFit(g, k, weights)) return false;
  // The largest sums of a row of G's magnitudes are 3 and 7.
  const int most = (k.rows == 4 ? 7 : 3) * (k.columns == 4 ? 7 : 3);
  int16_t low = 0, high = 0;  // std::minmax_element is not vectorised
  for (int16_t w : weights) {
    low = w < low ? w : low;
    high = w > high ? w : high;
  }
  if (std::max(-int{low}, int{high}) * most <= INT16_MAX) return true;
  for (size_t i = 0; i < weights.size(); i += 9) {
    int32_t transformed[kMaxProducts];
    TransformNine(k, weights.data() + i, transformed);
    for (int p = 0; p < Products(k); ++p) {
      if (std::abs(transformed[p]) > INT16_MAX) return false;
    }
  }
  return true;
}

std::optional<WinogradTile> ChooseWinogradTile(const ConvGeometry& g,
                                               const QuantizedWeights& weights, Isa isa) {
  if (!WinogradConvAccepts(g, isa)) return std::nullopt;
  const std::vector<int16_t> products = IntegerWeights(g, weights);
  for (WinogradTile tile : {WinogradTile::k4x4, WinogradTile::k2x4, WinogradTile::k2x2}) {
    if (WinogradConvRowBytes(g, tile) <= kMaxWinogradRowBytes &&
        WinogradConvFits(g, products, tile))
      return tile;
  }
  return std::nullopt;
}

double WinogradConvCycles(const ConvGeometry& g, WinogradTile of) {
  // Per product and 16 output channels of a tile: 16 multiply-accumulates per input channel; the
  // transforms of a tile's inputs and outputs with the epilogue; and those of the weights, for each
  // chunk of tiles, per pair of input channels.
  constexpr double kMacs = 25, kPerProduct = 6;
  constexpr double kProducts[] = {16, 24, 36}, kOutputs[] = {150, 240, 350},
                   kInputs[] = {60, 90, 140}, kWeights[] = {60, 85, 130};
  const int tile = static_cast<int>(of);
  const int64_t tiles = WinogradConvTiles(g, of, 1), most = ChunkTiles(g, of);
  const double chunks = static_cast<double>((tiles + most - 1) / most);
  const double blocks = OutputBlocks(g), pairs = g.ic / 2;
  const double multiply = kProducts[tile] * (16.0 * g.ic / kMacs + kPerProduct);
  return static_cast<double>(tiles) *
             (blocks * (multiply + kOutputs[tile]) + g.ic / 16.0 * kInputs[tile]) +
         (TransformedBytes(g, of) > kMaxStoredBytes ? chunks * blocks * pairs * kWeights[tile] : 0);
}

PackedWinogradConv PackWinogradConv(const ConvGeometry& geometry, const QuantizedWeights& weights,
                                    WinogradTile tile) {
  const ConvGeometry& g = geometry;
  PackedWinogradConv conv;
  conv.geometry = geometry;
  conv.tile = tile;
  const bool clustered = IsClustered(weights.scheme);
  const int64_t pairs = int64_t{OutputBlocks(g)} * g.ic / 2;
  conv.codes = AlignedBuffer(pairs * kPairCodes);
  int8_t* code = conv.codes.as<int8_t>();
  std::memset(code, 0, conv.codes.size_bytes());
  if (clustered) conv.scales = AlignedBuffer(pairs * kPairScales);
  int8_t* scale = conv.scales.as<int8_t>();
  const ClusterMap map(g.ic, clustered ? weights.cluster_size : g.ic);
  const auto codes = weights.codes.data<int8_t>(), scales = weights.cluster_scales.data<int8_t>();
  for (int block = 0; block < OutputBlocks(g); ++block) {
    for (int c = 0; c < g.ic; c += 2, code += kPairCodes, scale += kPairScales) {
      for (int i = 0; i < kPairScales; ++i) {
        const int64_t o = block * kOutputBlock + i / 2;
        const int channel = c + i % 2;
        if (clustered)
          scale[i] = o < g.oc ? scales[o * map.clusters() + map.cluster_of(channel)] : int8_t{0};
        if (o >= g.oc) continue;
        const int8_t* nine = codes.data() + (o * g.ic + channel) * 9;
        for (int tap = 0; tap < 9; ++tap) code[tap * kPairScales + i] = nine[tap];
      }
    }
  }
  if (const int64_t bytes = TransformedBytes(g, tile); bytes <= kMaxStoredBytes) {
    const Kernels& k = KernelsOf(tile);
    const int64_t stride = WeightStride(g), of_block = g.ic / 2;
    conv.transformed = AlignedBuffer(bytes);
    int16_t* to = conv.transformed.as<int16_t>();
    for (int block = 0; block < OutputBlocks(g); ++block) {
      for (int row = 0; row < k.rows + 2; ++row, to += (k.columns + 2) * stride) {
        k.weights[row](
            conv.codes.as<int8_t>() + block * of_block * kPairCodes,
            clustered ? conv.scales.as<int8_t>() + block * of_block * kPairScales : nullptr,
            of_block, to, stride);
      }
    }
    conv.codes = AlignedBuffer();
    conv.scales = AlignedBuffer();
  }
  return conv;
}

size_t WinogradConvScratchBytes(const PackedWinogradConv& conv) {
  return Scratch(conv, nullptr).bytes();
}

int64_t WinogradConvTiles(const ConvGeometry& g, WinogradTile tile, int batch) {
  const Kernels& k = KernelsOf(tile);
  return int64_t{batch} * ((g.oh + k.rows - 1) / k.rows) * ((g.ow + k.columns - 1) / k.columns);
}

void RunWinogradConv(const PackedWinogradConv& conv, const ClusterConvArgs& args,
                     int64_t tile_begin, int64_t tile_end, int block_begin, int block_end) {
  if (tile_begin >= tile_end || block_begin >= block_end) return;
  Runner(conv, args).Run(tile_begin, tile_end, block_begin, block_end);
}

#else  // Accepts nothing, so the rest is never called.

bool WinogradConvAccepts(const ConvGeometry&, Isa) { return false; }
size_t WinogradConvRowBytes(const ConvGeometry&, WinogradTile) { return 0; }
bool WinogradConvFits(const ConvGeometry&, absl::Span<const int16_t>, WinogradTile) {
  return false;
}
std::optional<WinogradTile> ChooseWinogradTile(const ConvGeometry&, const QuantizedWeights&, Isa) {
  return std::nullopt;
}
double WinogradConvCycles(const ConvGeometry&, WinogradTile) { return 0; }
PackedWinogradConv PackWinogradConv(const ConvGeometry&, const QuantizedWeights&, WinogradTile) {
  return {};
}
size_t WinogradConvScratchBytes(const PackedWinogradConv&) { return 0; }
int64_t WinogradConvTiles(const ConvGeometry&, WinogradTile, int) { return 0; }
void RunWinogradConv(const PackedWinogradConv&, const ClusterConvArgs&, int64_t, int64_t, int,
                     int) {}

#endif

}  // namespace tern::kernels
