// A convolution with its data, and its comparison with the scalar definition of the cluster
// convolutions, which has its own tests. Sums and results must be equal bit for bit.
#ifndef TERN_TESTS_KERNELS_CONV_PROBLEM_H_
#define TERN_TESTS_KERNELS_CONV_PROBLEM_H_

#include <algorithm>
#include <random>
#include <type_traits>
#include <vector>

#include "gtest/gtest.h"
#include "server/kernels/cluster_conv.h"
#include "server/tensor/cluster.h"
#include "tests/testing/guarded_buffer.h"

namespace tern::kernels::testing {

using tern::testing::Guard;
using tern::testing::GuardedBuffer;

struct Problem {
  ConvGeometry g;
  int batch = 1;
  QuantizedWeights weights;
  std::vector<uint8_t> src, residual;
  uint8_t zero_point = 0;
  std::vector<float> multiplier, offset;
  FixedPointLayer fixed;

  size_t outputs() const { return size_t{1} * batch * g.oh * g.ow * g.oc; }
};

// Random everything; int8 weights are -128..127.
inline Problem MakeProblem(const ConvGeometry& g, WeightScheme scheme, int n, uint32_t seed,
                           int batch = 1) {
  std::mt19937 random(seed);
  const auto draw = [&](int lo, int hi) {
    return lo + static_cast<int>(random() % static_cast<uint32_t>(hi - lo + 1));
  };
  Problem p;
  p.g = g;
  p.batch = batch;
  p.weights.scheme = scheme;
  const bool clustered = IsClustered(scheme);
  const int largest = LargestCode(scheme);
  p.weights.codes = Tensor(DType::kS8, {g.oc, g.ic, g.kh, g.kw});
  for (int8_t& code : p.weights.codes.data<int8_t>())
    code = static_cast<int8_t>(draw(-largest, clustered ? largest : largest - 1));
  if (clustered) {
    p.weights.cluster_size = n;
    p.weights.cluster_scales = Tensor(DType::kS8, {g.oc, ClusterMap(g.ic, n).clusters()});
    for (int8_t& scale : p.weights.cluster_scales.data<int8_t>())
      scale = static_cast<int8_t>(draw(1, 127));
  }
  p.src.resize(static_cast<size_t>(batch) * g.ih * g.iw * g.ic);
  for (uint8_t& x : p.src) x = static_cast<uint8_t>(draw(0, 255));
  p.residual.resize(p.outputs());
  for (uint8_t& r : p.residual) r = static_cast<uint8_t>(draw(0, 255));
  p.zero_point = static_cast<uint8_t>(draw(0, 255));
  for (int o = 0; o < g.oc; ++o) {
    p.multiplier.push_back(static_cast<float>(draw(1, 1000)) * 1e-6f);
    p.offset.push_back(static_cast<float>(draw(0, 2550)) * 0.1f);
    p.fixed.multiplier.push_back(draw(1, 3));
    p.fixed.offset.push_back(draw(-1000000, 1000000));
  }
  p.fixed.narrow_offset.assign(p.fixed.offset.begin(), p.fixed.offset.end());
  p.fixed.residual_multiplier = 1 << 10;
  p.fixed.shift = 12;
  return p;
}

enum Output { kSums, kFloat, kCodes, kCodesInPlace, kFixed, kOutputs };

// The bytes that `run` leaves in the destination.
template <typename T, typename Run>
std::vector<T> Result(const Problem& p, Output output, size_t scratch_bytes, const Run& run) {
  const Guard guard = output % 2 == 0 ? Guard::kAfter : Guard::kBefore;
  const GuardedBuffer<uint8_t> src(p.src, guard);
  const GuardedBuffer<uint8_t> residual(p.residual, guard);
  GuardedBuffer<T> dst(std::vector<T>(p.outputs(), T{77}), guard);
  GuardedBuffer<uint8_t> scratch(std::vector<uint8_t>((scratch_bytes + 63) / 64 * 64, 0xEE), guard);
  ClusterConvArgs args;
  args.src = src.data();
  args.batch = p.batch;
  args.src_zero_point = p.zero_point;
  args.multiplier = p.multiplier.data();
  args.offset = p.offset.data();
  args.scratch = scratch.data();
  if constexpr (sizeof(T) == 1) {
    args.dst = dst.data();
    args.residual = residual.data();
    args.residual_multiplier = 0.37f;
    args.lo = 3.0f;
    args.hi = 250.0f;
    if (output == kFixed) args.fixed = &p.fixed;
    if (output == kCodesInPlace) {
      std::copy(p.residual.begin(), p.residual.end(), dst.data());
      args.residual = dst.data();
    }
  } else if constexpr (std::is_same_v<T, float>) {
    args.dst_f32 = dst.data();
    args.lo = -1e9f;
    args.hi = 1e9f;
  } else {
    args.dst_s32 = dst.data();
  }
  run(args);
  EXPECT_TRUE(dst.SlackIsUntouched());
  EXPECT_TRUE(scratch.SlackIsUntouched());
  return dst.ToVector();
}

// Compares what `run` gives with the definition. scratch_bytes: of the kernel that it runs.
template <typename T, typename Run>
void CompareOne(const Problem& p, Output output, size_t scratch_bytes, const Run& run) {
  const PackedClusterConv reference = PackClusterConv(p.g, p.weights, Isa::kScalar);
  const auto expected =
      Result<T>(p, output, ClusterConvScratchBytes(reference), [&](const ClusterConvArgs& args) {
        RunClusterConv(reference, args, 0, int64_t{p.batch} * p.g.oh * p.g.ow, 0,
                       OutputBlocks(p.g));
      });
  const auto got = Result<T>(p, output, scratch_bytes, run);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i], expected[i])
        << "output kind " << output << " pixel " << i / p.g.oc << " output channel " << i % p.g.oc
        << " " << Name(p.weights.scheme) << " N=" << p.weights.cluster_size << " batch " << p.batch
        << " in " << p.g.ih << "x" << p.g.iw << "x" << p.g.ic << " out " << p.g.oh << "x" << p.g.ow
        << "x" << p.g.oc << " kernel " << p.g.kh << " stride " << p.g.stride_h;
  }
}

// All kinds of output.
template <typename Run>
void CompareWithDefinition(const Problem& p, size_t scratch_bytes, const Run& run) {
  CompareOne<int32_t>(p, kSums, scratch_bytes, run);
  CompareOne<float>(p, kFloat, scratch_bytes, run);
  for (Output output : {kCodes, kCodesInPlace, kFixed})
    CompareOne<uint8_t>(p, output, scratch_bytes, run);
}

}  // namespace tern::kernels::testing

#endif  // TERN_TESTS_KERNELS_CONV_PROBLEM_H_
