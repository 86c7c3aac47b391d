// Speed of the cluster convolutions on ResNet-50's layers and of the int8 depthwise ones on
// MobileNet v2's, one thread.
//
//   kernels_bench [isa [batch [milliseconds per measurement [layer name part]]]]
//
// Prints GMAC/s (10^9 multiply-accumulates per second), from the fastest of as many runs as fit
// the given time: on a shared machine only the fastest run measures the code. Weights,
// activations and output of a layer are warm. "total" weights each layer by how often it occurs and
// takes the fastest kernel for each: "tiles" (cluster_conv.h), "tables" (table_conv.h) or the
// "winograd" tile that ConvKernel would take (winograd_conv.h).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "server/base/aligned_buffer.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/depthwise_conv.h"
#include "server/kernels/table_conv.h"
#include "server/kernels/winograd_conv.h"
#include "server/tensor/cluster.h"

namespace tern::kernels {
namespace {

struct Layer {
  const char* name;
  int ic, size, oc, k, stride, times;
};

// Version 1.5: the stride is on the 3x3. Without the first convolution (3 channels, int8).
constexpr Layer kLayers[] = {
    {"s1_1x1_64_64", 64, 56, 64, 1, 1, 1},       {"s1_3x3_64", 64, 56, 64, 3, 1, 3},
    {"s1_1x1_64_256", 64, 56, 256, 1, 1, 4},     {"s1_1x1_256_64", 256, 56, 64, 1, 1, 2},
    {"s2_1x1_256_128", 256, 56, 128, 1, 1, 1},   {"s2_3x3s2_128", 128, 56, 128, 3, 2, 1},
    {"s2_1x1_128_512", 128, 28, 512, 1, 1, 4},   {"s2_1x1s2_256_512", 256, 56, 512, 1, 2, 1},
    {"s2_1x1_512_128", 512, 28, 128, 1, 1, 3},   {"s2_3x3_128", 128, 28, 128, 3, 1, 3},
    {"s3_1x1_512_256", 512, 28, 256, 1, 1, 1},   {"s3_3x3s2_256", 256, 28, 256, 3, 2, 1},
    {"s3_1x1_256_1024", 256, 14, 1024, 1, 1, 6}, {"s3_1x1s2_512_1024", 512, 28, 1024, 1, 2, 1},
    {"s3_1x1_1024_256", 1024, 14, 256, 1, 1, 5}, {"s3_3x3_256", 256, 14, 256, 3, 1, 5},
    {"s4_1x1_1024_512", 1024, 14, 512, 1, 1, 1}, {"s4_3x3s2_512", 512, 14, 512, 3, 2, 1},
    {"s4_1x1_512_2048", 512, 7, 2048, 1, 1, 3},  {"s4_1x1s2_1024_2048", 1024, 14, 2048, 1, 2, 1},
    {"s4_1x1_2048_512", 2048, 7, 512, 1, 1, 2},  {"s4_3x3_512", 512, 7, 512, 3, 1, 2},
};

struct Config {
  const char* name;
  int n;
  WeightScheme scheme;
};

constexpr Config kConfigs[] = {
    {"N=4", 4, WeightScheme::kTernaryCluster},
    {"N=64", 64, WeightScheme::kTernaryCluster},
    {"4-bit N=64", 64, WeightScheme::kInt4Cluster},
    {"int8", 0, WeightScheme::kInt8},
};

// Seconds of the fastest of as many runs as fit.
template <typename F>
double Fastest(double seconds, F run) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double best = 1e9;
  for (int runs = 0;
       runs < 3 || std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++runs) {
    const auto begin = Clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

// Seconds of the fastest run of each kernel; 0: it does not take the layer.
struct Times {
  double tiles = 0, tables = 0, winograd = 0;
  double least() const {
    double t = tiles;
    for (double other : {tables, winograd}) {
      if (other > 0) t = std::min(t, other);
    }
    return t;
  }
};

// Codes of a network as trained: spread like a normal distribution that few of them exceed.
int8_t DrawCode(std::mt19937& random, WeightScheme scheme) {
  const int largest = scheme == WeightScheme::kInt8 ? 63 : LargestCode(scheme);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(largest) * 0.3f + 0.4f);
  return static_cast<int8_t>(
      std::clamp(static_cast<int>(std::lrint(normal(random))), -largest, largest));
}

Times Measure(const Layer& layer, const Config& config, Isa isa, int batch, double seconds) {
  std::mt19937 random(1);
  ConvGeometry g;
  g.ih = g.iw = layer.size;
  g.ic = layer.ic;
  g.oc = layer.oc;
  g.kh = g.kw = layer.k;
  g.stride_h = g.stride_w = layer.stride;
  g.pad_top = g.pad_left = layer.k / 2;
  g.oh = g.ow = layer.size / layer.stride;

  QuantizedWeights weights;
  weights.scheme = config.scheme;
  weights.codes = Tensor(DType::kS8, {g.oc, g.ic, g.kh, g.kw});
  const auto codes = weights.codes.data<int8_t>();
  for (int8_t& code : codes) code = DrawCode(random, config.scheme);
  std::vector<int16_t> products(codes.begin(), codes.end());
  if (IsClustered(config.scheme)) {
    const ClusterMap map(g.ic, config.n);
    weights.cluster_size = config.n;
    weights.cluster_scales = Tensor(DType::kS8, {g.oc, map.clusters()});
    const auto scales = weights.cluster_scales.data<int8_t>();
    for (int8_t& scale : scales) scale = static_cast<int8_t>(64 + random() % 64);
    const int64_t taps = int64_t{g.kh} * g.kw;
    for (size_t i = 0; i < products.size(); ++i) {
      const int64_t pair = static_cast<int64_t>(i) / taps;
      products[i] = static_cast<int16_t>(
          products[i] *
          scales[pair / g.ic * map.clusters() + map.cluster_of(static_cast<int>(pair % g.ic))]);
    }
  }
  const PackedClusterConv conv = PackClusterConv(g, weights, isa);
  std::optional<PackedWinogradConv> winograd;
  if (WinogradConvAccepts(g, isa)) {
    for (WinogradTile tile : {WinogradTile::k4x4, WinogradTile::k2x4, WinogradTile::k2x2}) {
      if (!winograd && WinogradConvBytes(g, tile) <= kMaxWinogradBytes)
        winograd = PackWinogradConv(g, products, tile);
    }
  }

  const int64_t pixels = int64_t{batch} * g.oh * g.ow;
  AlignedBuffer src(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  AlignedBuffer dst(pixels * g.oc);
  const bool has_tables = TableConvAccepts(g, weights, isa);
  const PackedTableConv tables = has_tables ? PackTableConv(g, weights) : PackedTableConv{};
  AlignedBuffer scratch(
      std::max({ClusterConvScratchBytes(conv), has_tables ? TableConvScratchBytes(tables) : 0,
                winograd ? WinogradConvScratchBytes(*winograd) : 0}));
  for (size_t i = 0; i < src.size_bytes(); ++i)
    src.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  const std::vector<float> multiplier(g.oc, 1e-4f);
  const std::vector<float> offset(g.oc, 100.0f);

  ClusterConvArgs args;
  args.src = src.as<uint8_t>();
  args.batch = batch;
  args.multiplier = multiplier.data();
  args.offset = offset.data();
  args.dst = dst.as<uint8_t>();
  args.scratch = scratch.data();

  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  Times best{1e9, has_tables ? 1e9 : 0, winograd ? 1e9 : 0};
  const auto time = [&](double& least, const auto& run) {
    const auto begin = Clock::now();
    run();
    least = std::min(least, std::chrono::duration<double>(Clock::now() - begin).count());
  };
  for (int runs = 0;
       runs < 3 || std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++runs) {
    time(best.tiles, [&] { RunClusterConv(conv, args, 0, pixels, 0, OutputBlocks(g)); });
    if (has_tables) {
      time(best.tables, [&] {
        RunTableConv(tables, args, 0, TableConvTiles(tables, batch), 0, OutputBlocks(g));
      });
    }
    if (winograd) {
      time(best.winograd, [&] {
        RunWinogradConv(*winograd, args, 0, WinogradConvTiles(*winograd, batch), 0,
                        OutputBlocks(g));
      });
    }
  }
  return best;
}

struct DepthwiseLayer {
  const char* name;
  int channels, size, stride, times;
};

// Of 3x3 kernels.
constexpr DepthwiseLayer kDepthwiseLayers[] = {
    {"dw_32_112", 32, 112, 1, 1},    {"dw_96_112_s2", 96, 112, 2, 1},
    {"dw_144_56", 144, 56, 1, 1},    {"dw_144_56_s2", 144, 56, 2, 1},
    {"dw_192_28", 192, 28, 1, 2},    {"dw_192_28_s2", 192, 28, 2, 1},
    {"dw_384_14", 384, 14, 1, 4},    {"dw_576_14", 576, 14, 1, 2},
    {"dw_576_14_s2", 576, 14, 2, 1}, {"dw_960_7", 960, 7, 1, 3},
};

// Seconds of the fastest run with a square kernel of `k`.
double MeasureDepthwise(const DepthwiseLayer& layer, int k, Isa isa, int batch, double seconds) {
  std::mt19937 random(1);
  ConvGeometry g;
  g.ih = g.iw = layer.size;
  g.ic = g.oc = layer.channels;
  g.kh = g.kw = k;
  g.stride_h = g.stride_w = layer.stride;
  g.pad_top = g.pad_left = k / 2;
  g.oh = g.ow = layer.size / layer.stride;
  std::vector<int8_t> weights(static_cast<size_t>(g.oc) * k * k);
  for (int8_t& w : weights) w = static_cast<int8_t>(random());
  const PackedDepthwiseConv conv = PackDepthwiseConv(g, weights, isa);
  AlignedBuffer src(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  AlignedBuffer dst(static_cast<size_t>(batch) * g.oh * g.ow * g.oc);
  AlignedBuffer scratch(DepthwiseConvScratchBytes(conv));
  for (size_t i = 0; i < src.size_bytes(); ++i)
    src.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  const std::vector<float> multiplier(g.oc, 1e-3f);
  const std::vector<float> offset(g.oc, 100.0f);
  ClusterConvArgs args;
  args.src = src.as<uint8_t>();
  args.batch = batch;
  args.multiplier = multiplier.data();
  args.offset = offset.data();
  args.dst = dst.as<uint8_t>();
  args.scratch = scratch.data();
  return Fastest(seconds, [&] { RunDepthwiseConv(conv, args, 0, int64_t{batch} * g.oh); });
}

void PrintDepthwise(Isa isa, int batch, double seconds, const char* part) {
  std::printf("\n| depthwise | x | 3x3 MMAC | 3x3 us | 3x3 GMAC/s | 5x5 us | 5x5 GMAC/s |\n");
  std::printf("|---|---|---|---|---|---|---|\n");
  double total[2] = {};
  for (const DepthwiseLayer& layer : kDepthwiseLayers) {
    if (std::strstr(layer.name, part) == nullptr) continue;
    const double out = layer.size / layer.stride;
    const double taps = batch * out * out * layer.channels;
    std::printf("| %s | %d | %.2f |", layer.name, layer.times, 9 * taps * 1e-6);
    for (int i = 0; i < 2; ++i) {
      const int k = 3 + 2 * i;
      const double best = MeasureDepthwise(layer, k, isa, batch, seconds);
      total[i] += best * layer.times;
      std::printf(" %.1f | %.1f |", best * 1e6, taps * k * k / best * 1e-9);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
  std::printf("| all, weighted | | | %.1f | | %.1f | |\n", total[0] * 1e6, total[1] * 1e6);
}

int Main(int argc, char** argv) {
  const auto isa = SelectIsa(argc > 1 ? argv[1] : "");
  if (!isa.ok()) {
    std::fprintf(stderr, "%s\n", isa.status().ToString().c_str());
    return 2;
  }
  const int batch = argc > 2 ? std::atoi(argv[2]) : 1;
  const double seconds = (argc > 3 ? std::atoi(argv[3]) : 100) / 1000.0;
  const char* part = argc > 4 ? argv[4] : "";
  std::printf("isa %s, batch %d, one thread, GMAC/s\n", IsaName(*isa), batch);
  std::printf("| layer | x | MMAC |");
  for (const Config& config : kConfigs) std::printf(" %s tiles | tables | winograd |", config.name);
  std::printf("\n|---|---|---|");
  for (size_t i = 0; i < 3 * std::size(kConfigs); ++i) std::printf("---|");
  std::printf("\n");
  double total_macs = 0;
  std::vector<double> tiles(std::size(kConfigs)), least(std::size(kConfigs));
  for (const Layer& layer : kLayers) {
    if (std::strstr(layer.name, part) == nullptr) continue;
    const double out = layer.size / layer.stride;
    const double macs = batch * out * out * layer.oc * layer.ic * layer.k * layer.k;
    total_macs += macs * layer.times;
    std::printf("| %s | %d | %.0f |", layer.name, layer.times, macs * 1e-6);
    for (size_t i = 0; i < std::size(kConfigs); ++i) {
      const Times best = Measure(layer, kConfigs[i], *isa, batch, seconds);
      tiles[i] += best.tiles * layer.times;
      least[i] += best.least() * layer.times;
      for (double t : {best.tiles, best.tables, best.winograd})
        std::printf(t > 0 ? " %.1f |" : " - |", macs / t * 1e-9);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
  std::printf("| total; tiles, fastest | | %.0f |", total_macs * 1e-6);
  for (size_t i = 0; i < std::size(kConfigs); ++i) {
    for (double seconds_of_all : {tiles[i], least[i]}) {
      std::printf(" %.1f (%.2f ms) |", total_macs / seconds_of_all * 1e-9, seconds_of_all * 1e3);
    }
    std::printf(" |");
  }
  std::printf("\n");
  PrintDepthwise(*isa, batch, seconds, part);
  return 0;
}

}  // namespace
}  // namespace tern::kernels

int main(int argc, char** argv) { return tern::kernels::Main(argc, argv); }
