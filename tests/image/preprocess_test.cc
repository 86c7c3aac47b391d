#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "server/image/image.h"

namespace tern::image {
namespace {

using absl::StatusCode;
using v1::Preprocessing;

// Red counts columns, green rows, blue is 200.
Image Ramp(int width, int height) {
  Image image{width, height, {}};
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      image.pixels.push_back(static_cast<uint8_t>(x));
      image.pixels.push_back(static_cast<uint8_t>(y));
      image.pixels.push_back(200);
    }
  }
  return image;
}

std::vector<float> Preprocessed(const Image& image, const Preprocessing& contract, int height,
                                int width) {
  EXPECT_TRUE(ValidatePreprocessing(contract, height, width).ok());
  std::vector<float> out(static_cast<size_t>(height) * width * 3, -1000.0f);
  const absl::Status status = Preprocess(image, contract, height, width, absl::MakeSpan(out));
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

TEST(PreprocessTest, NormalisesEachChannelByItsOwnMeanAndDeviation) {
  Preprocessing contract = *NamedPreprocessing("cifar10");
  const std::vector<float> out = Preprocessed(Ramp(32, 32), contract, 32, 32);
  const double mean[] = {0.485, 0.456, 0.406}, deviation[] = {0.229, 0.224, 0.225};
  for (int y = 0; y < 32; ++y) {
    for (int x = 0; x < 32; ++x) {
      const double pixel[] = {1.0 * x, 1.0 * y, 200};
      for (int c = 0; c < 3; ++c) {
        ASSERT_NEAR(out[(y * 32 + x) * 3 + c], (pixel[c] / 255 - mean[c]) / deviation[c], 1e-6);
      }
    }
  }
}

TEST(PreprocessTest, BgrSwapsTheChannelsButNotMeanAndDeviation) {
  Preprocessing contract;
  contract.set_color_order(Preprocessing::BGR);
  for (float mean : {103.0f, 116.0f, 123.0f}) contract.add_mean(mean);
  for (float deviation : {1.0f, 2.0f, 4.0f}) contract.add_std(deviation);
  const std::vector<float> out = Preprocessed(Ramp(4, 3), contract, 3, 4);
  EXPECT_EQ(out[(1 * 4 + 2) * 3 + 0], (200.0f - 103.0f) / 1.0f);
  EXPECT_EQ(out[(1 * 4 + 2) * 3 + 1], (1.0f - 116.0f) / 2.0f);
  EXPECT_EQ(out[(1 * 4 + 2) * 3 + 2], (2.0f - 123.0f) / 4.0f);
}

TEST(PreprocessTest, AnEmptyContractPassesPixelsThrough) {
  const std::vector<float> out = Preprocessed(Ramp(5, 2), Preprocessing(), 2, 5);
  EXPECT_EQ(out[(1 * 5 + 3) * 3 + 0], 3.0f);
  EXPECT_EQ(out[(1 * 5 + 3) * 3 + 1], 1.0f);
  EXPECT_EQ(out[(1 * 5 + 3) * 3 + 2], 200.0f);
}

// torchvision: int(round((have - want) / 2.0)), and Python rounds halves to even.
TEST(PreprocessTest, CentreCropRoundsHalvesToEven) {
  Preprocessing contract;
  contract.set_center_crop(true);
  const struct {
    int have, want, first;
  } cases[] = {{10, 10, 0}, {11, 10, 0}, {12, 10, 1}, {13, 10, 2},
               {14, 10, 2}, {15, 10, 2}, {17, 10, 4}};
  for (const auto& c : cases) {
    const std::vector<float> out = Preprocessed(Ramp(c.have, c.have), contract, c.want, c.want);
    EXPECT_EQ(out[0], static_cast<float>(c.first)) << c.have;
    EXPECT_EQ(out[1], static_cast<float>(c.first)) << c.have;
    EXPECT_EQ(out[out.size() - 3], static_cast<float>(c.first + c.want - 1)) << c.have;
  }
}

TEST(PreprocessTest, ASmallerImageIsPaddedWithBlackBeforeNormalising) {
  Preprocessing contract;
  contract.set_center_crop(true);
  for (int c = 0; c < 3; ++c) contract.add_mean(10);
  // 3 rows into 6: one above (3 / 2), two below; 9 columns cut to 4 from round(2.5) = 2.
  const std::vector<float> out = Preprocessed(Ramp(9, 3), contract, 6, 4);
  for (int y = 0; y < 6; ++y) {
    for (int x = 0; x < 4; ++x) {
      const float* pixel = &out[(y * 4 + x) * 3];
      const bool inside = y >= 1 && y < 4;
      EXPECT_EQ(pixel[0], (inside ? 2 + x : 0) - 10.0f) << x << "," << y;
      EXPECT_EQ(pixel[1], (inside ? y - 1 : 0) - 10.0f) << x << "," << y;
      EXPECT_EQ(pixel[2], (inside ? 200 : 0) - 10.0f) << x << "," << y;
    }
  }
}

TEST(PreprocessTest, AnImageOfAnotherSizeIsRefusedWithBothSizes) {
  std::vector<float> out(4 * 4 * 3);
  const absl::Status status = Preprocess(Ramp(5, 4), Preprocessing(), 4, 4, absl::MakeSpan(out));
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("5x4"), std::string::npos) << status;
  EXPECT_NE(status.message().find("4x4"), std::string::npos) << status;

  Preprocessing shorter;
  shorter.set_resize(Preprocessing::SHORTER_SIDE);
  shorter.set_resize_size(4);
  EXPECT_EQ(Preprocess(Ramp(16, 8), shorter, 4, 4, absl::MakeSpan(out)).code(),
            StatusCode::kInvalidArgument);
  EXPECT_TRUE(Preprocess(Ramp(8, 8), shorter, 4, 4, absl::MakeSpan(out)).ok());
}

TEST(PreprocessTest, ExactIgnoresTheAspectRatioWithEveryFilter) {
  for (auto filter : {Preprocessing::BILINEAR_ANTIALIAS, Preprocessing::BICUBIC_ANTIALIAS,
                      Preprocessing::BILINEAR}) {
    Preprocessing contract;
    contract.set_resize(Preprocessing::EXACT);
    contract.set_filter(filter);
    const std::vector<float> out = Preprocessed(Ramp(100, 40), contract, 10, 10);
    // A ramp stays a ramp away from the edges: pixel x of 10 covers columns 10x..10x+9.
    EXPECT_NEAR(out[(5 * 10 + 5) * 3 + 0], 54.5, 1.0);
    EXPECT_NEAR(out[(5 * 10 + 5) * 3 + 1], 21.5, 1.0);
    EXPECT_EQ(out[(5 * 10 + 5) * 3 + 2], 200.0f);
  }
}

TEST(PreprocessTest, ShrinkingAveragesUnlessTheFilterIsPlainBilinear) {
  // Columns alternate between 0 and 240.
  Image stripes{64, 64, std::vector<uint8_t>(64 * 64 * 3)};
  for (size_t i = 0; i < stripes.pixels.size(); ++i) stripes.pixels[i] = i / 3 % 2 == 0 ? 0 : 240;
  Preprocessing contract;
  contract.set_resize(Preprocessing::EXACT);
  EXPECT_NEAR(Preprocessed(stripes, contract, 7, 7)[(3 * 7 + 3) * 3], 120, 8);
  contract.set_filter(Preprocessing::BILINEAR);
  double spread = 0;
  for (float value : Preprocessed(stripes, contract, 7, 7))
    spread = std::max(spread, std::fabs(value - 120.0));
  EXPECT_GT(spread, 60);
}

TEST(PreprocessTest, NamedContractsAreThoseOfTheDocumentation) {
  const auto imagenet = NamedPreprocessing("imagenet");
  ASSERT_TRUE(imagenet.ok());
  EXPECT_EQ(imagenet->resize(), Preprocessing::SHORTER_SIDE);
  EXPECT_EQ(imagenet->resize_size(), 256u);
  EXPECT_TRUE(imagenet->center_crop());
  EXPECT_EQ(NamedPreprocessing("cifar10")->resize_size(), 32u);
  EXPECT_EQ(NamedPreprocessing("imagenet-299")->resize_size(), 342u);
  const auto none = NamedPreprocessing("mnist");
  EXPECT_EQ(none.status().code(), StatusCode::kNotFound);
  EXPECT_NE(none.status().message().find("cifar10"), std::string::npos);
}

TEST(PreprocessTest, AContractOfANetworkOfAnotherSizeIsRefused) {
  for (const auto& [name, side] : {std::pair{"cifar10", 224},     // an image of 32 in a black frame
                                   std::pair{"imagenet", 299},    // of 256
                                   std::pair{"imagenet", 32},     // the middle eighth
                                   std::pair{"imagenet-299", 64}}) {
    const absl::Status status = ValidatePreprocessing(*NamedPreprocessing(name), side, side);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << name << " " << side;
    EXPECT_NE(status.message().find("resize_size"), std::string::npos) << status;
  }
  for (const auto& [name, side] : {std::pair{"cifar10", 32}, std::pair{"imagenet", 227},
                                   std::pair{"imagenet", 256}, std::pair{"imagenet-299", 299}}) {
    EXPECT_TRUE(ValidatePreprocessing(*NamedPreprocessing(name), side, side).ok()) << name << side;
  }
}

TEST(PreprocessTest, ValidationNamesTheField) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto message = [](auto change, int height = 224, int width = 224) {
    Preprocessing contract = *NamedPreprocessing("imagenet");
    change(contract);
    const absl::Status status = ValidatePreprocessing(contract, height, width);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const auto same = [](Preprocessing&) {};
  EXPECT_TRUE(ValidatePreprocessing(*NamedPreprocessing("imagenet"), 224, 224).ok());
  EXPECT_TRUE(ValidatePreprocessing(Preprocessing(), 28, 28).ok());
  EXPECT_NE(message(same, 0, 224).find("network input"), std::string::npos);
  EXPECT_NE(message(same, 224, 100000).find("network input"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.set_resize_size(0); }).find("resize_size"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.set_resize_size(1u << 31); }).find("resize_size"),
            std::string::npos);
  EXPECT_NE(message([](auto& c) { c.set_center_crop(false); }).find("resize_size"),
            std::string::npos);
  EXPECT_NE(message([&](auto& c) { c.set_scale(nan); }).find("scale"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.add_mean(1); }).find("mean"), std::string::npos);
  EXPECT_NE(message([&](auto& c) { c.set_mean(1, nan); }).find("mean[1]"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.set_std(2, 0); }).find("std[2]"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.set_std(0, -1); }).find("std[0]"), std::string::npos);
  EXPECT_NE(
      message([](auto& c) { c.set_filter(static_cast<Preprocessing::Filter>(9)); }).find("filter"),
      std::string::npos);
  EXPECT_NE(
      message([](auto& c) { c.set_resize(static_cast<Preprocessing::Resize>(9)); }).find("resize"),
      std::string::npos);
  EXPECT_NE(message([](auto& c) {
              c.set_color_order(static_cast<Preprocessing::ColorOrder>(9));
            }).find("color_order"),
            std::string::npos);
}

}  // namespace
}  // namespace tern::image
