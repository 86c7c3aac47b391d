#include <webp/decode.h>
#include <webp/demux.h>

#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/image/codecs.h"

namespace tern::image {
namespace {

struct Delete {
  void operator()(WebPDemuxer* demuxer) const { WebPDemuxDelete(demuxer); }
};

}  // namespace

absl::StatusOr<Decoded> DecodeWebp(absl::string_view bytes, const Limits& limits) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  int width = 0, height = 0;
  if (!WebPGetInfo(data, bytes.size(), &width, &height)) {
    return absl::InvalidArgumentError("damaged WebP: bad header");
  }
  TERN_RETURN_IF_ERROR(CheckSize(width, height, limits));

  const WebPData file = {data, bytes.size()};
  // Fails unless every chunk that the container announces is there.
  const std::unique_ptr<WebPDemuxer, Delete> demuxer(WebPDemux(&file));
  WebPIterator frame;
  if (demuxer == nullptr || !WebPDemuxGetFrame(demuxer.get(), 1, &frame)) {
    return absl::InvalidArgumentError("damaged WebP: incomplete container");
  }
  std::unique_ptr<WebPIterator, void (*)(WebPIterator*)> release(&frame, &WebPDemuxReleaseIterator);
  // The canvas may differ from what the first chunk said, and the frame lies inside the canvas.
  width = static_cast<int>(WebPDemuxGetI(demuxer.get(), WEBP_FF_CANVAS_WIDTH));
  height = static_cast<int>(WebPDemuxGetI(demuxer.get(), WEBP_FF_CANVAS_HEIGHT));
  TERN_RETURN_IF_ERROR(CheckSize(width, height, limits));
  if (frame.x_offset < 0 || frame.y_offset < 0 || frame.width < 1 || frame.height < 1 ||
      frame.x_offset > width - frame.width || frame.y_offset > height - frame.height) {
    return absl::InvalidArgumentError("damaged WebP: the first frame lies outside the canvas");
  }

  // An animation is its first frame; what that does not cover is black, as in Pillow.
  Decoded decoded;
  decoded.image.width = width;
  decoded.image.height = height;
  decoded.image.pixels.resize(static_cast<size_t>(width) * height * 3);
  const size_t offset = (static_cast<size_t>(frame.y_offset) * width + frame.x_offset) * 3;
  if (WebPDecodeRGBInto(frame.fragment.bytes, frame.fragment.size,
                        decoded.image.pixels.data() + offset, decoded.image.pixels.size() - offset,
                        width * 3) == nullptr) {
    return absl::InvalidArgumentError("damaged WebP: pixels cannot be decoded");
  }
  WebPChunkIterator chunk;
  if (WebPDemuxGetChunk(demuxer.get(), "EXIF", 1, &chunk)) {
    decoded.orientation = ExifOrientation(
        absl::string_view(reinterpret_cast<const char*>(chunk.chunk.bytes), chunk.chunk.size));
    WebPDemuxReleaseChunkIterator(&chunk);
  }
  return decoded;
}

}  // namespace tern::image
