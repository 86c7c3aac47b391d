// preprocessing.jpeg_scaling: which reduced size is decoded, and that nothing else changes.
#include <gtest/gtest.h>
#include <turbojpeg.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "server/base/file.h"
#include "server/image/codecs.h"
#include "server/image/image.h"
#include "tests/image/encode_jpeg.h"

namespace tern::image {
namespace {

using absl::StatusCode;
using v1::Preprocessing;

// Smooth, so that reduced and whole decodes are comparable; no symmetry.
std::vector<uint8_t> Waves(int width, int height) {
  std::vector<uint8_t> pixels;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < 3; ++c) {
        const double wave = std::sin(x * 0.04 * (c + 1)) + std::cos(y * 0.05 + c);
        pixels.push_back(static_cast<uint8_t>(std::lround(128 + 60 * wave)));
      }
    }
  }
  return pixels;
}

std::string TestJpeg(int width, int height) {
  return testing::EncodeJpeg(Waves(width, height), width, height, 90);
}

// Inserts an EXIF block with this orientation behind the start-of-image marker.
std::string WithOrientation(const std::string& jpeg, int orientation) {
  std::string exif("Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0", 24);
  exif += {static_cast<char>(orientation), 0, 0, 0, 0, 0, 0, 0};
  std::string segment = {'\xff', '\xe1', 0, static_cast<char>(exif.size() + 2)};
  return jpeg.substr(0, 2) + segment + exif + jpeg.substr(2);
}

Preprocessing ShorterSide(int size) {
  Preprocessing contract;
  contract.set_resize(Preprocessing::SHORTER_SIDE);
  contract.set_resize_size(size);
  contract.set_center_crop(true);
  contract.set_jpeg_scaling(true);
  return contract;
}

Preprocessing Exact() {
  Preprocessing contract;
  contract.set_resize(Preprocessing::EXACT);
  contract.set_jpeg_scaling(true);
  return contract;
}

// What libjpeg-turbo itself gives at eighths/8.
Image Oracle(const std::string& jpeg, int width, int height, int eighths) {
  const tjscalingfactor factor{eighths, 8};
  Image image;
  image.width = TJSCALED(width, factor);
  image.height = TJSCALED(height, factor);
  image.pixels.resize(static_cast<size_t>(image.width) * image.height * 3);
  const tjhandle handle = tjInitDecompress();
  EXPECT_EQ(tjDecompress2(handle, reinterpret_cast<const unsigned char*>(jpeg.data()), jpeg.size(),
                          image.pixels.data(), image.width, 0, image.height, TJPF_RGB,
                          TJFLAG_ACCURATEDCT),
            0);
  tjDestroy(handle);
  return image;
}

struct Case {
  int width, height;
  int eighths;         // expected
  int want_w, want_h;  // expected: ceil(side * eighths / 8)
};

void ExpectScales(const std::vector<Case>& cases, const Preprocessing& contract, int height,
                  int width) {
  for (const Case& c : cases) {
    SCOPED_TRACE(std::to_string(c.width) + "x" + std::to_string(c.height));
    const std::string jpeg = TestJpeg(c.width, c.height);
    const auto image = Decode(jpeg, Limits{}, contract, height, width);
    ASSERT_TRUE(image.ok()) << image.status();
    EXPECT_EQ(image->width, c.want_w);
    EXPECT_EQ(image->height, c.want_h);
    EXPECT_EQ(image->reduction, 8 / c.eighths);
    EXPECT_EQ(image->full_width, c.eighths < 8 ? c.width : 0);
    EXPECT_EQ(image->full_height, c.eighths < 8 ? c.height : 0);
    EXPECT_EQ(image->pixels, Oracle(jpeg, c.width, c.height, c.eighths).pixels);
    std::vector<float> input(static_cast<size_t>(height) * width * 3);
    EXPECT_TRUE(Preprocess(*image, contract, height, width, absl::MakeSpan(input)).ok());
  }
}

TEST(JpegScalingTest, TheShorterSideIsTheSmallestThatIsNotEnlarged) {
  ExpectScales({{256, 256, 1, 32, 32},  // equal to the target
                {249, 249, 1, 32, 32},  // rounded up to it
                {248, 248, 2, 62, 62},  // one less: 31 at 1/8
                {125, 125, 2, 32, 32},  // and for 1/4
                {124, 124, 4, 62, 62},  //
                {63, 63, 4, 32, 32},    // and for 1/2
                {62, 62, 8, 62, 62},    // no reduced size is enough
                {500, 256, 1, 63, 32},  // landscape
                {256, 500, 1, 32, 63},  // portrait
                {2000, 100, 4, 1000, 50},
                {100, 2000, 4, 50, 1000}},
               ShorterSide(32), 32, 32);
}

TEST(JpegScalingTest, TheLongerSideIsNotEnlargedEither) {
  // At 1/8 249 rows are rounded up to 32, but the 51 columns wanted (32 * 400 / 249) have only 50.
  ExpectScales({{400, 249, 2, 100, 63}, {249, 400, 2, 63, 100}}, ShorterSide(32), 32, 32);
}

TEST(JpegScalingTest, ImagesBelowTheTargetAreDecodedWhole) {
  ExpectScales({{40, 36, 8, 40, 36}, {31, 300, 8, 31, 300}, {9, 7, 8, 9, 7}, {1, 1, 8, 1, 1}},
               ShorterSide(32), 32, 32);
}

TEST(JpegScalingTest, AnExactResizeNeedsBothSides) {
  ExpectScales({{384, 192, 1, 48, 24},
                {376, 192, 2, 94, 48},
                {384, 184, 2, 96, 46},
                {192, 384, 2, 48, 96},
                {47, 400, 8, 47, 400}},
               Exact(), 24, 48);
}

TEST(JpegScalingTest, TheTargetIsComparedWithTheTurnedImage) {
  const std::string jpeg = TestJpeg(384, 192);
  for (int orientation = 1; orientation <= 8; ++orientation) {
    SCOPED_TRACE(orientation);
    const std::string turned = WithOrientation(jpeg, orientation);
    // Upright 384 x 192 fits 48 x 24 at 1/8, upright 192 x 384 at 1/4 only.
    const bool portrait = orientation >= 5;
    const Image want = ApplyOrientation(Oracle(jpeg, 384, 192, portrait ? 2 : 1), orientation);
    const auto image = Decode(turned, Limits{}, Exact(), 24, 48);
    ASSERT_TRUE(image.ok()) << image.status();
    EXPECT_EQ(image->width, 48);
    EXPECT_EQ(image->height, portrait ? 96 : 24);
    EXPECT_EQ(image->pixels, want.pixels);
    EXPECT_EQ(image->reduction, portrait ? 4 : 8);
    EXPECT_EQ(image->full_width, portrait ? 192 : 384);
    EXPECT_EQ(image->full_height, portrait ? 384 : 192);

    Preprocessing as_stored = Exact();
    as_stored.set_ignore_exif_orientation(true);
    const auto stored = Decode(turned, Limits{}, as_stored, 24, 48);
    ASSERT_TRUE(stored.ok()) << stored.status();
    EXPECT_EQ(stored->pixels, Oracle(jpeg, 384, 192, 1).pixels);
  }
}

TEST(JpegScalingTest, TheResizedSizeFollowsFromTheWholePicture) {
  // Resized to 8 rows 33 x 16 is 8 * 33 / 16 = 16 wide, its half 17 x 8 would stay 17 wide.
  Preprocessing contract = ShorterSide(8);
  contract.set_center_crop(false);
  const auto image = Decode(TestJpeg(33, 16), Limits{}, contract, 8, 16);
  ASSERT_TRUE(image.ok()) << image.status();
  ASSERT_EQ(image->width, 17);
  std::vector<float> input(8 * 16 * 3);
  const absl::Status status = Preprocess(*image, contract, 8, 16, absl::MakeSpan(input));
  EXPECT_TRUE(status.ok()) << status;
}

TEST(JpegScalingTest, NetworkInputsStayClose) {
  for (const auto& [width, height] : {std::pair{1000, 750}, std::pair{701, 1103}}) {
    const std::string jpeg = TestJpeg(width, height);
    Preprocessing contract = ShorterSide(72);
    const auto input = [&](bool scaled) {
      contract.set_jpeg_scaling(scaled);
      std::vector<float> out(64 * 64 * 3);
      const auto image = Decode(jpeg, Limits{}, contract, 64, 64);
      EXPECT_EQ(image->width < width, scaled);
      EXPECT_TRUE(Preprocess(*image, contract, 64, 64, absl::MakeSpan(out)).ok());
      return out;
    };
    const std::vector<float> reduced = input(true), whole = input(false);
    double sum = 0;
    for (size_t i = 0; i < whole.size(); ++i) sum += std::fabs(reduced[i] - whole[i]);
    EXPECT_LT(sum / static_cast<double>(whole.size()), 3.0) << width;
    EXPECT_GT(sum, 0) << width;
  }
}

TEST(JpegScalingTest, OffIsTheWholePicture) {
  const std::string jpeg = WithOrientation(TestJpeg(400, 300), 6);
  Preprocessing contract = ShorterSide(32);
  contract.set_jpeg_scaling(false);
  const auto image = Decode(jpeg, Limits{}, contract, 32, 32);
  const auto plain = Decode(jpeg, Limits{}, true);
  ASSERT_TRUE(image.ok() && plain.ok());
  EXPECT_EQ(image->width, 300);
  EXPECT_EQ(image->reduction, 1);
  EXPECT_EQ(image->pixels, plain->pixels);
  EXPECT_EQ(image->pixels, ApplyOrientation(Oracle(jpeg, 400, 300, 8), 6).pixels);
}

TEST(JpegScalingTest, WithoutAResizeStepNothingIsReducedAndTheContractIsRefused) {
  Preprocessing contract;
  contract.set_center_crop(true);
  contract.set_jpeg_scaling(true);
  const absl::Status status = ValidatePreprocessing(contract, 8, 8);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("jpeg_scaling"), std::string::npos) << status;
  ExpectScales({{400, 300, 8, 400, 300}}, contract, 8, 8);
  contract.set_resize(Preprocessing::EXACT);
  EXPECT_TRUE(ValidatePreprocessing(contract, 8, 8).ok());
}

TEST(JpegScalingTest, NoNamedContractAllowsIt) {
  for (const char* name : {"cifar10", "imagenet"}) {
    EXPECT_FALSE(NamedPreprocessing(name)->jpeg_scaling()) << name;
  }
}

TEST(JpegScalingTest, OtherFormatsAreUntouched) {
  const char* source = std::getenv("TERN_SOURCE_DIR");
  const std::string folder =
      std::string(source != nullptr ? source : ".") + "/tests/image/fixtures/";
  int seen = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string extension = entry.path().extension().string();
    if (extension != ".png" && extension != ".webp" && extension != ".bmp") continue;
    const std::string bytes = ReadFile(entry.path().string()).value();
    const auto image = Decode(bytes, Limits{}, Exact(), 2, 2);
    const auto plain = Decode(bytes, Limits{}, true);
    ASSERT_TRUE(image.ok() && plain.ok()) << entry.path();
    EXPECT_EQ(image->width, plain->width) << entry.path();
    EXPECT_EQ(image->pixels, plain->pixels) << entry.path();
    EXPECT_EQ(image->reduction, 1) << entry.path();
    ++seen;
  }
  EXPECT_GE(seen, 20);
}

TEST(JpegScalingTest, InksAreReducedToo) {
  // Left and right halves of two even mixtures: every scale shows the same two colours.
  std::vector<uint8_t> inks;
  for (int i = 0; i < 128 * 128; ++i) {
    if (i % 128 < 64) {
      inks.insert(inks.end(), {200, 90, 30, 220});
    } else {
      inks.insert(inks.end(), {10, 250, 130, 180});
    }
  }
  const std::string jpeg = testing::EncodeJpeg(inks, 128, 128, 95, TJSAMP_444, TJPF_CMYK);
  const auto whole = Decode(jpeg, Limits{}, true);
  const auto reduced = Decode(jpeg, Limits{}, Exact(), 16, 16);
  ASSERT_TRUE(whole.ok() && reduced.ok());
  ASSERT_EQ(reduced->width, 16);
  ASSERT_EQ(reduced->height, 16);
  for (int y = 0; y < 16; ++y) {
    for (int x = 0; x < 16; ++x) {
      for (int c = 0; c < 3; ++c) {
        EXPECT_NEAR(reduced->pixels[(y * 16 + x) * 3 + c],
                    whole->pixels[((8 * y + 4) * 128 + 8 * x + 4) * 3 + c], 2);
      }
    }
  }
}

TEST(JpegScalingTest, LimitsCountTheWholePicture) {
  Limits limits;
  limits.max_pixels = 300 * 200 - 1;
  const std::string jpeg = TestJpeg(300, 200);
  // The headers alone: refused before anything is decoded.
  for (const std::string& bytes : {jpeg, jpeg.substr(0, 700)}) {
    const auto image = Decode(bytes, limits, Exact(), 8, 8);
    EXPECT_EQ(image.status().code(), StatusCode::kResourceExhausted) << image.status();
    EXPECT_NE(image.status().message().find("300x200 = 60000 pixels, the limit is 59999"),
              std::string::npos)
        << image.status();
  }
  limits.max_pixels += 1;
  EXPECT_TRUE(Decode(jpeg, limits, Exact(), 8, 8).ok());
  limits.max_bytes = 100;
  EXPECT_EQ(Decode(jpeg, limits, Exact(), 8, 8).status().code(), StatusCode::kResourceExhausted);
}

TEST(JpegScalingTest, DamageIsFoundAsInAWholeDecode) {
  const std::string jpeg = TestJpeg(300, 200);
  for (size_t size = 0; size < jpeg.size(); size += 7) {
    EXPECT_EQ(Decode(jpeg.substr(0, size), Limits{}, Exact(), 8, 8).status().code(),
              StatusCode::kInvalidArgument)
        << size;
  }
  EXPECT_EQ(
      Decode(jpeg.substr(0, jpeg.size() / 2) + "\xff\xd9", Limits{}, Exact(), 8, 8).status().code(),
      StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::image
