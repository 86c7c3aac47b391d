#include <turbojpeg.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/image/codecs.h"
#include "server/image/resize.h"

namespace tern::image {
namespace {

struct Destroy {
  void operator()(void* handle) const { tjDestroy(handle); }
};

// A progressive file of a few bytes per scan costs a pass over the whole picture for each: 60 ms of
// 40 million pixels. Encoders write 6 to 16 scans; that many over a picture of limits.max_pixels are
// the most work that is done, and smaller pictures may have more.
constexpr uint64_t kMostScans = 20;

// What the segments say besides the pixels.
struct Segments {
  bool complete = false;   // an end-of-image marker was reached
  uint64_t scans = 0;
  absl::string_view exif;  // the first APP1 block that holds EXIF
};

// Walks the marker segments (ITU-T T.81, annex B). libjpeg fills a cut file up with grey, and only
// the first of its warnings can be read through TurboJPEG, so whether the file is whole is decided
// here.
Segments Walk(absl::string_view bytes) {
  constexpr absl::string_view kExif("Exif\0\0", 6);
  Segments result;
  size_t i = 2;  // after the start-of-image marker
  while (i + 1 < bytes.size()) {
    if (static_cast<uint8_t>(bytes[i]) != 0xff) {
      ++i;  // entropy-coded data, or bytes that do not belong; the decoder judges those
      continue;
    }
    const uint8_t marker = static_cast<uint8_t>(bytes[i + 1]);
    if (marker == 0xff) {
      ++i;  // fill byte
      continue;
    }
    i += 2;
    if (marker == 0xd9) {
      result.complete = true;
      return result;
    }
    // Stuffed zero, TEM, restart and start-of-image markers stand alone.
    if (marker <= 0x01 || (marker >= 0xd0 && marker <= 0xd8)) continue;
    if (marker == 0xda) ++result.scans;
    if (i + 2 > bytes.size()) return result;
    const size_t length = static_cast<size_t>(static_cast<uint8_t>(bytes[i])) << 8 |
                          static_cast<uint8_t>(bytes[i + 1]);
    if (length < 2 || length > bytes.size() - i) return result;
    const absl::string_view payload = bytes.substr(i + 2, length - 2);
    if (marker == 0xe1 && result.exif.empty() && payload.substr(0, kExif.size()) == kExif) {
      result.exif = payload;
    }
    i += length;
  }
  return result;
}

// Warnings that leave every pixel intact: stray bytes between segments (cameras pad there), odd
// scan parameters that the decoder corrects, an unknown Adobe colour code.
bool IsBenign(absl::string_view warning) {
  return absl::StrContains(warning, "extraneous bytes before marker") ||
         absl::StrContains(warning, "Invalid SOS parameters") ||
         absl::StrContains(warning, "Inconsistent progression sequence") ||
         absl::StrContains(warning, "Adobe color transform");
}

// Pillow's conversion of CMYK, where Adobe's files hold the inverted inks: rgb = k - (255 - ink) *
// k / 255 with `ink` and `k` as stored, rounded as Pillow rounds.
uint8_t FromInk(int stored_ink, int stored_k) {
  const int product = (255 - stored_ink) * stored_k + 128;
  return static_cast<uint8_t>(stored_k - ((product + (product >> 8)) >> 8));
}

int64_t Reduced(int64_t side, int reduction) { return (side + reduction - 1) / reduction; }

// By how much a picture of size `stored` is reduced for `purpose`: the most of 8, 4 and 2 at which
// the resize step still enlarges neither side. libjpeg offers every M/8 of the size, but the other
// transforms have no vector code: decoding takes 1.3 (5/8) to 1.9 times (7/8) as long as the whole
// picture, and 3/8 longer than 4/8.
int Reduction(Size stored, int orientation, const Purpose& purpose) {
  if (orientation >= 5 && !purpose.contract.ignore_exif_orientation()) {
    std::swap(stored.width, stored.height);
  }
  const Size resized = ResizedSize(purpose.contract, stored, {purpose.width, purpose.height});
  for (const int reduction : {8, 4, 2}) {
    if (Reduced(stored.width, reduction) >= resized.width &&
        Reduced(stored.height, reduction) >= resized.height) {
      return reduction;
    }
  }
  return 1;
}

}  // namespace

absl::StatusOr<Decoded> DecodeJpeg(absl::string_view bytes, const Limits& limits,
                                   const Purpose* purpose) {
  const std::unique_ptr<void, Destroy> handle(tjInitDecompress());
  if (handle == nullptr) return absl::InternalError("JPEG: no decoder");
  const auto error = [&] {
    return absl::InvalidArgumentError(absl::StrCat("damaged JPEG: ", tjGetErrorStr2(handle.get())));
  };
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
  int width = 0, height = 0, subsampling = -1, color_space = -1;
  // The header call also fails for sampling factors outside TurboJPEG's list, after it has read the
  // size; the decoder itself takes them.
  if (tjDecompressHeader3(handle.get(), data, bytes.size(), &width, &height, &subsampling,
                          &color_space) != 0 &&
      (width < 1 || height < 1 || color_space < 0) &&
      tjGetErrorCode(handle.get()) != TJERR_WARNING) {
    return error();
  }
  TERN_RETURN_IF_ERROR(CheckSize(width, height, limits));

  const Segments segments = Walk(bytes);
  if (!segments.complete) {
    return absl::InvalidArgumentError(
        absl::StrCat("truncated JPEG: ", bytes.size(), " bytes without an end marker"));
  }
  const uint64_t pixels = static_cast<uint64_t>(width) * height;
  if (segments.scans * pixels > kMostScans * limits.max_pixels) {
    return absl::ResourceExhaustedError(
        absl::StrCat("JPEG of ", segments.scans, " scans over ", width, "x", height,
                     " pixels, the limit is ", kMostScans, " scans over ", limits.max_pixels));
  }
  Decoded decoded;
  decoded.orientation = ExifOrientation(segments.exif);
  if (purpose != nullptr) {
    const int reduction = Reduction({width, height}, decoded.orientation, *purpose);
    if (reduction > 1) {
      decoded.image.reduction = reduction;
      decoded.image.full_width = width;
      decoded.image.full_height = height;
      width = static_cast<int>(Reduced(width, reduction));
      height = static_cast<int>(Reduced(height, reduction));
    }
  }
  decoded.image.width = width;
  decoded.image.height = height;
  const size_t area = static_cast<size_t>(width) * height;
  decoded.image.pixels.resize(area * 3);

  const bool cmyk = color_space == TJCS_CMYK || color_space == TJCS_YCCK;
  std::vector<uint8_t> inks;
  if (cmyk) inks.resize(area * 4);
  // Of its scales the decoder takes the largest that gives the size asked for.
  // LIMITSCANS: at most 500 scans, however small the picture.
  const int status =
      tjDecompress2(handle.get(), data, bytes.size(),
                    cmyk ? inks.data() : decoded.image.pixels.data(), width, width * (cmyk ? 4 : 3),
                    height, cmyk ? TJPF_CMYK : TJPF_RGB, TJFLAG_ACCURATEDCT | TJFLAG_LIMITSCANS);
  if (status != 0 &&
      (tjGetErrorCode(handle.get()) != TJERR_WARNING || !IsBenign(tjGetErrorStr2(handle.get())))) {
    return error();
  }
  if (cmyk) {
    uint8_t* to = decoded.image.pixels.data();
    for (size_t i = 0; i < area; ++i, to += 3) {
      for (int c = 0; c < 3; ++c) to[c] = FromInk(inks[4 * i + c], inks[4 * i + 3]);
    }
  }
  return decoded;
}

}  // namespace tern::image
