// Whichever kernel is chosen, the sums are those of the scalar definition.
#include "server/kernels/conv_kernel.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "server/base/aligned_buffer.h"
#include "server/tensor/cluster.h"
#include "tests/kernels/isa_test.h"

namespace tern::kernels {
namespace {

ConvGeometry Square(int size, int ic, int oc, int k) {
  ConvGeometry g;
  g.ih = g.iw = g.oh = g.ow = size;
  g.ic = ic;
  g.oc = oc;
  g.kh = g.kw = k;
  g.pad_top = g.pad_left = k / 2;
  return g;
}

QuantizedWeights RandomWeights(const ConvGeometry& g, WeightScheme scheme, int n) {
  std::mt19937 random(1);
  QuantizedWeights weights;
  weights.scheme = scheme;
  weights.codes = Tensor(DType::kS8, {g.oc, g.ic, g.kh, g.kw});
  // int8: n is the largest code.
  const int largest = IsClustered(scheme) ? 1 : n;
  for (int8_t& code : weights.codes.data<int8_t>()) {
    code = static_cast<int8_t>(static_cast<int>(random() % (2 * largest + 1)) - largest);
  }
  if (!IsClustered(scheme)) return weights;
  weights.cluster_size = n;
  weights.cluster_scales = Tensor(DType::kS8, {g.oc, ClusterMap(g.ic, n).clusters()});
  for (int8_t& scale : weights.cluster_scales.data<int8_t>()) {
    scale = static_cast<int8_t>(1 + random() % 127);
  }
  return weights;
}

// The sums of `batch` images in `cuts` x 2 calls.
std::vector<int32_t> Sums(const ConvKernel& kernel, int batch, int cuts) {
  const ConvGeometry& g = kernel.geometry();
  std::mt19937 random(2);
  std::vector<uint8_t> src(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  for (uint8_t& x : src) x = static_cast<uint8_t>(random());
  std::vector<int32_t> sums(static_cast<size_t>(batch) * g.oh * g.ow * g.oc, 77);
  AlignedBuffer scratch(kernel.scratch_bytes());
  ClusterConvArgs args;
  args.src = src.data();
  args.batch = batch;
  args.src_zero_point = 9;
  args.dst_s32 = sums.data();
  args.scratch = scratch.data();
  const int64_t units = kernel.Units(batch);
  const int blocks = OutputBlocks(g);
  for (int i = 0; i < cuts; ++i) {
    for (int half = 0; half < 2; ++half) {
      kernel.Run(args, units * i / cuts, units * (i + 1) / cuts, blocks * half / 2,
                 blocks * (half + 1) / 2);
    }
  }
  return sums;
}

class ConvKernelTest : public IsaTest {};

TEST_P(ConvKernelTest, GivesTheSumsOfTheDefinitionWhateverItChooses) {
  for (int k : {1, 3}) {
    for (int n : {4, 64}) {
      for (int size : {6, 14}) {
        const ConvGeometry g = Square(size, 64, 144, k);
        const QuantizedWeights weights = RandomWeights(g, WeightScheme::kTernaryCluster, n);
        const ConvKernel expected = ConvKernel::Make(g, weights, Isa::kScalar);
        const ConvKernel kernel = ConvKernel::Make(g, weights, GetParam());
        EXPECT_EQ(expected.name(), "scalar");
        for (int batch : {1, 3}) {
          EXPECT_EQ(Sums(kernel, batch, 4), Sums(expected, batch, 1))
              << kernel.name() << " kernel " << k << " N=" << n << " size " << size;
        }
      }
    }
  }
}

TEST_P(ConvKernelTest, ChoosesTheSameForEqualLayers) {
  const ConvGeometry g = Square(14, 64, 128, 3);
  const QuantizedWeights weights = RandomWeights(g, WeightScheme::kTernaryCluster, 16);
  const std::string name = ConvKernel::Make(g, weights, GetParam()).name();
  EXPECT_TRUE(name == IsaName(GetParam()) || name == "sum-tables-avx2" ||
              name == "winograd-4x4-avx2")
      << name;
  for (int i = 0; i < 5; ++i) EXPECT_EQ(ConvKernel::Make(g, weights, GetParam()).name(), name);
}

TEST_P(ConvKernelTest, KeepsTilesWhereNothingElseTakesTheLayer) {
  const auto name = [](const ConvGeometry& g, WeightScheme scheme, int n) {
    return ConvKernel::Make(g, RandomWeights(g, scheme, n), GetParam()).name();
  };
  const char* tiles = IsaName(GetParam());
  EXPECT_EQ(name(Square(14, 64, 48, 1), WeightScheme::kTernaryCluster, 16), tiles);  // few outputs
  EXPECT_EQ(name(Square(1, 256, 256, 1), WeightScheme::kTernaryCluster, 16), tiles);
  EXPECT_EQ(name(Square(14, 64, 128, 1), WeightScheme::kTernaryCluster, 5), tiles);
  EXPECT_EQ(name(Square(14, 64, 128, 1), WeightScheme::kInt4Cluster, 16), tiles);
  EXPECT_EQ(name(Square(14, 72, 48, 3), WeightScheme::kInt4Cluster, 16), tiles);
}

TEST_P(ConvKernelTest, TakesInt8LayersWhereItExpectsToBeFaster) {
  const auto made = [](const ConvGeometry& g, int largest) {
    const QuantizedWeights weights = RandomWeights(g, WeightScheme::kInt8, largest);
    auto kernel = ConvKernel::MakeIfFaster(g, weights, GetParam());
    if (!kernel) return std::string("none");
    EXPECT_EQ(Sums(*kernel, 2, 3), Sums(ConvKernel::Make(g, weights, Isa::kScalar), 2, 1));
    return kernel->name();
  };
  const bool avx2 = GetParam() == Isa::kAvx2, simd = GetParam() >= Isa::kAvx2;
  EXPECT_EQ(made(Square(14, 64, 48, 3), 63), simd ? "winograd-4x4-avx2" : "none");
  // Small weights need few flushes, large ones many.
  EXPECT_EQ(made(Square(7, 256, 48, 1), 20), avx2 ? "int8-avx2" : "none");
  EXPECT_EQ(made(Square(7, 256, 48, 1), 127), "none");
  // Tiles of 2 x 2 and more cover one pixel; and three channels fill a dword and its partner
  // poorly.
  EXPECT_EQ(made(Square(1, 64, 48, 3), 127), "none");
  EXPECT_EQ(made(Square(14, 3, 48, 3), 20), "none");
}

TEST(KernelChoicesTest, AddedLinesDecideAndOthersAreIgnored) {
  const Isa isa = std::min(DetectIsa(), Isa::kAvx2);
  if (isa == Isa::kScalar) GTEST_SKIP() << "tables need AVX2";
  // Two layers that nothing else here has, one line for each, by the format that KernelChoices has.
  for (const char* choice : {"tables", "tiles"}) {
    const int size = choice == std::string("tables") ? 18 : 20;
    const ConvGeometry g = Square(size, 64, 128, 1);
    const std::string layer = absl::StrCat(
        g.ih, " ", g.iw, " ", g.ic, " ", g.oh, " ", g.ow, " ", g.oc, " ", g.kh, " ", g.kw, " ",
        g.stride_h, " ", g.stride_w, " ", g.pad_top, " ", g.pad_left, " ", g.dilation_h, " ",
        g.dilation_w, " 64 1 ", static_cast<int>(isa), " -1 ", choice, "\n");
    AddKernelChoices(absl::StrCat("\n", layer, "1 2 3 tables\n", "x", layer, layer, "nonsense"));
    EXPECT_NE(KernelChoices().find(layer), std::string::npos);
    EXPECT_EQ(KernelChoices().find("nonsense"), std::string::npos);
    const std::string name =
        ConvKernel::Make(g, RandomWeights(g, WeightScheme::kTernaryCluster, 64), isa).name();
    EXPECT_EQ(name == "sum-tables-avx2", choice == std::string("tables")) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, ConvKernelTest, kAllIsas, IsaSuffix);

}  // namespace
}  // namespace tern::kernels
