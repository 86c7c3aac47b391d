// Packing, pixel pointers and loop order of the SIMD cluster convolutions; the arithmetic is
// in the tiles (cluster_conv_tiles.h). docs/kernels.md has the design and the numbers.
#include <algorithm>
#include <cassert>
#include <cstring>

#include "server/kernels/cluster_conv_epilogue.h"
#include "server/kernels/cluster_conv_tiles.h"
#include "server/kernels/cluster_conv_variants.h"
#include "server/tensor/cluster.h"

namespace tern::kernels::tiled {
namespace {

// PackedClusterConv::layout: these, then the program of TileArgs.
enum LayoutField { kKind, kFlushes, kSteps, kRowBytes, kLayoutFields };

// One s16 lane receives two products of at most 255 * max_code per step, so this many steps
// are exact: 64 ternary, 9 4-bit.
constexpr int MaxFlushSteps(int max_code) { return 32767 / (510 * max_code); }
static_assert(MaxFlushSteps(1) == 64 && 510 * 1 * 64 <= 32767);
static_assert(MaxFlushSteps(7) == 9 && 510 * 7 * 9 <= 32767);

// Activations of a pixel chunk: stay in the second-level cache (256 KB on the smallest AVX2
// servers) while every block of output channels sweeps over them.
constexpr int64_t kChunkBytes = 160 * 1024;
// Pixel pointers of a chunk: 64 KB at most, for kernels of up to 9 x 9 taps.
constexpr int64_t kChunkPointers = 8192;

constexpr int kStepBytes = kOutputBlock * 4;
constexpr int kFlushScales = kOutputBlock * 2;

// A dword of four channels; only those in `mask` count in this step.
struct Dword {
  int index;
  int mask;
};

// Dwords whose low lanes (channels 0, 1) all belong to one cluster and high lanes (2, 3) to
// one cluster, so that one pair of scales serves their sum. -1: the lane is empty.
struct Group {
  int clusters[2];
  std::vector<Dword> dwords;
};

// Even N below the channel count gives one group per pair of clusters with full masks, and
// N >= channels a single group. Odd N lets clusters begin inside a lane: such a dword is
// visited twice, each time with the other cluster's weights masked.
std::vector<Group> MakeGroups(const ClusterMap& map) {
  std::vector<Group> groups;
  const int channels = map.channels();
  for (int d = 0; 4 * d < channels; ++d) {
    for (int visit = 0; visit < 2; ++visit) {
      int clusters[2] = {-1, -1};
      int mask = 0;
      for (int lane = 0; lane < 2; ++lane) {
        const int c = 4 * d + 2 * lane;
        const int first = c < channels ? map.cluster_of(c) : -1;
        const int second = c + 1 < channels ? map.cluster_of(c + 1) : -1;
        if (visit == 0 && first >= 0) {
          clusters[lane] = first;
          mask |= (second == first ? 3 : 1) << 2 * lane;
        } else if (visit == 1 && second >= 0 && second != first) {
          clusters[lane] = second;
          mask |= 2 << 2 * lane;
        }
      }
      if (mask == 0) continue;
      Group* home = nullptr;
      for (size_t back = 1; back <= 2 && back <= groups.size() && home == nullptr; ++back) {
        Group& group = groups[groups.size() - back];
        bool fits = true;
        for (int lane = 0; lane < 2; ++lane) {
          fits = fits && (clusters[lane] < 0 || group.clusters[lane] < 0 ||
                          clusters[lane] == group.clusters[lane]);
        }
        if (fits) home = &group;
      }
      if (home == nullptr) home = &groups.emplace_back(Group{{-1, -1}, {}});
      for (int lane = 0; lane < 2; ++lane) {
        if (clusters[lane] >= 0) home->clusters[lane] = clusters[lane];
      }
      home->dwords.push_back({d, mask});
    }
  }
  return groups;
}

struct Step {
  int tap;
  Dword dword;
};

struct Flush {
  int clusters[2];
  std::vector<Step> steps;
};

// Cuts each group's steps into equal flushes of at most `max_steps`.
std::vector<Flush> MakeFlushes(const std::vector<Group>& groups, int taps, int max_steps) {
  std::vector<Flush> flushes;
  for (const Group& group : groups) {
    const size_t total = group.dwords.size() * taps;
    const size_t parts = (total + max_steps - 1) / max_steps;
    for (size_t part = 0; part < parts; ++part) {
      Flush flush{{group.clusters[0], group.clusters[1]}, {}};
      for (size_t i = total * part / parts; i < total * (part + 1) / parts; ++i) {
        flush.steps.push_back(
            {static_cast<int>(i / group.dwords.size()), group.dwords[i % group.dwords.size()]});
      }
      flushes.push_back(std::move(flush));
    }
  }
  return flushes;
}

// Rows in scratch, at multiples of 64 bytes: one of zero points, then copies of the last
// pixels of the source.
struct Rows {
  int64_t row_stride;
  int tails;  // pixels that a read of row_bytes could leave by the end of the source
};

Rows RowsOf(const PackedClusterConv& conv) {
  const int row_bytes = conv.layout[kRowBytes];
  return {(row_bytes + 63) / 64 * 64, (row_bytes - 1) / conv.geometry.ic};
}

int64_t PointerCapacity(const ConvGeometry& g) {
  return std::max<int64_t>(kChunkPointers, int64_t{kMaxTilePixels} * g.kh * g.kw);
}

// Finds where each tap of an output pixel lies.
class PixelPointers {
 public:
  PixelPointers(const PackedClusterConv& conv, const ClusterConvArgs& args)
      : g_(conv.geometry), src_(args.src), row_bytes_(conv.layout[kRowBytes]) {
    const Rows rows = RowsOf(conv);
    uint8_t* row = static_cast<uint8_t*>(args.scratch);
    std::memset(row, args.src_zero_point, row_bytes_);
    padding_ = row;
    const int64_t pixels = int64_t{args.batch} * g_.ih * g_.iw;
    end_ = src_ + pixels * g_.ic;
    tail_begin_ = end_;
    for (int64_t i = 1; i <= rows.tails && i <= pixels; ++i) {
      row += rows.row_stride;
      tail_begin_ = end_ - i * g_.ic;
      const int64_t inside = std::min<int64_t>(row_bytes_, end_ - tail_begin_);
      std::memcpy(row, tail_begin_, inside);
      std::memset(row + inside, 0, row_bytes_ - inside);
    }
    tails_ = static_cast<uint8_t*>(args.scratch) + rows.row_stride;
    tail_stride_ = rows.row_stride;
  }

  // inputs[tap * pixels + i] for the `pixels` output pixels from `first` on.
  void Fill(int64_t first, int pixels, const uint8_t** inputs) const {
    int64_t p = first / g_.ow;
    int ox = static_cast<int>(first % g_.ow);
    int oy = static_cast<int>(p % g_.oh);
    int64_t image = p / g_.oh;
    for (int i = 0; i < pixels; ++i) {
      FillOne(image, oy, ox, pixels, inputs + i);
      if (++ox == g_.ow) {
        ox = 0;
        if (++oy == g_.oh) {
          oy = 0;
          ++image;
        }
      }
    }
  }

 private:
  void FillOne(int64_t image, int oy, int ox, int pixels, const uint8_t** inputs) const {
    const int y0 = oy * g_.stride_h - g_.pad_top;
    const int x0 = ox * g_.stride_w - g_.pad_left;
    const int64_t step = int64_t{g_.dilation_w} * g_.ic;
    for (int ky = 0; ky < g_.kh; ++ky) {
      const int y = y0 + ky * g_.dilation_h;
      if (y < 0 || y >= g_.ih) {
        for (int kx = 0; kx < g_.kw; ++kx, inputs += pixels) *inputs = padding_;
        continue;
      }
      const int64_t row = (image * g_.ih + y) * g_.iw;
      const int x_last = x0 + (g_.kw - 1) * g_.dilation_w;
      if (x0 >= 0 && x_last < g_.iw && src_ + (row + x_last) * g_.ic < tail_begin_) {
        const uint8_t* pixel = src_ + (row + x0) * g_.ic;
        for (int kx = 0; kx < g_.kw; ++kx, inputs += pixels, pixel += step) *inputs = pixel;
        continue;
      }
      for (int kx = 0; kx < g_.kw; ++kx, inputs += pixels) {
        const int x = x0 + kx * g_.dilation_w;
        if (x < 0 || x >= g_.iw) {
          *inputs = padding_;
          continue;
        }
        const uint8_t* pixel = src_ + (row + x) * g_.ic;
        if (pixel >= tail_begin_) {
          pixel = tails_ + ((end_ - pixel) / g_.ic - 1) * tail_stride_;
        }
        *inputs = pixel;
      }
    }
  }

  const ConvGeometry& g_;
  const uint8_t* src_;
  const int row_bytes_;
  const uint8_t* end_;
  const uint8_t* tail_begin_;  // from here on pixels are read from their copies
  const uint8_t* padding_;
  const uint8_t* tails_;
  int64_t tail_stride_;
};

}  // namespace

void Pack(const QuantizedWeights& weights, PackedClusterConv& conv) {
  const ConvGeometry& g = conv.geometry;
  const int taps = g.kh * g.kw;
  const ClusterMap map(g.ic, weights.cluster_size);
  const auto codes = weights.codes.data<int8_t>();
  const auto cluster_scales = weights.cluster_scales.data<int8_t>();

  int dwords = (g.ic + 3) / 4;
  std::vector<Group> groups = MakeGroups(map);
  Kind kind = kGeneral;
  if (taps == 1 && map.paired() && map.n() == 4) {
    kind = kPairs;
    // An odd last dword gets a partner without weights.
    if (groups.back().dwords.size() == 1) groups.back().dwords.push_back({dwords++, 0});
  }
  const std::vector<Flush> flushes = MakeFlushes(groups, taps, MaxFlushSteps(conv.max_code));
  int64_t steps = 0;
  for (const Flush& flush : flushes) steps += flush.steps.size();

  conv.layout = {kind, static_cast<int32_t>(flushes.size()), static_cast<int32_t>(steps),
                 4 * dwords};
  for (const Flush& flush : flushes) {
    const size_t runs_at = conv.layout.size();
    conv.layout.push_back(0);
    for (size_t i = 0; i < flush.steps.size(); ++i) {
      const Step& step = flush.steps[i];
      if (i > 0 && flush.steps[i - 1].tap == step.tap &&
          flush.steps[i - 1].dword.index + 1 == step.dword.index) {
        ++conv.layout.back();
        continue;
      }
      ++conv.layout[runs_at];
      conv.layout.push_back(4 * step.dword.index);
      conv.layout.push_back(step.tap << 8 | 1);
    }
  }

  const int blocks = OutputBlocks(g);
  conv.weights = AlignedBuffer(static_cast<size_t>(blocks) * steps * kStepBytes);
  conv.scales = AlignedBuffer(sizeof(int16_t) * blocks * flushes.size() * kFlushScales);
  int8_t* w = conv.weights.as<int8_t>();
  int16_t* s = conv.scales.as<int16_t>();
  for (int block = 0; block < blocks; ++block) {
    for (const Flush& flush : flushes) {
      for (int i = 0; i < kOutputBlock; ++i) {
        const int64_t o = block * kOutputBlock + i;
        for (int cluster : flush.clusters) {
          *s++ = o < g.oc && cluster >= 0 ? cluster_scales[o * map.clusters() + cluster] : 0;
        }
      }
      for (const Step& step : flush.steps) {
        for (int i = 0; i < kOutputBlock; ++i) {
          const int64_t o = block * kOutputBlock + i;
          for (int j = 0; j < 4; ++j) {
            const int c = 4 * step.dword.index + j;
            const bool counts = o < g.oc && (step.dword.mask >> j & 1);
            const int8_t code = counts ? codes[(o * g.ic + c) * taps + step.tap] : int8_t{0};
            assert(code >= -conv.max_code && code <= conv.max_code);
            *w++ = code;
          }
        }
      }
    }
  }
}

size_t ScratchBytes(const PackedClusterConv& conv) {
  const Rows rows = RowsOf(conv);
  return (1 + rows.tails) * rows.row_stride + sizeof(uint8_t*) * PointerCapacity(conv.geometry);
}

void Run(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
         int64_t pixel_end, int block_begin, int block_end) {
  const ConvGeometry& g = conv.geometry;
  const int64_t taps = int64_t{g.kh} * g.kw;
  const TileKernels& kernels =
      (conv.isa == Isa::kAvx512Vnni ? kAvx512Tiles : kAvx2Tiles)[conv.layout[kKind]];
  const PixelPointers pointers(conv, args);
  const Rows rows = RowsOf(conv);
  const uint8_t** inputs = reinterpret_cast<const uint8_t**>(static_cast<uint8_t*>(args.scratch) +
                                                             (1 + rows.tails) * rows.row_stride);

  // Chunks of equal size, so that the last one is not a poor fragment.
  const int64_t pixels = pixel_end - pixel_begin;
  const int64_t pixel_bytes =
      int64_t{g.ic} * std::min(g.stride_h, g.kh) * std::min(g.stride_w, g.kw);
  int64_t chunk = std::min(kChunkBytes / pixel_bytes, PointerCapacity(g) / taps);
  chunk = std::max<int64_t>(chunk / kernels.max_pixels, 1) * kernels.max_pixels;
  const int64_t chunks = (pixels + chunk - 1) / chunk;

  TileArgs tile{};
  BlockEpilogue epilogue(g, args, tile);
  tile.program = conv.layout.data() + kLayoutFields;
  tile.flushes = conv.layout[kFlushes];
  const int64_t block_weights = int64_t{conv.layout[kSteps]} * kStepBytes;
  const int64_t block_scales = int64_t{conv.layout[kFlushes]} * kFlushScales;

  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = pixel_begin + pixels * c / chunks;
    const int64_t count = pixel_begin + pixels * (c + 1) / chunks - first;
    // Tiles differ by one pixel at most.
    const int64_t tiles = (count + kernels.max_pixels - 1) / kernels.max_pixels;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = count * t / tiles;
      const int64_t end = count * (t + 1) / tiles;
      pointers.Fill(first + begin, static_cast<int>(end - begin), inputs + taps * begin);
    }
    for (int block = block_begin; block < block_end; ++block) {
      epilogue.SetBlock(block);
      tile.weights = conv.weights.as<int8_t>() + block * block_weights;
      tile.scales = conv.scales.as<int16_t>() + block * block_scales;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = count * t / tiles;
        const int64_t end = count * (t + 1) / tiles;
        tile.inputs = inputs + taps * begin;
        epilogue.SetPixel(first + begin);
        kernels.run[end - begin](tile);
      }
    }
  }
}

}  // namespace tern::kernels::tiled
