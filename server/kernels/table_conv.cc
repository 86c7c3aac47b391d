// Packing, tiling and loop order of the sum-table convolutions; the arithmetic is in
// table_conv_avx2.cc.
//
// Quads: in every 8 channels, channels 0, 1, 4, 5 and channels 2, 3, 6, 7. Clusters are paired
// (server/tensor/cluster.h), so with N a multiple of 4 the first quad lies in the first cluster of
// a pair and the second in the second; with one cluster for all channels any quads do.
#include "server/kernels/table_conv.h"

#include <algorithm>
#include <cstring>

#include "server/tensor/cluster.h"
#if TERN_HAVE_AVX2
#include "server/kernels/cluster_conv_epilogue.h"
#include "server/kernels/scratch_parts.h"
#include "server/kernels/table_conv_tiles.h"
#endif

namespace tern::kernels {

#if TERN_HAVE_AVX2

namespace {

using namespace tables;  // NOLINT(build/namespaces): the other half of this file

constexpr int kQuadOffsets[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};

// Quads of 3x3 whose sums fit s16 together: each of nine taps adds at most 4 * 255.
constexpr int kRunQuads = 3;
static_assert(kRunQuads * 9 * 4 * 255 <= 32767);

int PaddedOutputs(const ConvGeometry& g) { return OutputBlocks(g) * kOutputBlock; }

bool Is3x3(const ConvGeometry& g) { return g.kh == 3; }

// Channels that share a pair of scales.
int PairChannels(const PackedTableConv& conv) {
  const int ic = conv.geometry.ic;
  return conv.cluster_size >= ic ? ic : 2 * conv.cluster_size;
}

int PairsPerGroup(const PackedTableConv& conv) {
  return std::max(1, 4 * kGroupQuads / PairChannels(conv));
}

// How the output pixels of a 3x3 layer are cut: into strips `height` rows high and at most `width`
// columns wide; `strips_per_line` of them lie side by side in the lines of a group, each with its
// two halo columns; a group is cut into `pieces` of a few rows, the tiles.
struct Tiling {
  int column_parts, width;
  int bands, height;  // of an image
  int strips_per_line, vectors;
  int pieces;
  int64_t strips, groups;
};

Tiling MakeTiling(const ConvGeometry& g, int batch) {
  constexpr int kMaxWidth = kLinePositions - 2;
  Tiling best{};
  double best_cost = 0;
  const int column_parts = (g.ow + kMaxWidth - 1) / kMaxWidth;
  const int width = (g.ow + column_parts - 1) / column_parts;
  for (int vectors = 1; vectors <= kMaxVectors; ++vectors) {
    // The last strip's two halo columns may lie beyond the vectors.
    const int per_line = ((vectors == 1 ? kLanes : kMaxWidth) + 2) / (width + 2);
    for (int bands = 1; bands <= std::min(per_line, g.oh); ++bands) {
      Tiling t{column_parts, width, bands, (g.oh + bands - 1) / bands, per_line, vectors};
      // Pieces of three or two rows.
      t.pieces = (t.height + 2) / 3;
      t.strips = int64_t{batch} * bands * column_parts;
      t.groups = (t.strips + per_line - 1) / per_line;
      // Cycles per quad: two additions, or one store of a table row, per cycle.
      const double cost =
          static_cast<double>(t.groups) * (0.5 * 9 * t.height * vectors * PaddedOutputs(g) +
                                           2.0 * kStates * (t.height + 2 * t.pieces));
      if (best.vectors == 0 || cost < best_cost) {
        best = t;
        best_cost = cost;
      }
    }
  }
  return best;
}

// The parts of a call's scratch, each at a multiple of 64 bytes.
struct Scratch : ScratchParts {
  Scratch(const PackedTableConv& conv, void* memory) : ScratchParts(memory) {
    const ConvGeometry& g = conv.geometry;
    const size_t outputs = PaddedOutputs(g);
    const size_t sums = Is3x3(g) ? outputs * kMaxRows * kMaxVectors * kLanes : 0;
    padding = Take<uint8_t>(g.ic);
    planes = Take<uint8_t>(static_cast<size_t>(g.ic) * (Is3x3(g) ? kPlaneStride : kLanes));
    table = Take<char>(Is3x3(g) ? kTable3x3Bytes : kTable1x1Bytes);
    partner = Take<int16_t>(sums);
    own = Take<int16_t>(sums);
    acc = Take<int32_t>(Is3x3(g) ? sums : outputs * kLanes);
  }

  uint8_t* padding;  // one pixel
  uint8_t* planes;
  char* table;
  int16_t *partner, *own;
  int32_t* acc;
};

// One call.
class Runner {
 public:
  Runner(const PackedTableConv& conv, const ClusterConvArgs& args, int block_begin, int block_end)
      : conv_(conv),
        g_(conv.geometry),
        args_(args),
        block_begin_(block_begin),
        block_end_(block_end),
        outputs_((block_end - block_begin) * kOutputBlock),
        scratch_(conv, args.scratch),
        epilogue_(g_, args, finish_) {
    std::memset(scratch_.padding, args.src_zero_point, g_.ic);
  }

  void Run3x3(int64_t tile_begin, int64_t tile_end) {
    const Tiling t = MakeTiling(g_, args_.batch);
    int64_t group = -1;
    int filled = 0;  // lines of the group
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int piece = static_cast<int>(tile % t.pieces);
      const int begin = t.height * piece / t.pieces;
      const int end = t.height * (piece + 1) / t.pieces;
      if (tile / t.pieces != group) {
        group = tile / t.pieces;
        filled = begin;
      }
      for (; filled < end + 2; ++filled) GatherLine(t, group, filled);
      Sum3x3(begin % kSlots, end - begin, t.vectors);
      Finish3x3(t, group, begin, end);
    }
  }

  void Run1x1(int64_t tile_begin, int64_t tile_end) {
    const int64_t pixels = int64_t{args_.batch} * g_.oh * g_.ow;
    const GroupKernel add = kGroupKernels[PairsPerGroup(conv_)];
    const int groups = g_.ic / (4 * kGroupQuads);
    const int64_t o = int64_t{block_begin_} * kOutputBlock;
    GroupArgs sum{};
    sum.table = scratch_.table;
    sum.acc = scratch_.acc;
    sum.outputs = outputs_;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t first = tile * kLanes;
      const int count = static_cast<int>(std::min<int64_t>(kLanes, pixels - first));
      const uint8_t* from[kLanes];
      for (int i = 0; i < kLanes; ++i) from[i] = i < count ? Pixel(first + i) : scratch_.padding;
      GatherPlanes(from, g_.ic, scratch_.planes, kLanes);
      for (int group = 0; group < groups; ++group) {
        BuildGroup(scratch_.planes + int64_t{4 * kGroupQuads * kLanes} * group, scratch_.table);
        const int64_t at = int64_t{group} * PaddedOutputs(g_) + o;
        sum.states = conv_.states.as<uint16_t>() + kGroupQuads * at;
        sum.scales = conv_.scales.as<int32_t>() + PairsPerGroup(conv_) * at;
        sum.clear = group == 0;
        add(sum);
      }
      for (int block = block_begin_; block < block_end_; ++block) {
        epilogue_.SetBlock(block);
        TransposeSums(scratch_.acc + int64_t{block - block_begin_} * kOutputBlock * kLanes, kLanes,
                      tile_);
        epilogue_.SetPixel(first);
        tiled::FinishAvx2(finish_, tile_, count);
      }
    }
  }

 private:
  // A strip's place. width 0: there is none.
  struct Strip {
    int64_t image;
    int y, rows, x, width;
  };

  Strip StripOf(const Tiling& t, int64_t index) const {
    if (index >= t.strips) return {};
    const int part = static_cast<int>(index % t.column_parts);
    const int band = static_cast<int>(index / t.column_parts % t.bands);
    const int x = g_.ow * part / t.column_parts;
    const int y = band * t.height;
    return {index / t.column_parts / t.bands, y, std::min(t.height, g_.oh - y), x,
            g_.ow * (part + 1) / t.column_parts - x};
  }

  const uint8_t* Pixel(int64_t output) const {
    const int64_t row = output / g_.ow;
    const int64_t y = row % g_.oh * g_.stride_h, x = output % g_.ow * g_.stride_w;
    return args_.src + ((row / g_.oh * g_.ih + y) * g_.iw + x) * g_.ic;
  }

  void GatherLine(const Tiling& t, int64_t group, int line) {
    const uint8_t* from[kLinePositions];
    std::fill(from, from + kLinePositions, scratch_.padding);
    int position = 0;
    for (int s = 0; s < t.strips_per_line; ++s, position = s * (t.width + 2)) {
      const Strip strip = StripOf(t, group * t.strips_per_line + s);
      const int y = strip.y + line - g_.pad_top;
      if (strip.width == 0 || y < 0 || y >= g_.ih) continue;
      const int x0 = strip.x - g_.pad_left;
      const uint8_t* row = args_.src + (strip.image * g_.ih + y) * g_.iw * g_.ic;
      for (int x = std::max(x0, 0); x < std::min(x0 + strip.width + 2, g_.iw); ++x) {
        from[position + x - x0] = row + int64_t{x} * g_.ic;
      }
    }
    uint8_t* to = scratch_.planes + line % kSlots * kLinePositions;
    GatherPlanes(from, g_.ic, to, kPlaneStride);
    GatherPlanes(from + 16, g_.ic, to + 16, kPlaneStride);
  }

  // All sums of a tile into acc.
  void Sum3x3(int slot, int rows, int vectors) {
    const QuadKernel* const add = kQuadKernels[rows - 1][vectors - 1];
    const int64_t o = int64_t{block_begin_} * kOutputBlock;
    const int pair_channels = PairChannels(conv_);
    QuadArgs sum{};
    sum.table = scratch_.table;
    sum.partner = scratch_.partner;
    sum.acc = scratch_.acc;
    sum.outputs = outputs_;
    sum.clear = true;
    for (int first = 0, pair = 0; first < g_.ic; first += pair_channels, ++pair) {
      sum.scales = conv_.scales.as<int32_t>() + int64_t{pair} * PaddedOutputs(g_) + o;
      // Quads of each of the two clusters, in runs of equal length.
      const int quads = std::min(pair_channels, g_.ic - first) / 8;
      const int runs = (quads + kRunQuads - 1) / kRunQuads;
      for (int run = 0; run < runs; ++run) {
        const int begin = quads * run / runs, end = quads * (run + 1) / runs;
        for (int side = 0; side < 2; ++side) {
          sum.sums = side == 0 ? scratch_.partner : scratch_.own;
          for (int q = begin; q < end; ++q) {
            const int64_t quad = first / 4 + 2 * q + side;
            BuildLines(scratch_.planes + 4 * kPlaneStride * quad, slot, rows, scratch_.table);
            sum.states = conv_.states.as<uint8_t>() + 9 * (quad * PaddedOutputs(g_) + o);
            add[(q == begin ? kFirst : kMiddle) | (side == 1 && q + 1 == end ? kLast : kMiddle)](
                sum);
          }
        }
        sum.clear = false;
      }
    }
  }

  // The epilogue of rows [begin, end) of a group's strips.
  void Finish3x3(const Tiling& t, int64_t group, int begin, int end) {
    const int sums = (end - begin) * t.vectors;
    for (int block = block_begin_; block < block_end_; ++block) {
      epilogue_.SetBlock(block);
      for (int v = 0; v < sums; ++v) {
        TransposeSums(scratch_.acc + (int64_t{block - block_begin_} * kOutputBlock * sums + v) * 16,
                      int64_t{16} * sums, tile_);
        const int row = begin + v / t.vectors;
        // Positions 14 and 15 are in both vectors: they count in the first.
        const bool second = v % t.vectors == 1;
        const int own_begin = second ? kLanes : 0;
        const int own_end = second ? kSecondVector + kLanes : kLanes;
        for (int s = 0; s < t.strips_per_line; ++s) {
          const Strip strip = StripOf(t, group * t.strips_per_line + s);
          if (row >= strip.rows) continue;
          const int position = s * (t.width + 2);
          const int from = std::max(position, own_begin);
          const int to = std::min(position + strip.width, own_end);
          if (from >= to) continue;
          epilogue_.SetPixel((strip.image * g_.oh + strip.y + row) * g_.ow + strip.x + from -
                             position);
          tiled::FinishAvx2(finish_, tile_ + 16 * (from - (second ? kSecondVector : 0)), to - from);
        }
      }
    }
  }

  const PackedTableConv& conv_;
  const ConvGeometry& g_;
  const ClusterConvArgs& args_;
  const int block_begin_, block_end_, outputs_;
  Scratch scratch_;
  tiled::EpilogueArgs finish_{};
  tiled::BlockEpilogue epilogue_;
  alignas(64) int32_t tile_[kLanes * kOutputBlock];
};

}  // namespace

bool TableConvAccepts(const ConvGeometry& g, const QuantizedWeights& weights, Isa isa) {
  if (isa < Isa::kAvx2 || weights.scheme != WeightScheme::kTernaryCluster) return false;
  const int n = weights.cluster_size;
  const bool whole = n >= g.ic;
  if (g.kh == 1 && g.kw == 1) {
    return g.pad_top == 0 && g.pad_left == 0 && (g.oh - 1) * g.stride_h < g.ih &&
           (g.ow - 1) * g.stride_w < g.iw && g.ic % 32 == 0 &&
           (whole || n == 4 || n == 8 || n % 16 == 0);
  }
  return g.kh == 3 && g.kw == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 &&
         g.dilation_w == 1 && g.ic % 16 == 0 && (whole || n % 4 == 0);
}

PackedTableConv PackTableConv(const ConvGeometry& geometry, const QuantizedWeights& weights) {
  PackedTableConv conv;
  conv.geometry = geometry;
  conv.cluster_size = weights.cluster_size;
  const ConvGeometry& g = conv.geometry;
  const int taps = g.kh * g.kw;
  const int64_t outputs = PaddedOutputs(g);
  const ClusterMap map(g.ic, weights.cluster_size);
  const auto codes = weights.codes.data<int8_t>();
  const auto scales = weights.cluster_scales.data<int8_t>();

  const int quads = g.ic / 4;
  // states[tap]: the digits of a quad's codes plus one, to the base of 3.
  const auto states_of = [&](int64_t o, int64_t quad, auto* states, int factor, int offset) {
    if (o >= g.oc) {
      std::fill_n(states, taps,
                  static_cast<std::decay_t<decltype(*states)>>(factor * kZeroState + offset));
      return;
    }
    const int8_t* channel = codes.data() + (o * g.ic + quad / 2 * 8) * taps;
    const auto& offsets = kQuadOffsets[quad % 2];
    const int8_t *a = channel + offsets[0] * taps, *b = channel + offsets[1] * taps,
                 *c = channel + offsets[2] * taps, *d = channel + offsets[3] * taps;
    for (int t = 0; t < taps; ++t) {
      const int state = 27 * a[t] + 9 * b[t] + 3 * c[t] + d[t] + kZeroState;
      states[t] = static_cast<std::decay_t<decltype(*states)>>(factor * state + offset);
    }
  };
  // Block by block, so that neither the reads nor the writes leave the first-level cache.
  conv.states = AlignedBuffer((Is3x3(g) ? taps : sizeof(uint16_t)) * quads * outputs);
  for (int64_t first = 0; first < outputs; first += kOutputBlock) {
    if (Is3x3(g)) {
      for (int64_t quad = 0; quad < quads; ++quad) {
        uint8_t* states = conv.states.as<uint8_t>() + (quad * outputs + first) * taps;
        for (int64_t o = first; o < first + kOutputBlock; ++o, states += taps)
          states_of(o, quad, states, 1, 0);
      }
      continue;
    }
    static_assert(kTable1x1Bytes <= 65536);
    for (int64_t group = 0; group < quads / kGroupQuads; ++group) {
      uint16_t* states = conv.states.as<uint16_t>() + (group * outputs + first) * kGroupQuads;
      for (int64_t o = first; o < first + kOutputBlock; ++o) {
        for (int q = 0; q < kGroupQuads; ++q, ++states)
          states_of(o, group * kGroupQuads + q, states, 2 * kLanes, 2 * kLanes * kStates * q);
      }
    }
  }

  // Where a pair of scales begins to count: every pair's first channel, or the 1x1 groups' share.
  const int pairs_per_group = Is3x3(g) ? 1 : PairsPerGroup(conv);
  const int step = Is3x3(g) ? PairChannels(conv) : 4 * kGroupQuads / pairs_per_group;
  const int pairs = (g.ic + step - 1) / step;
  conv.scales = AlignedBuffer(sizeof(int32_t) * pairs * outputs);
  int32_t* pair_scales = conv.scales.as<int32_t>();
  std::memset(pair_scales, 0, conv.scales.size_bytes());
  for (int64_t o = 0; o < g.oc; ++o) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int8_t* own = scales.data() + o * map.clusters();
      const int first = own[map.cluster_of(static_cast<int>(pair) * step)];
      const int second = own[map.cluster_of(static_cast<int>(pair) * step + 2)];
      pair_scales[(pair / pairs_per_group * outputs + o) * pairs_per_group +
                  pair % pairs_per_group] = first | second << 16;
    }
  }
  return conv;
}

size_t TableConvScratchBytes(const PackedTableConv& conv) { return Scratch(conv, nullptr).bytes(); }

int64_t TableConvTiles(const PackedTableConv& conv, int batch) {
  const ConvGeometry& g = conv.geometry;
  if (!Is3x3(g)) return (int64_t{batch} * g.oh * g.ow + kLanes - 1) / kLanes;
  const Tiling tiling = MakeTiling(g, batch);
  return tiling.groups * tiling.pieces;
}

void RunTableConv(const PackedTableConv& conv, const ClusterConvArgs& args, int64_t tile_begin,
                  int64_t tile_end, int block_begin, int block_end) {
  if (tile_begin >= tile_end || block_begin >= block_end) return;
  Runner runner(conv, args, block_begin, block_end);
  if (Is3x3(conv.geometry)) {
    runner.Run3x3(tile_begin, tile_end);
  } else {
    runner.Run1x1(tile_begin, tile_end);
  }
}

#else  // Accepts nothing, so the rest is never called.

bool TableConvAccepts(const ConvGeometry&, const QuantizedWeights&, Isa) { return false; }
PackedTableConv PackTableConv(const ConvGeometry&, const QuantizedWeights&) { return {}; }
size_t TableConvScratchBytes(const PackedTableConv&) { return 0; }
int64_t TableConvTiles(const PackedTableConv&, int) { return 0; }
void RunTableConv(const PackedTableConv&, const ClusterConvArgs&, int64_t, int64_t, int, int) {}

#endif

}  // namespace tern::kernels
