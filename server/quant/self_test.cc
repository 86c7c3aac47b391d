#include "server/quant/self_test.h"

#include <algorithm>
#include <limits>

#include "server/base/status_macros.h"

namespace tern::quant {
namespace {

constexpr size_t kImages = 4;

// The largest logit less the second.
float Margin(absl::Span<const float> logits) {
  if (logits.size() < 2) return 0;
  float best = logits[0], second = -std::numeric_limits<float>::infinity();
  for (float logit : logits.subspan(1)) {
    second = std::max(second, std::min(best, logit));
    best = std::max(best, logit);
  }
  return best - second;
}

}  // namespace

Tensor ToNchw(absl::Span<const std::vector<float>> images, const Shape& shape) {
  const int64_t c = shape[0], pixels = shape[1] * shape[2];
  Tensor tensor(DType::kF32, shape.WithBatch(static_cast<int64_t>(images.size())));
  float* out = tensor.data<float>().data();
  for (const std::vector<float>& image : images) {
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t k = 0; k < c; ++k) out[k * pixels + p] = image[p * c + k];
    }
    out += c * pixels;
  }
  return tensor;
}

absl::Status AddSelfTest(const engine::Plan& plan, int threads,
                         absl::Span<const std::vector<float>> images,
                         artifact::Artifact& artifact) {
  TERN_ASSIGN_OR_RETURN(engine::Session session, plan.NewSession(threads));
  struct Candidate {
    float margin;
    size_t image;
    std::vector<float> logits;
  };
  std::vector<Candidate> candidates;
  for (size_t i = 0; i < images.size() && i < kSelfTestCandidates; ++i) {
    std::copy(images[i].begin(), images[i].end(), session.input().begin());
    TERN_ASSIGN_OR_RETURN(const absl::Span<const float> logits, session.Run(1));
    candidates.push_back({Margin(logits), i, {logits.begin(), logits.end()}});
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.margin > b.margin; });
  candidates.resize(std::min(candidates.size(), kImages));
  std::vector<std::vector<float>> inputs;
  std::vector<float> logits;
  for (const Candidate& candidate : candidates) {
    inputs.push_back(images[candidate.image]);
    logits.insert(logits.end(), candidate.logits.begin(), candidate.logits.end());
  }
  artifact.self_test_input = ToNchw(inputs, plan.input_shape());
  artifact.self_test_logits =
      Tensor::Of<float>(Shape{static_cast<int64_t>(inputs.size()), plan.classes()}, logits);
  return absl::OkStatus();
}

}  // namespace tern::quant
