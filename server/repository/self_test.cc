#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/repository/repository.h"

namespace tern::repository {
namespace {

// Part of the largest stored logit by which a recomputed one may differ.
constexpr double kTolerance = 0.05;

// Index of the greatest; the lower of equals; NaN never.
int Best(absl::Span<const float> logits) {
  int best = 0;
  for (int i = 1; i < static_cast<int>(logits.size()); ++i) {
    if (logits[i] > logits[best] || std::isnan(logits[best])) best = i;
  }
  return best;
}

}  // namespace

absl::Status SelfTest(const artifact::Artifact& artifact, const engine::Plan& plan) {
  const Tensor& input = artifact.self_test_input;
  const Tensor& stored = artifact.self_test_logits;
  if (input.empty() && stored.empty()) return absl::OkStatus();
  const Shape& image = plan.input_shape();
  const int64_t n = input.shape().rank() > 0 ? input.shape()[0] : 0;
  if (input.dtype() != DType::kF32 || stored.dtype() != DType::kF32 ||
      input.shape() != image.WithBatch(n) || stored.shape() != Shape({n, plan.classes()})) {
    return absl::DataLossError(absl::StrCat("self-test: stored input ", input.shape().ToString(),
                                            " and logits ", stored.shape().ToString(),
                                            " do not fit a network of ", image.ToString(), " -> ",
                                            plan.classes(), " classes"));
  }
  double largest = 0;
  for (float logit : stored.data<float>()) {
    if (!std::isfinite(logit))
      return absl::DataLossError("self-test: a stored logit is not finite");
    largest = std::max(largest, std::abs(static_cast<double>(logit)));
  }

  TERN_ASSIGN_OR_RETURN(engine::Session session, plan.NewSession(1));
  const int64_t per_image = image.elements();
  const int64_t classes = plan.classes();
  double worst = 0;
  for (int64_t first = 0; first < n; first += plan.max_batch()) {
    const int batch = static_cast<int>(std::min<int64_t>(plan.max_batch(), n - first));
    engine::NchwToNhwc(input.data<float>().data() + first * per_image, batch, image[0], image[1],
                       image[2], session.input().data());
    TERN_ASSIGN_OR_RETURN(const absl::Span<const float> logits, session.Run(batch));
    for (int64_t i = 0; i < batch; ++i) {
      const auto got = logits.subspan(i * classes, classes);
      const auto want = stored.data<float>().subspan((first + i) * classes, classes);
      for (int64_t k = 0; k < classes; ++k) {
        const double difference = std::abs(static_cast<double>(got[k]) - want[k]);
        if (!(difference <= kTolerance * largest)) {
          return absl::DataLossError(absl::StrFormat(
              "self-test: image %d, logit %d: got %g, stored %g, allowed difference %g", first + i,
              k, got[k], want[k], kTolerance * largest));
        }
        worst = std::max(worst, difference);
      }
      if (Best(got) != Best(want)) {
        return absl::DataLossError(absl::StrFormat(
            "self-test: image %d: got class %d, stored class %d (largest difference of a logit %g)",
            first + i, Best(got), Best(want), worst));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace tern::repository
