#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/base/thread_pool.h"
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

// Runs stored image `i`; `largest` is the largest magnitude of all stored logits.
absl::Status TestImage(const artifact::Artifact& artifact, int64_t i, double largest,
                       engine::Session& session) {
  const Shape& image = session.plan().input_shape();
  const int64_t classes = session.plan().classes();
  engine::NchwToNhwc(artifact.self_test_input.data<float>().data() + i * image.elements(), 1,
                     image[0], image[1], image[2], session.input().data());
  TERN_ASSIGN_OR_RETURN(const absl::Span<const float> got, session.Run(1));
  const auto want = artifact.self_test_logits.data<float>().subspan(i * classes, classes);
  double worst = 0;
  for (int64_t k = 0; k < classes; ++k) {
    const double difference = std::abs(static_cast<double>(got[k]) - want[k]);
    if (!(difference <= kTolerance * largest)) {
      return absl::DataLossError(
          absl::StrFormat("self-test: image %d, logit %d: got %g, stored %g, allowed difference %g",
                          i, k, got[k], want[k], kTolerance * largest));
    }
    worst = std::max(worst, difference);
  }
  if (Best(got) != Best(want)) {
    return absl::DataLossError(absl::StrFormat(
        "self-test: image %d: got class %d, stored class %d (largest difference of a logit %g)", i,
        Best(got), Best(want), worst));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SelfTest(const artifact::Artifact& artifact, const engine::Plan& plan,
                      const SelfTestOptions& options) {
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

  int64_t macs_per_image = 1;
  for (const engine::LayerInfo& layer : plan.layers()) macs_per_image += layer.macs;
  const int64_t images = std::min(n, std::max<int64_t>(1, options.most_macs / macs_per_image));
  std::vector<absl::Status> statuses(images);
  const size_t workers = static_cast<size_t>(std::min<int64_t>(options.threads, images));
  ParallelFor(options.threads, workers, [&](size_t worker) {
    absl::StatusOr<engine::Session> session =
        plan.NewSession(std::max(1, options.threads / static_cast<int>(workers)));
    for (int64_t i = static_cast<int64_t>(worker); i < images;
         i += static_cast<int64_t>(workers)) {
      statuses[i] = session.ok() ? TestImage(artifact, i, largest, *session) : session.status();
    }
  });
  for (const absl::Status& status : statuses) TERN_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

}  // namespace tern::repository
