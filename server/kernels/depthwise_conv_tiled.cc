// Packing, padding and loop order of the SIMD depthwise convolutions; the arithmetic is in the
// tiles (depthwise_conv_tiles.h). docs/kernels.md has the design and the numbers.
#include <algorithm>
#include <cstring>

#include "server/kernels/depthwise_conv_tiles.h"
#include "server/kernels/depthwise_conv_variants.h"

namespace tern::kernels::tiled {
namespace {

// Activations of some rows: stay in the second-level cache while every block of channels reads its
// part of their cache lines.
constexpr int64_t kChunkBytes = 160 * 1024;
// A patch is at most this many pixels wide, and this many bytes, half a first-level cache, unless
// one row of tiles takes more.
constexpr int kPatchPixels = 32;
constexpr int64_t kPatchBytes = 16 * 1024;
constexpr int kMaxBlock = 32;

const DepthwiseKernels& KernelsOf(Isa isa) {
  return isa == Isa::kAvx512Vnni ? kAvx512Depthwise : kAvx2Depthwise;
}

DepthwiseShape ShapeOf(const ConvGeometry& g) {
  const bool regular = g.kh == g.kw && g.stride_h == g.stride_w && g.stride_h <= 2 &&
                       g.dilation_h == 1 && g.dilation_w == 1;
  if (!regular || (g.kh != 3 && g.kh != 5)) return kAny;
  if (g.kh == 3) return g.stride_h == 1 ? k3x3 : k3x3Stride2;
  return g.stride_h == 1 ? k5x5 : k5x5Stride2;
}

// Output rows of a tile: those of stride 1 share what they read.
int RowsOf(DepthwiseShape shape) { return shape == k3x3 || shape == k5x5 ? 2 : 1; }

// How a layer is cut.
struct Cut {
  Cut(const ConvGeometry& geometry, const DepthwiseKernels& kernels)
      : g(geometry),
        shape(ShapeOf(g)),
        rows(RowsOf(shape)),
        block(kernels.block),
        blocks((g.oc + block - 1) / block),
        groups(((rows - 1) * g.stride_h + g.kh + kernels.group_rows - 1) / kernels.group_rows),
        block_weights(int64_t{rows} * g.kw * groups * block * 4) {
    const int64_t column_bytes = int64_t{PatchRows(rows)} * block;
    const int64_t fit = shape == kAny ? kPatchBytes / (column_bytes * g.kw) : kPatchPixels;
    patch_pixels = static_cast<int>(std::clamp<int64_t>(fit, 4, kPatchPixels));
    patch_bytes = std::max(kPatchBytes, column_bytes * PatchColumns(patch_pixels));
  }

  // The last block of many begins early enough to be whole.
  int FirstChannel(int b) const { return std::max(0, std::min(b * block, g.oc - block)); }

  // Of a patch for some pixels of some output rows. That of kAny has whole groups of rows.
  int PatchColumns(int pixels) const {
    return shape == kAny ? pixels * g.kw : (pixels - 1) * g.stride_w + g.kw;
  }
  int PatchRows(int output_rows) const {
    return shape == kAny ? (g.kh + 3) / 4 * 4 : (output_rows - 1) * g.stride_h + g.kh;
  }
  // Output rows that a patch of so many pixels serves.
  int RowsPerPatch(int pixels) const {
    if (shape == kAny) return 1;
    const int64_t fit = patch_bytes / (int64_t{PatchColumns(pixels)} * block);
    const int64_t output_rows = std::max<int64_t>(rows, (fit - g.kh) / g.stride_h + 1);
    return static_cast<int>(output_rows / rows) * rows;
  }

  const ConvGeometry& g;
  DepthwiseShape shape;
  int rows;  // of a tile
  int block, blocks, groups;
  int64_t block_weights;  // bytes
  int patch_pixels;       // at most
  int64_t patch_bytes;    // at most; no fewer blocks of channels than the patch has results
};

// One call of Run.
class Runner {
 public:
  Runner(const PackedDepthwiseConv& conv, const ClusterConvArgs& args)
      : g_(conv.geometry),
        args_(args),
        kernels_(KernelsOf(conv.isa)),
        cut_(g_, kernels_),
        weights_(conv.weights.as<uint8_t>()),
        patch_(static_cast<uint8_t*>(args.scratch)),
        result_(patch_ + cut_.patch_bytes) {}

  // Output rows [begin, end) of an image. The results point at the first of them.
  void RunImage(int64_t image, int begin, int end, int32_t* sums, uint8_t* codes) {
    src_ = args_.src + image * g_.ih * g_.iw * g_.ic;
    first_row_ = begin;
    sums_ = sums;
    codes_ = codes;
    const int64_t row_bytes = int64_t{g_.iw} * g_.ic * g_.stride_h;
    const int64_t most = std::max<int64_t>(1, kChunkBytes / row_bytes / cut_.rows) * cut_.rows;
    for (int first = begin; first < end;) {
      const int last = static_cast<int>(std::min<int64_t>(end, first + most));
      for (int b = 0; b < cut_.blocks; ++b) {
        StartBlock(b);
        RunRows(first, last);
      }
      first = last;
    }
  }

 private:
  void StartBlock(int b) {
    channel_ = cut_.FirstChannel(b);
    channels_ = std::min(cut_.block, g_.oc - channel_);
    tile_ = DepthwiseTile{};
    tile_.weights = weights_ + b * cut_.block_weights;
    tile_.groups = cut_.groups;
    tile_.kw = g_.kw;
    if (sums_ != nullptr) return;
    if (args_.fixed != nullptr) {
      tile_.fixed_multiplier = Constants(args_.fixed->multiplier.data(), fixed_multiplier_);
      tile_.fixed_offset = Constants(args_.fixed->narrow_offset.data(), fixed_offset_);
      tile_.shift = args_.fixed->shift;
      tile_.lo = static_cast<uint8_t>(args_.fixed->lo);
      tile_.hi = static_cast<uint8_t>(args_.fixed->hi);
    } else {
      tile_.multiplier = Constants(args_.multiplier, multiplier_);
      tile_.offset = Constants(args_.offset, offset_);
      tile_.lo = static_cast<uint8_t>(args_.lo);
      tile_.hi = static_cast<uint8_t>(args_.hi);
    }
  }

  // The block's, in a copy if they are fewer than a block.
  template <typename T>
  const T* Constants(const T* all, T (&copy)[kMaxBlock]) const {
    if (channels_ == cut_.block) return all + channel_;
    std::copy_n(all, channels_, copy);
    return copy;
  }

  // Whole tiles of outputs [begin, end) that see no padding; first == last: none.
  struct Range {
    int first, last;
  };
  static Range Inner(int begin, int end, int stride, int pad, int kernel, int size, int tile) {
    const int inside = (pad + stride - 1) / stride;
    const int skipped = (std::max(0, inside - begin) + tile - 1) / tile * tile;
    const int room = size - kernel + pad;
    const int limit = std::min(end, room < 0 ? 0 : room / stride + 1);
    const int first = begin + skipped;
    return {first, first + std::max(0, limit - first) / tile * tile};
  }

  // Output rows [begin, end) of the block: from the source itself where that is most of them.
  void RunRows(int begin, int end) {
    const Range y = Inner(begin, end, g_.stride_h, g_.pad_top, g_.kh, g_.ih, cut_.rows);
    const Range x =
        Inner(0, g_.ow, g_.stride_w, g_.pad_left, g_.kw, g_.iw, kernels_.tile / cut_.rows);
    const int64_t inner = int64_t{y.last - y.first} * (x.last - x.first);
    if (cut_.shape == kAny || channels_ < cut_.block ||
        3 * inner < 2 * int64_t{end - begin} * g_.ow) {
      RunPatches(begin, end, 0, g_.ow);
      return;
    }
    RunPatches(begin, y.first, 0, g_.ow);
    RunPatches(y.first, y.last, 0, x.first);
    const int64_t pixel =
        (int64_t{y.first} * g_.stride_h - g_.pad_top) * g_.iw + x.first * g_.stride_w - g_.pad_left;
    tile_.src = src_ + pixel * g_.ic + channel_;
    tile_.row_stride = int64_t{g_.iw} * g_.ic;
    tile_.column_stride = g_.ic;
    RunTiles(y.first, y.last - y.first, x.first, x.last - x.first);
    RunPatches(y.first, y.last, x.last, g_.ow);
    RunPatches(y.last, end, 0, g_.ow);
  }

  // Index of the block's first channel in the results.
  int64_t At(int oy, int ox) const {
    return (int64_t{oy - first_row_} * g_.ow + ox) * g_.oc + channel_;
  }

  // tile_, whose source is set, to its place in the results.
  void RunTiles(int oy, int rows, int ox, int pixels) {
    tile_.rows = rows;
    tile_.pixels = pixels;
    tile_.pixel_elements = g_.oc;
    tile_.row_elements = int64_t{g_.ow} * g_.oc;
    tile_.sums = sums_ != nullptr ? sums_ + At(oy, ox) : nullptr;
    tile_.codes = codes_ != nullptr ? codes_ + At(oy, ox) : nullptr;
    kernels_.run[cut_.shape](tile_);
  }

  // Output rows [row_begin, row_end), pixels [begin, end), from copies of what they read: where
  // there is padding, or the shape is not a regular one, or a block is not whole.
  void RunPatches(int row_begin, int row_end, int begin, int end) {
    for (int ox = begin; ox < end; ox += cut_.patch_pixels) {
      const int pixels = std::min(cut_.patch_pixels, end - ox);
      const int columns = cut_.PatchColumns(pixels), most = cut_.RowsPerPatch(pixels);
      tile_.src = patch_;
      tile_.row_stride = int64_t{columns} * cut_.block;
      tile_.column_stride = cut_.block;
      for (int oy = row_begin; oy < row_end; oy += most) {
        const int rows = std::min(most, row_end - oy);
        FillPatch(oy, cut_.shape == kAny ? g_.kh : cut_.PatchRows(rows), ox, columns);
        if (channels_ == cut_.block) {
          RunTiles(oy, rows, ox, pixels);
        } else {
          RunNarrow(oy, rows, ox, pixels);
        }
      }
    }
  }

  // As RunTiles for fewer channels than a block.
  void RunNarrow(int oy, int rows, int ox, int pixels) {
    tile_.rows = rows;
    tile_.pixels = pixels;
    tile_.pixel_elements = cut_.block;
    tile_.row_elements = int64_t{pixels} * cut_.block;
    tile_.sums = sums_ != nullptr ? reinterpret_cast<int32_t*>(result_) : nullptr;
    tile_.codes = codes_ != nullptr ? result_ : nullptr;
    kernels_.run[cut_.shape](tile_);
    for (int r = 0; r < rows; ++r) {
      for (int p = 0; p < pixels; ++p) {
        const int64_t from = (int64_t{r} * pixels + p) * cut_.block, to = At(oy + r, ox + p);
        if (sums_ != nullptr) {
          std::copy_n(tile_.sums + from, channels_, sums_ + to);
        } else {
          std::copy_n(tile_.codes + from, channels_, codes_ + to);
        }
      }
    }
  }

  void FillPatch(int oy, int rows, int ox, int columns) {
    uint8_t* to = patch_;
    for (int r = 0; r < rows; ++r, to += int64_t{columns} * cut_.block) {
      const int iy = oy * g_.stride_h - g_.pad_top + r * g_.dilation_h;
      if (iy < 0 || iy >= g_.ih) {
        std::memset(to, args_.src_zero_point, int64_t{columns} * cut_.block);
        continue;
      }
      const uint8_t* row = src_ + int64_t{iy} * g_.iw * g_.ic + channel_;
      if (cut_.shape != kAny) {
        FillRow(row, ox * g_.stride_w - g_.pad_left, 1, columns, to);
        continue;
      }
      for (int column = 0; column < columns; column += g_.kw) {
        FillRow(row, (ox + column / g_.kw) * g_.stride_w - g_.pad_left, g_.dilation_w, g_.kw,
                to + int64_t{column} * cut_.block);
      }
    }
  }

  // `count` pixels of a row from x on, `step` apart.
  void FillRow(const uint8_t* row, int x, int step, int count, uint8_t* to) {
    for (; count > 0 && x < 0; --count, x += step, to += cut_.block) {
      std::memset(to, args_.src_zero_point, cut_.block);
    }
    const uint8_t* from = row + int64_t{x} * g_.ic;
    const int64_t stride = int64_t{step} * g_.ic;
    const int inside = x < g_.iw ? std::min(count, (g_.iw - 1 - x) / step + 1) : 0;
    if (channels_ == 32) {
      Copy<32>(from, stride, inside, to);
    } else if (channels_ == 16) {
      Copy<16>(from, stride, inside, to);
    } else {
      for (int i = 0; i < inside; ++i, from += stride) {
        std::memcpy(to + int64_t{i} * cut_.block, from, channels_);
      }
    }
    std::memset(to + int64_t{inside} * cut_.block, args_.src_zero_point,
                int64_t{count - inside} * cut_.block);
  }

  template <int kBytes>
  void Copy(const uint8_t* from, int64_t stride, int count, uint8_t* to) const {
    const int64_t to_stride = cut_.block;
    for (int i = 0; i < count; ++i, from += stride, to += to_stride) std::memcpy(to, from, kBytes);
  }

  const ConvGeometry& g_;
  const ClusterConvArgs& args_;
  const DepthwiseKernels& kernels_;
  const Cut cut_;
  const uint8_t* const weights_;
  uint8_t* const patch_;
  uint8_t* const result_;  // of a patch with few channels

  const uint8_t* src_ = nullptr;  // of the image
  int first_row_ = 0;             // the output row at which the results point
  int32_t* sums_ = nullptr;
  uint8_t* codes_ = nullptr;
  int channel_ = 0, channels_ = 0;
  DepthwiseTile tile_{};
  float multiplier_[kMaxBlock] = {}, offset_[kMaxBlock] = {};
  int32_t fixed_multiplier_[kMaxBlock] = {}, fixed_offset_[kMaxBlock] = {};
};

}  // namespace

void Pack(absl::Span<const int8_t> weights, PackedDepthwiseConv& conv) {
  const ConvGeometry& g = conv.geometry;
  const DepthwiseKernels& kernels = KernelsOf(conv.isa);
  const Cut cut(g, kernels);
  conv.weights = AlignedBuffer(cut.blocks * cut.block_weights);
  int16_t* words = conv.weights.as<int16_t>();
  int8_t* bytes = conv.weights.as<int8_t>();
  for (int b = 0; b < cut.blocks; ++b) {
    const int first = cut.FirstChannel(b);
    for (int r = 0; r < cut.rows; ++r) {
      for (int kx = 0; kx < g.kw; ++kx) {
        for (int row = 0; row < cut.groups * kernels.group_rows; row += kernels.group_rows) {
          for (int d = 0; d < cut.block; ++d) {
            const int half = 2 * d / cut.block, i = d % (cut.block / 2);
            const int64_t c = first + kernels.lane[i / 4] + 4 * half + i % 4;
            for (int t = 0; t < kernels.group_rows; ++t) {
              const int ky = row + t - r * g.stride_h;
              const bool counts = c < g.oc && ky >= 0 && ky < g.kh;
              const int8_t w = counts ? weights[(c * g.kh + ky) * g.kw + kx] : int8_t{0};
              if (kernels.group_rows == 2) {
                *words++ = w;
              } else {
                *bytes++ = w;
              }
            }
          }
        }
      }
    }
  }
}

// A patch, and its results as sums.
size_t ScratchBytes(const PackedDepthwiseConv& conv) {
  const Cut cut(conv.geometry, KernelsOf(conv.isa));
  return cut.patch_bytes * (1 + sizeof(int32_t));
}

void Run(const PackedDepthwiseConv& conv, const ClusterConvArgs& args, int64_t row_begin,
         int64_t row_end, int32_t* sums, uint8_t* codes) {
  const ConvGeometry& g = conv.geometry;
  Runner runner(conv, args);
  const int64_t row_elements = int64_t{g.ow} * g.oc;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t image = row / g.oh, end = std::min(row_end, (image + 1) * g.oh);
    const int64_t at = (row - row_begin) * row_elements;
    runner.RunImage(image, static_cast<int>(row % g.oh), static_cast<int>(end - image * g.oh),
                    sums != nullptr ? sums + at : nullptr, codes != nullptr ? codes + at : nullptr);
    row = end;
  }
}

}  // namespace tern::kernels::tiled
