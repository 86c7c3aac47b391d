// The stored self-test of a quantised artifact: a few inputs and the logits they must give when the
// artifact is loaded elsewhere (server/repository/self_test.h runs it).
#ifndef TERN_SERVER_QUANT_SELF_TEST_H_
#define TERN_SERVER_QUANT_SELF_TEST_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "server/artifact/artifact.h"
#include "server/engine/plan.h"
#include "server/tensor/tensor.h"

namespace tern::quant {

// Images considered by AddSelfTest; it looks at no more.
inline constexpr size_t kSelfTestCandidates = 64;

// f32 NHWC images of sample shape [c,h,w], one vector each, as one tensor [n,c,h,w].
Tensor ToNchw(absl::Span<const std::vector<float>> images, const Shape& shape);

// Runs the images (preprocessed, NHWC) through `plan`, the artifact's own with a batch of at least
// 1, on `threads` threads, and stores the four clearest answers (the largest distance between the
// two best logits): the test wants the same top-1 on every CPU, and a near tie may go either way
// where oneDNN rounds differently. The plan's errors. Thread safe.
absl::Status AddSelfTest(const engine::Plan& plan, int threads,
                         absl::Span<const std::vector<float>> images, artifact::Artifact& artifact);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_SELF_TEST_H_
