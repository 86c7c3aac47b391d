#include "server/serving/evaluate.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"

namespace tern::serving {

absl::StatusOr<std::vector<float>> PrepareSample(const Sample& sample,
                                                 const v1::Preprocessing& preprocessing,
                                                 const Shape& shape, const image::Limits& limits) {
  absl::StatusOr<image::Image> decoded =
      image::Decode(sample.image, limits, !preprocessing.ignore_exif_orientation());
  const std::string context = sample.name.empty() ? "image" : absl::StrCat("image ", sample.name);
  if (!decoded.ok()) return Annotate(decoded.status(), context);
  std::vector<float> pixels(shape.elements());
  const absl::Status status = image::Preprocess(*decoded, preprocessing, static_cast<int>(shape[1]),
                                                static_cast<int>(shape[2]), absl::MakeSpan(pixels));
  if (!status.ok()) return Annotate(status, context);
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
  TERN_ASSIGN_OR_RETURN(const absl::Span<const float> logits, session_->Run(images));
  absl::Span<const float> reference;
  if (reference_.has_value()) {
    TERN_ASSIGN_OR_RETURN(reference, reference_->Run(images));
  }
  const int64_t classes = plan_->classes();
  for (int i = 0; i < images; ++i) {
    const absl::Span<const float> mine = logits.subspan(i * classes, classes);
    ++counts_.images;
    const std::optional<uint32_t>& label = pending_[i].sample.label;
    if (label.has_value()) {
      ++counts_.labelled;
      counts_.top1 += classify::InTopK(mine, static_cast<int>(*label), 1);
      counts_.top5 += classify::InTopK(mine, static_cast<int>(*label), 5);
    }
    if (reference.empty()) continue;
    const absl::Span<const float> theirs = reference.subspan(i * classes, classes);
    if (label.has_value()) {
      counts_.reference_top1 += classify::InTopK(theirs, static_cast<int>(*label), 1);
      counts_.reference_top5 += classify::InTopK(theirs, static_cast<int>(*label), 5);
    }
    counts_.agree += classify::InTopK(mine, classify::TopK(theirs, 1)[0].index, 1);
  }
  pending_.clear();
  return absl::OkStatus();
}

v1::Proportion MakeProportion(uint64_t hits, uint64_t total) {
  const classify::Interval interval = classify::WilsonInterval(hits, total);
  v1::Proportion proportion;
  proportion.set_value(interval.value);
  proportion.set_low(interval.low);
  proportion.set_high(interval.high);
  proportion.set_hits(hits);
  proportion.set_total(total);
  return proportion;
}

}  // namespace tern::serving
