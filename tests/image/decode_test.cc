#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <png.h>
#include <webp/encode.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>
#include <sstream>
#include <string>

#include "server/base/file.h"
#include "server/image/codecs.h"
#include "server/image/image.h"
#include "tests/image/encode_jpeg.h"

namespace tern::image {
namespace {

using absl::StatusCode;

std::string FixtureFolder() {
  const char* source = std::getenv("TERN_SOURCE_DIR");
  return std::string(source != nullptr ? source : ".") + "/tests/image/fixtures/";
}

std::string Fixture(const std::string& name) {
  auto bytes = ReadFile(FixtureFolder() + name);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? *bytes : "";
}

// name -> bytes, all of them.
std::map<std::string, std::string> AllFixtures() {
  std::map<std::string, std::string> all;
  for (const auto& entry : std::filesystem::directory_iterator(FixtureFolder())) {
    if (entry.path().extension() != ".ppm")
      all[entry.path().filename()] = Fixture(entry.path().filename());
  }
  return all;
}

// Pillow's pixels of a fixture, written by make_fixtures.py.
Image Expected(const std::string& name) {
  const std::string ppm = Fixture(name + ".ppm");
  std::istringstream in(ppm);
  std::string magic;
  int maximum = 0;
  Image image;
  in >> magic >> image.width >> image.height >> maximum;
  const size_t start = static_cast<size_t>(in.tellg()) + 1;
  image.pixels.assign(ppm.begin() + start, ppm.end());
  EXPECT_EQ(image.pixels.size(), static_cast<size_t>(image.width) * image.height * 3) << name;
  return image;
}

absl::StatusOr<Image> DecodeDefault(const std::string& bytes) {
  return Decode(bytes, Limits{}, true);
}

std::string TestJpeg(int width, int height, int quality = 90) {
  std::vector<uint8_t> pixels(static_cast<size_t>(width) * height * 3);
  std::mt19937 random(1);
  for (auto& p : pixels) p = static_cast<uint8_t>(random());
  return testing::EncodeJpeg(pixels, width, height, quality);
}

std::string BlackPng(int width, int height) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = width;
  image.height = height;
  image.format = PNG_FORMAT_GRAY;
  image.flags = PNG_IMAGE_FLAG_FAST;
  const std::vector<uint8_t> pixels(static_cast<size_t>(width) * height);
  png_alloc_size_t size = 0;
  EXPECT_TRUE(png_image_write_to_memory(&image, nullptr, &size, 0, pixels.data(), 0, nullptr));
  std::string bytes(size, '\0');
  EXPECT_TRUE(png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels.data(), 0, nullptr));
  bytes.resize(size);
  return bytes;
}

std::string BlackWebp(int width, int height) {
  const std::vector<uint8_t> pixels(static_cast<size_t>(width) * height * 3);
  uint8_t* out = nullptr;
  const size_t size = WebPEncodeLosslessRGB(pixels.data(), width, height, width * 3, &out);
  std::string bytes(reinterpret_cast<char*>(out), size);
  WebPFree(out);
  return bytes;
}

TEST(DecodeTest, SeesWhatPillowSeesInEveryFormat) {
  const auto all = AllFixtures();
  ASSERT_GE(all.size(), 35u);
  for (const auto& [name, bytes] : all) {
    const auto image = DecodeDefault(bytes);
    ASSERT_TRUE(image.ok()) << name << ": " << image.status();
    const Image want = Expected(name);
    ASSERT_EQ(image->width, want.width) << name;
    ASSERT_EQ(image->height, want.height) << name;
    int worst = 0;
    for (size_t i = 0; i < want.pixels.size(); ++i)
      worst = std::max(worst, std::abs(image->pixels[i] - want.pixels[i]));
    // Lossless formats are exact; versions of the JPEG and WebP libraries may round differently.
    const bool lossy = name.ends_with(".jpg") || name == "lossy.webp";
    EXPECT_LE(worst, lossy ? 2 : 0) << name;
  }
}

TEST(DecodeTest, ExifOrientationCanBeIgnored) {
  const auto upright = Decode(Fixture("orientation_1.jpg"), Limits{}, false);
  ASSERT_TRUE(upright.ok());
  for (const char* name : {"orientation_3.jpg", "orientation_6.jpg", "orientation_7.jpg"}) {
    const auto stored = Decode(Fixture(name), Limits{}, false);
    ASSERT_TRUE(stored.ok());
    EXPECT_EQ(stored->width, upright->width);
    EXPECT_EQ(stored->pixels, upright->pixels);
    const auto turned = Decode(Fixture(name), Limits{}, true);
    ASSERT_TRUE(turned.ok());
    EXPECT_NE(turned->pixels, upright->pixels);
  }
}

TEST(DecodeTest, OrientationsUndoEachOther) {
  Image image{5, 3, {}};
  for (int i = 0; i < 45; ++i) image.pixels.push_back(static_cast<uint8_t>(i));
  const std::map<int, int> inverse = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5},
                                      {6, 8}, {7, 7}, {8, 6}, {0, 9}};
  for (auto [there, back] : inverse) {
    const Image turned = ApplyOrientation(image, there);
    EXPECT_EQ(turned.width, there >= 5 ? 3 : 5);
    EXPECT_EQ(ApplyOrientation(turned, back).pixels, image.pixels) << there;
  }
}

TEST(DecodeTest, RejectsAJpegCutInHalf) {
  const std::string jpeg = TestJpeg(200, 150);
  ASSERT_TRUE(DecodeDefault(jpeg).ok());
  const auto half = DecodeDefault(jpeg.substr(0, jpeg.size() / 2));
  EXPECT_EQ(half.status().code(), StatusCode::kInvalidArgument) << half.status();
  EXPECT_NE(half.status().message().find("truncated"), std::string::npos) << half.status();
}

TEST(DecodeTest, RejectsEveryTruncationOfEveryFormat) {
  for (const auto& [name, bytes] : AllFixtures()) {
    for (size_t size = 0; size < bytes.size(); ++size) {
      const auto image = DecodeDefault(bytes.substr(0, size));
      ASSERT_EQ(image.status().code(), StatusCode::kInvalidArgument)
          << name << " cut to " << size << " of " << bytes.size();
    }
  }
}

TEST(DecodeTest, RejectsAJpegWhoseMiddleIsMissing) {
  // The end marker is there, so only the decoder's own warning can tell.
  const std::string jpeg = TestJpeg(200, 150);
  const auto image = DecodeDefault(jpeg.substr(0, jpeg.size() / 2) + "\xff\xd9");
  EXPECT_EQ(image.status().code(), StatusCode::kInvalidArgument) << image.status();
}

TEST(DecodeTest, AcceptsAJpegWithStrayBytesBeforeItsEnd) {
  std::string jpeg = TestJpeg(64, 48);
  const auto clean = DecodeDefault(jpeg);
  ASSERT_TRUE(clean.ok());
  jpeg.insert(jpeg.size() - 2, std::string(29, 'x'));
  const auto padded = DecodeDefault(jpeg + "trailing camera data");
  ASSERT_TRUE(padded.ok()) << padded.status();
  EXPECT_EQ(padded->pixels, clean->pixels);
}

TEST(DecodeTest, DamageNeverCrashesAndNeverEscapesTheLimits) {
  std::mt19937 random(7);
  Limits limits;
  limits.max_pixels = 100'000;
  for (const auto& [name, bytes] : AllFixtures()) {
    for (int round = 0; round < 400; ++round) {
      std::string damaged = bytes;
      const int flips = 1 + static_cast<int>(random() % 4);
      for (int i = 0; i < flips; ++i)
        damaged[random() % damaged.size()] = static_cast<char>(random());
      const auto image = Decode(damaged, limits, true);
      if (image.ok()) {
        EXPECT_LE(static_cast<uint64_t>(image->width) * image->height, limits.max_pixels);
        EXPECT_EQ(image->pixels.size(), static_cast<size_t>(image->width) * image->height * 3);
      } else {
        EXPECT_TRUE(image.status().code() == StatusCode::kInvalidArgument ||
                    image.status().code() == StatusCode::kResourceExhausted)
            << name << ": " << image.status();
      }
    }
  }
}

TEST(DecodeTest, RejectsWhatIsNoImage) {
  for (const std::string& bytes :
       {std::string(), std::string("nope"), std::string("GIF89a\1\0\1\0"), std::string("%PDF-1.4"),
        std::string(1000, '\0'), std::string("RIFF\4\0\0\0WAVE"), std::string("BM"),
        std::string("\xff\xd8\xff")}) {
    const auto image = DecodeDefault(bytes);
    EXPECT_EQ(image.status().code(), StatusCode::kInvalidArgument) << image.status();
  }
  EXPECT_NE(DecodeDefault("nope").status().message().find("JPEG, PNG, WebP or BMP"),
            std::string::npos);
}

TEST(DecodeTest, RefusesMoreBytesThanAllowed) {
  Limits limits;
  limits.max_bytes = 100;
  const auto image = Decode(TestJpeg(64, 64), limits, true);
  EXPECT_EQ(image.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(image.status().message().find("the limit is 100"), std::string::npos) << image.status();
}

TEST(DecodeTest, RefusesMorePixelsThanAllowedFromTheHeaderAlone) {
  Limits limits;
  limits.max_pixels = 300 * 200 - 1;
  // Cut right behind the headers: had pixels been decoded first, the code would be
  // INVALID_ARGUMENT.
  const std::string jpeg = TestJpeg(300, 200).substr(0, 700);
  const std::string whole_png = BlackPng(300, 200);
  const std::string png = whole_png.substr(0, whole_png.find("IDAT") + 4);
  const std::string webp = BlackWebp(300, 200).substr(0, 30);
  std::string bmp = Fixture("rgb_24.bmp").substr(0, 60);
  bmp[18] = 44, bmp[19] = 1, bmp[22] = static_cast<char>(200);
  for (const std::string& bytes : {jpeg, png, webp, bmp}) {
    const auto image = Decode(bytes, limits, true);
    EXPECT_EQ(image.status().code(), StatusCode::kResourceExhausted) << image.status();
    EXPECT_NE(image.status().message().find("300x200 = 60000 pixels, the limit is 59999"),
              std::string::npos)
        << image.status();
  }
  limits.max_pixels += 1;
  EXPECT_TRUE(Decode(TestJpeg(300, 200), limits, true).ok());
  EXPECT_TRUE(Decode(BlackPng(300, 200), limits, true).ok());
  EXPECT_TRUE(Decode(BlackWebp(300, 200), limits, true).ok());
}

TEST(DecodeTest, RefusesADecompressionBomb) {
  // 49 million pixels in about 200 kB.
  const std::string png = BlackPng(7000, 7000);
  ASSERT_LT(png.size(), 300'000u);
  const auto image = DecodeDefault(png);
  EXPECT_EQ(image.status().code(), StatusCode::kResourceExhausted) << image.status();
}

TEST(DecodeTest, RefusesALineLongerThanAnyJpeg) {
  const auto image = DecodeDefault(BlackPng(70000, 1));
  EXPECT_EQ(image.status().code(), StatusCode::kResourceExhausted) << image.status();
  EXPECT_TRUE(DecodeDefault(BlackPng(65535, 1)).ok());
}

TEST(DecodeTest, ADamagedExifBlockDoesNotCostTheImage) {
  std::string jpeg = Fixture("orientation_6.jpg");
  const size_t exif = jpeg.find(std::string("Exif\0\0", 6));
  ASSERT_NE(exif, std::string::npos);
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    std::string damaged = jpeg;
    for (int i = 0; i < 3; ++i) damaged[exif + 6 + random() % 26] = static_cast<char>(random());
    EXPECT_TRUE(DecodeDefault(damaged).ok());
  }
}

TEST(DecodeTest, ReadsOrientationsOfBothByteOrdersAndIgnoresNonsense) {
  const auto block = [](bool big, int type, int value, int count = 1) {
    std::string b = big ? std::string("MM\0*\0\0\0\x08", 8) : std::string("II*\0\x08\0\0\0", 8);
    const auto put = [&](uint32_t v, int size) {
      for (int i = 0; i < size; ++i)
        b.push_back(static_cast<char>(v >> 8 * (big ? size - 1 - i : i)));
    };
    put(1, 2), put(0x0112, 2), put(type, 2), put(count, 4);
    if (type == 3) {
      put(value, 2), put(0, 2);
    } else {
      put(value, 4);
    }
    put(0, 4);
    return b;
  };
  for (int value = 1; value <= 8; ++value) {
    EXPECT_EQ(ExifOrientation(block(true, 3, value)), value);
    EXPECT_EQ(ExifOrientation(block(false, 3, value)), value);
    EXPECT_EQ(ExifOrientation(std::string("Exif\0\0", 6) + block(false, 3, value)), value);
  }
  EXPECT_EQ(ExifOrientation(block(true, 3, 0)), 1);
  EXPECT_EQ(ExifOrientation(block(true, 3, 9)), 1);
  EXPECT_EQ(ExifOrientation(""), 1);
  EXPECT_EQ(ExifOrientation("Exif"), 1);
  EXPECT_EQ(ExifOrientation(std::string(100, 'x')), 1);
}

// A scan of a few bytes costs a pass over the whole picture.
TEST(DecodeTest, AJpegMayNotHaveManyMoreScansThanEncodersWrite) {
  std::string bytes = Fixture("progressive.jpg");
  const size_t last = bytes.rfind("\xff\xda"), end = bytes.rfind("\xff\xd9");
  ASSERT_LT(last, end);
  const std::string scan = bytes.substr(last, end - last);
  Limits limits;
  limits.max_pixels = 19 * 13;
  EXPECT_TRUE(Decode(bytes, limits, true).ok());
  for (int i = 0; i < 20; ++i) bytes.insert(end, scan);
  const absl::Status status = Decode(bytes, limits, true).status();
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("scans over 19x13 pixels"));
  // The limit is one of work: there is room for them in a server that takes larger pictures.
  limits.max_pixels *= 3;
  EXPECT_NE(Decode(bytes, limits, true).status().code(), StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace tern::image
