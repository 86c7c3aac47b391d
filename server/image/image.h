// Encoded image -> network input, exactly as the model's preprocessing contract says.
#ifndef TERN_SERVER_IMAGE_IMAGE_H_
#define TERN_SERVER_IMAGE_IMAGE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tern/v1/model.pb.h"

namespace tern::image {

// What an encoded image may cost. Checked from the header, before pixels are decoded.
struct Limits {
  uint64_t max_bytes = 16ull << 20;
  uint64_t max_pixels = 40'000'000;
};

// Interleaved 8-bit pixels, three channels, rows dense.
struct Image {
  int width = 0;
  int height = 0;
  std::vector<uint8_t> pixels;  // [height, width, 3], RGB
  // Where jpeg_scaling reduced the picture: a pixel stands for reduction x reduction of those of a
  // picture of full_width x full_height (the last column and row for fewer). Preprocess goes by
  // these, so that rounding width and height up moves nothing. 1, 0, 0 where it did not.
  int reduction = 1;
  int full_width = 0;
  int full_height = 0;
};

// Decodes JPEG, PNG, WebP or BMP (recognised by magic bytes) to RGB, orientation as
// stored unless `apply_exif_orientation`. Grey and palette images are widened, alpha is dropped, 16
// bits are reduced to 8, CMYK JPEGs are converted (all as Pillow's convert("RGB")).
// INVALID_ARGUMENT: empty, unknown format, damaged, truncated (also a JPEG cut in half);
// RESOURCE_EXHAUSTED: more bytes or pixels than `limits`, or a JPEG of very many scans; messages
// give value and limit. Thread safe.
absl::StatusOr<Image> Decode(absl::string_view bytes, const Limits& limits,
                             bool apply_exif_orientation);

// The same as `contract` says for an input of 3 x height x width: orientation, and with
// jpeg_scaling a JPEG at reduced size. `limits` count the whole picture's pixels in any case.
// Whoever decodes for a model uses this one.
absl::StatusOr<Image> Decode(absl::string_view bytes, const Limits& limits,
                             const v1::Preprocessing& contract, int height, int width);

// INVALID_ARGUMENT naming the field if the contract is not one that Preprocess can follow for an
// input of 3 x height x width.
absl::Status ValidatePreprocessing(const v1::Preprocessing& contract, int height, int width);

// Resizes, crops and normalises `image` into `output`, f32 NHWC [height, width, 3] (one image;
// channel order as the contract says). `contract` must be valid for height x width. Thread safe.
// INVALID_ARGUMENT if the image cannot be brought to that size (contract NONE and another size).
absl::Status Preprocess(const Image& image, const v1::Preprocessing& contract, int height,
                        int width, absl::Span<float> output);

// The named contracts that ternctl offers: "cifar10" (exact 32x32 as torchvision Resize(32) +
// CenterCrop(32), mean 0.485.. std 0.229..), "imagenet" (Resize(256), CenterCrop(224), the same
// mean and std). NOT_FOUND otherwise, listing the names.
absl::StatusOr<v1::Preprocessing> NamedPreprocessing(absl::string_view name);

}  // namespace tern::image

#endif  // TERN_SERVER_IMAGE_IMAGE_H_
