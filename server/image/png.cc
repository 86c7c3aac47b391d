#include <png.h>

#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/image/codecs.h"

namespace tern::image {
namespace {

// libpng reports errors with longjmp. Each method that calls it sets its own target and holds only
// trivially destructible locals, so no destructor is jumped over; memory belongs to the caller.
class PngReader {
 public:
  explicit PngReader(absl::string_view bytes) : rest_(bytes) {
    png_ = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, this, &PngReader::OnError,
                                    &PngReader::OnWarning, nullptr, &PngReader::Allocate, nullptr);
    if (png_ != nullptr) info_ = png_create_info_struct(png_);
    if (info_ == nullptr) std::strcpy(message_, "out of memory");
  }
  ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;

  // Everything before the pixels.
  bool ReadHeader() {
    if (info_ == nullptr) return false;
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_set_read_fn(png_, this, &PngReader::OnRead);
    // Ancillary chunks are skipped, except EXIF: a few kilobytes of compressed text can unpack to
    // gigabytes.
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
    static const png_byte kExif[] = {'e', 'X', 'I', 'f', 0};
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_AS_DEFAULT, kExif, 1);
    png_set_chunk_malloc_max(png_, 1 << 20);
    png_set_user_limits(png_, 0x7fffffff, 0x7fffffff);  // CheckSize has the word and the message
    png_read_info(png_, info_);
    width_ = png_get_image_width(png_, info_);
    height_ = png_get_image_height(png_, info_);
    return true;
  }

  // All pixels as 8-bit RGB into `rows`, and the chunks after them.
  bool ReadPixels(png_bytep* rows) {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_set_strip_16(png_);  // the high byte, as Pillow
    png_set_packing(png_);
    const int type = png_get_color_type(png_, info_);
    if (type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
    if ((type & PNG_COLOR_MASK_COLOR) == 0) {
      if (png_get_bit_depth(png_, info_) < 8) png_set_expand_gray_1_2_4_to_8(png_);
      png_set_gray_to_rgb(png_);
    }
    png_set_strip_alpha(png_);
    png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    if (png_get_rowbytes(png_, info_) != static_cast<size_t>(width_) * 3) {
      png_error(png_, "pixels do not convert to RGB");
    }
    png_read_image(png_, rows);
    png_read_end(png_, info_);
    return true;
  }

  // The EXIF block; empty if there is none. Valid while the reader lives.
  absl::string_view exif() const {
    png_bytep data = nullptr;
    png_uint_32 size = 0;
    if (png_get_eXIf_1(png_, info_, &size, &data) == 0 || data == nullptr) return {};
    return absl::string_view(reinterpret_cast<const char*>(data), size);
  }

  int64_t width() const { return width_; }
  int64_t height() const { return height_; }
  const char* message() const { return message_; }

 private:
  static void OnError(png_structp png, png_const_charp message) {
    auto* self = static_cast<PngReader*>(png_get_error_ptr(png));
    std::strncpy(self->message_, message, sizeof(self->message_) - 1);
    png_longjmp(png, 1);
  }
  // libpng 1.6 asks for as much as an eXIf chunk claims to have, before it looks for it and
  // whatever png_set_chunk_malloc_max says. Its largest honest wish is a row of 65,535 pixels of 8
  // bytes.
  static png_voidp Allocate(png_structp, png_alloc_size_t size) {
    constexpr png_alloc_size_t kMost = 1 << 20;
    return size <= kMost ? std::malloc(size) : nullptr;
  }
  // Warnings concern ancillary chunks (a bad checksum there drops the chunk).
  static void OnWarning(png_structp, png_const_charp) {}
  static void OnRead(png_structp png, png_bytep out, size_t size) {
    auto* self = static_cast<PngReader*>(png_get_io_ptr(png));
    if (size > self->rest_.size()) png_error(png, "truncated");
    std::memcpy(out, self->rest_.data(), size);
    self->rest_.remove_prefix(size);
  }

  absl::string_view rest_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  int64_t width_ = 0;
  int64_t height_ = 0;
  char message_[128] = {};
};

}  // namespace

absl::StatusOr<Decoded> DecodePng(absl::string_view bytes, const Limits& limits) {
  PngReader reader(bytes);
  const auto error = [&] {
    return absl::InvalidArgumentError(absl::StrCat("damaged PNG: ", reader.message()));
  };
  if (!reader.ReadHeader()) return error();
  TERN_RETURN_IF_ERROR(CheckSize(reader.width(), reader.height(), limits));
  Decoded decoded;
  decoded.image.width = static_cast<int>(reader.width());
  decoded.image.height = static_cast<int>(reader.height());
  const size_t row_bytes = static_cast<size_t>(reader.width()) * 3;
  decoded.image.pixels.resize(row_bytes * reader.height());
  std::vector<png_bytep> rows(reader.height());
  for (size_t y = 0; y < rows.size(); ++y) rows[y] = decoded.image.pixels.data() + y * row_bytes;
  if (!reader.ReadPixels(rows.data())) return error();
  decoded.orientation = ExifOrientation(reader.exif());
  return decoded;
}

}  // namespace tern::image
