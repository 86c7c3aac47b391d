// Accuracy of a plan on a stream of images, and its agreement with a reference plan.
#ifndef TERN_SERVER_SERVING_EVALUATE_H_
#define TERN_SERVER_SERVING_EVALUATE_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/engine/plan.h"
#include "server/image/image.h"
#include "tern/v1/model.pb.h"

namespace tern::serving {

struct Sample {
  std::string image;  // encoded
  std::optional<uint32_t> label;
  std::string name;  // for messages
};

// Decodes and preprocesses one sample to f32 NHWC [h, w, 3] (`shape` is [3, h, w]).
// The codes of image::Decode and Preprocess, prefixed with the sample's name.
absl::StatusOr<std::vector<float>> PrepareSample(const Sample& sample,
                                                 const v1::Preprocessing& preprocessing,
                                                 const Shape& shape, const image::Limits& limits);

struct Counts {
  uint64_t images = 0;
  uint64_t labelled = 0;
  uint64_t top1 = 0, top5 = 0;  // of labelled
  uint64_t reference_top1 = 0, reference_top5 = 0;
  uint64_t agree = 0;  // same top-1 as the reference, of all images
};

// Runs images through one plan, or two side by side on the same pixels. Not thread safe; uses up to
// `threads` threads inside each call.
class Evaluator {
 public:
  // `reference` may be null. Both plans must take the same input.
  // INVALID_ARGUMENT if they do not; INTERNAL if sessions cannot be made.
  static absl::StatusOr<std::unique_ptr<Evaluator>> Create(
      std::shared_ptr<const engine::Plan> plan, std::shared_ptr<const engine::Plan> reference,
      const v1::Preprocessing& preprocessing, const image::Limits& limits, int threads);

  // Takes a sample; images are run in batches. INVALID_ARGUMENT for a bad image or a label >=
  // classes, naming the sample.
  absl::Status Add(Sample sample);
  // Takes an already preprocessed image, f32 NHWC.
  absl::Status AddPixels(std::vector<float> pixels, std::optional<uint32_t> label);
  // Runs what is left and returns the counts.
  absl::StatusOr<Counts> Finish();

 private:
  Evaluator(std::shared_ptr<const engine::Plan> plan, const v1::Preprocessing& preprocessing,
            const image::Limits& limits, int threads)
      : plan_(std::move(plan)), preprocessing_(preprocessing), limits_(limits), threads_(threads) {}
  absl::Status Flush();

  struct Pending {
    Sample sample;
    std::vector<float> pixels;  // empty until prepared
  };
  std::shared_ptr<const engine::Plan> plan_;
  const v1::Preprocessing preprocessing_;
  const image::Limits limits_;
  const int threads_;
  std::optional<engine::Session> session_, reference_;
  std::vector<Pending> pending_;
  Counts counts_;
};

// A Proportion message with its Wilson interval.
v1::Proportion MakeProportion(uint64_t hits, uint64_t total);

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_EVALUATE_H_
