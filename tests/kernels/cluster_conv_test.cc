// Every variant against the definition in cluster_conv.h, written out here over the cluster map
// and the unpacked codes. Results must be equal bit for bit.
#include "server/kernels/cluster_conv.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <sstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/tensor/cluster.h"
#include "tests/kernels/conv_geometry.h"
#include "tests/kernels/isa_test.h"
#include "tests/testing/guarded_buffer.h"

namespace tern::kernels {
namespace {

using tern::testing::Guard;
using tern::testing::GuardedBuffer;
using ::testing::ElementsAreArray;
using testing::Geometry;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr WeightScheme kTernary = WeightScheme::kTernaryCluster;
constexpr WeightScheme kInt4 = WeightScheme::kInt4Cluster;
constexpr WeightScheme kInt3 = WeightScheme::kInt3Cluster;
constexpr WeightScheme kInt8 = WeightScheme::kInt8;

// One convolution with its data.
struct Problem {
  ConvGeometry g;
  int batch = 1;
  QuantizedWeights weights;
  std::vector<uint8_t> src;
  uint8_t zero_point = 0;
  std::vector<float> multiplier, offset;
  std::vector<uint8_t> residual;  // empty: none
  float residual_multiplier = 0.0f;
  bool f32 = false;
  float lo = 0.0f, hi = 255.0f;

  int64_t pixels() const { return int64_t{batch} * g.oh * g.ow; }
  int64_t outputs() const { return pixels() * g.oc; }
};

ConvGeometry Same(int size, int ic, int oc, int k) {
  return Geometry(size, size, ic, oc, k, k, 1, 1, {k / 2, k / 2, k / 2, k / 2});
}

int Draw(std::mt19937& random, int lo, int hi) {
  return lo + static_cast<int>(random() % static_cast<uint32_t>(hi - lo + 1));
}

// Random everything; the f32 output is the accumulator itself.
Problem MakeProblem(const ConvGeometry& g, int n, WeightScheme scheme, uint32_t seed,
                    int batch = 1) {
  std::mt19937 random(seed);
  // int8: `n` is the largest code.
  const int max_code = scheme == kInt8 ? n : LargestCode(scheme);
  Problem problem;
  problem.g = g;
  problem.batch = batch;
  problem.weights.scheme = scheme;
  problem.weights.codes = Tensor(DType::kS8, {g.oc, g.ic, g.kh, g.kw});
  for (int8_t& code : problem.weights.codes.data<int8_t>()) {
    code = static_cast<int8_t>(Draw(random, -max_code, max_code));
  }
  if (IsClustered(scheme)) {
    problem.weights.cluster_size = n;
    problem.weights.cluster_scales = Tensor(DType::kS8, {g.oc, ClusterMap(g.ic, n).clusters()});
    for (int8_t& scale : problem.weights.cluster_scales.data<int8_t>()) {
      scale = static_cast<int8_t>(Draw(random, 1, 127));
    }
  }
  problem.src.resize(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  for (uint8_t& x : problem.src) x = static_cast<uint8_t>(Draw(random, 0, 255));
  problem.zero_point = static_cast<uint8_t>(Draw(random, 0, 255));
  problem.multiplier.assign(g.oc, 1.0f);
  problem.offset.assign(g.oc, 0.0f);
  problem.f32 = true;
  problem.lo = -kInfinity;
  problem.hi = kInfinity;
  return problem;
}

std::vector<int32_t> Accumulators(const Problem& problem) {
  const ConvGeometry& g = problem.g;
  const bool clustered = IsClustered(problem.weights.scheme);
  const ClusterMap map(g.ic, clustered ? problem.weights.cluster_size : g.ic);
  const auto codes = problem.weights.codes.data<int8_t>();
  const auto scales = problem.weights.cluster_scales.data<int8_t>();
  std::vector<std::vector<int>> members;
  for (int cluster = 0; cluster < map.clusters(); ++cluster) {
    members.push_back(map.channels_of(cluster));
  }
  std::vector<int32_t> accumulators;
  accumulators.reserve(problem.outputs());
  for (int image = 0; image < problem.batch; ++image) {
    for (int oy = 0; oy < g.oh; ++oy) {
      for (int ox = 0; ox < g.ow; ++ox) {
        for (int o = 0; o < g.oc; ++o) {
          int64_t acc = 0;
          for (int cluster = 0; cluster < map.clusters(); ++cluster) {
            int64_t sum = 0;
            for (int ky = 0; ky < g.kh; ++ky) {
              for (int kx = 0; kx < g.kw; ++kx) {
                const int y = oy * g.stride_h - g.pad_top + ky * g.dilation_h;
                const int x = ox * g.stride_w - g.pad_left + kx * g.dilation_w;
                const bool inside = y >= 0 && y < g.ih && x >= 0 && x < g.iw;
                for (int c : members[cluster]) {
                  const int value = inside ? problem.src[((image * g.ih + y) * g.iw + x) * g.ic + c]
                                           : problem.zero_point;
                  sum += codes[((o * g.ic + c) * g.kh + ky) * g.kw + kx] * value;
                }
              }
            }
            acc += (clustered ? scales[o * map.clusters() + cluster] : 1) * sum;
          }
          EXPECT_LT(std::abs(acc), int64_t{1} << 31);
          accumulators.push_back(static_cast<int32_t>(acc));
        }
      }
    }
  }
  return accumulators;
}

// The results in f32; for u8 they are whole numbers 0..255.
std::vector<float> Expected(const Problem& problem, const std::vector<int32_t>& accumulators) {
  std::vector<float> results(accumulators.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const size_t o = i % problem.g.oc;
    float v =
        std::fma(static_cast<float>(accumulators[i]), problem.multiplier[o], problem.offset[o]);
    if (!problem.residual.empty()) {
      v = std::fma(static_cast<float>(problem.residual[i]), problem.residual_multiplier, v);
    }
    if (!problem.f32) v = std::nearbyint(v);
    results[i] = std::min(std::max(v, problem.lo), problem.hi);
  }
  return results;
}

struct RunOptions {
  Guard guard = Guard::kAfter;
  bool residual_is_dst = false;
  int64_t pixel_begin = 0;
  std::optional<int64_t> pixel_end;
  int block_begin = 0;
  std::optional<int> block_end;
};

// The outputs of a variant; elements outside the range keep the value 77.
std::vector<float> RunVariant(const Problem& problem, Isa isa, const RunOptions& options = {}) {
  const PackedClusterConv conv = PackClusterConv(problem.g, problem.weights, isa);
  const size_t outputs = static_cast<size_t>(problem.outputs());
  const GuardedBuffer<uint8_t> src(problem.src, options.guard);
  const GuardedBuffer<float> multiplier(problem.multiplier, options.guard);
  const GuardedBuffer<float> offset(problem.offset, options.guard);
  const GuardedBuffer<uint8_t> residual(problem.residual, options.guard);
  GuardedBuffer<uint8_t> dst(std::vector<uint8_t>(problem.f32 ? 0 : outputs, 77), options.guard);
  GuardedBuffer<float> dst_f32(std::vector<float>(problem.f32 ? outputs : 0, 77.0f), options.guard);
  // The scratch ends at an unmapped page as well, at the alignment that is promised.
  const size_t scratch_bytes = (ClusterConvScratchBytes(conv) + 63) / 64 * 64;
  GuardedBuffer<uint8_t> scratch(std::vector<uint8_t>(scratch_bytes, 0xEE), options.guard);

  ClusterConvArgs args;
  args.src = src.data();
  args.batch = problem.batch;
  args.src_zero_point = problem.zero_point;
  args.multiplier = multiplier.data();
  args.offset = offset.data();
  if (!problem.residual.empty()) {
    args.residual = residual.data();
    args.residual_multiplier = problem.residual_multiplier;
    if (options.residual_is_dst) {
      std::copy(problem.residual.begin(), problem.residual.end(), dst.data());
      args.residual = dst.data();
    }
  }
  if (problem.f32) {
    args.dst_f32 = dst_f32.data();
  } else {
    args.dst = dst.data();
  }
  args.lo = problem.lo;
  args.hi = problem.hi;
  args.scratch = scratch.data();
  RunClusterConv(conv, args, options.pixel_begin, options.pixel_end.value_or(problem.pixels()),
                 options.block_begin, options.block_end.value_or(OutputBlocks(problem.g)));

  EXPECT_TRUE(dst.SlackIsUntouched());
  EXPECT_TRUE(dst_f32.SlackIsUntouched());
  EXPECT_TRUE(scratch.SlackIsUntouched());
  if (problem.f32) return dst_f32.ToVector();
  return std::vector<float>(dst.data(), dst.data() + outputs);
}

std::string Describe(const Problem& problem) {
  const ConvGeometry& g = problem.g;
  std::ostringstream out;
  out << Name(problem.weights.scheme) << " N=" << problem.weights.cluster_size << " batch "
      << problem.batch << " in " << g.ih << "x" << g.iw << "x" << g.ic << " out " << g.oh << "x"
      << g.ow << "x" << g.oc << " kernel " << g.kh << "x" << g.kw << " stride " << g.stride_h << ","
      << g.stride_w << " pad " << g.pad_top << "," << g.pad_left << " dilation " << g.dilation_h
      << "," << g.dilation_w << " zero point " << int{problem.zero_point}
      << (problem.f32 ? " f32" : " u8");
  return out.str();
}

// Compares the bits; says where the first difference is.
void ExpectSame(const std::vector<float>& got, const std::vector<float>& expected,
                const Problem& problem) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &expected[i], sizeof(float)) != 0) {
      FAIL() << "pixel " << i / problem.g.oc << " output channel " << i % problem.g.oc << ": got "
             << got[i] << ", expected " << expected[i] << "\n"
             << Describe(problem);
    }
  }
}

// Makes the result u8 with values over the whole range and a share of ties and clamps.
void ScaleToU8(Problem& problem, const std::vector<int32_t>& accumulators, uint32_t seed) {
  std::mt19937 random(seed);
  double largest = 1;
  for (int32_t acc : accumulators) largest = std::max(largest, std::abs(static_cast<double>(acc)));
  for (float& m : problem.multiplier) {
    m = static_cast<float>(Draw(random, 50, 200) / largest);
  }
  for (float& c : problem.offset) c = static_cast<float>(Draw(random, 200, 300)) / 2.0f;
  problem.f32 = false;
  problem.lo = static_cast<float>(Draw(random, 0, 20));
  problem.hi = static_cast<float>(Draw(random, 230, 255));
}

// The fixed-point epilogue with random constants that fit 32 bits, against 64-bit integers; and the
// sums themselves.
void CheckFixedPoint(const Problem& problem, const std::vector<int32_t>& accumulators, Isa isa,
                     bool with_residual) {
  std::mt19937 random(static_cast<uint32_t>(accumulators.size()) + with_residual);
  int64_t largest = 1;
  for (int32_t acc : accumulators) largest = std::max<int64_t>(largest, std::abs(acc));
  FixedPointLayer layer;
  // Multipliers beyond 16 bits where the sums are small.
  const int64_t room = std::min<int64_t>((int64_t{1} << 29) / largest, 127 << 24);
  layer.residual_multiplier = with_residual ? int64_t{1} << Draw(random, 0, 20) : 0;
  int64_t top = 1;
  for (int o = 0; o < problem.g.oc; ++o) {
    layer.multiplier.push_back(static_cast<int32_t>(
        std::max<int64_t>(1, Draw(random, 1, static_cast<int>(std::max<int64_t>(1, room))))));
    layer.offset.push_back(Draw(random, -(1 << 28), 1 << 28));
    top = std::max(top, largest * layer.multiplier.back());
  }
  layer.narrow_offset.assign(layer.offset.begin(), layer.offset.end());
  while (top >> layer.shift > 300) ++layer.shift;
  layer.lo = Draw(random, 0, 20);
  layer.hi = Draw(random, 230, 255);
  std::vector<uint8_t> residual(with_residual ? accumulators.size() : 0);
  for (uint8_t& r : residual) r = static_cast<uint8_t>(Draw(random, 0, 255));
  std::vector<float> expected(accumulators.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const size_t o = i % problem.g.oc;
    int64_t sum = int64_t{accumulators[i]} * layer.multiplier[o] + layer.offset[o];
    if (with_residual) sum += residual[i] * layer.residual_multiplier;
    expected[i] = static_cast<float>(std::clamp<int64_t>(sum >> layer.shift, layer.lo, layer.hi));
  }

  const PackedClusterConv conv = PackClusterConv(problem.g, problem.weights, isa);
  const Guard guard = with_residual ? Guard::kBefore : Guard::kAfter;
  GuardedBuffer<uint8_t> dst(std::vector<uint8_t>(accumulators.size(), 77), guard);
  GuardedBuffer<int32_t> sums(std::vector<int32_t>(accumulators.size(), 77), guard);
  AlignedBuffer scratch(ClusterConvScratchBytes(conv));
  ClusterConvArgs args;
  args.src = problem.src.data();
  args.batch = problem.batch;
  args.src_zero_point = problem.zero_point;
  args.scratch = scratch.as<void>();
  args.dst_s32 = sums.data();
  RunClusterConv(conv, args, 0, problem.pixels(), 0, OutputBlocks(problem.g));
  args.dst_s32 = nullptr;
  args.fixed = &layer;
  args.dst = dst.data();
  if (with_residual) {
    std::copy(residual.begin(), residual.end(), dst.data());
    args.residual = dst.data();
  }
  RunClusterConv(conv, args, 0, problem.pixels(), 0, OutputBlocks(problem.g));
  EXPECT_TRUE(dst.SlackIsUntouched());
  EXPECT_TRUE(sums.SlackIsUntouched());
  ASSERT_EQ(sums.ToVector(), accumulators) << Describe(problem);
  ExpectSame(std::vector<float>(dst.data(), dst.data() + expected.size()), expected, problem);
}

// The accumulators as f32, a u8 result and a fixed-point one, against guards on either side.
void Check(Problem problem, Isa isa) {
  if (!IsTurn()) return;
  const std::vector<int32_t> accumulators = Accumulators(problem);
  ExpectSame(RunVariant(problem, isa), Expected(problem, accumulators), problem);
  ScaleToU8(problem, accumulators, 5);
  RunOptions options;
  options.guard = Guard::kBefore;
  ExpectSame(RunVariant(problem, isa, options), Expected(problem, accumulators), problem);
  for (bool with_residual : {false, true}) {
    CheckFixedPoint(problem, accumulators, isa, with_residual);
  }
}

class ClusterConvTest : public IsaTest {};

TEST_P(ClusterConvTest, AgreesForEveryChannelCountAndClusterSize) {
  uint32_t seed = 1;
  for (WeightScheme scheme : {kTernary, kInt3, kInt4}) {
    for (int n : {1, 2, 3, 4, 6, 8, 16, 64, 256}) {
      for (int ic : {1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 64, 72}) {
        for (int k : {1, 3}) {
          Check(MakeProblem(Same(4, ic, 17, k), n, scheme, seed++), GetParam());
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, AgreesForInt8WeightsOfEverySize) {
  if (GetParam() == Isa::kAvx512Vnni) GTEST_SKIP() << "oneDNN runs int8 with VNNI";
  // From sums of four steps at a time to weights that go apart one by one.
  uint32_t seed = 50;
  for (int largest : {1, 20, 63, 127}) {
    for (int ic : {1, 3, 4, 7, 8, 12, 16, 21, 72, 261}) {
      for (int k : {1, 3}) {
        Check(MakeProblem(Same(4, ic, 17, k), largest, kInt8, seed++), GetParam());
        if (HasFatalFailure()) return;
      }
    }
  }
  for (int pixels = 1; pixels <= 21; ++pixels) {
    Check(MakeProblem(Geometry(1, pixels, 40, 33, 1, 1), 40, kInt8, seed++), GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(ClusterConvTest, AgreesForFirstLayersWhoseRowsOfTapsAreReadWhole) {
  if (GetParam() == Isa::kAvx512Vnni) GTEST_SKIP() << "AVX2 only: oneDNN runs int8 with VNNI";
  uint32_t seed = 60;
  const std::pair<int, int> kernels[] = {{7, 7}, {3, 3}, {1, 8}, {5, 5}, {2, 9}};
  for (const std::array<int, 4>& pads : {std::array<int, 4>{0, 0, 0, 0}, {1, 0, 2, 1}}) {
    for (const auto& [kh, kw] : kernels) {
      for (int ic : {1, 2, 3, 5, 8}) {
        for (int stride : {1, 2}) {
          for (int dilation_h : {1, 2}) {
            const ConvGeometry g =
                Geometry(15, 13, ic, 18, kh, kw, stride, 3 - stride, pads, dilation_h, 1);
            EXPECT_EQ(PrefersRowTaps(g, Isa::kAvx2), ic * kw >= 8 && ic != 8);
            Check(MakeProblem(g, dilation_h == 1 ? 25 : 90, kInt8, seed++, stride), GetParam());
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, SumsAreOnlyAsLongAsTheWeightsAllow) {
  // 129 weights of one sign in a lane, and of both signs: 255 * 129 leaves 16 bits.
  for (WeightScheme scheme : {kTernary, kInt3, kInt4, kInt8}) {
    for (int sign : {1, -1}) {
      for (int code : {1, LargestCode(scheme) - (scheme == kInt8)}) {
        for (int period : {1, 2, 7}) {
          Problem problem = MakeProblem(Same(2, 1024, 16, 1), 1024, scheme, 1);
          if (scheme == kInt8) problem = MakeProblem(Same(2, 1024, 16, 1), 127, scheme, 1);
          int i = 0;
          for (int8_t& c : problem.weights.codes.data<int8_t>())
            c = static_cast<int8_t>(i++ % period == 0 ? sign * code : -sign * code / 2);
          problem.src.assign(problem.src.size(), 255);
          for (size_t j = 0; j < problem.src.size(); j += 3) problem.src[j] = 0;
          Check(problem, GetParam());
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, AgreesForLongInputs) {
  uint32_t seed = 100;
  for (WeightScheme scheme : {kTernary, kInt3, kInt4}) {
    for (int n : {4, 7, 16, 64, 256, 1024}) {
      for (int ic : {130, 261, 512}) {
        Check(MakeProblem(Same(2, ic, 16, 3), n, scheme, seed++), GetParam());
        Check(MakeProblem(Same(3, ic, 16, 1), n, scheme, seed++), GetParam());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(ClusterConvTest, AgreesForEveryOutputCountAndKernelSize) {
  uint32_t seed = 200;
  for (int oc : {1, 8, 15, 16, 17, 64}) {
    for (int k : {1, 3, 5, 7}) {
      for (int n : {4, 16}) {
        Check(MakeProblem(Same(6, 24, oc, k), n, kTernary, seed++), GetParam());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(ClusterConvTest, AgreesForStridesDilationsAndPadding) {
  uint32_t seed = 300;
  const std::array<int, 4> pads[] = {{0, 0, 0, 0}, {1, 1, 1, 1}, {2, 0, 1, 3}, {0, 3, 2, 1}};
  const std::pair<int, int> kernels[] = {{1, 1}, {3, 3}, {1, 7}, {7, 1}, {5, 5}, {2, 4}};
  for (const auto& pad : pads) {
    for (const auto& [kh, kw] : kernels) {
      for (int stride_h : {1, 2, 3}) {
        for (int stride_w : {1, 2}) {
          for (int dilation : {1, 2}) {
            const ConvGeometry g =
                Geometry(13, 14, 6, 18, kh, kw, stride_h, stride_w, pad, dilation, 3 - dilation);
            Check(MakeProblem(g, 4, kTernary, seed++), GetParam());
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, AgreesForEveryNumberOfPixels) {
  // Tile sizes and their remainders, for the three ways of summing.
  for (int pixels = 1; pixels <= 40; ++pixels) {
    Check(MakeProblem(Geometry(1, pixels, 16, 16, 1, 1), 4, kTernary, pixels), GetParam());
    Check(MakeProblem(Geometry(1, pixels, 16, 16, 1, 1), 8, kTernary, pixels), GetParam());
    Check(MakeProblem(Geometry(1, pixels, 32, 16, 1, 1), 64, kTernary, pixels), GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(ClusterConvTest, AgreesWhenTheImageNeedsSeveralChunks) {
  // 40 x 37 pixels x 9 taps x 2 images are more pointers, and 30 x 31 pixels of 512 channels
  // more bytes, than a chunk holds.
  Check(MakeProblem(Geometry(40, 37, 8, 20, 3, 3, 1, 1, {1, 1, 1, 1}), 4, kTernary, 1, 2),
        GetParam());
  Check(MakeProblem(Geometry(30, 31, 512, 4, 1, 1), 64, kTernary, 2), GetParam());
  // More taps than fit one chunk of pointers for a tile of pixels.
  Check(MakeProblem(Geometry(40, 40, 1, 2, 40, 40, 1, 1, {3, 3, 3, 3}), 4, kTernary, 3),
        GetParam());
}

TEST_P(ClusterConvTest, AgreesForBatches) {
  for (int batch : {2, 3, 8}) {
    Check(MakeProblem(Same(3, 8, 16, 3), 4, kTernary, batch, batch), GetParam());
    Check(MakeProblem(Same(3, 10, 16, 1), 4, kTernary, batch, batch), GetParam());
  }
}

TEST_P(ClusterConvTest, AFullyConnectedLayerIsAConvolutionOfOnePixel) {
  Problem problem = MakeProblem(Geometry(1, 1, 72, 37, 1, 1), 16, kTernary, 1, 3);
  problem.weights.codes = problem.weights.codes.Reshaped({37, 72});
  Check(problem, GetParam());
}

TEST_P(ClusterConvTest, ExtremeInt8SumsDoNotOverflow) {
  if (GetParam() == Isa::kAvx512Vnni) GTEST_SKIP() << "oneDNN runs int8 with VNNI";
  for (int code : {127, -128}) {
    for (int k : {1, 3}) {
      Problem problem = MakeProblem(Same(4, 256, 16, k), 127, kInt8, 1);
      for (int8_t& c : problem.weights.codes.data<int8_t>()) c = static_cast<int8_t>(code);
      problem.src.assign(problem.src.size(), 255);
      problem.zero_point = 255;
      Check(problem, GetParam());
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(ClusterConvTest, ExtremeSumsDoNotOverflow) {
  for (WeightScheme scheme : {kTernary, kInt3, kInt4}) {
    const int8_t max_code = static_cast<int8_t>(LargestCode(scheme));
    for (int sign : {1, -1}) {
      for (int n : {3, 4, 16, 64, 256}) {
        for (int k : {1, 3}) {
          Problem problem = MakeProblem(Same(4, 256, 16, k), n, scheme, 1);
          for (int8_t& code : problem.weights.codes.data<int8_t>()) {
            code = static_cast<int8_t>(sign * max_code);
          }
          for (int8_t& scale : problem.weights.cluster_scales.data<int8_t>()) scale = 127;
          problem.src.assign(problem.src.size(), 255);
          problem.zero_point = 255;
          Check(problem, GetParam());
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, PaddingHasTheZeroPointsValue) {
  for (int zero_point : {0, 128, 255}) {
    for (int ic : {3, 8, 64}) {
      Problem problem = MakeProblem(Same(3, ic, 16, 3), 4, kTernary, zero_point);
      problem.zero_point = static_cast<uint8_t>(zero_point);
      Check(problem, GetParam());
    }
  }
  // Nothing but padding.
  Problem problem = MakeProblem(Geometry(1, 1, 8, 16, 3, 3, 1, 1, {9, 9, 9, 9}), 4, kTernary, 1);
  Check(problem, GetParam());
}

TEST_P(ClusterConvTest, WritesOnlyTheGivenPixelsAndBlocks) {
  for (bool f32 : {false, true}) {
    for (int n : {4, 64}) {
      for (int k : {1, 3}) {
        Problem problem = MakeProblem(Same(5, 16, 40, k), n, kTernary, 1, 2);
        const std::vector<int32_t> accumulators = Accumulators(problem);
        if (!f32) ScaleToU8(problem, accumulators, 1);
        const std::vector<float> all = Expected(problem, accumulators);
        for (const auto& [pixel_begin, pixel_end] :
             {std::pair{0, 50}, {0, 1}, {7, 31}, {24, 26}, {49, 50}, {13, 13}}) {
          for (const auto& [block_begin, block_end] :
               {std::pair{0, 3}, {0, 1}, {1, 2}, {2, 3}, {1, 3}, {2, 2}}) {
            RunOptions options;
            options.pixel_begin = pixel_begin;
            options.pixel_end = pixel_end;
            options.block_begin = block_begin;
            options.block_end = block_end;
            std::vector<float> expected(all.size(), 77.0f);
            for (int p = pixel_begin; p < pixel_end; ++p) {
              for (int o = 16 * block_begin; o < std::min(40, 16 * block_end); ++o) {
                expected[p * 40 + o] = all[p * 40 + o];
              }
            }
            ExpectSame(RunVariant(problem, GetParam(), options), expected, problem);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, DisjointRangesMayRunAtOnce) {
  Problem problem = MakeProblem(Same(12, 16, 40, 3), 4, kTernary, 1, 2);
  for (size_t o = 0; o < problem.offset.size(); ++o) problem.offset[o] = static_cast<float>(o);
  const std::vector<float> expected = Expected(problem, Accumulators(problem));
  const PackedClusterConv conv = PackClusterConv(problem.g, problem.weights, GetParam());
  std::vector<float> got(expected.size());
  std::vector<std::thread> threads;
  for (int part = 0; part < 6; ++part) {
    threads.emplace_back([&, part] {
      AlignedBuffer scratch(ClusterConvScratchBytes(conv));
      ClusterConvArgs args;
      args.src = problem.src.data();
      args.batch = problem.batch;
      args.src_zero_point = problem.zero_point;
      args.multiplier = problem.multiplier.data();
      args.offset = problem.offset.data();
      args.dst_f32 = got.data();
      args.lo = problem.lo;
      args.hi = problem.hi;
      args.scratch = scratch.data();
      const int64_t half = problem.pixels() / 2 + 1;
      RunClusterConv(conv, args, part % 2 * half, part % 2 == 0 ? half : problem.pixels(), part / 2,
                     part / 2 + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
  ExpectSame(got, expected, problem);
}

TEST_P(ClusterConvTest, AddsAResidualThatMayBeTheDestination) {
  for (int oc : {5, 16, 40}) {
    for (int n : {4, 8, 64}) {
      for (int pixels : {1, 7, 25}) {
        Problem problem = MakeProblem(Geometry(1, pixels, 16, oc, 1, 1), n, kTernary, oc + n);
        const std::vector<int32_t> accumulators = Accumulators(problem);
        std::mt19937 random(9);
        problem.residual.resize(problem.outputs());
        for (uint8_t& r : problem.residual) r = static_cast<uint8_t>(Draw(random, 0, 255));
        problem.residual_multiplier = 0.37f;
        ExpectSame(RunVariant(problem, GetParam()), Expected(problem, accumulators), problem);
        ScaleToU8(problem, accumulators, 1);
        const std::vector<float> expected = Expected(problem, accumulators);
        for (Guard guard : {Guard::kAfter, Guard::kBefore}) {
          for (bool residual_is_dst : {false, true}) {
            RunOptions options;
            options.guard = guard;
            options.residual_is_dst = residual_is_dst;
            ExpectSame(RunVariant(problem, GetParam(), options), expected, problem);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(ClusterConvTest, EachFmaRoundsOnce) {
  // Multipliers and offsets of no special form: a separate multiplication and addition differs
  // in a large share of these results.
  for (bool residual : {false, true}) {
    Problem problem = MakeProblem(Same(8, 16, 33, 3), 4, kTernary, 1);
    std::mt19937 random(3);
    std::uniform_real_distribution<float> real(-1.0f, 1.0f);
    for (float& m : problem.multiplier) m = real(random) * 1e-3f;
    for (float& c : problem.offset) c = real(random);
    if (residual) {
      problem.residual.resize(problem.outputs());
      for (uint8_t& r : problem.residual) r = static_cast<uint8_t>(Draw(random, 0, 255));
      problem.residual_multiplier = real(random);
    }
    const std::vector<int32_t> accumulators = Accumulators(problem);
    ExpectSame(RunVariant(problem, GetParam()), Expected(problem, accumulators), problem);
    problem.lo = -0.25f;
    problem.hi = 0.75f;
    ExpectSame(RunVariant(problem, GetParam()), Expected(problem, accumulators), problem);
  }
}

// One channel, weight 1: the accumulator is the activation.
Problem Identity(const std::vector<uint8_t>& values) {
  Problem problem =
      MakeProblem(Geometry(1, static_cast<int>(values.size()), 1, 16, 1, 1), 4, kTernary, 1);
  for (int8_t& code : problem.weights.codes.data<int8_t>()) code = 1;
  for (int8_t& scale : problem.weights.cluster_scales.data<int8_t>()) scale = 1;
  problem.src = values;
  problem.f32 = false;
  problem.lo = 0.0f;
  problem.hi = 255.0f;
  return problem;
}

TEST_P(ClusterConvTest, RoundsTiesToEven) {
  Problem problem = Identity({0, 1, 2, 3, 5, 7, 9, 255});
  problem.multiplier.assign(16, 0.5f);
  std::vector<float> expected;
  for (float y : {0.0f, 0.0f, 1.0f, 2.0f, 2.0f, 4.0f, 4.0f, 128.0f}) {
    expected.insert(expected.end(), 16, y);
  }
  ExpectSame(RunVariant(problem, GetParam()), expected, problem);
}

TEST_P(ClusterConvTest, ClampsValuesBeyondTheIntegers) {
  Problem problem = Identity({1, 2, 255});
  for (float huge : {1e20f, kInfinity}) {
    problem.offset.assign(16, huge);
    EXPECT_THAT(RunVariant(problem, GetParam()), ElementsAreArray(std::vector<float>(48, 255.0f)));
    problem.offset.assign(16, -huge);
    EXPECT_THAT(RunVariant(problem, GetParam()), ElementsAreArray(std::vector<float>(48, 0.0f)));
  }
  problem.lo = 3.0f;
  problem.offset.assign(16, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(RunVariant(problem, GetParam()), ElementsAreArray(std::vector<float>(48, 3.0f)));
}

INSTANTIATE_TEST_SUITE_P(Isas, ClusterConvTest, kAllIsas, IsaSuffix);

}  // namespace
}  // namespace tern::kernels
