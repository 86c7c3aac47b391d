// Speed of the convolution kernels on ResNet-50's layers and of the int8 depthwise ones on
// MobileNet v2's, one thread, by Google Benchmark.
//
//   kernels_bench [--isa scalar|avx2|avx512vnni] [--batch N] [Google Benchmark's flags]
//
// Names are layer/weights/kernel: every kernel that takes a layer is measured (server/kernels/
// conv_kernel.h), Winograd with the largest tile that ConvKernel would take. Weights, activations
// and output of a layer are warm. On a shared machine only the fastest run measures the code: with
// --benchmark_repetitions=N the row `min` has the least time and `max` the highest rate.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
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
  int ic, size, oc, k, stride;
};

// Version 1.5: the stride is on the 3x3. Without the first convolution.
constexpr Layer kLayers[] = {
    {"s1_1x1_64_64", 64, 56, 64, 1, 1},       {"s1_3x3_64", 64, 56, 64, 3, 1},
    {"s1_1x1_64_256", 64, 56, 256, 1, 1},     {"s1_1x1_256_64", 256, 56, 64, 1, 1},
    {"s2_1x1_256_128", 256, 56, 128, 1, 1},   {"s2_3x3s2_128", 128, 56, 128, 3, 2},
    {"s2_1x1_128_512", 128, 28, 512, 1, 1},   {"s2_1x1s2_256_512", 256, 56, 512, 1, 2},
    {"s2_1x1_512_128", 512, 28, 128, 1, 1},   {"s2_3x3_128", 128, 28, 128, 3, 1},
    {"s3_1x1_512_256", 512, 28, 256, 1, 1},   {"s3_3x3s2_256", 256, 28, 256, 3, 2},
    {"s3_1x1_256_1024", 256, 14, 1024, 1, 1}, {"s3_1x1s2_512_1024", 512, 28, 1024, 1, 2},
    {"s3_1x1_1024_256", 1024, 14, 256, 1, 1}, {"s3_3x3_256", 256, 14, 256, 3, 1},
    {"s4_1x1_1024_512", 1024, 14, 512, 1, 1}, {"s4_3x3s2_512", 512, 14, 512, 3, 2},
    {"s4_1x1_512_2048", 512, 7, 2048, 1, 1},  {"s4_1x1s2_1024_2048", 1024, 14, 2048, 1, 2},
    {"s4_1x1_2048_512", 2048, 7, 512, 1, 1},  {"s4_3x3_512", 512, 7, 512, 3, 1},
};

// 3x3 and 5x5 kernels.
constexpr Layer kDepthwiseLayers[] = {
    {"dw_32_112", 32, 112, 32, 3, 1},        {"dw_96_112_s2", 96, 112, 96, 3, 2},
    {"dw_144_56", 144, 56, 144, 3, 1},       {"dw_144_56_s2", 144, 56, 144, 3, 2},
    {"dw_192_28", 192, 28, 192, 3, 1},       {"dw_192_28_s2", 192, 28, 192, 3, 2},
    {"dw_384_14", 384, 14, 384, 3, 1},       {"dw_576_14", 576, 14, 576, 3, 1},
    {"dw_576_14_s2", 576, 14, 576, 3, 2},    {"dw_960_7", 960, 7, 960, 3, 1},
    {"dw5x5_144_56_s2", 144, 56, 144, 5, 2}, {"dw5x5_192_28", 192, 28, 192, 5, 1},
    {"dw5x5_576_14", 576, 14, 576, 5, 1},    {"dw5x5_960_7", 960, 7, 960, 5, 1},
};

struct Weights {
  const char* name;
  WeightScheme scheme;
  int n;
};

constexpr Weights kWeights[] = {
    {"ternary-4", WeightScheme::kTernaryCluster, 4},
    {"ternary-16", WeightScheme::kTernaryCluster, 16},
    {"ternary-64", WeightScheme::kTernaryCluster, 64},
    {"int4-64", WeightScheme::kInt4Cluster, 64},
    {"int8", WeightScheme::kInt8, 0},
};

ConvGeometry GeometryOf(const Layer& layer) {
  ConvGeometry g;
  g.ih = g.iw = layer.size;
  g.ic = layer.ic;
  g.oc = layer.oc;
  g.kh = g.kw = layer.k;
  g.stride_h = g.stride_w = layer.stride;
  g.pad_top = g.pad_left = layer.k / 2;
  g.oh = g.ow = layer.size / layer.stride;
  return g;
}

// Codes as networks have them: spread like a normal distribution that few of them exceed.
QuantizedWeights DrawWeights(const ConvGeometry& g, const Weights& kind) {
  std::mt19937 random(1);
  const int largest = kind.scheme == WeightScheme::kInt8 ? 63 : LargestCode(kind.scheme);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(largest) * 0.3f + 0.4f);
  QuantizedWeights weights;
  weights.scheme = kind.scheme;
  weights.codes = Tensor(DType::kS8, {g.oc, g.ic, g.kh, g.kw});
  for (int8_t& code : weights.codes.data<int8_t>()) {
    code = static_cast<int8_t>(
        std::clamp(static_cast<int>(std::lrint(normal(random))), -largest, largest));
  }
  if (!IsClustered(kind.scheme)) return weights;
  weights.cluster_size = kind.n;
  weights.cluster_scales = Tensor(DType::kS8, {g.oc, ClusterMap(g.ic, kind.n).clusters()});
  for (int8_t& scale : weights.cluster_scales.data<int8_t>())
    scale = static_cast<int8_t>(64 + random() % 64);
  return weights;
}

// One kernel with packed weights.
struct Kernel {
  size_t scratch_bytes = 0;
  size_t weight_bytes = 0;
  std::function<void(const ClusterConvArgs&)> run;
};

Kernel Tiles(const ConvGeometry& g, const QuantizedWeights& weights, Isa isa) {
  auto conv = std::make_shared<PackedClusterConv>(PackClusterConv(g, weights, isa));
  return {ClusterConvScratchBytes(*conv), conv->bytes(), [conv](const ClusterConvArgs& args) {
            const ConvGeometry& geometry = conv->geometry;
            RunClusterConv(*conv, args, 0, int64_t{args.batch} * geometry.oh * geometry.ow, 0,
                           OutputBlocks(geometry));
          }};
}

Kernel Tables(const ConvGeometry& g, const QuantizedWeights& weights, Isa) {
  auto conv = std::make_shared<PackedTableConv>(PackTableConv(g, weights));
  return {TableConvScratchBytes(*conv), conv->bytes(), [conv](const ClusterConvArgs& args) {
            RunTableConv(*conv, args, 0, TableConvTiles(*conv, args.batch), 0,
                         OutputBlocks(conv->geometry));
          }};
}

Kernel Winograd(const ConvGeometry& g, const QuantizedWeights& weights, Isa isa) {
  const std::optional<WinogradTile> tile = ChooseWinogradTile(g, weights, isa);
  if (!tile) return {};
  auto conv = std::make_shared<PackedWinogradConv>(PackWinogradConv(g, weights, *tile));
  return {WinogradConvScratchBytes(*conv), conv->bytes(), [conv](const ClusterConvArgs& args) {
            RunWinogradConv(*conv, args, 0, WinogradConvTiles(*conv, args.batch), 0,
                            OutputBlocks(conv->geometry));
          }};
}

Kernel Depthwise(const ConvGeometry& g, Isa isa) {
  std::mt19937 random(1);
  std::vector<int8_t> weights(static_cast<size_t>(g.oc) * g.kh * g.kw);
  for (int8_t& w : weights) w = static_cast<int8_t>(random());
  auto conv = std::make_shared<PackedDepthwiseConv>(PackDepthwiseConv(g, weights, isa));
  return {DepthwiseConvScratchBytes(*conv), conv->bytes(), [conv](const ClusterConvArgs& args) {
            RunDepthwiseConv(*conv, args, 0, int64_t{args.batch} * conv->geometry.oh);
          }};
}

void Measure(benchmark::State& state, const ConvGeometry& g, int batch, double macs,
             const Kernel& kernel) {
  if (!kernel.run) {
    state.SkipWithError("the weights do not allow it");
    return;
  }
  std::mt19937 random(1);
  AlignedBuffer src(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  AlignedBuffer dst(static_cast<size_t>(batch) * g.oh * g.ow * g.oc);
  AlignedBuffer scratch(kernel.scratch_bytes);
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
  for (auto _ : state) {
    kernel.run(args);
    benchmark::ClobberMemory();
  }
  state.counters["GMAC/s"] =
      benchmark::Counter(batch * macs * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["weights"] = static_cast<double>(kernel.weight_bytes);
}

void Register(const std::string& name, const ConvGeometry& g, int batch, double macs,
              std::function<Kernel()> make) {
  const auto least = [](const std::vector<double>& v) {
    return *std::min_element(v.begin(), v.end());
  };
  const auto most = [](const std::vector<double>& v) {
    return *std::max_element(v.begin(), v.end());
  };
  benchmark::RegisterBenchmark(
      name.c_str(), [=](benchmark::State& state) { Measure(state, g, batch, macs, make()); })
      ->Unit(benchmark::kMicrosecond)
      ->ComputeStatistics("min", least)
      ->ComputeStatistics("max", most);
}

void RegisterAll(Isa isa, int batch) {
  for (const Layer& layer : kLayers) {
    const ConvGeometry g = GeometryOf(layer);
    const double macs = static_cast<double>(g.oh) * g.ow * g.oc * g.ic * g.kh * g.kw;
    for (const Weights& kind : kWeights) {
      using Make = Kernel (*)(const ConvGeometry&, const QuantizedWeights&, Isa);
      std::vector<std::pair<const char*, Make>> kernels{{"tiles", Tiles}};
      QuantizedWeights like;  // what decides is the kind
      like.scheme = kind.scheme;
      like.cluster_size = kind.n;
      if (TableConvAccepts(g, like, isa)) kernels.emplace_back("tables", Tables);
      if (WinogradConvAccepts(g, isa)) kernels.emplace_back("winograd", Winograd);
      for (const auto& [name, make] : kernels) {
        Register(absl::StrCat(layer.name, "/", kind.name, "/", name), g, batch, macs,
                 [=, make = make] { return make(g, DrawWeights(g, kind), isa); });
      }
    }
  }
  for (const Layer& layer : kDepthwiseLayers) {
    const ConvGeometry g = GeometryOf(layer);
    const double macs = static_cast<double>(g.oh) * g.ow * g.oc * g.kh * g.kw;
    Register(absl::StrCat(layer.name, "/int8/depthwise"), g, batch, macs,
             [=] { return Depthwise(g, isa); });
  }
}

int Main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  std::string cap;
  int batch = 1;
  for (int i = 1; i < argc; i += 2) {
    const std::string flag = argv[i];
    if (i + 1 < argc && flag == "--isa") {
      cap = argv[i + 1];
    } else if (i + 1 >= argc || flag != "--batch" || !absl::SimpleAtoi(argv[i + 1], &batch) ||
               batch < 1) {
      std::fprintf(stderr,
                   "kernels_bench: --isa NAME, --batch N and Google Benchmark's flags, not %s\n",
                   argv[i]);
      return 2;
    }
  }
  const auto isa = SelectIsa(cap);
  if (!isa.ok()) {
    std::fprintf(stderr, "%s\n", isa.status().ToString().c_str());
    return 2;
  }
  benchmark::AddCustomContext("isa", IsaName(*isa));
  benchmark::AddCustomContext("batch", absl::StrCat(batch));
  RegisterAll(*isa, batch);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace tern::kernels

int main(int argc, char** argv) { return tern::kernels::Main(argc, argv); }
