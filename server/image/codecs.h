// The decoders behind Decode(), one per format. Internal to server/image.
//
// Every decoder reads the header first, calls CheckSize, and only then allocates and decodes
// pixels. Bytes that merely look like the format give INVALID_ARGUMENT. All are thread safe.
#ifndef TERN_SERVER_IMAGE_CODECS_H_
#define TERN_SERVER_IMAGE_CODECS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/image/image.h"

namespace tern::image {

// Pixels as stored and the orientation that EXIF asks for (1..8; 1 where there is none).
struct Decoded {
  Image image;
  int orientation = 1;
};

// No side may be longer than JPEG can express. A 40-megapixel line of one row is no photograph, and
// the resampling tables grow with the side, not with the area.
inline constexpr int64_t kMaxSide = 65535;

// INVALID_ARGUMENT if a side is below 1; RESOURCE_EXHAUSTED if it exceeds kMaxSide or the area
// exceeds limits.max_pixels.
absl::Status CheckSize(int64_t width, int64_t height, const Limits& limits);

// What is to be made of the pixels.
struct Purpose {
  const v1::Preprocessing& contract;
  int height, width;  // of the network's input
};

// At the size stored, or reduced as `purpose` allows if that is not null.
absl::StatusOr<Decoded> DecodeJpeg(absl::string_view bytes, const Limits& limits,
                                   const Purpose* purpose);
absl::StatusOr<Decoded> DecodePng(absl::string_view bytes, const Limits& limits);
absl::StatusOr<Decoded> DecodeWebp(absl::string_view bytes, const Limits& limits);
absl::StatusOr<Decoded> DecodeBmp(absl::string_view bytes, const Limits& limits);

// The orientation tag of an EXIF block ("Exif\0\0" and a TIFF structure; the prefix may be missing,
// as in PNG and WebP); 1 if there is none or it is damaged: a bad tag never makes an image
// undecodable.
int ExifOrientation(absl::string_view exif);

// `image` turned and mirrored so that it looks as orientation 1..8 says; other values count as 1.
Image ApplyOrientation(Image image, int orientation);

}  // namespace tern::image

#endif  // TERN_SERVER_IMAGE_CODECS_H_
