// Every variant against the formulas in elementwise.h, written out here. Bit for bit.
#include "server/kernels/elementwise.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/kernels/int8_conv.h"
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

TEST_P(ElementwiseTest, ScalesEveryChannelByItself) {
  std::mt19937 random(8);
  for (Guard guard : kGuards) {
    for (size_t channels : {1, 7, 8, 9, 24, 33}) {
      for (size_t pixels : {0, 1, 5}) {
        const std::vector<uint8_t> codes = RandomCodes(pixels * channels, 6);
        std::vector<float> multiplier(channels), offset(channels);
        for (float& m : multiplier) m = static_cast<float>(random() % 4001) / 1000.0f - 2.0f;
        // Halves: the results hit ties, which go to even.
        for (float& o : offset) o = static_cast<float>(random() % 600) / 2.0f - 20.0f;
        const FloatEpilogue scale{multiplier.data(), offset.data(), 0.0f, 3.0f, 250.0f};
        GuardedBuffer<uint8_t> data(codes, guard);  // in place
        ScaleChannelsU8(GetParam(), data.data(), scale, pixels, channels, data.data());
        for (size_t i = 0; i < codes.size(); ++i) {
          const size_t c = i % channels;
          ASSERT_EQ(data.data()[i], ToU8(std::fma(float(codes[i]), multiplier[c], offset[c]), 3.0f,
                                         250.0f));
        }
        ASSERT_TRUE(data.SlackIsUntouched());
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

TEST_P(ElementwiseTest, FinishesSumsAsTheConvolutionsDo) {
  std::mt19937 random(3);
  for (size_t channels : {1, 7, 8, 20, 32}) {
    constexpr size_t kPixels = 11;
    std::vector<int32_t> acc(kPixels * channels);
    for (int32_t& a : acc) a = static_cast<int32_t>(random()) >> 8;
    std::vector<float> multiplier(channels), offset(channels);
    for (float& m : multiplier) m = std::ldexp(static_cast<float>(random() % 1000 + 500), -25);
    for (float& c : offset) c = static_cast<float>(random() % 256) - 0.5f;
    const std::vector<uint8_t> residual = RandomCodes(acc.size(), 5);
    for (bool with_residual : {false, true}) {
      const FloatEpilogue epilogue{multiplier.data(), offset.data(), 0.37f, 5.0f, 240.0f};
      for (Guard guard : kGuards) {
        const GuardedBuffer<int32_t> src(acc, guard);
        GuardedBuffer<uint8_t> dst(residual, guard);
        GuardedBuffer<float> real(std::vector<float>(acc.size()), guard);
        const GuardedBuffer<uint8_t> r(residual, guard);
        FinishS32(GetParam(), src.data(), with_residual ? dst.data() : nullptr, epilogue, kPixels,
                  channels, dst.data(), nullptr);
        FinishS32(GetParam(), src.data(), with_residual ? r.data() : nullptr, epilogue, kPixels,
                  channels, nullptr, real.data());
        for (size_t i = 0; i < acc.size(); ++i) {
          float v =
              std::fma(static_cast<float>(acc[i]), multiplier[i % channels], offset[i % channels]);
          if (with_residual) v = std::fma(static_cast<float>(residual[i]), 0.37f, v);
          ASSERT_EQ(dst.data()[i], ToU8(v, 5.0f, 240.0f)) << channels << " " << i;
          ASSERT_EQ(real.data()[i], std::min(std::max(v, 5.0f), 240.0f)) << channels << " " << i;
        }
        ASSERT_TRUE(dst.SlackIsUntouched());
        ASSERT_TRUE(real.SlackIsUntouched());
      }
    }
  }
}

// Constants that 32 bits hold, and ones that need 64, down to the limits of FixedPointLayer.
TEST_P(ElementwiseTest, RequantizesSumsWithIntegersAlone) {
  for (bool narrow : {true, false}) {
    for (size_t channels : {1, 3, 8, 15, 16, 17, 27, 40, 64}) {
      for (bool with_residual : {false, true}) {
        std::mt19937_64 random(channels);
        const auto draw = [&](int64_t lo, int64_t hi) {
          return lo + static_cast<int64_t>(random() % static_cast<uint64_t>(hi - lo + 1));
        };
        constexpr size_t kPixels = 19;
        const int64_t top = narrow ? 1 << 22 : std::numeric_limits<int32_t>::max();
        FixedPointLayer layer;
        layer.shift = narrow ? 20 : 40;
        layer.residual_multiplier = with_residual ? int64_t{1} << (narrow ? 20 : 40) : 0;
        layer.lo = 3;
        layer.hi = 250;
        for (size_t c = 0; c < channels; ++c) {
          layer.multiplier.push_back(static_cast<int32_t>(draw(1, narrow ? 127 : 127 << 24)));
          layer.offset.push_back(draw(-(int64_t{1} << (narrow ? 29 : 58)), 1 << 29));
        }
        if (narrow) layer.narrow_offset.assign(layer.offset.begin(), layer.offset.end());
        std::vector<int32_t> acc(kPixels * channels);
        for (int32_t& a : acc) a = static_cast<int32_t>(draw(-top, top));
        const std::vector<uint8_t> residual = RandomCodes(acc.size(), 4);
        for (Guard guard : kGuards) {
          const GuardedBuffer<int32_t> src(acc, guard);
          GuardedBuffer<uint8_t> dst(residual, guard);
          RequantizeS32(GetParam(), src.data(), with_residual ? dst.data() : nullptr, layer,
                        kPixels, channels, dst.data());
          for (size_t i = 0; i < acc.size(); ++i) {
            const size_t c = i % channels;
            __int128 sum = __int128{acc[i]} * layer.multiplier[c] + layer.offset[c];
            if (with_residual) sum += __int128{residual[i]} * layer.residual_multiplier;
            const __int128 y = sum >> layer.shift;
            ASSERT_EQ(dst.data()[i], static_cast<int>(y < 3     ? 3
                                                      : y > 250 ? 250
                                                                : y))
                << channels << " channels, element " << i;
          }
          ASSERT_TRUE(dst.SlackIsUntouched());
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, AddsAndMultipliesWithIntegersAlone) {
  for (int exponent : {0, 3, 14, 22, 23, 30, 40}) {
    for (size_t n : kSizes) {
      const std::vector<uint8_t> a = RandomCodes(n, 5), b = RandomCodes(n, 6);
      FixedPointAdd add;
      add.multiplier_a = int64_t{1} << exponent;
      add.multiplier_b = exponent > 2 ? 4 : 1;
      add.shift = exponent;
      add.offset = (int64_t{1} << exponent) / 2 - 30 * add.multiplier_b;
      add.lo = 7;
      add.hi = 201;
      // (a - 100) (b - 40) in units that the result counts in 2^12, or far coarser or finer ones.
      FixedPointMap map;
      map.multiplier = add.multiplier_a;
      map.shift = std::min(exponent + 12, kMaxShift);
      map.offset = (int64_t{5} << map.shift) + (int64_t{1} << map.shift) / 2;
      for (Guard guard : kGuards) {
        const GuardedBuffer<uint8_t> p(a, guard), q(b, guard);
        GuardedBuffer<uint8_t> sum(std::vector<uint8_t>(n), guard);
        GuardedBuffer<uint8_t> product(std::vector<uint8_t>(2 * n), guard);
        AddFixedU8(GetParam(), p.data(), q.data(), add, n, sum.data());
        std::vector<uint8_t> twice = a;
        twice.insert(twice.end(), a.begin(), a.end());
        MulChannelsFixedU8(GetParam(), twice.data(), 100, q.data(), 40, map, 2, n, product.data());
        for (size_t i = 0; i < n; ++i) {
          const int64_t s =
              (a[i] * add.multiplier_a + b[i] * add.multiplier_b + add.offset) >> add.shift;
          ASSERT_EQ(sum.data()[i], std::clamp<int64_t>(s, 7, 201)) << exponent;
          const int64_t v = ((a[i] - 100) * (b[i] - 40) * map.multiplier + map.offset) >> map.shift;
          ASSERT_EQ(product.data()[i], std::clamp<int64_t>(v, 0, 255)) << exponent;
          ASSERT_EQ(product.data()[n + i], product.data()[i]) << exponent;
        }
        ASSERT_TRUE(sum.SlackIsUntouched());
        ASSERT_TRUE(product.SlackIsUntouched());
      }
    }
  }
}

// Every s8 weight beside every u8 code: nothing saturates.
TEST_P(ElementwiseTest, Int8ConvolutionIsExactForFullEightBitWeights) {
  for (int groups : {1, 2, 6}) {
    for (bool extreme : {false, true}) {
      ConvGeometry g;
      g.ih = 5, g.iw = 6, g.ic = 6 * 19, g.oc = 18, g.kh = 3, g.kw = 2;
      g.stride_h = 2, g.pad_top = 1, g.pad_left = 1, g.dilation_w = 2;
      g.oh = 3, g.ow = 5;
      const int channels = g.ic / groups;
      std::mt19937 random(7);
      std::vector<int8_t> weights(static_cast<size_t>(g.oc) * channels * g.kh * g.kw);
      for (int8_t& w : weights) {
        w = extreme ? int8_t{-128} : static_cast<int8_t>(random() % 256 - 128);
      }
      std::vector<uint8_t> x = RandomCodes(2 * g.ih * g.iw * g.ic, 8);
      if (extreme) x.assign(x.size(), 255);
      const GuardedBuffer<uint8_t> src(x, Guard::kAfter);
      const size_t outputs = 2 * g.oh * g.ow * g.oc;
      GuardedBuffer<int32_t> dst(std::vector<int32_t>(outputs, 77), Guard::kAfter);
      const PackedInt8Conv conv = PackInt8Conv(g, groups, weights, 99, GetParam());
      RunInt8Conv(conv, src.data(), 0, 11, dst.data());
      RunInt8Conv(conv, src.data(), 11, 2 * g.oh * g.ow, dst.data());
      for (size_t i = 0; i < outputs; ++i) {
        const int o = static_cast<int>(i) % g.oc, p = static_cast<int>(i) / g.oc;
        const int image = p / (g.oh * g.ow), oy = p / g.ow % g.oh, ox = p % g.ow;
        int64_t sum = 0;
        for (int c = 0; c < channels; ++c) {
          for (int ky = 0; ky < g.kh; ++ky) {
            for (int kx = 0; kx < g.kw; ++kx) {
              const int iy = 2 * oy - 1 + ky, ix = ox - 1 + 2 * kx;
              const bool inside = iy >= 0 && iy < g.ih && ix >= 0 && ix < g.iw;
              const int in = o / (g.oc / groups) * channels + c;
              const int code = inside ? x[((image * g.ih + iy) * g.iw + ix) * g.ic + in] : 99;
              sum += code * weights[((o * channels + c) * g.kh + ky) * g.kw + kx];
            }
          }
        }
        ASSERT_EQ(dst.data()[i], sum) << groups << " groups, element " << i;
      }
      ASSERT_TRUE(dst.SlackIsUntouched());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, ElementwiseTest, kAllIsas, IsaSuffix);

}  // namespace
}  // namespace tern::kernels
