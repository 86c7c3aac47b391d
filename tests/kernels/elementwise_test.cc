// Every variant against the formulas in elementwise.h, written out here. Bit for bit.
#include "server/kernels/elementwise.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/isa_test.h"
#include "tests/testing/guarded_buffer.h"

namespace tern::kernels {
namespace {

using tern::testing::Guard;
using tern::testing::GuardedBuffer;
using ::testing::Each;

constexpr Guard kGuards[] = {Guard::kAfter, Guard::kBefore};
constexpr size_t kSizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 33, 64, 72, 257, 1000};

std::vector<uint8_t> RandomCodes(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> codes(n);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
  return codes;
}

uint8_t ToU8(float v, float lo, float hi) {
  return static_cast<uint8_t>(std::min(std::max(std::nearbyint(v), lo), hi));
}

class ElementwiseTest : public IsaTest {};

TEST_P(ElementwiseTest, QuantizesAsTheParametersSay) {
  std::vector<float> reals = {0.0f,
                              -0.0f,
                              0.25f,
                              0.75f,
                              1.25f,
                              -0.25f,
                              1e30f,
                              -1e30f,
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::denorm_min(),
                              std::numeric_limits<float>::max(),
                              3e9f,
                              -3e9f};
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-100.0f, 100.0f);
  while (reals.size() < 1000) reals.push_back(uniform(random));
  for (const QuantParams& params :
       {QuantParams{0.5f, 0}, QuantParams{0.5f, 128}, QuantParams{0.3137f, 255},
        QuantParams{1e-30f, 7}, QuantParams{1e30f, 9}}) {
    for (Guard guard : kGuards) {
      for (size_t n : kSizes) {
        const GuardedBuffer<float> src(std::vector<float>(reals.begin(), reals.begin() + n), guard);
        GuardedBuffer<uint8_t> dst(n, guard);
        QuantizeF32(GetParam(), src.data(), n, params, dst.data());
        for (size_t i = 0; i < n; ++i) {
          ASSERT_EQ(dst.data()[i], params.Quantize(src.data()[i]))
              << src.data()[i] << " scale " << params.scale << " zero point " << params.zero_point;
        }
        ASSERT_TRUE(dst.SlackIsUntouched());
      }
    }
  }
}

TEST_P(ElementwiseTest, QuantizesNaNToTheZeroPoint) {
  const std::vector<float> src(17, std::numeric_limits<float>::quiet_NaN());
  std::vector<uint8_t> dst(17);
  QuantizeF32(GetParam(), src.data(), 17, QuantParams{0.5f, 99}, dst.data());
  EXPECT_THAT(dst, Each(99));
}

TEST_P(ElementwiseTest, DequantizesAsTheParametersSay) {
  const std::vector<uint8_t> codes = RandomCodes(1000, 1);
  for (const QuantParams& params : {QuantParams{0.5f, 0}, QuantParams{0.3137f, 128}}) {
    for (Guard guard : kGuards) {
      for (size_t n : kSizes) {
        const GuardedBuffer<uint8_t> src(std::vector<uint8_t>(codes.begin(), codes.begin() + n),
                                         guard);
        GuardedBuffer<float> dst(n, guard);
        DequantizeU8(GetParam(), src.data(), n, params, dst.data());
        for (size_t i = 0; i < n; ++i) ASSERT_EQ(dst.data()[i], params.Dequantize(src.data()[i]));
        ASSERT_TRUE(dst.SlackIsUntouched());
      }
    }
  }
}

TEST_P(ElementwiseTest, LooksUpEveryCode) {
  const GuardedBuffer<uint8_t> table(RandomCodes(256, 2), Guard::kAfter);
  std::vector<uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
  const std::vector<uint8_t> more = RandomCodes(744, 3);
  codes.insert(codes.end(), more.begin(), more.end());
  for (Guard guard : kGuards) {
    for (size_t n : kSizes) {
      GuardedBuffer<uint8_t> data(std::vector<uint8_t>(codes.begin(), codes.begin() + n), guard);
      LookupU8(GetParam(), data.data(), n, table.data(), data.data());  // in place
      for (size_t i = 0; i < n; ++i) ASSERT_EQ(data.data()[i], table.data()[codes[i]]);
      ASSERT_TRUE(data.SlackIsUntouched());
    }
  }
}

TEST_P(ElementwiseTest, AddsWithOneRoundingPerFma) {
  const std::vector<uint8_t> a = RandomCodes(1000, 4);
  const std::vector<uint8_t> b = RandomCodes(1000, 5);
  struct Factors {
    float ma, mb, offset;
    uint8_t lo, hi;
  };
  // The second set makes every other sum a tie.
  for (const Factors& f :
       {Factors{0.7371f, 0.4213f, -20.123f, 0, 255}, Factors{0.5f, 1.0f, 0.0f, 10, 200},
        Factors{-1e30f, 1e30f, 3.0f, 0, 255}}) {
    for (Guard guard : kGuards) {
      for (size_t n : kSizes) {
        const GuardedBuffer<uint8_t> left(std::vector<uint8_t>(a.begin(), a.begin() + n), guard);
        GuardedBuffer<uint8_t> right(std::vector<uint8_t>(b.begin(), b.begin() + n), guard);
        AddU8(GetParam(), left.data(), f.ma, right.data(), f.mb, f.offset, f.lo, f.hi, n,
              right.data());
        for (size_t i = 0; i < n; ++i) {
          const float v = std::fma(float(a[i]), f.ma, std::fma(float(b[i]), f.mb, f.offset));
          ASSERT_EQ(right.data()[i], ToU8(v, f.lo, f.hi)) << int{a[i]} << " " << int{b[i]};
        }
        ASSERT_TRUE(right.SlackIsUntouched());
      }
    }
  }
}

TEST_P(ElementwiseTest, RequantizesEveryCode) {
  const std::vector<uint8_t> codes = RandomCodes(1000, 6);
  for (const auto& [m, offset] : {std::pair{0.5f, 0.0f}, {0.73913f, -17.391f}, {-2.5f, 300.0f}}) {
    for (Guard guard : kGuards) {
      for (size_t n : kSizes) {
        GuardedBuffer<uint8_t> data(std::vector<uint8_t>(codes.begin(), codes.begin() + n), guard);
        RequantizeU8(GetParam(), data.data(), m, offset, n, data.data());
        for (size_t i = 0; i < n; ++i) {
          ASSERT_EQ(data.data()[i], ToU8(std::fma(float(codes[i]), m, offset), 0.0f, 255.0f));
        }
        ASSERT_TRUE(data.SlackIsUntouched());
      }
    }
  }
}

TEST_P(ElementwiseTest, MultipliesEachChannelByItsFactor) {
  for (Guard guard : kGuards) {
    for (size_t channels : {1, 2, 7, 8, 9, 24, 72}) {
      for (size_t pixels : {0, 1, 3, 49}) {
        const std::vector<uint8_t> a = RandomCodes(pixels * channels, 7);
        GuardedBuffer<uint8_t> data(a, guard);
        const GuardedBuffer<uint8_t> factors(RandomCodes(channels, 8), guard);
        for (const auto& [za, zb, m, zy] :
             {std::tuple{0, 0, 0.0039f, 0}, {128, 3, 0.0131f, 128}, {255, 255, 0.5f, 255}}) {
          std::copy(a.begin(), a.end(), data.data());
          MulChannelsU8(GetParam(), data.data(), za, factors.data(), zb, m, zy, pixels, channels,
                        data.data());
          for (size_t i = 0; i < a.size(); ++i) {
            const int product = (a[i] - za) * (factors.data()[i % channels] - zb);
            ASSERT_EQ(data.data()[i], ToU8(std::fma(float(product), m, float(zy)), 0.0f, 255.0f));
          }
          ASSERT_TRUE(data.SlackIsUntouched());
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, SumsPixelsPerChannel) {
  for (Guard guard : kGuards) {
    for (size_t channels : {1, 3, 15, 16, 17, 40}) {
      for (size_t pixels : {0, 1, 49, 256, 257, 258, 600}) {
        for (bool extreme : {false, true}) {
          std::vector<uint8_t> values = RandomCodes(pixels * channels, 9);
          if (extreme) values.assign(values.size(), 255);
          const GuardedBuffer<uint8_t> src(values, guard);
          GuardedBuffer<int32_t> sums(std::vector<int32_t>(channels, -1), guard);
          SumPixelsU8(GetParam(), src.data(), pixels, channels, sums.data());
          for (size_t c = 0; c < channels; ++c) {
            int32_t expected = 0;
            for (size_t p = 0; p < pixels; ++p) expected += values[p * channels + c];
            ASSERT_EQ(sums.data()[c], expected) << channels << " " << pixels;
          }
          ASSERT_TRUE(sums.SlackIsUntouched());
        }
      }
    }
  }
}

// The product cancels against the offset down to a tie, give or take the error of the product
// in f32: rounding the product by itself loses the direction in which it lies.
TEST_P(ElementwiseTest, EachFmaRoundsOnce) {
  int telling = 0;
  for (int code = 1; code < 256; ++code) {
    const float m = -253.5f / static_cast<float>(code);
    const float offset = 255.0f;
    volatile float product = static_cast<float>(code) * m;
    const uint8_t expected = ToU8(std::fma(static_cast<float>(code), m, offset), 0.0f, 255.0f);
    telling += expected != ToU8(product + offset, 0.0f, 255.0f);

    const std::vector<uint8_t> codes(8, static_cast<uint8_t>(code));
    const std::vector<uint8_t> zeros(8, 0);
    std::vector<uint8_t> dst(8);
    RequantizeU8(GetParam(), codes.data(), m, offset, 8, dst.data());
    ASSERT_THAT(dst, Each(expected));
    AddU8(GetParam(), codes.data(), m, zeros.data(), 1.0f, offset, 0, 255, 8, dst.data());
    ASSERT_THAT(dst, Each(expected));
    AddU8(GetParam(), zeros.data(), 1.0f, codes.data(), m, offset, 0, 255, 8, dst.data());
    ASSERT_THAT(dst, Each(expected));
    const std::vector<uint8_t> ones(8, 1);
    MulChannelsU8(GetParam(), codes.data(), 0, ones.data(), 0, m, 255, 1, 8, dst.data());
    ASSERT_THAT(dst, Each(expected));
  }
  EXPECT_GT(telling, 10);
}

INSTANTIATE_TEST_SUITE_P(Isas, ElementwiseTest, kAllIsas, IsaSuffix);

}  // namespace
}  // namespace tern::kernels
