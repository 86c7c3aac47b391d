#include "server/image/resize.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace tern::image {
namespace {

// The image of make_resize_golden.py.
Image Noise(int width, int height) {
  Image image{width, height, std::vector<uint8_t>(static_cast<size_t>(width) * height * 3)};
  uint32_t state = 12345;
  for (size_t i = 0; i < image.pixels.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    image.pixels[i] = static_cast<uint8_t>((state >> 24) + i / 3 % width);
  }
  return image;
}

uint64_t Fnv1a(const std::vector<uint8_t>& data) {
  uint64_t value = 0xcbf29ce484222325u;
  for (uint8_t byte : data) value = (value ^ byte) * 0x100000001b3u;
  return value;
}

struct Golden {
  int width, height, out_width, out_height;
  Kernel kernel;
  uint64_t hash;
};

const Golden kGolden[] = {
#include "tests/image/resize_golden.inc"
};

TEST(ResizeTest, EqualsPillowBitForBit) {
  for (const Golden& g : kGolden) {
    const Image out = ResizeAntialiased(Noise(g.width, g.height), g.out_width, g.out_height,
                                        {0, 0, g.out_width, g.out_height}, g.kernel);
    ASSERT_EQ(out.pixels.size(), static_cast<size_t>(g.out_width) * g.out_height * 3);
    EXPECT_EQ(Fnv1a(out.pixels), g.hash)
        << g.width << "x" << g.height << " -> " << g.out_width << "x" << g.out_height
        << (g.kernel == Kernel::kCubic ? " cubic" : " triangle");
  }
}

TEST(ResizeTest, AWindowIsThatPartOfTheWhole) {
  const Image in = Noise(83, 57);
  for (Kernel kernel : {Kernel::kTriangle, Kernel::kCubic}) {
    for (auto [width, height] : {std::pair{41, 29}, {200, 140}, {83, 30}, {30, 57}, {83, 57}}) {
      const Image whole = ResizeAntialiased(in, width, height, {0, 0, width, height}, kernel);
      for (const Window& w :
           {Window{0, 0, 1, 1}, Window{3, 5, 20, 17}, Window{width - 7, height - 3, 7, 3}}) {
        const Image part = ResizeAntialiased(in, width, height, w, kernel);
        ASSERT_EQ(part.width, w.width);
        ASSERT_EQ(part.height, w.height);
        for (int y = 0; y < w.height; ++y) {
          EXPECT_EQ(std::memcmp(&part.pixels[y * w.width * 3],
                                &whole.pixels[((w.y + y) * width + w.x) * 3], w.width * 3),
                    0)
              << width << "x" << height << " row " << y;
        }
      }
    }
  }
}

TEST(ResizeTest, AConstantImageStaysConstant) {
  Image in{31, 17, std::vector<uint8_t>(31 * 17 * 3, 0)};
  for (int value : {0, 1, 127, 254, 255}) {
    std::fill(in.pixels.begin(), in.pixels.end(), static_cast<uint8_t>(value));
    for (Kernel kernel : {Kernel::kTriangle, Kernel::kCubic}) {
      for (uint8_t pixel : ResizeAntialiased(in, 300, 5, {0, 0, 300, 5}, kernel).pixels)
        ASSERT_EQ(pixel, value);
    }
  }
}

TEST(ResizeTest, ExtremeSidesCostOnlyTheirWindow) {
  const Image line{1, 65535, std::vector<uint8_t>(65535 * 3, 9)};
  // The whole result would have 4 billion pixels.
  const int64_t height = int64_t{256} * 65535;
  const Image part =
      ResizeAntialiased(line, 256, height, {16, height / 2, 224, 224}, Kernel::kTriangle);
  for (uint8_t pixel : part.pixels) ASSERT_EQ(pixel, 9);
  const Image squashed = ResizeAntialiased(line, 224, 224, {0, 0, 224, 224}, Kernel::kCubic);
  for (uint8_t pixel : squashed.pixels) ASSERT_EQ(pixel, 9);
}

// INTER_LINEAR by its definition: the pixel centre mapped back, four neighbours, edges repeated, in
// real numbers.
TEST(ResizeTest, LinearWeighsTheFourNeighbours) {
  const Image in = Noise(23, 19);
  const int width = 40, height = 11;
  const auto out = ResizeLinear(in, width, height, {0, 0, width, height});
  ASSERT_TRUE(out.ok());
  const auto at = [&](int x, int y, int c) {
    x = std::clamp(x, 0, in.width - 1), y = std::clamp(y, 0, in.height - 1);
    return static_cast<double>(in.pixels[(y * in.width + x) * 3 + c]);
  };
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      const double sx = (x + 0.5) * in.width / width - 0.5,
                   sy = (y + 0.5) * in.height / height - 0.5;
      const int ix = static_cast<int>(std::floor(sx)), iy = static_cast<int>(std::floor(sy));
      const double fx = sx - ix, fy = sy - iy;
      for (int c = 0; c < 3; ++c) {
        const double want = (1 - fy) * ((1 - fx) * at(ix, iy, c) + fx * at(ix + 1, iy, c)) +
                            fy * ((1 - fx) * at(ix, iy + 1, c) + fx * at(ix + 1, iy + 1, c));
        ASSERT_NEAR(out->pixels[(y * width + x) * 3 + c], want, 1.0) << x << "," << y;
      }
    }
  }
}

TEST(ResizeTest, LinearRefusesAGiganticResult) {
  const Image line{1, 65535, std::vector<uint8_t>(65535 * 3, 9)};
  const auto out = ResizeLinear(line, 256, int64_t{256} * 65535, {16, 1000, 224, 224});
  EXPECT_EQ(out.status().code(), absl::StatusCode::kInvalidArgument) << out.status();
}

}  // namespace
}  // namespace tern::image
