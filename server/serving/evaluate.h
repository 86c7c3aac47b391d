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
#include "server/serving/class_tally.h"
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
  // Of labelled images, by top-1; 0 without a reference.
  uint64_t both_right = 0, only_reference_right = 0, only_candidate_right = 0, both_wrong = 0;
  double divergence = 0;  // from the reference's outputs, nats, summed over all images
};

// The paired table of `counts` with its interval and test.
v1::PairedComparison MakeComparison(const Counts& counts);

// A verdict is whether the accuracy gate is met or, without a gate, the drop of top-1 to a point.
// Says why labelled images are too few to support it, and how many would do; "" if they do. Too few
// are those whose 95 % interval of the drop holds the gate or, without a gate, reaches further than
// a point from its middle.
std::string TooFewForDrop(const v1::PairedComparison& comparison, std::optional<double> gate);
// The same for an accuracy alone: the 95 % interval reaches further than a point.
std::string TooFewForAccuracy(const v1::Proportion& top1);

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
  // classes, naming the sample; INTERNAL if a network's output is not finite.
  absl::Status Add(Sample sample);
  // Takes an already preprocessed image, f32 NHWC.
  absl::Status AddPixels(std::vector<float> pixels, std::optional<uint32_t> label);
  // Runs what is left and returns the counts.
  absl::StatusOr<Counts> Finish();
  // What the plan answered so far; images_of is the caller's to set.
  v1::OutputReference Outputs() const;
  // From now on the activation codes of `plan` are counted.
  void CountCodes() { codes_.assign(plan_->layers().size(), {}); }
  // So far, by layer of the plan; empty unless they are counted.
  const std::vector<engine::CodeCount>& codes() const { return codes_; }
  // How the classes of the labelled images fared so far.
  const ClassTally& classes() const { return tally_; }

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
  double confidence_ = 0, entropy_ = 0;  // sums over all images
  std::vector<uint32_t> best_class_;     // images by best class
  std::vector<engine::CodeCount> codes_;
  ClassTally tally_;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_EVALUATE_H_
