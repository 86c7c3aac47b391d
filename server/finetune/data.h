// Labelled images in folders, and training batches from them.
#ifndef TERN_SERVER_FINETUNE_DATA_H_
#define TERN_SERVER_FINETUNE_DATA_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/image/image.h"
#include "server/tensor/shape.h"
#include "tern/v1/model.pb.h"

namespace tern::finetune {

struct LabelledImage {
  std::string path;
  int64_t label = 0;
  bool operator==(const LabelledImage&) const = default;
};

// The images of an ImageFolder: one sub-folder per class, images (*.jpg, *.jpeg, *.png, *.webp,
// *.bmp, any case; hidden files passed over) at any depth below it. If every sub-folder's name is
// one of `labels`, its place there is the class; if none is, sub-folders in byte order are classes
// label_offset, label_offset + 1, ... Sorted by class and path.
// NOT_FOUND: no such folder. INVALID_ARGUMENT: no images, only some names are labels, or a class
// that is not below `classes`.
absl::StatusOr<std::vector<LabelledImage>> ListLabelledImages(
    const std::string& folder, const std::vector<std::string>& labels, int64_t classes,
    int label_offset);

struct Split {
  std::vector<LabelledImage> training;
  std::vector<LabelledImage> held_out;
};
// Takes `share` of each class (rounded; of a class with one image none) out of `images`, by a
// seeded choice. `limit` > 0 keeps that many training images, spread over the classes.
Split SplitImages(const std::vector<LabelledImage>& images, double share, int64_t limit,
                  uint64_t seed);

// A fingerprint of names and labels, for checkpoints. File contents are not read.
std::string Fingerprint(const std::vector<LabelledImage>& images);

// The order in which epoch `epoch` (1, 2, ...) visits `count` images.
std::vector<int64_t> EpochOrder(int64_t count, uint64_t seed, int64_t epoch);

struct Augmentation {
  bool flip = true;      // half of the images mirrored left to right
  int crop_padding = 0;  // images move by up to so many pixels; borders are reflected
};

struct Batch {
  std::vector<float> pixels;  // NHWC [labels.size(), h, w, 3]
  std::vector<int64_t> labels;
  std::vector<std::string> unreadable;  // messages; these images are left out
};

// Decodes, prepares and augments images. Thread safe.
class Loader {
 public:
  // `shape` is [3, h, w]; the contract is valid for it. All are copied but `images`, which must
  // outlive the loader. INVALID_ARGUMENT if crop_padding does not fit the image.
  static absl::StatusOr<Loader> Create(const std::vector<LabelledImage>* images,
                                       const v1::Preprocessing& contract, const Shape& shape,
                                       const Augmentation& augmentation, uint64_t seed);

  // The images at `indices`. epoch 0: as they are; else augmented, by a choice that depends only
  // on seed, epoch and index.
  Batch Load(absl::Span<const int64_t> indices, int64_t epoch) const;

  // Height and width of the images in a batch.
  std::pair<int64_t, int64_t> size() const { return {height_, width_}; }

 private:
  Loader() = default;
  const std::vector<LabelledImage>* images_ = nullptr;
  v1::Preprocessing contract_;
  int height_ = 0, width_ = 0;
  Augmentation augmentation_;
  uint64_t seed_ = 0;
};

}  // namespace tern::finetune

#endif  // TERN_SERVER_FINETUNE_DATA_H_
