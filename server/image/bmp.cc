// The one format read without a library: a BMP of the kinds accepted here is a header in front of
// raw pixels, and Debian's only packaged readers (OpenCV's imgcodecs with its 139 libraries,
// ImageMagick) would dwarf the server. Layout: Microsoft's BITMAPFILEHEADER and BITMAPINFOHEADER.
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/image/codecs.h"

namespace tern::image {
namespace {

uint32_t Little(absl::string_view bytes, size_t at, int size) {
  uint32_t value = 0;
  for (int i = 0; i < size; ++i)
    value |= static_cast<uint32_t>(static_cast<uint8_t>(bytes[at + i])) << (8 * i);
  return value;
}

absl::Status Damaged(absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("damaged BMP: ", why));
}

// The byte of a pixel that an 8-bit colour mask selects, or -1.
int ByteOfMask(uint32_t mask) {
  for (int i = 0; i < 4; ++i) {
    if (mask == 0xffu << (8 * i)) return i;
  }
  return -1;
}

}  // namespace

absl::StatusOr<Decoded> DecodeBmp(absl::string_view bytes, const Limits& limits) {
  constexpr size_t kFileHeader = 14;
  constexpr uint32_t kRgb = 0, kBitFields = 3;
  if (bytes.size() < kFileHeader + 40) return Damaged("shorter than its headers");
  const uint64_t pixel_offset = Little(bytes, 10, 4);
  const uint64_t header = Little(bytes, 14, 4);
  if (header < 40 || header > 124) {
    return absl::InvalidArgumentError(
        absl::StrCat("BMP header of ", header, " bytes; want 40 to 124"));
  }
  if (bytes.size() < kFileHeader + header) return Damaged("shorter than its headers");
  const int64_t width = static_cast<int32_t>(Little(bytes, 18, 4));
  const int64_t signed_height = static_cast<int32_t>(Little(bytes, 22, 4));
  const bool top_down = signed_height < 0;
  const int64_t height = top_down ? -signed_height : signed_height;
  TERN_RETURN_IF_ERROR(CheckSize(width, height, limits));

  const uint32_t bits = Little(bytes, 28, 2);
  const uint32_t compression = Little(bytes, 30, 4);
  const bool masked = bits == 32 && compression == kBitFields;
  if ((bits != 8 && bits != 24 && bits != 32) || (compression != kRgb && !masked)) {
    return absl::InvalidArgumentError(absl::StrCat("BMP with ", bits,
                                                   " bits per pixel and compression ", compression,
                                                   "; want 8, 24 or 32 bits, uncompressed"));
  }

  // Where red, green and blue lie in a pixel.
  int position[3] = {2, 1, 0};
  uint64_t after_header = kFileHeader + header;
  if (masked) {
    // The masks follow the 40-byte header; longer headers contain them at the same place.
    if (header == 40) after_header += 12;
    if (bytes.size() < kFileHeader + 52) return Damaged("colour masks are missing");
    for (int c = 0; c < 3; ++c) {
      position[c] = ByteOfMask(Little(bytes, kFileHeader + 40 + 4 * c, 4));
      if (position[c] < 0)
        return absl::InvalidArgumentError("BMP with colour masks that are not whole bytes");
    }
  }
  uint32_t colors = 0;
  if (bits == 8) {
    colors = Little(bytes, 46, 4);
    if (colors == 0) colors = 256;
    if (colors > 256 || after_header + 4ull * colors > bytes.size())
      return Damaged("palette outside the file");
  }
  const uint64_t row_bytes = (static_cast<uint64_t>(width) * bits / 8 + 3) / 4 * 4;
  if (pixel_offset < after_header + 4ull * colors || pixel_offset > bytes.size() ||
      row_bytes * height > bytes.size() - pixel_offset) {
    return Damaged(absl::StrCat(bytes.size(), " bytes, want ", pixel_offset + row_bytes * height));
  }

  Decoded decoded;
  decoded.image.width = static_cast<int>(width);
  decoded.image.height = static_cast<int>(height);
  decoded.image.pixels.resize(static_cast<size_t>(width) * height * 3);
  uint8_t* to = decoded.image.pixels.data();
  const size_t pixel_bytes = bits / 8;
  for (int64_t y = 0; y < height; ++y) {
    const char* row = bytes.data() + pixel_offset + row_bytes * (top_down ? y : height - 1 - y);
    for (int64_t x = 0; x < width; ++x, to += 3) {
      const char* pixel = row + x * pixel_bytes;
      if (bits == 8) {
        const uint32_t index = static_cast<uint8_t>(*pixel);
        if (index >= colors) return Damaged(absl::StrCat("colour ", index, " of ", colors));
        pixel = bytes.data() + after_header + 4 * index;
      }
      for (int c = 0; c < 3; ++c) to[c] = static_cast<uint8_t>(pixel[position[c]]);
    }
  }
  return decoded;
}

}  // namespace tern::image
