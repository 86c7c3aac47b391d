#include "server/finetune/data.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <random>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/base/file.h"
#include "server/base/status_macros.h"

namespace tern::finetune {
namespace {

namespace fs = std::filesystem;

bool IsImage(const fs::path& path) {
  constexpr std::array<absl::string_view, 5> kNames = {".jpg", ".jpeg", ".png", ".webp", ".bmp"};
  const std::string extension = absl::AsciiStrToLower(path.extension().string());
  return std::find(kNames.begin(), kNames.end(), extension) != kNames.end();
}

bool IsHidden(const fs::path& path) { return absl::StrCat(path.filename().string())[0] == '.'; }

// Sebastiano Vigna's splitmix64: a good hash of a counter.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// As std::shuffle, but the same with every standard library.
template <typename T>
void Shuffle(std::vector<T>& items, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

int Reflect(int i, int size) {
  if (i < 0) i = -i;
  return i >= size ? 2 * (size - 1) - i : i;
}

}  // namespace

absl::StatusOr<std::vector<LabelledImage>> ListLabelledImages(
    const std::string& folder, const std::vector<std::string>& labels, int64_t classes,
    int label_offset) {
  std::error_code code;
  std::vector<std::string> names;
  for (fs::directory_iterator it(folder, code), end; !code && it != end; it.increment(code)) {
    if (it->is_directory(code) && !IsHidden(it->path())) {
      names.push_back(it->path().filename().string());
    }
  }
  if (code) return absl::NotFoundError(absl::StrCat(folder, ": ", code.message()));
  std::sort(names.begin(), names.end());
  std::vector<int64_t> class_of;
  std::string stranger;
  int64_t known = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto place = std::find(labels.begin(), labels.end(), names[i]);
    if (place == labels.end()) {
      stranger = names[i];
    } else {
      ++known;
    }
    class_of.push_back(place - labels.begin());
  }
  if (known > 0 && !stranger.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(folder, ": sub-folder '", stranger,
                                                   "' is none of the model's labels, others are"));
  }
  std::vector<LabelledImage> images;
  for (size_t i = 0; i < names.size(); ++i) {
    const int64_t label = known > 0 ? class_of[i] : static_cast<int64_t>(i) + label_offset;
    if (label < 0 || label >= classes) {
      return absl::InvalidArgumentError(absl::StrCat(folder, ": sub-folder '", names[i],
                                                     "' would be class ", label, ", the model has ",
                                                     classes));
    }
    const size_t first = images.size();
    fs::recursive_directory_iterator it(fs::path(folder) / names[i], code), end;
    for (; !code && it != end; it.increment(code)) {
      if (IsHidden(it->path())) {
        it.disable_recursion_pending();
      } else if (IsImage(it->path()) && it->is_regular_file(code)) {
        images.push_back({it->path().string(), label});
      }
    }
    if (code) return absl::InvalidArgumentError(absl::StrCat(names[i], ": ", code.message()));
    std::sort(images.begin() + static_cast<int64_t>(first), images.end(),
              [](const auto& a, const auto& b) { return a.path < b.path; });
  }
  if (images.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        folder, ": no images; want one sub-folder per class with .jpg, .png, .webp or .bmp files"));
  }
  std::stable_sort(images.begin(), images.end(),
                   [](const auto& a, const auto& b) { return a.label < b.label; });
  return images;
}

Split SplitImages(const std::vector<LabelledImage>& images, double share, int64_t limit,
                  uint64_t seed) {
  std::map<int64_t, std::vector<LabelledImage>> classes;
  for (const LabelledImage& image : images) classes[image.label].push_back(image);
  Split split;
  for (auto& [label, members] : classes) {
    Shuffle(members, Mix(seed ^ Mix(static_cast<uint64_t>(label))));
    const auto held = std::min<size_t>(
        static_cast<size_t>(std::lround(share * static_cast<double>(members.size()))),
        members.size() - 1);
    const auto cut = members.end() - static_cast<int64_t>(held);
    split.held_out.insert(split.held_out.end(), cut, members.end());
    members.erase(cut, members.end());
  }
  const int64_t wanted = limit > 0 ? limit : static_cast<int64_t>(images.size());
  for (size_t round = 0; static_cast<int64_t>(split.training.size()) < wanted; ++round) {
    bool any = false;
    for (auto& [label, members] : classes) {
      if (round >= members.size() || static_cast<int64_t>(split.training.size()) >= wanted)
        continue;
      split.training.push_back(members[round]);
      any = true;
    }
    if (!any) break;
  }
  return split;
}

std::string Fingerprint(const std::vector<LabelledImage>& images) {
  std::string text;
  for (const LabelledImage& image : images) {
    absl::StrAppend(&text, fs::path(image.path).filename().string(), "\n", image.label, "\n");
  }
  return Sha256Hex(text);
}

std::vector<int64_t> EpochOrder(int64_t count, uint64_t seed, int64_t epoch) {
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  Shuffle(order, Mix(seed ^ Mix(static_cast<uint64_t>(epoch))));
  return order;
}

absl::StatusOr<Loader> Loader::Create(const std::vector<LabelledImage>* images,
                                      const v1::Preprocessing& contract, const Shape& shape,
                                      const Augmentation& augmentation, uint64_t seed) {
  Loader loader;
  loader.images_ = images;
  loader.contract_ = contract;
  loader.height_ = static_cast<int>(shape[1]);
  loader.width_ = static_cast<int>(shape[2]);
  loader.augmentation_ = augmentation;
  loader.seed_ = seed;
  const int side = std::min(loader.height_, loader.width_);
  if (augmentation.crop_padding < 0 || augmentation.crop_padding >= side) {
    return absl::InvalidArgumentError(
        absl::StrCat("crop padding: got ", augmentation.crop_padding, ", want 0 to ", side - 1));
  }
  return loader;
}

Batch Loader::Load(absl::Span<const int64_t> indices, int64_t epoch) const {
  const size_t size = static_cast<size_t>(height_) * width_ * 3;
  Batch batch;
  batch.pixels.reserve(indices.size() * size);
  std::vector<float> plain(size);
  for (int64_t index : indices) {
    const LabelledImage& image = (*images_)[index];
    const auto prepare = [&]() -> absl::Status {
      const image::Limits limits;
      TERN_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(image.path, limits.max_bytes));
      TERN_ASSIGN_OR_RETURN(const image::Image decoded,
                            image::Decode(bytes, limits, contract_, height_, width_));
      return image::Preprocess(decoded, contract_, height_, width_, absl::MakeSpan(plain));
    };
    const absl::Status status = prepare();
    if (!status.ok()) {
      batch.unreadable.push_back(absl::StrCat(image.path, ": ", std::string(status.message())));
      continue;
    }
    batch.labels.push_back(image.label);
    bool flip = false;
    int down = 0, right = 0;
    if (epoch > 0) {
      uint64_t random =
          Mix(seed_ ^ Mix(static_cast<uint64_t>(epoch) << 40 ^ static_cast<uint64_t>(index)));
      flip = augmentation_.flip && (random & 1) != 0;
      const auto room = static_cast<uint64_t>(2 * augmentation_.crop_padding + 1);
      down = static_cast<int>((random >> 1) % room) - augmentation_.crop_padding;
      random = Mix(random);
      right = static_cast<int>(random % room) - augmentation_.crop_padding;
    }
    if (!flip && down == 0 && right == 0) {
      batch.pixels.insert(batch.pixels.end(), plain.begin(), plain.end());
      continue;
    }
    for (int y = 0; y < height_; ++y) {
      const float* row = &plain[static_cast<size_t>(Reflect(y + down, height_)) * width_ * 3];
      for (int x = 0; x < width_; ++x) {
        const int from = Reflect((flip ? width_ - 1 - x : x) + right, width_);
        batch.pixels.insert(batch.pixels.end(), row + from * 3, row + from * 3 + 3);
      }
    }
  }
  return batch;
}

}  // namespace tern::finetune
