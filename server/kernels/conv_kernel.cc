#include "server/kernels/conv_kernel.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/base/aligned_buffer.h"

namespace tern::kernels {
namespace {

// Below these the tables cost more than they save, on every layer that was measured.
constexpr int kLeastOutputs = 64;
constexpr int kLeastPixels = 32;

// Of what a caller adds; more layers than any number of networks has.
constexpr size_t kMostChoices = 10000;

// A measurement runs all kernels in turn, at least this often, until the time is over.
constexpr int kLeastRounds = 3;
constexpr double kMeasureSeconds = 1e-3;
// Multiply-accumulates of one run, about; but as many units as a kernel works on together, by Kind:
// pixels of five register tiles, one table's positions, tiles of a chunk.
constexpr int64_t kMeasuredMacs = 8 << 20;
constexpr int64_t kLeastUnits[] = {30, 1, 36};

// Times that differ by less than this are equal, as far as one measurement can tell: then the
// kernel with the fewest bytes is taken.
constexpr double kNear = 1.03;

// Written before each run, so that weights come from beyond the second-level cache as they do
// inside a network.
constexpr size_t kEvictedBytes = 1 << 20;

// Of this thread: other work on the machine counts little.
double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double Macs(const ConvGeometry& g) {
  return static_cast<double>(int64_t{g.oh} * g.ow * g.oc * g.ic) * (g.kh * g.kw);
}

// Which kernel was the fastest, by layer: shape, weights' kind, cluster size, instruction set and
// the tile that Winograd's would have. Guards itself.
enum Kind { kTiles, kTables, kWinograd, kKinds };
constexpr const char* kKindNames[kKinds] = {"tiles", "tables", "winograd"};
using Key = std::array<int, 18>;

Key KeyOf(const ConvGeometry& g, const QuantizedWeights& weights, Isa isa,
          std::optional<WinogradTile> tile) {
  return {g.ih,
          g.iw,
          g.ic,
          g.oh,
          g.ow,
          g.oc,
          g.kh,
          g.kw,
          g.stride_h,
          g.stride_w,
          g.pad_top,
          g.pad_left,
          g.dilation_h,
          g.dilation_w,
          weights.cluster_size,
          LargestCode(weights.scheme),
          static_cast<int>(isa),
          tile ? static_cast<int>(*tile) : -1};
}

struct Choices {
  std::mutex mutex;
  std::map<Key, Kind> kinds;
};

Choices& AllChoices() {
  static auto* const choices = new Choices();
  return *choices;
}

std::optional<Kind> Choice(const Key& key) {
  Choices& all = AllChoices();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.kinds.find(key);
  return found == all.kinds.end() ? std::nullopt : std::optional<Kind>(found->second);
}

// The model of int8 layers: cycles for one image, as measured on Zen 3 (docs/kernels.md).

// Of the taps of all output pixels, the share that is no padding.
double InsideShare(const ConvGeometry& g) {
  const auto inside = [](int outputs, int stride, int pad, int taps, int dilation, int inputs) {
    int count = 0;
    for (int o = 0; o < outputs; ++o) {
      for (int t = 0; t < taps; ++t) {
        const int at = o * stride - pad + t * dilation;
        count += at >= 0 && at < inputs;
      }
    }
    return static_cast<double>(count) / (static_cast<double>(outputs) * taps);
  };
  return inside(g.oh, g.stride_h, g.pad_top, g.kh, g.dilation_h, g.ih) *
         inside(g.ow, g.stride_w, g.pad_left, g.kw, g.dilation_w, g.iw);
}

// Of a library's kernel. It skips padding, fills up channels to a multiple of four, and spends a
// constant time on each pixel and output channel.
double LibraryCycles(const ConvGeometry& g) {
  constexpr double kMacs = 31.5, kPerOutput = 0.75;
  const double channels = (g.ic + 3) / 4 * 4;
  const double outputs = static_cast<double>(g.oh) * g.ow * g.oc;
  return outputs * (channels * g.kh * g.kw * InsideShare(g) / kMacs + kPerOutput);
}

}  // namespace

std::vector<double> ConvKernel::Measure(absl::Span<const ConvKernel> kernels) {
  const ConvGeometry& g = kernels[0].geometry();
  size_t scratch_bytes = 0;
  for (const ConvKernel& kernel : kernels)
    scratch_bytes = std::max(scratch_bytes, kernel.scratch_bytes());
  AlignedBuffer src(static_cast<size_t>(g.ih) * g.iw * g.ic);
  AlignedBuffer dst(static_cast<size_t>(g.oh) * g.ow * g.oc);
  AlignedBuffer scratch(scratch_bytes);
  const std::vector<float> constants(g.oc, 1.0f);
  AlignedBuffer evicting(kEvictedBytes);
  ClusterConvArgs args;
  args.src = src.as<uint8_t>();
  args.multiplier = constants.data();
  args.offset = constants.data();
  args.dst = dst.as<uint8_t>();
  args.scratch = scratch.data();

  std::vector<double> seconds(kernels.size(), 1e9);
  const double end = CpuSeconds() + kMeasureSeconds * static_cast<double>(kernels.size());
  for (int round = 0; round < kLeastRounds || CpuSeconds() < end; ++round) {
    for (size_t i = 0; i < kernels.size(); ++i) {
      const int64_t all = kernels[i].Units(1);
      const int64_t some = std::clamp<int64_t>(
          static_cast<int64_t>(static_cast<double>(all) * kMeasuredMacs / Macs(g)),
          std::min(all, kLeastUnits[kernels[i].packed_.index()]), all);
      const auto run = [&] {
        const double begin = CpuSeconds();
        kernels[i].Run(args, 0, some, 0, OutputBlocks(g));
        return CpuSeconds() - begin;
      };
      std::memset(evicting.data(), round, evicting.size_bytes());
      // What the layer before has left near.
      std::memset(src.data(), 1, src.size_bytes());
      std::memset(dst.data(), 0, dst.size_bytes());
      std::memset(scratch.data(), 0, scratch.size_bytes());
      // The first units fetch the weights, the others find them near.
      const double first = run();
      const double others = run() * static_cast<double>(all - some) / static_cast<double>(some);
      seconds[i] = std::min(seconds[i], first + others);
    }
  }
  return seconds;
}

ConvKernel ConvKernel::Make(const ConvGeometry& g, const QuantizedWeights& weights, Isa isa) {
  const std::optional<WinogradTile> winograd = ChooseWinogradTile(g, weights, isa);
  const bool large = g.oc >= kLeastOutputs && g.oh * g.ow >= kLeastPixels;
  std::vector<Kind> kinds{kTiles};
  if (large && TableConvAccepts(g, weights, isa)) kinds.push_back(kTables);
  if (winograd) kinds.push_back(kWinograd);
  const auto pack = [&](Kind kind) {
    if (kind == kTables) return ConvKernel(PackTableConv(g, weights));
    if (kind == kWinograd) return ConvKernel(PackWinogradConv(g, weights, *winograd));
    return ConvKernel(PackClusterConv(g, weights, isa));
  };
  if (kinds.size() == 1) return pack(kTiles);

  const Key key = KeyOf(g, weights, isa, winograd);
  std::optional<Kind> choice = Choice(key);
  // A file of choices may name what does not take the layer.
  if (choice && std::find(kinds.begin(), kinds.end(), *choice) != kinds.end()) return pack(*choice);
  std::vector<ConvKernel> kernels;
  for (Kind kind : kinds) kernels.push_back(pack(kind));
  // One at a time, so that measurements do not disturb each other.
  static std::mutex measuring;
  std::lock_guard<std::mutex> lock(measuring);
  choice = Choice(key);
  size_t best = std::find(kinds.begin(), kinds.end(), choice.value_or(kKinds)) - kinds.begin();
  if (best == kinds.size()) {
    const std::vector<double> seconds = Measure(kernels);
    const double near = kNear * *std::min_element(seconds.begin(), seconds.end());
    for (size_t i = 0; i < kernels.size(); ++i) {
      if (seconds[i] <= near &&
          (best == kinds.size() || kernels[i].bytes() < kernels[best].bytes()))
        best = i;
    }
    Choices& all = AllChoices();
    std::lock_guard<std::mutex> all_lock(all.mutex);
    all.kinds[key] = kinds[best];
  }
  return std::move(kernels[best]);
}

std::optional<ConvKernel> ConvKernel::MakeIfFaster(const ConvGeometry& g,
                                                   const QuantizedWeights& weights, Isa isa) {
  const double library = LibraryCycles(g);
  const std::optional<WinogradTile> winograd = ChooseWinogradTile(g, weights, isa);
  const double winograd_cycles = winograd ? WinogradConvCycles(g, *winograd) : library;
  // Tiles never come near half of a library's time.
  if (winograd_cycles > 0.5 * library) {
    PackedClusterConv tiles = PackClusterConv(g, weights, isa);
    const double tiles_cycles = Int8TileCycles(tiles);
    if (tiles_cycles < std::min(winograd_cycles, library)) return ConvKernel(std::move(tiles));
  }
  if (winograd_cycles >= library) return std::nullopt;
  return ConvKernel(PackWinogradConv(g, weights, *winograd));
}

std::string KernelChoices() {
  Choices& all = AllChoices();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::string text;
  for (const auto& [key, kind] : all.kinds)
    absl::StrAppend(&text, absl::StrJoin(key, " "), " ", kKindNames[kind], "\n");
  return text;
}

void AddKernelChoices(absl::string_view text) {
  Choices& all = AllChoices();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
    Key key{};
    const auto kind = std::find(std::begin(kKindNames), std::end(kKindNames), words.back());
    bool valid = words.size() == key.size() + 1 && kind != std::end(kKindNames);
    for (size_t i = 0; valid && i < key.size(); ++i) valid = absl::SimpleAtoi(words[i], &key[i]);
    if (valid && all.kinds.size() < kMostChoices)
      all.kinds.emplace(key, static_cast<Kind>(kind - std::begin(kKindNames)));
  }
}

const ConvGeometry& ConvKernel::geometry() const {
  return std::visit([](const auto& packed) -> const ConvGeometry& { return packed.geometry; },
                    packed_);
}

std::string ConvKernel::name() const {
  if (const auto* tiles = std::get_if<PackedClusterConv>(&packed_))
    return absl::StrCat(tiles->cluster_size == 0 ? "int8-" : "", IsaName(tiles->isa));
  if (std::holds_alternative<PackedTableConv>(packed_))
    return absl::StrCat("sum-tables-", IsaName(Isa::kAvx2));
  constexpr const char* kTiles[] = {"2x2", "2x4", "4x4"};
  return absl::StrCat("winograd-",
                      kTiles[static_cast<int>(std::get<PackedWinogradConv>(packed_).tile)], "-",
                      IsaName(Isa::kAvx2));
}

size_t ConvKernel::bytes() const {
  return std::visit([](const auto& packed) { return packed.bytes(); }, packed_);
}

size_t ConvKernel::scratch_bytes() const {
  if (const auto* tiles = std::get_if<PackedClusterConv>(&packed_))
    return ClusterConvScratchBytes(*tiles);
  if (const auto* tables = std::get_if<PackedTableConv>(&packed_))
    return TableConvScratchBytes(*tables);
  return WinogradConvScratchBytes(std::get<PackedWinogradConv>(packed_));
}

int64_t ConvKernel::Units(int batch) const {
  if (const auto* tables = std::get_if<PackedTableConv>(&packed_))
    return TableConvTiles(*tables, batch);
  if (const auto* winograd = std::get_if<PackedWinogradConv>(&packed_))
    return WinogradConvTiles(*winograd, batch);
  return int64_t{batch} * geometry().oh * geometry().ow;
}

int ConvKernel::SharedBlocks() const {
  // Measured on the 1x1 layers of ResNet-50 (N=64, 64 to 512 inputs): about 500 output channels.
  if (std::holds_alternative<PackedTableConv>(packed_)) return 512 / kOutputBlock;
  // Transformed inputs cost a few hundredths of the products of even one block.
  return 0;
}

void ConvKernel::Run(const ClusterConvArgs& args, int64_t unit_begin, int64_t unit_end,
                     int block_begin, int block_end) const {
  if (const auto* tiles = std::get_if<PackedClusterConv>(&packed_)) {
    RunClusterConv(*tiles, args, unit_begin, unit_end, block_begin, block_end);
  } else if (const auto* tables = std::get_if<PackedTableConv>(&packed_)) {
    RunTableConv(*tables, args, unit_begin, unit_end, block_begin, block_end);
  } else {
    RunWinogradConv(std::get<PackedWinogradConv>(packed_), args, unit_begin, unit_end, block_begin,
                    block_end);
  }
}

}  // namespace tern::kernels
