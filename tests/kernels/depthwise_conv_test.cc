// Every variant against the definition in depthwise_conv.h, written out here. Results must be equal
// bit for bit.
#include "server/kernels/depthwise_conv.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>

#include "gtest/gtest.h"
#include "tests/kernels/conv_geometry.h"
#include "tests/kernels/isa_test.h"
#include "tests/testing/guarded_buffer.h"

namespace tern::kernels {
namespace {

using tern::testing::Guard;
using tern::testing::GuardedBuffer;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One convolution with its data.
struct Problem {
  ConvGeometry g;
  int batch = 1;
  std::vector<int8_t> weights;
  std::vector<uint8_t> src;
  uint8_t zero_point = 0;

  int64_t rows() const { return int64_t{batch} * g.oh; }
  size_t outputs() const { return static_cast<size_t>(rows()) * g.ow * g.oc; }
};

// Pads: top, left, bottom, right.
ConvGeometry Geometry(int ih, int iw, int channels, int kh, int kw, int stride_h = 1,
                      int stride_w = 1, std::array<int, 4> pads = {0, 0, 0, 0}, int dilation_h = 1,
                      int dilation_w = 1) {
  return testing::Geometry(ih, iw, channels, channels, kh, kw, stride_h, stride_w, pads, dilation_h,
                           dilation_w);
}

ConvGeometry Same(int ih, int iw, int channels, int k, int stride = 1) {
  return Geometry(ih, iw, channels, k, k, stride, stride, {k / 2, k / 2, k / 2, k / 2});
}

int Draw(std::mt19937& random, int lo, int hi) {
  return lo + static_cast<int>(random() % static_cast<uint32_t>(hi - lo + 1));
}

// Random everything; a third of weights and codes at the ends of their ranges.
Problem MakeProblem(const ConvGeometry& g, uint32_t seed, int batch = 1) {
  std::mt19937 random(seed);
  Problem problem;
  problem.g = g;
  problem.batch = batch;
  problem.weights.resize(static_cast<size_t>(g.oc) * g.kh * g.kw);
  for (int8_t& w : problem.weights) {
    const int kind = Draw(random, 0, 5);
    w = static_cast<int8_t>(kind == 0 ? -128 : kind == 1 ? 127 : Draw(random, -128, 127));
  }
  problem.src.resize(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  for (uint8_t& x : problem.src) {
    x = static_cast<uint8_t>(Draw(random, 0, 2) == 0 ? 255 : Draw(random, 0, 255));
  }
  problem.zero_point = static_cast<uint8_t>(Draw(random, 0, 255));
  return problem;
}

std::vector<int32_t> Sums(const Problem& problem) {
  const ConvGeometry& g = problem.g;
  std::vector<int32_t> sums;
  sums.reserve(problem.outputs());
  for (int image = 0; image < problem.batch; ++image) {
    for (int oy = 0; oy < g.oh; ++oy) {
      for (int ox = 0; ox < g.ow; ++ox) {
        for (int c = 0; c < g.oc; ++c) {
          int64_t sum = 0;
          for (int ky = 0; ky < g.kh; ++ky) {
            for (int kx = 0; kx < g.kw; ++kx) {
              const int y = oy * g.stride_h - g.pad_top + ky * g.dilation_h;
              const int x = ox * g.stride_w - g.pad_left + kx * g.dilation_w;
              const bool inside = y >= 0 && y < g.ih && x >= 0 && x < g.iw;
              const int code = inside ? problem.src[((image * g.ih + y) * g.iw + x) * g.ic + c]
                                      : problem.zero_point;
              sum += problem.weights[(c * g.kh + ky) * g.kw + kx] * code;
            }
          }
          sums.push_back(static_cast<int32_t>(sum));
        }
      }
    }
  }
  return sums;
}

std::string Describe(const Problem& problem) {
  const ConvGeometry& g = problem.g;
  std::ostringstream out;
  out << "batch " << problem.batch << " in " << g.ih << "x" << g.iw << "x" << g.ic << " out "
      << g.oh << "x" << g.ow << " kernel " << g.kh << "x" << g.kw << " stride " << g.stride_h << ","
      << g.stride_w << " pad " << g.pad_top << "," << g.pad_left << " dilation " << g.dilation_h
      << "," << g.dilation_w << " zero point " << int{problem.zero_point};
  return out.str();
}

template <typename T>
void ExpectSame(const GuardedBuffer<T>& got, const std::vector<T>& expected, const Problem& problem,
                const char* what) {
  EXPECT_TRUE(got.SlackIsUntouched()) << what << ", " << Describe(problem);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(got.data() + i, &expected[i], sizeof(T)) != 0) {
      FAIL() << what << ": pixel " << i / problem.g.oc << " channel " << i % problem.g.oc
             << ": got " << +got.data()[i] << ", expected " << +expected[i] << "\n"
             << Describe(problem);
    }
  }
}

// A call's buffers, all of which end or begin at unmapped pages; the scratch at the alignment that
// is promised.
class Runner {
 public:
  Runner(const Problem& problem, Isa isa, Guard guard)
      : problem_(problem),
        conv_(PackDepthwiseConv(problem.g, problem.weights, isa)),
        src_(problem.src, guard),
        scratch_(std::vector<uint8_t>((DepthwiseConvScratchBytes(conv_) + 63) / 64 * 64, 0xEE),
                 guard) {}

  // In two ranges of rows.
  void Run(ClusterConvArgs args) {
    args.src = src_.data();
    args.batch = problem_.batch;
    args.src_zero_point = problem_.zero_point;
    args.scratch = scratch_.data();
    const int64_t cut = problem_.rows() * 2 / 3;
    RunDepthwiseConv(conv_, args, cut, problem_.rows());
    RunDepthwiseConv(conv_, args, 0, cut);
    EXPECT_TRUE(scratch_.SlackIsUntouched());
  }

 private:
  const Problem& problem_;
  const PackedDepthwiseConv conv_;
  const GuardedBuffer<uint8_t> src_;
  GuardedBuffer<uint8_t> scratch_;
};

// The sums; codes and reals by the float epilogue, with and without a residual, which is where the
// codes go; and codes by the fixed-point one.
void Check(const Problem& problem, Isa isa) {
  if (!IsTurn()) return;
  const ConvGeometry& g = problem.g;
  const std::vector<int32_t> sums = Sums(problem);
  const size_t outputs = sums.size();
  std::mt19937 random(static_cast<uint32_t>(outputs));
  double largest = 1;
  for (int32_t sum : sums) largest = std::max(largest, std::abs(static_cast<double>(sum)));
  std::vector<float> multiplier(g.oc), offset(g.oc);
  for (float& m : multiplier) m = static_cast<float>(Draw(random, 50, 400) / largest);
  for (float& c : offset) c = static_cast<float>(Draw(random, 100, 300)) / 2.0f;
  // Beyond s32, and not a number.
  multiplier[random() % g.oc] = 1e30f;
  offset[random() % g.oc] = std::numeric_limits<float>::quiet_NaN();
  std::vector<uint8_t> residual(outputs);
  for (uint8_t& r : residual) r = static_cast<uint8_t>(Draw(random, 0, 255));
  FixedPointLayer layer;
  layer.shift = 12;
  const int room = static_cast<int>((1 << 28) / largest);
  for (int c = 0; c < g.oc; ++c) {
    layer.multiplier.push_back(
        std::clamp(static_cast<int>((Draw(random, 50, 400) << 12) / largest), 1, room));
    layer.narrow_offset.push_back(Draw(random, -(1 << 20), 1 << 20));
    layer.offset.push_back(layer.narrow_offset.back());
  }
  layer.lo = Draw(random, 0, 20);
  layer.hi = Draw(random, 230, 255);

  Guard guard = Guard::kBefore;
  const auto next = [&] { return guard = guard == Guard::kAfter ? Guard::kBefore : Guard::kAfter; };
  {
    GuardedBuffer<int32_t> dst(std::vector<int32_t>(outputs, 77), next());
    ClusterConvArgs args;
    args.dst_s32 = dst.data();
    Runner(problem, isa, guard).Run(args);
    ExpectSame(dst, sums, problem, "sums");
  }
  for (bool with_residual : {false, true}) {
    if (::testing::Test::HasFatalFailure()) return;
    ClusterConvArgs args;
    std::vector<uint8_t> codes(outputs);
    GuardedBuffer<uint8_t> dst(residual, next());
    args.dst = dst.data();
    if (with_residual) args.residual = dst.data();
    layer.residual_multiplier = with_residual ? 1 << 10 : 0;
    for (size_t i = 0; i < outputs; ++i) {
      const int64_t sum = int64_t{sums[i]} * layer.multiplier[i % g.oc] + layer.offset[i % g.oc] +
                          residual[i] * layer.residual_multiplier;
      codes[i] = static_cast<uint8_t>(std::clamp<int64_t>(sum >> layer.shift, layer.lo, layer.hi));
    }
    args.fixed = &layer;
    Runner(problem, isa, guard).Run(args);
    ExpectSame(dst, codes, problem, "fixed point");
  }
  for (bool with_residual : {false, true}) {
    for (bool real : {false, true}) {
      if (::testing::Test::HasFatalFailure()) return;
      ClusterConvArgs args;
      args.lo = real ? -kInfinity : static_cast<float>(Draw(random, 0, 20));
      args.hi = real ? 200.5f : static_cast<float>(Draw(random, 230, 255));
      args.multiplier = multiplier.data();
      args.offset = offset.data();
      args.residual_multiplier = 0.37f;
      std::vector<float> reals(outputs);
      for (size_t i = 0; i < outputs; ++i) {
        float v = std::fma(static_cast<float>(sums[i]), multiplier[i % g.oc], offset[i % g.oc]);
        if (with_residual) v = std::fma(static_cast<float>(residual[i]), 0.37f, v);
        if (!real) v = std::nearbyint(v);
        reals[i] = std::isnan(v) ? args.lo : std::min(std::max(v, args.lo), args.hi);
      }
      if (real) {
        const GuardedBuffer<uint8_t> r(residual, next());
        GuardedBuffer<float> dst(std::vector<float>(outputs, 77.0f), guard);
        args.dst_f32 = dst.data();
        if (with_residual) args.residual = r.data();
        Runner(problem, isa, guard).Run(args);
        ExpectSame(dst, reals, problem, "reals");
      } else {
        GuardedBuffer<uint8_t> dst(residual, next());
        args.dst = dst.data();
        if (with_residual) args.residual = dst.data();
        Runner(problem, isa, guard).Run(args);
        ExpectSame(dst, std::vector<uint8_t>(reals.begin(), reals.end()), problem, "codes");
      }
    }
  }
}

class DepthwiseConvTest : public IsaTest {};

TEST_P(DepthwiseConvTest, AgreesForEveryChannelCount) {
  uint32_t seed = 1;
  for (int k : {3, 5, 4}) {
    for (int stride : {1, 2}) {
      for (int channels = 1; channels <= 70; channels += channels < 34 ? 1 : 5) {
        Check(MakeProblem(Same(7, 6, channels, k, stride), seed++), GetParam());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Tiles and what is left of them, patches beside and around them, in both directions.
TEST_P(DepthwiseConvTest, AgreesForEverySize) {
  uint32_t seed = 1000;
  for (int k : {3, 5}) {
    for (int stride : {1, 2}) {
      for (int size = 1; size <= 21; ++size) {
        for (int channels : {16, 40}) {
          Check(MakeProblem(Same(size, 22 - size, channels, k, stride), seed++), GetParam());
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(DepthwiseConvTest, AgreesForKernelsStridesDilationsAndPadding) {
  uint32_t seed = 2000;
  const std::array<int, 4> pads[] = {
      {0, 0, 0, 0}, {1, 1, 1, 1}, {2, 0, 1, 3}, {0, 3, 2, 1}, {5, 6, 6, 5}};
  const std::pair<int, int> kernels[] = {{1, 1}, {2, 2}, {3, 3}, {1, 7}, {7, 1},
                                         {5, 5}, {2, 4}, {7, 7}, {3, 5}, {9, 2}};
  for (const auto& pad : pads) {
    for (const auto& [kh, kw] : kernels) {
      for (int stride_h : {1, 2, 3}) {
        for (int stride_w : {1, 2}) {
          for (int dilation : {1, 2}) {
            const ConvGeometry g = Geometry(19, 20, 33, kh, kw, stride_h, stride_w, pad,
                                            kh < 9 ? dilation : 1, kw < 7 ? 3 - dilation : 1);
            Check(MakeProblem(g, seed++), GetParam());
            if (HasFatalFailure()) return;
          }
          Check(MakeProblem(Geometry(13, 20, 32, kh, kw, stride_h, stride_w, pad), seed++),
                GetParam());
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(DepthwiseConvTest, AgreesForLargeImagesAndManyChannels) {
  uint32_t seed = 3000;
  Check(MakeProblem(Same(45, 131, 48, 3), seed++), GetParam());
  Check(MakeProblem(Same(45, 131, 20, 5), seed++), GetParam());
  Check(MakeProblem(Same(40, 140, 32, 5, 2), seed++), GetParam());
  Check(MakeProblem(Same(30, 30, 270, 3, 2), seed++), GetParam());
  // A kernel that is larger than a patch usually is.
  Check(MakeProblem(Geometry(64, 61, 33, 60, 59, 1, 1, {3, 0, 0, 3}), seed++), GetParam());
}

TEST_P(DepthwiseConvTest, AgreesForBatches) {
  for (int batch : {2, 3, 5}) {
    Check(MakeProblem(Same(7, 7, 35, 3), batch, batch), GetParam());
    Check(MakeProblem(Same(9, 8, 32, 5, 2), batch, batch), GetParam());
  }
}

// Nothing saturates between -128 x 255 and 127 x 255, whatever else is in the sum.
TEST_P(DepthwiseConvTest, ExtremeCodesAreExact) {
  for (int k : {3, 5, 6}) {
    for (int8_t w : {int8_t{-128}, int8_t{127}}) {
      for (uint8_t zero_point : {uint8_t{0}, uint8_t{255}}) {
        Problem problem = MakeProblem(Same(9, 9, 48, k), k);
        problem.weights.assign(problem.weights.size(), w);
        problem.src.assign(problem.src.size(), 255);
        problem.zero_point = zero_point;
        Check(problem, GetParam());
        if (HasFatalFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, DepthwiseConvTest, kAllIsas, IsaSuffix);

}  // namespace
}  // namespace tern::kernels
