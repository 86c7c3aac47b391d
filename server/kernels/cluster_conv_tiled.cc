// Packing, pixel pointers and loop order of the SIMD cluster convolutions; the arithmetic is
// in the tiles (cluster_conv_tiles.h). docs/kernels.md has the design and the numbers.
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "server/kernels/cluster_conv_epilogue.h"
#include "server/kernels/cluster_conv_tiles.h"
#include "server/kernels/cluster_conv_variants.h"
#include "server/kernels/scratch_parts.h"
#include "server/tensor/cluster.h"

namespace tern::kernels::tiled {
namespace {

// PackedClusterConv::layout: the fields, then BlockField of each block, then their programs
// (TileArgs).
// kPointers: per output pixel, one for each tap, or a single one to the first tap (PrefersRowTaps).
// kCodeBits: as stored; 8: as the tiles read them. kMostSteps, kMostFlushes: of a block, as far as
// it must be expanded (ExpandCodesAvx2, ExpandScalesAvx2).
enum LayoutField {
  kKind,
  kRowBytes,
  kPointers,
  kCodeBits,
  kMostSteps,
  kMostFlushes,
  kLayoutFields
};
// Where a block's part begins in the weights (in bytes), scales (in flushes) and the layout.
enum BlockField { kFirstByte, kBytes, kFirstFlush, kProgram, kFlushes, kBlockFields };

// A lane's s16 sum is exact while neither its positive nor its negative weights add up to more:
// activations are at most 255.
constexpr int kMaxLaneSum = 32767 / 255;
static_assert(kMaxLaneSum == 128);
// A run's length has eight bits.
constexpr size_t kMaxRun = 255;

// Activations of a pixel chunk, and these with its results: stay in the second-level cache (512 KB;
// the activations even in 256 KB) while every block of output channels sweeps over them.
constexpr int64_t kChunkBytes = 160 * 1024;
constexpr int64_t kChunkBytesWithResults = 256 * 1024;
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

// The weights of one step: [16 output channels][4 channels].
using StepWeights = std::array<int8_t, kStepBytes>;

// Sums of positive and of negative weights, lane by lane. In s16, which compilers turn into
// vectors: no sum has more than a few steps beyond kMaxLaneSum.
class LaneSums {
 public:
  // Of steps, or of what has been added up.
  template <typename... Parts>
  explicit LaneSums(const Parts&... parts) {
    (Add(parts), ...);
  }
  void Add(const StepWeights& w) {
    int16_t words[kFlushScales];  // two weights each
    std::memcpy(words, w.data(), sizeof(words));
    for (int lane = 0; lane < kFlushScales; ++lane) {
      const int16_t a = static_cast<int16_t>(words[lane] << 8) >> 8, b = words[lane] >> 8;
      positive_[lane] += std::max<int16_t>(a, 0) + std::max<int16_t>(b, 0);
      negative_[lane] -= std::min<int16_t>(a, 0) + std::min<int16_t>(b, 0);
    }
  }
  void Add(const LaneSums& other) {
    for (int lane = 0; lane < kFlushScales; ++lane) {
      positive_[lane] += other.positive_[lane];
      negative_[lane] += other.negative_[lane];
    }
  }
  // Whether s16 sums of these products are exact, whatever the activations.
  bool exact() const {
    int16_t any = 0;  // negative if one of the differences is
    for (int lane = 0; lane < kFlushScales; ++lane)
      any |= (kMaxLaneSum - positive_[lane]) | (kMaxLaneSum - negative_[lane]);
    return any >= 0;
  }

 private:
  int16_t positive_[kFlushScales] = {}, negative_[kFlushScales] = {};
};

// Calls `take` with the step, or with two that add up to it if vpmaddubsw would saturate: one
// product per lane each.
template <typename Take>
void ForExactParts(const StepWeights& w, const Take& take) {
  if (LaneSums(w).exact()) return take(w);
  for (int odd = 0; odd < 2; ++odd) {
    StepWeights half{};
    for (int i = odd; i < kStepBytes; i += 2) half[i] = w[i];
    take(half);
  }
}

struct Step {
  int tap, dword;
};

struct Flush {
  int clusters[2];
  std::vector<Step> steps;
};

// Collects a block's steps into flushes as long as the weights allow, and their weights in `out`.
class FlushMaker {
 public:
  FlushMaker(size_t max_steps, int largest_code, std::vector<int8_t>& out)
      : max_steps_(max_steps), largest_code_(largest_code), out_(out) {}

  // Of up to `steps` steps.
  void BeginGroup(const Group& group, size_t steps) {
    group_ = &group;
    open_ = false;
    any_is_exact_ = steps * 2 * largest_code_ <= kMaxLaneSum;
  }

  void Add(const Step& step, const StepWeights& weights) {
    if (2 * largest_code_ <= kMaxLaneSum) return AddExact(step, weights);
    ForExactParts(weights, [&](const StepWeights& part) { AddExact(step, part); });
  }

  std::vector<Flush> Take() { return std::move(flushes_); }

 private:
  void AddExact(const Step& step, const StepWeights& weights) {
    bool fits = open_ && flushes_.back().steps.size() < max_steps_;
    if (!any_is_exact_) {
      LaneSums with = sums_;
      with.Add(weights);
      fits = fits && with.exact();
      sums_ = fits ? with : LaneSums(weights);
    }
    if (!fits) flushes_.push_back({{group_->clusters[0], group_->clusters[1]}, {}});
    open_ = true;
    flushes_.back().steps.push_back(step);
    out_.insert(out_.end(), weights.begin(), weights.end());
  }

  const size_t max_steps_;
  const int largest_code_;
  std::vector<int8_t>& out_;
  const Group* group_ = nullptr;
  bool any_is_exact_ = false;  // whatever the group's weights are
  bool open_ = false;
  LaneSums sums_;
  std::vector<Flush> flushes_;
};

int64_t PointerCapacity(const ConvGeometry& g) {
  return std::max<int64_t>(kChunkPointers, int64_t{kMaxTilePixels} * g.kh * g.kw);
}

// The parts of a call's scratch, each at a multiple of 64 bytes.
struct Scratch : ScratchParts {
  Scratch(const PackedClusterConv& conv, void* memory)
      : ScratchParts(memory),
        row_stride((conv.layout[kRowBytes] + 63) / 64 * 64),
        tails((conv.layout[kRowBytes] - 1) / conv.geometry.ic) {
    rows = Take<uint8_t>((1 + tails) * row_stride);
    pointers = Take<const uint8_t*>(PointerCapacity(conv.geometry));
    weights = Take<int8_t>(int64_t{conv.layout[kMostSteps]} * kStepBytes);
    scales = Take<int16_t>(int64_t{conv.layout[kMostFlushes]} * kFlushScales);
  }

  int64_t row_stride;
  int tails;      // pixels that a read of row_bytes could leave by the end of the source
  uint8_t* rows;  // one of zero points, then copies of the last pixels of the source
  const uint8_t** pointers;
  int8_t* weights;  // one block's
  int16_t* scales;
};

// Finds where each tap of an output pixel lies.
class PixelPointers {
 public:
  PixelPointers(const PackedClusterConv& conv, const ClusterConvArgs& args, const Scratch& scratch)
      : g_(conv.geometry),
        src_(args.src),
        row_bytes_(conv.layout[kRowBytes]),
        single_(conv.layout[kPointers] < g_.kh * g_.kw) {
    uint8_t* row = scratch.rows;
    std::memset(row, args.src_zero_point, row_bytes_);
    padding_ = row;
    const int64_t pixels = int64_t{args.batch} * g_.ih * g_.iw;
    end_ = src_ + pixels * g_.ic;
    tail_begin_ = end_;
    for (int64_t i = 1; i <= scratch.tails && i <= pixels; ++i) {
      row += scratch.row_stride;
      tail_begin_ = end_ - i * g_.ic;
      const int64_t inside = std::min<int64_t>(row_bytes_, end_ - tail_begin_);
      std::memcpy(row, tail_begin_, inside);
      std::memset(row + inside, 0, row_bytes_ - inside);
    }
    tails_ = scratch.rows + scratch.row_stride;
    tail_stride_ = scratch.row_stride;
  }

  // inputs[tap * pixels + i] for the `pixels` output pixels from `first` on.
  void Fill(int64_t first, int pixels, const uint8_t** inputs) const {
    int64_t p = first / g_.ow;
    int ox = static_cast<int>(first % g_.ow);
    int oy = static_cast<int>(p % g_.oh);
    int64_t image = p / g_.oh;
    for (int done = 0; done < pixels; ox = 0) {
      const int count = std::min(pixels - done, g_.ow - ox);
      FillRow(image, oy, ox, count, pixels, inputs + done);
      done += count;
      if (++oy == g_.oh) {
        oy = 0;
        ++image;
      }
    }
  }

 private:
  // As Fill, for `count` output pixels of one row; taps are `pixels` apart in `inputs`.
  void FillRow(int64_t image, int oy, int ox, int count, int pixels, const uint8_t** inputs) const {
    const int y0 = oy * g_.stride_h - g_.pad_top;
    const int64_t step = int64_t{g_.stride_w} * g_.ic;
    if (single_) {
      const int x0 = ox * g_.stride_w - g_.pad_left;
      const uint8_t* pixel = src_ + ((image * g_.ih + y0) * g_.iw + x0) * g_.ic;
      for (int i = 0; i < count; ++i, pixel += step) inputs[i] = pixel;
      return;
    }
    // The first output column at or right of which a tap's column is x or more.
    const auto column_of = [&](int x) {
      return std::clamp(x <= 0 ? 0 : (x + g_.stride_w - 1) / g_.stride_w, ox, ox + count) - ox;
    };
    for (int kx = 0; kx < g_.kw; ++kx) {
      const int x0 = kx * g_.dilation_w - g_.pad_left;  // of the tap for output column 0
      const int begin = column_of(-x0), end = std::max(begin, column_of(g_.iw - x0));
      for (int ky = 0; ky < g_.kh; ++ky) {
        const uint8_t** to = inputs + int64_t{ky * g_.kw + kx} * pixels;
        const int y = y0 + ky * g_.dilation_h;
        if (y < 0 || y >= g_.ih) {
          std::fill(to, to + count, padding_);
          continue;
        }
        std::fill(to, to + begin, padding_);
        const uint8_t* pixel =
            src_ + ((image * g_.ih + y) * g_.iw + x0 + int64_t{ox + begin} * g_.stride_w) * g_.ic;
        for (int i = begin; i < end; ++i, pixel += step) to[i] = pixel;
        std::fill(to + end, to + count, padding_);
        for (int i = end; i > begin && to[i - 1] >= tail_begin_; --i)
          to[i - 1] = tails_ + ((end_ - to[i - 1]) / g_.ic - 1) * tail_stride_;
      }
    }
  }

  const ConvGeometry& g_;
  const uint8_t* src_;
  const int row_bytes_;
  const bool single_;  // no pixel needs padding, and no read leaves the source
  const uint8_t* end_;
  const uint8_t* tail_begin_;  // from here on pixels are read from their copies
  const uint8_t* padding_;
  const uint8_t* tails_;
  int64_t tail_stride_;
};

}  // namespace

namespace {

// The weights of a layer, block by block, as they go into a PackedClusterConv.
class Packer {
 public:
  Packer(const QuantizedWeights& weights, PackedClusterConv& conv)
      : g_(conv.geometry),
        taps_(g_.kh * g_.kw),
        scheme_(weights.scheme),
        clustered_(IsClustered(weights.scheme)),
        map_(g_.ic, clustered_ ? weights.cluster_size : g_.ic),
        codes_(weights.codes.data<int8_t>()),
        cluster_scales_(weights.cluster_scales.data<int8_t>()),
        conv_(conv) {}

  void Run() {
    int dwords = (g_.ic + 3) / 4;
    int pointers = taps_;
    std::vector<Group> groups = MakeGroups(map_);
    Kind kind = kGeneral;
    if (!clustered_ && conv_.isa == Isa::kAvx2) {
      kind = kInt8;
      if (PrefersRowTaps(g_, conv_.isa) && !HasPadding()) pointers = 1;
      dwords += dwords % 2;
    } else if (taps_ == 1 && clustered_ && map_.paired() && map_.n() == 4) {
      kind = kPairs;
      // An odd last dword gets a partner without weights.
      if (groups.back().dwords.size() == 1) groups.back().dwords.push_back({dwords++, 0});
    }
    const int blocks = OutputBlocks(g_);
    conv_.layout.assign(kLayoutFields + kBlockFields * blocks, 0);
    conv_.layout[kKind] = kind;
    conv_.layout[kRowBytes] = 4 * dwords;
    conv_.layout[kPointers] = pointers;
    const int bits = !clustered_ ? 8 : LargestCode(scheme_) == 1 ? 2 : 4;
    conv_.layout[kCodeBits] = bits;
    stored_.reserve(static_cast<size_t>(blocks) * dwords * taps_ * kStepBytes * bits / 8);
    for (int block = 0; block < blocks; ++block) {
      const auto program = static_cast<int32_t>(conv_.layout.size());
      const auto first_byte = static_cast<int32_t>(stored_.size());
      const auto first_flush = static_cast<int32_t>(scales_.size() / kFlushScales);
      weights_.clear();
      const int flushes = kind == kInt8 ? PackInt8(block, dwords)
                                        : PackClusters(block, groups, kind == kPairs ? 2 : kMaxRun);
      StoreCodes(bits);
      const int32_t steps = static_cast<int32_t>(weights_.size() / kStepBytes);
      if (bits < 8) conv_.layout[kMostSteps] = std::max(conv_.layout[kMostSteps], steps);
      if (kind != kInt8) conv_.layout[kMostFlushes] = std::max(conv_.layout[kMostFlushes], flushes);
      int32_t* field = conv_.layout.data() + kLayoutFields + kBlockFields * block;
      field[kFirstByte] = first_byte;
      field[kBytes] = static_cast<int32_t>(stored_.size()) - first_byte;
      field[kFirstFlush] = first_flush;
      field[kProgram] = program;
      field[kFlushes] = flushes;
    }
    conv_.weights = AlignedBuffer(stored_.size());
    std::copy(stored_.begin(), stored_.end(), conv_.weights.as<uint8_t>());
    conv_.scales = AlignedBuffer(scales_.size());
    std::copy(scales_.begin(), scales_.end(), conv_.scales.as<int8_t>());  // none for int8
  }

 private:
  bool HasPadding() const {
    return g_.pad_top != 0 || g_.pad_left != 0 ||
           (g_.oh - 1) * g_.stride_h + (g_.kh - 1) * g_.dilation_h >= g_.ih ||
           (g_.ow - 1) * g_.stride_w + (g_.kw - 1) * g_.dilation_w >= g_.iw;
  }

  // Those of the four codes from `at` on in a row of taps, but for those before `from`.
  StepWeights RowWeightsOf(int block, int row, int at, int from) const {
    StepWeights w{};
    for (int i = 0; i < kStepBytes; ++i) {
      const int64_t o = block * kOutputBlock + i / 4;
      const int byte = at + i % 4, c = byte % g_.ic, kx = byte / g_.ic;
      if (o < g_.oc && byte >= from && kx < g_.kw)
        w[i] = codes_[(o * g_.ic + c) * taps_ + row * g_.kw + kx];
    }
    return w;
  }

  StepWeights WeightsOf(int block, int tap, const Dword& dword) const {
    StepWeights w;
    const int64_t first = int64_t{block} * kOutputBlock;
    if (first + kOutputBlock <= g_.oc && 4 * dword.index + 4 <= g_.ic && dword.mask == 15) {
      const int8_t* from = codes_.data() + (first * g_.ic + 4 * dword.index) * taps_ + tap;
      for (int o = 0; o < kOutputBlock; ++o, from += int64_t{g_.ic} * taps_) {
        if (taps_ == 1) {
          std::memcpy(&w[4 * o], from, 4);
          continue;
        }
        for (int c = 0; c < 4; ++c) w[4 * o + c] = from[c * taps_];
      }
      return w;
    }
    w.fill(0);
    for (int i = 0; i < kStepBytes; ++i) {
      const int64_t o = first + i / 4;
      const int c = 4 * dword.index + i % 4;
      if (o < g_.oc && c < g_.ic && (dword.mask >> i % 4 & 1))
        w[i] = codes_[(o * g_.ic + c) * taps_ + tap];
    }
    return w;
  }

  // A block's weights_, filled up with zeros, as ExpandCodesAvx2 reads them.
  void StoreCodes(int bits) {
    if (bits == 8) {
      stored_.insert(stored_.end(), weights_.begin(), weights_.end());
      return;
    }
    constexpr int kBytes = 32;
    const size_t group = kBytes * 8 / bits;
    weights_.resize((weights_.size() + group - 1) / group * group);
    const size_t begin = stored_.size();
    stored_.resize(begin + weights_.size() * bits / 8);
    uint8_t* to = stored_.data() + begin;
    const uint8_t bias = static_cast<uint8_t>(1 << (bits - 1));
    for (size_t at = 0; at < weights_.size(); at += kBytes) {
      const int shift = static_cast<int>(at % group / kBytes) * bits;
      for (int i = 0; i < kBytes; ++i)
        to[i] |= static_cast<uint8_t>(static_cast<uint8_t>(weights_[at + i] + bias) << shift);
      if (shift + bits == 8) to += kBytes;
    }
  }

  void Append(const StepWeights& w) { weights_.insert(weights_.end(), w.begin(), w.end()); }

  // The number of flushes.
  int PackClusters(int block, const std::vector<Group>& groups, size_t max_steps) {
    FlushMaker maker(max_steps, LargestCode(scheme_), weights_);
    for (const Group& group : groups) {
      maker.BeginGroup(group, group.dwords.size() * taps_);
      for (int tap = 0; tap < taps_; ++tap) {
        for (const Dword& dword : group.dwords)
          maker.Add({tap, dword.index}, WeightsOf(block, tap, dword));
      }
    }
    const std::vector<Flush> flushes = maker.Take();
    std::vector<int32_t>& program = conv_.layout;
    for (const Flush& flush : flushes) {
      const size_t runs_at = program.size();
      program.push_back(0);
      for (size_t i = 0; i < flush.steps.size(); ++i) {
        const Step& step = flush.steps[i];
        if (i > 0 && flush.steps[i - 1].tap == step.tap &&
            flush.steps[i - 1].dword + 1 == step.dword) {
          ++program.back();
          continue;
        }
        ++program[runs_at];
        program.push_back(4 * step.dword);
        program.push_back(step.tap << 8 | 1);
      }
      for (int i = 0; i < kOutputBlock; ++i) {
        const int64_t o = block * kOutputBlock + i;
        for (int cluster : flush.clusters) {
          int8_t scale = 0;
          if (o < g_.oc && cluster >= 0)
            scale = clustered_ ? cluster_scales_[o * map_.clusters() + cluster] : int8_t{1};
          scales_.push_back(scale);
        }
      }
    }
    return static_cast<int>(flushes.size());
  }

  // Eight codes of a tap, or of a row of taps, `channel` bytes behind its pointer.
  struct Pair {
    int channel;
    StepWeights first, second;
  };

  // The number of runs, one for each pointer of a pixel.
  int PackInt8(int block, int dwords) {
    if (conv_.layout[kPointers] == 1 && taps_ > 1) {
      std::vector<Pair> pairs;
      const int bytes = g_.kw * g_.ic;
      for (int row = 0; row < g_.kh; ++row) {
        for (int from = 0; from < bytes; from += 8) {
          // The last pair begins earlier, so that it ends with the row.
          const int at = std::min(from, bytes - 8);
          pairs.push_back({row * g_.iw * g_.ic * g_.dilation_h + at,
                           RowWeightsOf(block, row, at, from),
                           RowWeightsOf(block, row, at + 4, from)});
        }
      }
      AppendRun(0, pairs);
      return 1;
    }
    for (int tap = 0; tap < taps_; ++tap) {
      std::vector<Pair> pairs;
      for (int d = 0; d < dwords; d += 2) {
        pairs.push_back(
            {4 * d, WeightsOf(block, tap, {d, 15}), WeightsOf(block, tap, {d + 1, 15})});
      }
      AppendRun(tap, pairs);
    }
    return taps_;
  }

  // Neighbours become flushes of four steps where these are exact.
  void AppendRun(int tap, const std::vector<Pair>& pairs) {
    std::vector<int32_t> fours, twos;
    std::vector<Pair> rest;
    std::vector<LaneSums> sums;
    for (const Pair& pair : pairs) sums.emplace_back(pair.first, pair.second);
    for (size_t i = 0; i < pairs.size(); ++i) {
      const Pair& a = pairs[i];
      if (i + 1 < pairs.size() && pairs[i + 1].channel == a.channel + 8 &&
          LaneSums(sums[i], sums[i + 1]).exact()) {
        fours.push_back(a.channel);
        for (const Pair* pair : {&a, &pairs[i + 1]}) {
          Append(pair->first);
          Append(pair->second);
        }
        ++i;
        continue;
      }
      // Together if they fit, else apart, else even apart from odd channels.
      if (sums[i].exact()) {
        rest.push_back(a);
        continue;
      }
      ForExactParts(a.first, [&](const StepWeights& part) {
        rest.push_back({a.channel, part, {}});
      });
      ForExactParts(a.second, [&](const StepWeights& part) {
        rest.push_back({a.channel, {}, part});
      });
    }
    for (const Pair& pair : rest) {
      twos.push_back(pair.channel);
      Append(pair.first);
      Append(pair.second);
    }
    std::vector<int32_t>& program = conv_.layout;
    program.push_back(tap);
    program.push_back(static_cast<int32_t>(fours.size()));
    program.push_back(static_cast<int32_t>(twos.size()));
    program.insert(program.end(), fours.begin(), fours.end());
    program.insert(program.end(), twos.begin(), twos.end());
  }

  const ConvGeometry& g_;
  const int taps_;
  const WeightScheme scheme_;
  const bool clustered_;
  const ClusterMap map_;
  const absl::Span<const int8_t> codes_, cluster_scales_;
  PackedClusterConv& conv_;
  std::vector<int8_t> weights_;  // of the block at work
  std::vector<uint8_t> stored_;
  std::vector<int8_t> scales_;
};

}  // namespace

void Pack(const QuantizedWeights& weights, PackedClusterConv& conv) { Packer(weights, conv).Run(); }

double Int8Cycles(const PackedClusterConv& conv) {
  if (conv.layout[kKind] != kInt8) return std::numeric_limits<double>::infinity();
  // Of a tile of 10 pixels and 16 output channels, measured with its data in the first-level cache.
  // Smaller tiles take less, but not for fewer than four pixels, which wait for their weights.
  constexpr double kTile = 100, kRun = 64, kFour = 63.4, kTwo = 34.9;
  const ConvGeometry& g = conv.geometry;
  double cycles = 0;
  for (int block = 0; block < OutputBlocks(g); ++block) {
    const int32_t* field = conv.layout.data() + kLayoutFields + kBlockFields * block;
    const int32_t* run = conv.layout.data() + field[kProgram];
    // Of a short block the second half is left out.
    const double share = g.oc - block * kOutputBlock <= kOutputBlock / 2 ? 0.5 : 1;
    cycles += kTile;
    for (int r = 0; r < field[kFlushes]; ++r) {
      cycles += share * (kRun + kFour * run[1] + kTwo * run[2]);
      run += 3 + run[1] + run[2];
    }
  }
  return std::max(4.0, static_cast<double>(g.oh) * g.ow) / 10 * cycles;
}

size_t ScratchBytes(const PackedClusterConv& conv) { return Scratch(conv, nullptr).bytes(); }

void Run(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
         int64_t pixel_end, int block_begin, int block_end) {
  const ConvGeometry& g = conv.geometry;
  const int64_t taps = conv.layout[kPointers];
  const bool avx2 = conv.isa != Isa::kAvx512Vnni;
  const TileKernels& kernels = (avx2 ? kAvx2Tiles : kAvx512Tiles)[conv.layout[kKind]];
  const TileKernels& narrow = avx2 ? kAvx2NarrowTiles[conv.layout[kKind]] : kernels;
  const Scratch scratch(conv, args.scratch);
  const PixelPointers pointers(conv, args, scratch);
  const uint8_t** inputs = scratch.pointers;

  // Chunks of equal size, so that the last one is not a poor fragment.
  const int64_t pixels = pixel_end - pixel_begin;
  const int64_t pixel_bytes =
      int64_t{g.ic} * std::min(g.stride_h, g.kh) * std::min(g.stride_w, g.kw);
  const int64_t result_bytes = int64_t{g.oc} * (args.dst != nullptr ? 1 : 4) +
                               (args.residual != nullptr && args.residual != args.dst ? g.oc : 0);
  int64_t chunk =
      std::min({kChunkBytes / pixel_bytes, kChunkBytesWithResults / (pixel_bytes + result_bytes),
                PointerCapacity(g) / taps});
  chunk = std::max<int64_t>(chunk / kernels.max_pixels, 1) * kernels.max_pixels;
  const int64_t chunks = (pixels + chunk - 1) / chunk;

  TileArgs tile{};
  tile.scales = scratch.scales;
  BlockEpilogue epilogue(g, args, tile);

  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = pixel_begin + pixels * c / chunks;
    const int64_t count = pixel_begin + pixels * (c + 1) / chunks - first;
    // Tiles differ by one pixel at most.
    const int64_t tiles = (count + kernels.max_pixels - 1) / kernels.max_pixels;
    pointers.Fill(first, static_cast<int>(count), inputs);
    tile.tap_stride = count;
    for (int block = block_begin; block < block_end; ++block) {
      epilogue.SetBlock(block);
      const int32_t* field = conv.layout.data() + kLayoutFields + kBlockFields * block;
      const uint8_t* stored = conv.weights.as<uint8_t>() + field[kFirstByte];
      const int bits = conv.layout[kCodeBits];
      if (bits < 8) {
        ExpandCodesAvx2(stored, field[kBytes], bits, scratch.weights);
        tile.weights = scratch.weights;
      } else {
        tile.weights = reinterpret_cast<const int8_t*>(stored);
      }
      if (conv.layout[kMostFlushes] > 0) {
        const int8_t* scales =
            conv.scales.as<int8_t>() + int64_t{field[kFirstFlush]} * kFlushScales;
        ExpandScalesAvx2(scales, int64_t{field[kFlushes]} * kFlushScales, scratch.scales);
      }
      tile.program = conv.layout.data() + field[kProgram];
      tile.flushes = field[kFlushes];
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = count * t / tiles;
        const int64_t end = count * (t + 1) / tiles;
        tile.inputs = inputs + begin;
        epilogue.SetPixel(first + begin);
        (tile.channels <= 8 ? narrow : kernels).run[end - begin](tile);
      }
    }
  }
}

}  // namespace tern::kernels::tiled
