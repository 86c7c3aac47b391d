// Resampling to the letter of the libraries that networks are trained with.
#ifndef TERN_SERVER_IMAGE_RESIZE_H_
#define TERN_SERVER_IMAGE_RESIZE_H_

#include "absl/status/statusor.h"
#include "server/image/image.h"

namespace tern::image {

struct Size {
  int64_t width = 0, height = 0;
};

// What the contract's resize step makes of an image of size `image` (at least 1 x 1), for a network
// input of `input`, before the crop.
Size ResizedSize(const v1::Preprocessing& contract, Size image, Size input);

// Which part of the resized image is wanted; inside it.
struct Window {
  int64_t x = 0, y = 0;
  int width = 0, height = 0;
};

enum class Kernel { kTriangle, kCubic };

// Pillow's Image.resize (Resample.c): the kernel is widened by the shrinking factor, the
// horizontal pass comes first and is rounded to 8 bits, coefficients have 22 fraction bits.
// Gives `window` of the `width` x `height` result; equal to Pillow bit for bit. Work and
// memory follow the window, not the result. Thread safe. Of a reduced image the part that the
// picture covers is resized, as with Pillow's draft() and a box.
Image ResizeAntialiased(const Image& image, int64_t width, int64_t height, const Window& window,
                        Kernel kernel);

// OpenCV's INTER_LINEAR (no antialiasing). INVALID_ARGUMENT if the whole result would exceed
// 2^26 pixels: OpenCV cannot compute a part. Thread safe.
absl::StatusOr<Image> ResizeLinear(const Image& image, int64_t width, int64_t height,
                                   const Window& window);

}  // namespace tern::image

#endif  // TERN_SERVER_IMAGE_RESIZE_H_
