#include "server/kernels/cluster_kernel.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
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

// A measurement runs both kernels in turn, at least this often, until the time is over.
constexpr int kLeastRounds = 3;
constexpr double kMeasureSeconds = 1e-3;
// Multiply-accumulates of one run, about; at least one tile.
constexpr int64_t kMeasuredMacs = 8 << 20;

// Of what a caller adds; more layers than any number of networks has.
constexpr size_t kMostChoices = 10000;

// Of this thread: other work on the machine counts little.
double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Whether the tables take less time for one image. More images only fill their tiles better.
bool MeasureTables(const PackedClusterConv& tiles, const PackedTableConv& tables) {
  const ConvGeometry& g = tiles.geometry;
  const int64_t pixels = int64_t{g.oh} * g.ow;
  const int64_t all_tiles = TableConvTiles(tables, 1);
  const int64_t macs = pixels * g.oc * g.ic * g.kh * g.kw;
  const int64_t some_tiles = std::clamp<int64_t>(all_tiles * kMeasuredMacs / macs, 1, all_tiles);
  const int64_t some_pixels = (pixels * some_tiles + all_tiles - 1) / all_tiles;

  AlignedBuffer src(static_cast<size_t>(g.ih) * g.iw * g.ic);
  AlignedBuffer dst(static_cast<size_t>(pixels) * g.oc);
  AlignedBuffer scratch(std::max(ClusterConvScratchBytes(tiles), TableConvScratchBytes(tables)));
  std::memset(src.data(), 1, src.size_bytes());
  const std::vector<float> constants(g.oc, 1.0f);
  ClusterConvArgs args;
  args.src = src.as<uint8_t>();
  args.multiplier = constants.data();
  args.offset = constants.data();
  args.dst = dst.as<uint8_t>();
  args.scratch = scratch.data();

  const auto time = [](double& least, const auto& run) {
    const double begin = CpuSeconds();
    run();
    least = std::min(least, CpuSeconds() - begin);
  };
  double tiles_time = 1e9, tables_time = 1e9;
  const double end = CpuSeconds() + kMeasureSeconds;
  for (int round = 0; round < kLeastRounds || CpuSeconds() < end; ++round) {
    time(tiles_time, [&] { RunClusterConv(tiles, args, 0, some_pixels, 0, OutputBlocks(g)); });
    time(tables_time, [&] { RunTableConv(tables, args, 0, some_tiles, 0, OutputBlocks(g)); });
  }
  const auto whole = [](double part, int64_t some, int64_t all) {
    return part / static_cast<double>(some) * static_cast<double>(all);
  };
  return whole(tables_time, some_tiles, all_tiles) < whole(tiles_time, some_pixels, pixels);
}

// A layer's shape, cluster size, largest code and instruction set.
using Key = std::array<int, 17>;

Key KeyOf(const ConvGeometry& g, const QuantizedWeights& weights, Isa isa) {
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
          static_cast<int>(isa)};
}

// Whether the tables were faster, by layer. Guards itself.
struct Choices {
  std::mutex mutex;
  std::map<Key, bool> tables;
};

Choices& AllChoices() {
  static auto* const choices = new Choices();
  return *choices;
}

std::optional<bool> Choice(const Key& key) {
  Choices& all = AllChoices();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.tables.find(key);
  return found == all.tables.end() ? std::nullopt : std::optional<bool>(found->second);
}

}  // namespace

ClusterKernel ClusterKernel::Make(const ConvGeometry& geometry, const QuantizedWeights& weights,
                                  Isa isa) {
  ClusterKernel kernel;
  const bool small = geometry.oc < kLeastOutputs || geometry.oh * geometry.ow < kLeastPixels;
  if (small || !TableConvAccepts(geometry, weights, isa)) {
    kernel.tiles_ = PackClusterConv(geometry, weights, isa);
    return kernel;
  }
  const Key key = KeyOf(geometry, weights, isa);
  std::optional<bool> use_tables = Choice(key);
  if (use_tables != true) kernel.tiles_ = PackClusterConv(geometry, weights, isa);
  if (use_tables != false) kernel.tables_ = PackTableConv(geometry, weights);
  if (!use_tables) {
    // One at a time, so that measurements do not disturb each other.
    static std::mutex measuring;
    std::lock_guard<std::mutex> lock(measuring);
    use_tables = Choice(key);
    if (!use_tables) {
      use_tables = MeasureTables(*kernel.tiles_, *kernel.tables_);
      Choices& all = AllChoices();
      std::lock_guard<std::mutex> all_lock(all.mutex);
      all.tables.emplace(key, *use_tables);
    }
  }
  if (*use_tables) {
    kernel.tiles_.reset();
  } else {
    kernel.tables_.reset();
  }
  return kernel;
}

std::string KernelChoices() {
  Choices& all = AllChoices();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::string text;
  for (const auto& [key, tables] : all.tables)
    absl::StrAppend(&text, absl::StrJoin(key, " "), tables ? " tables\n" : " tiles\n");
  return text;
}

void AddKernelChoices(absl::string_view text) {
  Choices& all = AllChoices();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
    Key key{};
    bool valid =
        words.size() == key.size() + 1 && (words.back() == "tables" || words.back() == "tiles");
    for (size_t i = 0; valid && i < key.size(); ++i) valid = absl::SimpleAtoi(words[i], &key[i]);
    if (valid && all.tables.size() < kMostChoices)
      all.tables.emplace(key, words.back() == "tables");
  }
}

std::string ClusterKernel::name() const {
  return tables_ ? std::string("sum-tables-") + IsaName(Isa::kAvx2) : IsaName(tiles_->isa);
}

size_t ClusterKernel::scratch_bytes() const {
  return tables_ ? TableConvScratchBytes(*tables_) : ClusterConvScratchBytes(*tiles_);
}

int64_t ClusterKernel::Units(int batch) const {
  if (tables_) return TableConvTiles(*tables_, batch);
  return int64_t{batch} * tiles_->geometry.oh * tiles_->geometry.ow;
}

int ClusterKernel::SharedBlocks() const {
  // Measured on the 1x1 layers of ResNet-50 (N=64, 64 to 512 inputs): about 500 output channels.
  return tables_ ? 512 / kOutputBlock : 0;
}

void ClusterKernel::Run(const ClusterConvArgs& args, int64_t unit_begin, int64_t unit_end,
                        int block_begin, int block_end) const {
  if (tables_) {
    RunTableConv(*tables_, args, unit_begin, unit_end, block_begin, block_end);
  } else {
    RunClusterConv(*tiles_, args, unit_begin, unit_end, block_begin, block_end);
  }
}

}  // namespace tern::kernels
