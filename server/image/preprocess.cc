#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/image/image.h"
#include "server/image/resize.h"

namespace tern::image {
namespace {

using v1::Preprocessing;

// Network inputs and intermediate sizes; far above any classification network's.
constexpr int kMaxInput = 8192;

// Where the crop lies in the resized image and in the output. torchvision's CenterCrop: a smaller
// image is padded with zeros, floor(difference / 2) in front; a larger one is cut at
// round(difference / 2), half to even.
struct Crop {
  int64_t from = 0;  // in the resized image
  int to = 0;        // in the output
  int size = 0;      // copied
};

Crop CenterCrop(int64_t have, int want) {
  Crop crop;
  if (have >= want) {
    crop.from = static_cast<int64_t>(std::nearbyint(static_cast<double>(have - want) / 2.0));
    crop.size = want;
  } else {
    crop.to = static_cast<int>((want - have) / 2);
    crop.size = static_cast<int>(have);
  }
  return crop;
}

absl::Status CheckVector(const google::protobuf::RepeatedField<float>& values,
                         absl::string_view field, bool positive) {
  if (values.size() != 0 && values.size() != 3) {
    return absl::InvalidArgumentError(
        absl::StrCat("preprocessing.", field, ": got ", values.size(), " values, want 3 or none"));
  }
  for (int c = 0; c < values.size(); ++c) {
    if (!std::isfinite(values[c]) || (positive && values[c] <= 0)) {
      return absl::InvalidArgumentError(absl::StrCat("preprocessing.", field, "[", c, "]: got ",
                                                     values[c], ", want a ",
                                                     positive ? "positive" : "finite", " number"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

Size ResizedSize(const Preprocessing& contract, Size image, Size input) {
  if (contract.resize() == Preprocessing::EXACT) return input;
  if (contract.resize() != Preprocessing::SHORTER_SIDE) return image;
  const int64_t side = contract.resize_size();
  if (image.width <= image.height) return {side, side * image.height / image.width};
  return {side * image.width / image.height, side};
}

absl::Status ValidatePreprocessing(const Preprocessing& contract, int height, int width) {
  if (height < 1 || width < 1 || height > kMaxInput || width > kMaxInput) {
    return absl::InvalidArgumentError(absl::StrCat("network input: got ", height, "x", width,
                                                   ", want 1 to ", kMaxInput, " per side"));
  }
  if (!Preprocessing::ColorOrder_IsValid(contract.color_order())) {
    return absl::InvalidArgumentError(absl::StrCat("preprocessing.color_order: unknown value ",
                                                   static_cast<int>(contract.color_order())));
  }
  if (!Preprocessing::Filter_IsValid(contract.filter())) {
    return absl::InvalidArgumentError(
        absl::StrCat("preprocessing.filter: unknown value ", static_cast<int>(contract.filter())));
  }
  switch (contract.resize()) {
    case Preprocessing::NONE:
    case Preprocessing::EXACT:
      break;
    case Preprocessing::SHORTER_SIDE:
      if (contract.resize_size() < 1 || contract.resize_size() > kMaxInput) {
        return absl::InvalidArgumentError(absl::StrCat("preprocessing.resize_size: got ",
                                                       contract.resize_size(), ", want 1 to ",
                                                       kMaxInput, " pixels for SHORTER_SIDE"));
      }
      if (!contract.center_crop() &&
          static_cast<int>(contract.resize_size()) != std::min(height, width)) {
        return absl::InvalidArgumentError(
            absl::StrCat("preprocessing.resize_size: got ", contract.resize_size(),
                         " without center_crop, want ", std::min(height, width),
                         ", the shorter side of the network's input ", height, "x", width));
      }
      // Contracts in use are 1 to 1.2 times the network's side. Less would frame every image in
      // black; far more is another network's contract.
      if (const int least = std::min(height, width), most = 4 * std::max(height, width);
          contract.center_crop() && (static_cast<int>(contract.resize_size()) < least ||
                                     static_cast<int>(contract.resize_size()) > most)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "preprocessing.resize_size: got ", contract.resize_size(), " with center_crop, want ",
            least, " to ", most, " for the network's input ", height, "x", width));
      }
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat("preprocessing.resize: unknown value ",
                                                     static_cast<int>(contract.resize())));
  }
  if (contract.jpeg_scaling() && contract.resize() == Preprocessing::NONE) {
    return absl::InvalidArgumentError(
        "preprocessing.jpeg_scaling: got true with resize NONE, want a resize step");
  }
  if (!std::isfinite(contract.scale())) {
    return absl::InvalidArgumentError(
        absl::StrCat("preprocessing.scale: got ", contract.scale(), ", want a finite number"));
  }
  TERN_RETURN_IF_ERROR(CheckVector(contract.mean(), "mean", /*positive=*/false));
  return CheckVector(contract.std(), "std", /*positive=*/true);
}

absl::Status Preprocess(const Image& image, const Preprocessing& contract, int height, int width,
                        absl::Span<float> output) {
  const size_t want = static_cast<size_t>(height) * width * 3;
  if (output.size() != want) {
    return absl::InternalError(
        absl::StrCat("Preprocess: output of ", output.size(), " floats, want ", want));
  }
  if (image.width < 1 || image.height < 1 ||
      image.pixels.size() != static_cast<size_t>(image.width) * image.height * 3) {
    return absl::InvalidArgumentError(absl::StrCat("image of ", image.width, "x", image.height,
                                                   " with ", image.pixels.size(),
                                                   " bytes of pixels"));
  }
  const Size full = image.reduction > 1 ? Size{image.full_width, image.full_height}
                                        : Size{image.width, image.height};
  const auto [resized_width, resized_height] = ResizedSize(contract, full, {width, height});
  Crop columns{0, 0, width};
  Crop rows{0, 0, height};
  if (contract.center_crop()) {
    columns = CenterCrop(resized_width, width);
    rows = CenterCrop(resized_height, height);
  } else if (resized_width != width || resized_height != height) {
    return absl::InvalidArgumentError(
        absl::StrCat("image of ", full.width, "x", full.height, " (width x height)",
                     contract.resize() == Preprocessing::NONE
                         ? std::string(" is not resized")
                         : absl::StrCat(" becomes ", resized_width, "x", resized_height),
                     "; the model wants exactly ", width, "x", height));
  }
  const Window window{columns.from, rows.from, columns.size, rows.size};

  Image part;
  if (contract.filter() == Preprocessing::BILINEAR &&
      (resized_width != image.width || resized_height != image.height)) {
    TERN_ASSIGN_OR_RETURN(part, ResizeLinear(image, resized_width, resized_height, window));
  } else {
    part = ResizeAntialiased(
        image, resized_width, resized_height, window,
        contract.filter() == Preprocessing::BICUBIC_ANTIALIAS ? Kernel::kCubic : Kernel::kTriangle);
  }

  // A pixel has 256 values per channel, so normalisation is a table.
  float table[3][256];
  int source[3];
  const float scale = contract.scale() == 0 ? 1.0f : contract.scale();
  for (int c = 0; c < 3; ++c) {
    source[c] = contract.color_order() == Preprocessing::BGR ? 2 - c : c;
    const float mean = contract.mean_size() == 3 ? contract.mean(c) : 0.0f;
    const float deviation = contract.std_size() == 3 ? contract.std(c) : 1.0f;
    for (int p = 0; p < 256; ++p) table[c][p] = (static_cast<float>(p) * scale - mean) / deviation;
  }
  if (columns.size != width || rows.size != height) {
    for (size_t i = 0; i < output.size(); i += 3) {
      for (int c = 0; c < 3; ++c) output[i + c] = table[c][0];
    }
  }
  const uint8_t* in = part.pixels.data();
  for (int y = 0; y < rows.size; ++y) {
    float* out = output.data() + (static_cast<size_t>(rows.to + y) * width + columns.to) * 3;
    for (int x = 0; x < columns.size; ++x, in += 3, out += 3) {
      out[0] = table[0][in[source[0]]];
      out[1] = table[1][in[source[1]]];
      out[2] = table[2][in[source[2]]];
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Preprocessing> NamedPreprocessing(absl::string_view name) {
  uint32_t side = 0;
  if (name == "cifar10") {
    side = 32;
  } else if (name == "imagenet") {
    side = 256;
  } else if (name == "imagenet-299") {
    side = 342;
  } else {
    return absl::NotFoundError(absl::StrCat("no preprocessing named '", name,
                                            "'; there are cifar10, imagenet and imagenet-299"));
  }
  Preprocessing contract;
  contract.set_resize(Preprocessing::SHORTER_SIDE);
  contract.set_resize_size(side);
  contract.set_filter(Preprocessing::BILINEAR_ANTIALIAS);
  contract.set_center_crop(true);
  contract.set_scale(1.0f / 255.0f);
  for (float mean : {0.485f, 0.456f, 0.406f}) contract.add_mean(mean);
  for (float deviation : {0.229f, 0.224f, 0.225f}) contract.add_std(deviation);
  return contract;
}

}  // namespace tern::image
