// Sum tables against the definition (conv_problem.h).
#include "server/kernels/table_conv.h"

#include <thread>

#include "gtest/gtest.h"
#include "tests/kernels/conv_problem.h"
#include "tests/kernels/isa_test.h"

namespace tern::kernels {
namespace {

using testing::CompareWithDefinition;
using testing::kSums;
using testing::Problem;
using testing::Result;

ConvGeometry Geometry(int oh, int ow, int ic, int oc, int k, int stride = 1, int pad = 1) {
  ConvGeometry g;
  g.kh = g.kw = k;
  g.pad_top = g.pad_left = k == 3 ? pad : 0;
  g.stride_h = g.stride_w = stride;
  g.ih = (oh - 1) * stride + k - 2 * g.pad_top;
  g.iw = (ow - 1) * stride + k - 2 * g.pad_left;
  g.ic = ic;
  g.oh = oh;
  g.ow = ow;
  g.oc = oc;
  return g;
}

// Ternary weights.
Problem MakeProblem(const ConvGeometry& g, int n, uint32_t seed, int batch = 1) {
  return testing::MakeProblem(g, WeightScheme::kTernaryCluster, n, seed, batch);
}

void Check(const Problem& p) {
  ASSERT_TRUE(TableConvAccepts(p.g, p.weights, Isa::kAvx2));
  const PackedTableConv tables = PackTableConv(p.g, p.weights);
  CompareWithDefinition(p, TableConvScratchBytes(tables), [&](const ClusterConvArgs& args) {
    RunTableConv(tables, args, 0, TableConvTiles(tables, p.batch), 0, OutputBlocks(p.g));
  });
}

class TableConvTest : public IsaTest {};

TEST_P(TableConvTest, AgreesForEveryClusterSize) {
  uint32_t seed = 1;
  for (int n : {4, 8, 12, 16, 20, 32, 48, 64, 128, 256, 333}) {
    for (int ic : {16, 32, 48, 64, 96, 160, 256}) {
      if (n % 4 == 0 || n >= ic) Check(MakeProblem(Geometry(5, 4, ic, 17, 3), n, seed++));
      if (HasFatalFailure()) return;
      if (ic % 32 != 0 || (n != 4 && n != 8 && n % 16 != 0 && n < ic)) continue;
      Check(MakeProblem(Geometry(5, 4, ic, 17, 1), n, seed++));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(TableConvTest, AgreesForEverySizeOfTheImage) {
  uint32_t seed = 100;
  for (int ow = 1; ow <= 34; ++ow) {
    for (int oh : {1, 2, 3, 7, 8}) {
      Check(MakeProblem(Geometry(oh, ow, 32, 16, 3), 4, seed++, 1 + 2 * (ow % 2)));
      Check(MakeProblem(Geometry(oh, ow, 32, 16, 1), 4, seed++, 1 + 2 * (ow % 2)));
      if (HasFatalFailure()) return;
    }
  }
  for (int size : {7, 14, 28, 56, 61, 95}) {
    for (int batch : {1, 2, 3}) {
      Check(MakeProblem(Geometry(size, size, 16, 5, 3), 8, seed++, batch));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(TableConvTest, AgreesForEveryOutputCountPaddingAndStride) {
  uint32_t seed = 200;
  for (int oc : {1, 8, 15, 16, 17, 40, 64}) {
    for (int pad : {0, 1, 2}) Check(MakeProblem(Geometry(9, 8, 32, oc, 3, 1, pad), 16, seed++, 3));
    for (int stride : {1, 2, 3}) Check(MakeProblem(Geometry(5, 6, 64, oc, 1, stride), 16, seed++));
    if (HasFatalFailure()) return;
  }
}

TEST_P(TableConvTest, ExtremeSumsDoNotOverflow) {
  for (int8_t sign : {int8_t{1}, int8_t{-1}}) {
    for (int n : {4, 8, 16, 64, 1024}) {
      for (int k : {1, 3}) {
        Problem p = MakeProblem(Geometry(5, 5, 512, 16, k), n, 1);
        for (int8_t& code : p.weights.codes.data<int8_t>()) code = sign;
        for (int8_t& scale : p.weights.cluster_scales.data<int8_t>()) scale = 127;
        p.src.assign(p.src.size(), 255);
        p.zero_point = 255;
        Check(p);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(TableConvTest, DisjointRangesMayRunAtOnceAndCoverEverything) {
  for (int k : {1, 3}) {
    const Problem p = MakeProblem(Geometry(14, 14, 64, 72, k), 16, 7, 3);
    const PackedClusterConv reference = PackClusterConv(p.g, p.weights, Isa::kScalar);
    const auto expected = Result<int32_t>(
        p, kSums, ClusterConvScratchBytes(reference), [&](const ClusterConvArgs& args) {
          RunClusterConv(reference, args, 0, 3 * 14 * 14, 0, OutputBlocks(p.g));
        });
    const PackedTableConv tables = PackTableConv(p.g, p.weights);
    const int64_t tiles = TableConvTiles(tables, p.batch);
    const auto got = Result<int32_t>(p, kSums, 0, [&](const ClusterConvArgs& args) {
      // Some parts of 3x3 begin in the middle of a group of tiles.
      std::vector<std::thread> threads;
      for (int part = 0; part < 8; ++part) {
        threads.emplace_back([&, part] {
          AlignedBuffer scratch(TableConvScratchBytes(tables));
          ClusterConvArgs own = args;
          own.scratch = scratch.data();
          const int t = part % 4, half = part / 4;
          RunTableConv(tables, own, tiles * t / 4, tiles * (t + 1) / 4, 2 * half,
                       half == 0 ? 2 : 5);
        });
      }
      for (std::thread& thread : threads) thread.join();
    });
    EXPECT_EQ(got, expected) << "kernel " << k;
  }
}

TEST_P(TableConvTest, RefusesWhatItsSumsCannotHold) {
  const auto accepts = [](ConvGeometry g, int n, WeightScheme scheme, Isa isa) {
    QuantizedWeights weights;
    weights.scheme = scheme;
    weights.cluster_size = n;
    return TableConvAccepts(g, weights, isa);
  };
  constexpr WeightScheme kTernary = WeightScheme::kTernaryCluster;
  const ConvGeometry square = Geometry(8, 8, 64, 64, 3), point = Geometry(8, 8, 64, 64, 1);
  EXPECT_TRUE(accepts(square, 4, kTernary, GetParam()));
  EXPECT_TRUE(accepts(point, 4, kTernary, GetParam()));
  EXPECT_FALSE(accepts(square, 4, kTernary, Isa::kScalar));
  EXPECT_FALSE(accepts(square, 64, WeightScheme::kInt4Cluster, GetParam()));
  EXPECT_FALSE(accepts(point, 64, WeightScheme::kInt8, GetParam()));
  for (int n : {1, 2, 3, 6, 10}) {
    EXPECT_FALSE(accepts(square, n, kTernary, GetParam())) << n;
    EXPECT_FALSE(accepts(point, n, kTernary, GetParam())) << n;
  }
  EXPECT_FALSE(accepts(point, 12, kTernary, GetParam()));
  EXPECT_FALSE(accepts(Geometry(8, 8, 24, 64, 3), 4, kTernary, GetParam()));
  EXPECT_FALSE(accepts(Geometry(8, 8, 48, 64, 1), 4, kTernary, GetParam()));
  EXPECT_FALSE(accepts(Geometry(8, 8, 64, 64, 3, 2), 4, kTernary, GetParam()));
  EXPECT_FALSE(accepts(Geometry(8, 8, 64, 64, 5), 4, kTernary, GetParam()));
  ConvGeometry dilated = square;
  dilated.dilation_w = 2;
  EXPECT_FALSE(accepts(dilated, 4, kTernary, GetParam()));
  ConvGeometry padded = point;
  padded.pad_left = 1;
  EXPECT_FALSE(accepts(padded, 4, kTernary, GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Isas, TableConvTest, ::testing::Values(Isa::kAvx2), IsaSuffix);

}  // namespace
}  // namespace tern::kernels
