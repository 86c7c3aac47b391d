#include "server/serving/evaluate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"
#include "statistics/statistics.h"

namespace tern::serving {
namespace {

constexpr double kPoint = 0.01;

// Widths shrink with the square root of the number of images. Rounded up to two digits.
uint64_t ImagesWanted(uint64_t images, double half_width, double wanted) {
  const double ratio = half_width / wanted;
  const double count = static_cast<double>(images) * ratio * ratio;
  double unit = 1;
  while (count / unit > 100) unit *= 10;
  return static_cast<uint64_t>(std::ceil(count / unit) * unit);
}

// For messages.
std::string NameOf(const Sample& sample) {
  return sample.name.empty() ? "image" : absl::StrCat("image ", sample.name);
}

}  // namespace

absl::StatusOr<std::vector<float>> PrepareSample(const Sample& sample,
                                                 const v1::Preprocessing& preprocessing,
                                                 const Shape& shape, const image::Limits& limits) {
  absl::StatusOr<image::Image> decoded = image::Decode(
      sample.image, limits, preprocessing, static_cast<int>(shape[1]), static_cast<int>(shape[2]));
  if (!decoded.ok()) return Annotate(decoded.status(), NameOf(sample));
  std::vector<float> pixels(shape.elements());
  const absl::Status status = image::Preprocess(*decoded, preprocessing, static_cast<int>(shape[1]),
                                                static_cast<int>(shape[2]), absl::MakeSpan(pixels));
  if (!status.ok()) return Annotate(status, NameOf(sample));
  return pixels;
}

absl::StatusOr<std::unique_ptr<Evaluator>> Evaluator::Create(
    std::shared_ptr<const engine::Plan> plan, std::shared_ptr<const engine::Plan> reference,
    const v1::Preprocessing& preprocessing, const image::Limits& limits, int threads) {
  if (reference != nullptr && (reference->input_shape() != plan->input_shape() ||
                               reference->classes() != plan->classes())) {
    return absl::InvalidArgumentError(
        absl::StrCat("reference version: input ", reference->input_shape().ToString(), " and ",
                     reference->classes(), " classes, want ", plan->input_shape().ToString(),
                     " and ", plan->classes()));
  }
  std::unique_ptr<Evaluator> evaluator(new Evaluator(plan, preprocessing, limits, threads));
  TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(threads));
  evaluator->session_ = std::move(session);
  if (reference != nullptr) {
    TERN_ASSIGN_OR_RETURN(engine::Session other, reference->NewSession(threads));
    evaluator->reference_ = std::move(other);
  }
  return evaluator;
}

absl::Status Evaluator::Add(Sample sample) {
  if (sample.label.has_value() && *sample.label >= plan_->classes()) {
    return absl::InvalidArgumentError(absl::StrCat("image ", sample.name, ": label ", *sample.label,
                                                   ", the model has ", plan_->classes(),
                                                   " classes"));
  }
  pending_.push_back({std::move(sample), {}});
  if (static_cast<int>(pending_.size()) < plan_->max_batch()) return absl::OkStatus();
  return Flush();
}

absl::Status Evaluator::AddPixels(std::vector<float> pixels, std::optional<uint32_t> label) {
  pending_.push_back({Sample{"", label, ""}, std::move(pixels)});
  if (static_cast<int>(pending_.size()) < plan_->max_batch()) return absl::OkStatus();
  return Flush();
}

absl::StatusOr<Counts> Evaluator::Finish() {
  TERN_RETURN_IF_ERROR(Flush());
  return counts_;
}

absl::Status Evaluator::Flush() {
  const int images = static_cast<int>(pending_.size());
  if (images == 0) return absl::OkStatus();
  const Shape& shape = plan_->input_shape();
  const int64_t per_image = shape.elements();
  std::vector<absl::Status> statuses(images);
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
  for (int i = 0; i < images; ++i) {
    if (!pending_[i].pixels.empty()) continue;
    auto pixels = PrepareSample(pending_[i].sample, preprocessing_, shape, limits_);
    statuses[i] = pixels.status();
    if (pixels.ok()) pending_[i].pixels = *std::move(pixels);
  }
  for (const absl::Status& status : statuses) {
    if (!status.ok()) {
      pending_.clear();
      return status;
    }
  }
  // Both sessions see the same pixels.
  for (std::optional<engine::Session>* session : {&session_, &reference_}) {
    if (!session->has_value()) continue;
    for (int i = 0; i < images; ++i) {
      std::memcpy((*session)->input().data() + i * per_image, pending_[i].pixels.data(),
                  per_image * sizeof(float));
    }
  }
  std::vector<engine::CodeCount> codes;
  TERN_ASSIGN_OR_RETURN(
      const absl::Span<const float> logits,
      codes_.empty() ? session_->Run(images) : session_->RunCounted(images, codes));
  for (size_t l = 0; l < codes.size(); ++l) {
    codes_[l].at_limit += codes[l].at_limit;
    codes_[l].total += codes[l].total;
  }
  absl::Span<const float> reference;
  if (reference_.has_value()) {
    TERN_ASSIGN_OR_RETURN(reference, reference_->Run(images));
  }
  const int64_t classes = plan_->classes();
  best_class_.resize(classes, 0);
  for (int i = 0; i < images; ++i) {
    const absl::Span<const float> mine = logits.subspan(i * classes, classes);
    const absl::Span<const float> theirs =
        reference.empty() ? reference : reference.subspan(i * classes, classes);
    const std::string name = NameOf(pending_[i].sample);
    TERN_RETURN_IF_ERROR(Annotate(classify::CheckFinite(mine), name));
    TERN_RETURN_IF_ERROR(
        Annotate(classify::CheckFinite(theirs), absl::StrCat(name, ", reference version")));
    const classify::Prediction best = classify::TopK(mine, 1)[0];
    const int answer = best.index;
    ++counts_.images;
    confidence_ += best.probability;
    entropy_ += classify::Entropy(mine);
    ++best_class_[answer];
    const std::optional<uint32_t>& label = pending_[i].sample.label;
    const bool right = label.has_value() && answer == static_cast<int>(*label);
    if (label.has_value()) {
      ++counts_.labelled;
      counts_.top1 += right;
      counts_.top5 += classify::InTopK(mine, static_cast<int>(*label), 5);
    }
    if (reference.empty()) {
      if (label.has_value()) tally_.Add(*label, answer, std::nullopt);
      continue;
    }
    const int their_answer = classify::TopK(theirs, 1)[0].index;
    counts_.agree += answer == their_answer;
    counts_.divergence += classify::KlDivergence(theirs, mine);
    if (!label.has_value()) continue;
    const bool they_right = their_answer == static_cast<int>(*label);
    counts_.reference_top1 += they_right;
    counts_.reference_top5 += classify::InTopK(theirs, static_cast<int>(*label), 5);
    counts_.both_right += right && they_right;
    counts_.only_reference_right += !right && they_right;
    counts_.only_candidate_right += right && !they_right;
    counts_.both_wrong += !right && !they_right;
    tally_.Add(*label, answer, their_answer);
  }
  pending_.clear();
  return absl::OkStatus();
}

v1::OutputReference Evaluator::Outputs() const {
  v1::OutputReference outputs;
  if (counts_.images == 0) return outputs;
  const double images = static_cast<double>(counts_.images);
  outputs.set_images(counts_.images);
  outputs.set_confidence(confidence_ / images);
  outputs.set_entropy(entropy_ / images);
  outputs.mutable_best_class()->Add(best_class_.begin(), best_class_.end());
  return outputs;
}

v1::PairedComparison MakeComparison(const Counts& counts) {
  return statistics::MakeComparison(counts.both_right, counts.only_reference_right,
                                    counts.only_candidate_right, counts.both_wrong);
}

std::string TooFewForDrop(const v1::PairedComparison& comparison, std::optional<double> gate) {
  const uint64_t images = comparison.both_right() + comparison.only_reference_right() +
                          comparison.only_candidate_right() + comparison.both_wrong();
  const double middle = (comparison.drop_high() + comparison.drop_low()) / 2;
  const double half = (comparison.drop_high() - comparison.drop_low()) / 2;
  const std::string interval = absl::StrFormat(
      "the 95 %% interval of the drop in top-1 is %.2f..%.2f points on %d labelled images",
      100 * comparison.drop_low(), 100 * comparison.drop_high(), images);
  if (!gate.has_value()) {
    if (half <= kPoint) return "";
    return absl::StrCat("too few evaluation images to tell the drop to a point: ", interval,
                        "; about ", ImagesWanted(images, half, kPoint), " would do");
  }
  if (comparison.drop_high() <= *gate || comparison.drop_low() > *gate) return "";
  const std::string text = absl::StrFormat(
      "too few evaluation images to support the verdict: %s, and the limit of %.2f lies in it",
      interval, 100 * *gate);
  // A drop right at the limit is not decided by any number of images.
  const double distance = std::fabs(*gate - middle);
  if (distance < half / 10) return text;
  return absl::StrCat(text, "; if the drop stays, about ", ImagesWanted(images, half, distance),
                      " would do");
}

std::string TooFewForAccuracy(const v1::Proportion& top1) {
  const double half = (top1.high() - top1.low()) / 2;
  if (half <= kPoint) return "";
  return absl::StrFormat(
      "too few images to tell the accuracy to a point: the 95 %% interval of top-1 is "
      "%.2f..%.2f %% on %d labelled images; about %d would do",
      100 * top1.low(), 100 * top1.high(), top1.total(), ImagesWanted(top1.total(), half, kPoint));
}

}  // namespace tern::serving
