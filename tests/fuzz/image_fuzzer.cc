// Bytes of an image -> what the server does with a request's: recognise, decode, orient,
// preprocess.
//
// The last byte also chooses the contract: every file is an input, so tests/image/fixtures are
// seeds.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"
#include "server/image/codecs.h"
#include "server/image/image.h"
#include "tests/fuzz/fuzzer.h"

namespace tern::image {
namespace {

using v1::Preprocessing;

constexpr int kHeight = 24, kWidth = 32;

// Eight contracts: every resize rule and filter, with and without crop, turn and reduced decoding.
Preprocessing Contract(uint8_t choice) {
  Preprocessing contract;
  contract.set_ignore_exif_orientation(choice & 1);
  contract.set_filter(static_cast<Preprocessing::Filter>(choice % 3));
  contract.set_scale(1.0f / 255);
  switch (choice >> 1 & 3) {
    case 0:
      contract.set_center_crop(true);  // at the size stored
      break;
    case 1:
      contract.set_resize(Preprocessing::EXACT);
      contract.set_color_order(Preprocessing::BGR);
      contract.set_jpeg_scaling(true);
      break;
    case 2:
      contract.set_resize(Preprocessing::SHORTER_SIDE);
      contract.set_resize_size(40);
      contract.set_center_crop(true);
      contract.set_jpeg_scaling(true);
      break;
    default:
      contract.set_resize(Preprocessing::SHORTER_SIDE);
      contract.set_resize_size(kHeight);
      contract.set_center_crop(true);
  }
  return contract;
}

void Run(absl::string_view bytes) {
  const Preprocessing contract = Contract(bytes.empty() ? 0 : static_cast<uint8_t>(bytes.back()));
  const absl::Status valid = ValidatePreprocessing(contract, kHeight, kWidth);
  fuzz::Check(valid.ok(), valid.message());

  // An EXIF block reaches the parser also without an image around it.
  const int orientation = ExifOrientation(bytes);
  fuzz::Check(orientation >= 1 && orientation <= 8, "an orientation outside 1..8");

  // Less than the server allows, so that the time of an input stays that of its bytes.
  Limits limits;
  limits.max_pixels = 1 << 18;
  const absl::StatusOr<Image> image = Decode(bytes, limits, contract, kHeight, kWidth);
  if (!image.ok()) {
    fuzz::Check(
        absl::IsInvalidArgument(image.status()) || absl::IsResourceExhausted(image.status()),
        image.status().ToString());
    return;
  }
  fuzz::Check(image->width >= 1 && image->height >= 1 &&
                  image->pixels.size() == size_t{3} * image->width * image->height,
              "pixels do not fit the size");
  std::vector<float> output(kHeight * kWidth * 3, -1.0f);
  const absl::Status status = Preprocess(*image, contract, kHeight, kWidth, absl::MakeSpan(output));
  fuzz::Check(status.ok() || absl::IsInvalidArgument(status), status.ToString());
  if (!status.ok()) return;
  for (float value : output) fuzz::Check(value >= 0.0f && value <= 1.0f, "a value outside 0..1");
}

}  // namespace
}  // namespace tern::image

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tern::image::Run(tern::fuzz::Text(data, size));
  return 0;
}
