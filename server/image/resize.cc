#include "server/image/resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <opencv2/core/utility.hpp>
#include <opencv2/imgproc.hpp>
#include <vector>

#include "absl/strings/str_cat.h"

namespace tern::image {
namespace {

// 8 bits of pixel, 2 of headroom for the cubic kernel's overshoot (its coefficients' magnitudes sum
// to at most 1.25), the sign: 22 bits are left.
constexpr int kFractionBits = 22;

// For output positions first..first+count-1: which inputs, and how much of each.
struct Taps {
  std::vector<int> begin;        // first input of each output
  std::vector<int> size;         // how many
  std::vector<int32_t> weights;  // [output][stride], 22-bit fixed point
  int stride = 0;
};

double Triangle(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Keys' cubic with a = -0.5.
double Cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// `extent` is what the whole output covers of the `in_size` inputs: all, or the last only in part.
Taps MakeTaps(int in_size, double extent, int64_t out_size, int64_t first, int count,
              Kernel kernel) {
  const double scale = extent / static_cast<double>(out_size);
  const double widening = std::max(scale, 1.0);
  const double support = (kernel == Kernel::kTriangle ? 1.0 : 2.0) * widening;
  Taps taps;
  taps.stride = static_cast<int>(std::ceil(support)) * 2 + 1;
  taps.begin.resize(count);
  taps.size.resize(count);
  taps.weights.resize(static_cast<size_t>(count) * taps.stride);
  std::vector<double> real(taps.stride);
  for (int i = 0; i < count; ++i) {
    const double center = (static_cast<double>(first + i) + 0.5) * scale;
    const double step = 1.0 / widening;
    // Truncation, not floor: Pillow casts to int, and clamps afterwards.
    const int begin = std::max(static_cast<int>(center - support + 0.5), 0);
    const int end = std::min(static_cast<int>(center + support + 0.5), in_size);
    double sum = 0;
    for (int j = begin; j < end; ++j) {
      const double at = (j - center + 0.5) * step;
      const double w = kernel == Kernel::kTriangle ? Triangle(at) : Cubic(at);
      real[j - begin] = w;
      sum += w;
    }
    int32_t* weights = taps.weights.data() + static_cast<size_t>(i) * taps.stride;
    for (int j = 0; j < end - begin; ++j) {
      const double w = (sum != 0 ? real[j] / sum : real[j]) * (1 << kFractionBits);
      weights[j] = static_cast<int32_t>(w < 0 ? w - 0.5 : w + 0.5);
    }
    taps.begin[i] = begin;
    taps.size[i] = end - begin;
  }
  return taps;
}

inline uint8_t Clip(int32_t sum) {
  const int32_t value = sum >> kFractionBits;
  return static_cast<uint8_t>(std::min(255, std::max(0, value)));
}

constexpr int32_t kHalf = 1 << (kFractionBits - 1);

// Compiled twice, for AVX2 and for any x86-64; integers, so both give the same. Once under
// ThreadSanitizer: GCC instruments the function that chooses, which runs before the sanitizer can.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define TERN_IMAGE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define TERN_IMAGE_CLONES
#endif

using Bytes16 = uint8_t __attribute__((vector_size(16)));
using Ints4 = int32_t __attribute__((vector_size(16)));

// One row through the horizontal pass. `end` is the end of the image's pixels: a pixel is read with
// the 13 bytes behind it where they are there.
TERN_IMAGE_CLONES void ResizeRow(const uint8_t* row, const uint8_t* end, const Taps& taps,
                                 uint8_t* out) {
  const int count = static_cast<int>(taps.begin.size());
  for (int x = 0; x < count; ++x, out += 3) {
    const uint8_t* in = row + static_cast<size_t>(taps.begin[x]) * 3;
    const int32_t* weights = taps.weights.data() + static_cast<size_t>(x) * taps.stride;
    const int size = taps.size[x];
    const ptrdiff_t left = end - in - static_cast<ptrdiff_t>(sizeof(Bytes16));
    const int wide = left < 0 ? 0 : static_cast<int>(std::min<ptrdiff_t>(left / 3 + 1, size));
    Ints4 sum = {kHalf, kHalf, kHalf, kHalf};
    int j = 0;
    for (; j < wide; ++j, in += 3) {
      Bytes16 pixels;
      std::memcpy(&pixels, in, sizeof(pixels));
      const Bytes16 spread = __builtin_shufflevector(pixels, pixels, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2,
                                                     2, 2, 3, 3, 3, 3);
      Ints4 pixel;
      std::memcpy(&pixel, &spread, sizeof(pixel));
      sum += (pixel & 255) * weights[j];
    }
    for (; j < size; ++j, in += 3) {
      const Ints4 pixel = {in[0], in[1], in[2], 0};
      sum += pixel * weights[j];
    }
    for (int c = 0; c < 3; ++c) out[c] = Clip(sum[c]);
  }
}

// A row of the horizontal pass, times its weight, onto the sums of an output row.
TERN_IMAGE_CLONES void AddRow(const uint8_t* row, int32_t weight, size_t bytes, int32_t* sums) {
  for (size_t x = 0; x < bytes; ++x) sums[x] += row[x] * weight;
}

TERN_IMAGE_CLONES void ClipAll(const int32_t* sums, size_t count, uint8_t* out) {
  for (size_t i = 0; i < count; ++i) out[i] = Clip(sums[i]);
}

Image Cut(const uint8_t* pixels, size_t row_bytes, const Window& window) {
  Image out;
  out.width = window.width;
  out.height = window.height;
  const size_t out_bytes = static_cast<size_t>(window.width) * 3;
  out.pixels.resize(out_bytes * window.height);
  for (int y = 0; y < window.height; ++y) {
    std::memcpy(out.pixels.data() + y * out_bytes,
                pixels + (window.y + y) * row_bytes + window.x * 3, out_bytes);
  }
  return out;
}

// How many pixels of a side the picture covers.
double Extent(int side, int full_side, int reduction) {
  return reduction > 1 ? static_cast<double>(full_side) / reduction : side;
}

}  // namespace

Image ResizeAntialiased(const Image& image, int64_t width, int64_t height, const Window& window,
                        Kernel kernel) {
  const size_t in_bytes = static_cast<size_t>(image.width) * 3;
  const size_t out_bytes = static_cast<size_t>(window.width) * 3;
  if (width == image.width && height == image.height)
    return Cut(image.pixels.data(), in_bytes, window);
  // A pass that would not change the size is left out, as in Pillow; its window is a copy.
  const bool horizontal = width != image.width;
  const bool vertical = height != image.height;
  Taps columns;
  if (horizontal)
    columns = MakeTaps(image.width, Extent(image.width, image.full_width, image.reduction), width,
                       window.x, window.width, kernel);

  Image out;
  out.width = window.width;
  out.height = window.height;
  out.pixels.resize(out_bytes * window.height);
  const auto resized_row = [&](int y, uint8_t* to) {
    const uint8_t* row = image.pixels.data() + y * in_bytes;
    if (horizontal) {
      ResizeRow(row, image.pixels.data() + image.pixels.size(), columns, to);
    } else {
      std::memcpy(to, row + window.x * 3, out_bytes);
    }
  };
  if (!vertical) {
    for (int y = 0; y < window.height; ++y) {
      resized_row(static_cast<int>(window.y) + y, out.pixels.data() + y * out_bytes);
    }
    return out;
  }

  // Each input row goes through the horizontal pass once and is added at once to the output rows
  // that want it: a very tall image needs no very tall intermediate. Both ends of the ranges rise
  // with y.
  const Taps rows = MakeTaps(image.height, Extent(image.height, image.full_height, image.reduction),
                             height, window.y, window.height, kernel);
  std::vector<uint8_t> row(out_bytes);
  std::vector<int32_t> sums(out_bytes * window.height, kHalf);
  int first = 0;  // the first output row that is not complete
  for (int y = rows.begin[0]; y < rows.begin.back() + rows.size.back(); ++y) {
    while (first < window.height && rows.begin[first] + rows.size[first] <= y) ++first;
    if (first == window.height) break;
    if (rows.begin[first] > y) continue;
    resized_row(y, row.data());
    for (int i = first; i < window.height && rows.begin[i] <= y; ++i) {
      const int32_t weight =
          rows.weights[static_cast<size_t>(i) * rows.stride + (y - rows.begin[i])];
      AddRow(row.data(), weight, out_bytes, sums.data() + i * out_bytes);
    }
  }
  ClipAll(sums.data(), sums.size(), out.pixels.data());
  return out;
}

absl::StatusOr<Image> ResizeLinear(const Image& image, int64_t width, int64_t height,
                                   const Window& window) {
  constexpr int64_t kMaxPixels = int64_t{1} << 26;
  if (width > kMaxPixels / height) {
    return absl::InvalidArgumentError(absl::StrCat("image of ", image.width, "x", image.height,
                                                   " would become ", width, "x", height,
                                                   ", the limit is ", kMaxPixels, " pixels"));
  }
  const cv::Mat in(image.height, image.width, CV_8UC3, const_cast<uint8_t*>(image.pixels.data()));
  cv::Mat out;
  // Our pools are the parallelism; OpenCV would start a team per calling thread.
  static const bool single = (cv::setNumThreads(1), true);
  (void)single;
  try {
    cv::resize(in, out, cv::Size(static_cast<int>(width), static_cast<int>(height)), 0, 0,
               cv::INTER_LINEAR);
  } catch (const cv::Exception& e) {
    return absl::InternalError(absl::StrCat("cv::resize: ", e.what()));
  }
  return Cut(out.data, out.step[0], window);
}

}  // namespace tern::image
