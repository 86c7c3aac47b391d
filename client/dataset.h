// Folders of images, labelled or not, and deterministic choices from them.
//
// Three layouts are understood:
//   a folder with `labels.txt`   its lines are `file index`, files relative to the folder;
//   an ImageFolder               one sub-folder per class, images at any depth below it; the class
//                                is the model's label that the sub-folder has the name of, or, if
//                                no sub-folder has one, the sub-folder's place in byte order;
//   a flat folder                images without labels.
// Images are files named *.jpg, *.jpeg, *.png, *.webp or *.bmp in any case; hidden files and
// folders are passed over. Only names are read: a listing takes about 100 bytes per image.
#ifndef TERN_CLIENT_DATASET_H_
#define TERN_CLIENT_DATASET_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tern::client {

struct ImageFile {
  std::string path;
  std::optional<uint32_t> label;

  bool operator==(const ImageFile&) const = default;
};

// What a model tells apart.
struct Classes {
  uint64_t count = 0;               // 0: not known
  std::vector<std::string> labels;  // one per class, or none
};

struct Labelling {
  // Added to each index that a place or a labels.txt gives (networks with a background class want
  // 1), not to the class of a name.
  int offset = 0;
  // The model's classes; called for an ImageFolder only. Null: sub-folders count by their place.
  std::function<absl::StatusOr<Classes>()> classes;
  // Told what a reader may not expect: sub-folders by place that are not as many as the classes,
  // images that lie beside the sub-folders and are left out. May be null.
  std::function<void(const std::string&)> warn;
};

// The images of `path`, a folder in one of the layouts or a single file (unlabelled). Order:
// labels.txt's, else sub-folder by sub-folder and by name in byte order.
// NOT_FOUND: no such path, or a file that labels.txt names; INVALID_ARGUMENT: no images, a
// malformed line, a label that the offset makes negative, or sub-folders of which some are labels
// of the model and others are not, or are of several classes; or the error of `classes`.
absl::StatusOr<std::vector<ImageFile>> ListImages(const std::string& path,
                                                  const Labelling& labelling = {});

// `count` images (all if there are fewer, or if count is 0), spread over the classes: classes and
// the images inside each are shuffled by `seed`, then classes give one image each in turn. The
// same names, labels, count and seed give the same choice on every machine.
std::vector<ImageFile> ChooseImages(const std::vector<ImageFile>& images, size_t count,
                                    uint64_t seed);

}  // namespace tern::client

#endif  // TERN_CLIENT_DATASET_H_
