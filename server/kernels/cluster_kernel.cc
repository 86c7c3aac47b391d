#include "server/kernels/cluster_kernel.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

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

bool TablesAreFaster(const PackedClusterConv& tiles, const PackedTableConv& tables) {
  const ConvGeometry& g = tiles.geometry;
  if (g.oc < kLeastOutputs || g.oh * g.ow < kLeastPixels) return false;
  using Key = std::array<int, 16>;
  const Key key{g.ih,
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
                tiles.cluster_size,
                static_cast<int>(tiles.isa)};
  static std::mutex mutex;
  static auto* const known = new std::map<Key, bool>();
  std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known->emplace(key, false);
  if (is_new) at->second = MeasureTables(tiles, tables);
  return at->second;
}

}  // namespace

ClusterKernel ClusterKernel::Make(const ConvGeometry& geometry, const QuantizedWeights& weights,
                                  Isa isa) {
  ClusterKernel kernel;
  kernel.tiles_ = PackClusterConv(geometry, weights, isa);
  if (!TableConvAccepts(geometry, weights, isa)) return kernel;
  kernel.tables_ = PackTableConv(geometry, weights);
  if (TablesAreFaster(*kernel.tiles_, *kernel.tables_)) {
    kernel.tiles_.reset();
  } else {
    kernel.tables_.reset();
  }
  return kernel;
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

void ClusterKernel::Run(const ClusterConvArgs& args, int64_t unit_begin, int64_t unit_end,
                        int block_begin, int block_end) const {
  if (tables_) {
    RunTableConv(*tables_, args, unit_begin, unit_end, block_begin, block_end);
  } else {
    RunClusterConv(*tiles_, args, unit_begin, unit_end, block_begin, block_end);
  }
}

}  // namespace tern::kernels
