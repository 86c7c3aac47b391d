#include <libexif/exif-data.h>

#include <memory>
#include <string>

#include "server/image/codecs.h"

namespace tern::image {
namespace {

struct Unref {
  void operator()(ExifData* data) const { exif_data_unref(data); }
};

}  // namespace

int ExifOrientation(absl::string_view exif) {
  constexpr absl::string_view kPrefix("Exif\0\0", 6);
  // A TIFF header and an empty directory take 14 bytes. JPEG segments end at 64 KiB, and cameras
  // write no larger block elsewhere either, so a larger one is not worth its parsing time.
  if (exif.size() < 14 || exif.size() > (64u << 10)) return 1;
  std::string block(exif);
  if (exif.substr(0, kPrefix.size()) != kPrefix) block.insert(0, kPrefix.data(), kPrefix.size());
  const std::unique_ptr<ExifData, Unref> data(exif_data_new());
  if (data == nullptr) return 1;
  // Read what is there; do not add the entries that the standard calls mandatory.
  exif_data_unset_option(data.get(), EXIF_DATA_OPTION_FOLLOW_SPECIFICATION);
  exif_data_load_data(data.get(), reinterpret_cast<const unsigned char*>(block.data()),
                      static_cast<unsigned int>(block.size()));
  const ExifEntry* entry = exif_content_get_entry(data->ifd[EXIF_IFD_0], EXIF_TAG_ORIENTATION);
  if (entry == nullptr || entry->data == nullptr) return 1;
  const ExifByteOrder order = exif_data_get_byte_order(data.get());
  uint32_t value = 1;
  if (entry->format == EXIF_FORMAT_SHORT && entry->size >= 2) {
    value = exif_get_short(entry->data, order);
  } else if (entry->format == EXIF_FORMAT_LONG && entry->size >= 4) {
    value = exif_get_long(entry->data, order);
  }
  return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
}

}  // namespace tern::image
