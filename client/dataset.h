// Folders of images, labelled or not, and deterministic choices from them.
//
// Three layouts are understood:
//   a folder with `labels.txt`   its lines are `file index`, files relative to the folder;
//   an ImageFolder               one sub-folder per class; the class index is the sub-folder's
//                                place in byte order; images at any depth below it;
//   a flat folder                images without labels.
// Images are files named *.jpg, *.jpeg, *.png, *.webp or *.bmp in any case; hidden files and
// folders are passed over. Only names are read: a listing takes about 100 bytes per image.
#ifndef TERN_CLIENT_DATASET_H_
#define TERN_CLIENT_DATASET_H_

#include <cstdint>
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

// The images of `path`, a folder in one of the layouts or a single file (unlabelled). Order:
// labels.txt's, else class by class and by name in byte order. `label_offset` is added to each
// label (networks with a background class want 1).
// NOT_FOUND: no such path, or a file that labels.txt names; INVALID_ARGUMENT: no images, a
// malformed line, or a label that the offset makes negative.
absl::StatusOr<std::vector<ImageFile>> ListImages(const std::string& path, int label_offset = 0);

// `count` images (all if there are fewer, or if count is 0), spread over the classes: classes and
// the images inside each are shuffled by `seed`, then classes give one image each in turn. The
// same names, labels, count and seed give the same choice on every machine.
std::vector<ImageFile> ChooseImages(const std::vector<ImageFile>& images, size_t count,
                                    uint64_t seed);

}  // namespace tern::client

#endif  // TERN_CLIENT_DATASET_H_
