// Winograd convolutions against the definition (conv_problem.h).
#include "server/kernels/winograd_conv.h"

#include <thread>

#include "absl/algorithm/container.h"
#include "gtest/gtest.h"
#include "tests/kernels/conv_geometry.h"
#include "tests/kernels/conv_problem.h"
#include "tests/kernels/isa_test.h"

namespace tern::kernels {
namespace {

using testing::CompareWithDefinition;
using testing::Geometry;
using testing::kSums;
using testing::MakeProblem;
using testing::Problem;
using testing::Result;

constexpr WinogradTile kTiles[] = {WinogradTile::k2x2, WinogradTile::k2x4, WinogradTile::k4x4};

ConvGeometry Square(int size, int ic, int oc, std::array<int, 4> pads = {1, 1, 1, 1}) {
  return Geometry(size, size, ic, oc, 3, 3, 1, 1, pads);
}

std::vector<int16_t> Products(const Problem& p) {
  const auto codes = p.weights.codes.data<int8_t>();
  std::vector<int16_t> products(codes.begin(), codes.end());
  if (!IsClustered(p.weights.scheme)) return products;
  const ClusterMap map(p.g.ic, p.weights.cluster_size);
  const auto scales = p.weights.cluster_scales.data<int8_t>();
  for (size_t i = 0; i < products.size(); ++i) {
    const int o = static_cast<int>(i / 9) / p.g.ic, c = static_cast<int>(i / 9) % p.g.ic;
    products[i] =
        static_cast<int16_t>(products[i] * scales[o * map.clusters() + map.cluster_of(c)]);
  }
  return products;
}

void Check(const Problem& p) {
  ASSERT_TRUE(WinogradConvAccepts(p.g, Isa::kAvx2));
  for (WinogradTile tile : kTiles) {
    const bool fits = WinogradConvFits(p.g, Products(p), tile);
    if (!fits && p.weights.scheme == WeightScheme::kInt4Cluster && tile != WinogradTile::k2x2)
      continue;  // random codes times random scales are larger than those of real layers
    ASSERT_TRUE(fits);
    const PackedWinogradConv conv = PackWinogradConv(p.g, p.weights, tile);
    SCOPED_TRACE(static_cast<int>(tile));
    CompareWithDefinition(p, WinogradConvScratchBytes(conv), [&](const ClusterConvArgs& args) {
      RunWinogradConv(conv, args, 0, WinogradConvTiles(conv, p.batch), 0, OutputBlocks(p.g));
    });
    if (::testing::Test::HasFatalFailure()) return;
  }
}

class WinogradConvTest : public IsaTest {};

TEST_P(WinogradConvTest, AgreesForEverySchemeAndChannelCount) {
  uint32_t seed = 1;
  for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster,
                              WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
    for (int ic : {16, 32, 48, 112}) {
      for (int n : {3, 4, 64}) {
        Check(MakeProblem(Square(6, ic, 17), scheme, n, seed++));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(WinogradConvTest, AgreesWhereWeightsAreTransformedWhenTheyAreUsed) {
  uint32_t seed = 50;
  for (WeightScheme scheme : {WeightScheme::kInt8, WeightScheme::kTernaryCluster,
                              WeightScheme::kInt3Cluster, WeightScheme::kInt4Cluster}) {
    for (int n : {3, 64}) {
      const Problem p = MakeProblem(Square(6, 112, 200), scheme, n, seed++);
      EXPECT_EQ(PackWinogradConv(p.g, p.weights, WinogradTile::k2x2).transformed.size_bytes(), 0);
      Check(p);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(WinogradConvTest, AgreesForEverySizeOfTheImage) {
  uint32_t seed = 100;
  for (int size = 1; size <= 13; ++size) {
    for (int other : {1, 4, 7, 14, 33}) {
      const ConvGeometry g = Geometry(size, other, 16, 8, 3, 3, 1, 1, {1, 1, 1, 1});
      Check(MakeProblem(g, WeightScheme::kInt8, 0, seed++, 1 + size % 3));
      if (HasFatalFailure()) return;
    }
  }
  // More tiles than are computed together.
  Check(MakeProblem(Square(50, 96, 5), WeightScheme::kInt8, 0, seed++, 3));
}

TEST_P(WinogradConvTest, AgreesForEveryOutputCountAndPadding) {
  uint32_t seed = 200;
  for (int oc : {1, 8, 15, 16, 17, 40, 64}) {
    for (const std::array<int, 4>& pads :
         {std::array<int, 4>{0, 0, 0, 0}, {2, 0, 1, 3}, {5, 4, 6, 5}}) {
      Check(MakeProblem(Square(7, 16, oc, pads), WeightScheme::kInt8, 0, seed++, 2));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(WinogradConvTest, ExtremeSumsAreExact) {
  // Two checkerboards, of inputs and of weights, reach the extremes of the transforms.
  for (int pattern = 0; pattern < 8; ++pattern) {
    Problem p = MakeProblem(Square(8, 64, 16), WeightScheme::kInt8, 0, 1);
    size_t i = 0;
    for (int8_t& code : p.weights.codes.data<int8_t>()) {
      code = (pattern & 1) != 0 && i % 2 != 0 ? int8_t{-128} : int8_t{127};
      if (pattern & 2) code = static_cast<int8_t>(-1 - code);
      ++i;
    }
    for (size_t j = 0; j < p.src.size(); ++j) {
      const size_t pixel = j / 64;
      p.src[j] = (pattern & 4) != 0 && (pixel % 8 + pixel / 8) % 2 != 0 ? 0 : 255;
    }
    p.zero_point = 255;
    Check(p);
    if (HasFatalFailure()) return;
  }
}

TEST_P(WinogradConvTest, RefusesWeightsWhoseSumsItCannotHold) {
  const ConvGeometry g = Square(8, 512, 16);
  const auto packs = [&](int16_t weight, WinogradTile tile) {
    return WinogradConvFits(g, std::vector<int16_t>(size_t{512} * 16 * 9, weight), tile);
  };
  // 255 * 512 * 9 * w must stay below 2^25, 2^27 and 2^29.
  EXPECT_TRUE(packs(28, WinogradTile::k4x4));
  EXPECT_FALSE(packs(29, WinogradTile::k4x4));
  EXPECT_TRUE(packs(-114, WinogradTile::k2x4));
  EXPECT_FALSE(packs(-115, WinogradTile::k2x4));
  EXPECT_TRUE(packs(456, WinogradTile::k2x2));
  EXPECT_FALSE(packs(457, WinogradTile::k2x2));
  // Transformed weights must fit 16 bits: 49 * w, though the sums of 16 channels would fit.
  const ConvGeometry few = Square(8, 16, 1);
  std::vector<int16_t> weights(size_t{16} * 9, 0);
  for (int i = 0; i < 9; ++i) weights[i] = 668;
  EXPECT_TRUE(WinogradConvFits(few, weights, WinogradTile::k4x4));
  for (int i = 0; i < 9; ++i) weights[i] = 669;
  EXPECT_FALSE(WinogradConvFits(few, weights, WinogradTile::k4x4));
}

TEST_P(WinogradConvTest, TheLargestSumsThatItTakesAreExact) {
  // Every weight and activation as large as the bound allows, of either sign.
  const int codes[] = {4, 1, 1}, scales[] = {114, 114, 28};
  for (WinogradTile tile : kTiles) {
    for (int sign : {1, -1}) {
      const int code = sign * codes[static_cast<int>(tile)];
      const int scale = scales[static_cast<int>(tile)], weight = code * scale;
      Problem p = MakeProblem(Square(5, 512, 16, {0, 0, 0, 0}), WeightScheme::kInt4Cluster, 512, 1);
      auto all_codes = p.weights.codes.data<int8_t>(),
           all_scales = p.weights.cluster_scales.data<int8_t>();
      absl::c_fill(all_codes, static_cast<int8_t>(code));
      absl::c_fill(all_scales, static_cast<int8_t>(scale));
      ASSERT_TRUE(WinogradConvFits(p.g, Products(p), tile));
      const PackedWinogradConv conv = PackWinogradConv(p.g, p.weights, tile);
      const std::vector<uint8_t> src(size_t{25} * 512, 255);
      std::vector<int32_t> sums(size_t{9} * 16, 77);
      AlignedBuffer scratch(WinogradConvScratchBytes(conv));
      ClusterConvArgs args;
      args.src = src.data();
      args.dst_s32 = sums.data();
      args.scratch = scratch.data();
      RunWinogradConv(conv, args, 0, WinogradConvTiles(conv, 1), 0, 1);
      EXPECT_EQ(sums, std::vector<int32_t>(sums.size(), 255 * 512 * 9 * weight));
    }
  }
}

TEST_P(WinogradConvTest, DisjointRangesMayRunAtOnceAndCoverEverything) {
  for (WinogradTile tile : kTiles) {
    const Problem p = MakeProblem(Square(14, 64, 72), WeightScheme::kInt8, 0, 7, 3);
    const PackedClusterConv reference = PackClusterConv(p.g, p.weights, Isa::kScalar);
    const auto expected = Result<int32_t>(
        p, kSums, ClusterConvScratchBytes(reference), [&](const ClusterConvArgs& args) {
          RunClusterConv(reference, args, 0, 3 * 14 * 14, 0, OutputBlocks(p.g));
        });
    const PackedWinogradConv conv = PackWinogradConv(p.g, p.weights, tile);
    const int64_t tiles = WinogradConvTiles(conv, p.batch);
    const auto got = Result<int32_t>(p, kSums, 0, [&](const ClusterConvArgs& args) {
      std::vector<std::thread> threads;
      for (int part = 0; part < 8; ++part) {
        threads.emplace_back([&, part] {
          AlignedBuffer scratch(WinogradConvScratchBytes(conv));
          ClusterConvArgs own = args;
          own.scratch = scratch.data();
          const int t = part % 4, half = part / 4;
          RunWinogradConv(conv, own, tiles * t / 4, tiles * (t + 1) / 4, 2 * half,
                          half == 0 ? 2 : 5);
        });
      }
      for (std::thread& thread : threads) thread.join();
    });
    EXPECT_EQ(got, expected);
  }
}

TEST_P(WinogradConvTest, RefusesOtherShapes) {
  EXPECT_TRUE(WinogradConvAccepts(Square(8, 32, 3), GetParam()));
  EXPECT_FALSE(WinogradConvAccepts(Square(8, 32, 3), Isa::kScalar));
  EXPECT_FALSE(WinogradConvAccepts(Square(8, 24, 3), GetParam()));
  EXPECT_FALSE(WinogradConvAccepts(Geometry(8, 8, 32, 8, 1, 1), GetParam()));
  EXPECT_FALSE(WinogradConvAccepts(Geometry(8, 8, 32, 8, 3, 1), GetParam()));
  EXPECT_FALSE(WinogradConvAccepts(Geometry(8, 8, 32, 8, 5, 5), GetParam()));
  EXPECT_FALSE(WinogradConvAccepts(Geometry(8, 8, 32, 8, 3, 3, 2, 1), GetParam()));
  EXPECT_FALSE(
      WinogradConvAccepts(Geometry(8, 8, 32, 8, 3, 3, 1, 1, {1, 1, 1, 1}, 1, 2), GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Isas, WinogradConvTest, ::testing::Values(Isa::kAvx2), IsaSuffix);

}  // namespace
}  // namespace tern::kernels
