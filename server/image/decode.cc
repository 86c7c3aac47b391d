#include <cstring>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/image/codecs.h"
#include "server/image/image.h"

namespace tern::image {
namespace {

bool StartsWith(absl::string_view bytes, absl::string_view prefix) {
  return bytes.substr(0, prefix.size()) == prefix;
}

absl::StatusOr<Decoded> DecodeAny(absl::string_view bytes, const Limits& limits,
                                  const Purpose* purpose) {
  if (StartsWith(bytes, "\xff\xd8\xff")) return DecodeJpeg(bytes, limits, purpose);
  if (StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return DecodePng(bytes, limits);
  if (StartsWith(bytes, "RIFF") && bytes.size() >= 12 && bytes.substr(8, 4) == "WEBP") {
    return DecodeWebp(bytes, limits);
  }
  if (StartsWith(bytes, "BM")) return DecodeBmp(bytes, limits);
  return absl::InvalidArgumentError(absl::StrCat("unknown image format: starts with \"",
                                                 absl::CHexEscape(bytes.substr(0, 8)),
                                                 "\"; want JPEG, PNG, WebP or BMP"));
}

absl::StatusOr<Image> DecodeFor(absl::string_view bytes, const Limits& limits,
                                bool apply_exif_orientation, const Purpose* purpose) {
  if (bytes.empty()) return absl::InvalidArgumentError("image is empty (0 bytes)");
  if (bytes.size() > limits.max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("image has ", bytes.size(), " bytes, the limit is ", limits.max_bytes));
  }
  TERN_ASSIGN_OR_RETURN(Decoded decoded, DecodeAny(bytes, limits, purpose));
  if (!apply_exif_orientation) return std::move(decoded.image);
  return ApplyOrientation(std::move(decoded.image), decoded.orientation);
}

}  // namespace

absl::Status CheckSize(int64_t width, int64_t height, const Limits& limits) {
  if (width < 1 || height < 1) {
    return absl::InvalidArgumentError(absl::StrCat("image is ", width, "x", height, " pixels"));
  }
  if (width > kMaxSide || height > kMaxSide) {
    return absl::ResourceExhaustedError(
        absl::StrCat("image is ", width, "x", height, " pixels, the limit per side is ", kMaxSide));
  }
  const uint64_t pixels = static_cast<uint64_t>(width) * static_cast<uint64_t>(height);
  if (pixels > limits.max_pixels) {
    return absl::ResourceExhaustedError(absl::StrCat("image is ", width, "x", height, " = ", pixels,
                                                     " pixels, the limit is ", limits.max_pixels));
  }
  return absl::OkStatus();
}

Image ApplyOrientation(Image image, int orientation) {
  if (orientation < 2 || orientation > 8) return image;
  const int w = image.width;
  const int h = image.height;
  const bool swap = orientation >= 5;
  Image out;
  out.width = swap ? h : w;
  out.height = swap ? w : h;
  out.reduction = image.reduction;
  out.full_width = swap ? image.full_height : image.full_width;
  out.full_height = swap ? image.full_width : image.full_height;
  out.pixels.resize(image.pixels.size());
  // The pixel at (0, 0) of the output, and how the source moves with output columns and rows.
  const ptrdiff_t column = 3;
  const ptrdiff_t row = static_cast<ptrdiff_t>(w) * 3;
  ptrdiff_t start = 0, dx = column, dy = row;
  switch (orientation) {
    case 2:  // mirrored left-right
      start = (w - 1) * column, dx = -column;
      break;
    case 3:  // turned by 180 degrees
      start = (w - 1) * column + (h - 1) * row, dx = -column, dy = -row;
      break;
    case 4:  // mirrored top-bottom
      start = (h - 1) * row, dy = -row;
      break;
    case 5:  // transposed
      dx = row, dy = column;
      break;
    case 6:  // to be turned clockwise
      start = (h - 1) * row, dx = -row, dy = column;
      break;
    case 7:  // transposed over the other diagonal
      start = (w - 1) * column + (h - 1) * row, dx = -row, dy = -column;
      break;
    case 8:  // to be turned anticlockwise
      start = (w - 1) * column, dx = row, dy = -column;
      break;
  }
  uint8_t* to = out.pixels.data();
  for (int y = 0; y < out.height; ++y) {
    ptrdiff_t from = start + y * dy;
    for (int x = 0; x < out.width; ++x, from += dx, to += 3) {
      std::memcpy(to, image.pixels.data() + from, 3);
    }
  }
  return out;
}

absl::StatusOr<Image> Decode(absl::string_view bytes, const Limits& limits,
                             bool apply_exif_orientation) {
  return DecodeFor(bytes, limits, apply_exif_orientation, nullptr);
}

absl::StatusOr<Image> Decode(absl::string_view bytes, const Limits& limits,
                             const v1::Preprocessing& contract, int height, int width) {
  const Purpose purpose{contract, height, width};
  return DecodeFor(bytes, limits, !contract.ignore_exif_orientation(),
                   contract.jpeg_scaling() ? &purpose : nullptr);
}

}  // namespace tern::image
