// Logits -> probabilities -> the k best classes.
#ifndef TERN_SERVER_CLASSIFY_TOP_K_H_
#define TERN_SERVER_CLASSIFY_TOP_K_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace tern::classify {

struct Prediction {
  int index = 0;
  float probability = 0.0f;  // softmax over all classes
};

// The k (clamped to 1..classes) most probable classes, best first; equal logits: lower index first.
// Non-finite logits count as the lowest. Softmax in double, shifted by the maximum.
std::vector<Prediction> TopK(absl::Span<const float> logits, int k);

// True if `label` is among the k best of `logits` (ties as in TopK).
bool InTopK(absl::Span<const float> logits, int label, int k);

// 95 % Wilson score interval of hits/total; total 0 gives {0, 0, 1}.
struct Interval {
  double value = 0, low = 0, high = 1;
};
Interval WilsonInterval(uint64_t hits, uint64_t total);

// One class name per line; trailing blank lines and CR are dropped.
// INVALID_ARGUMENT if the number of names is not `classes` (when classes > 0) or a line is not
// UTF-8.
absl::StatusOr<std::vector<std::string>> ParseLabels(absl::string_view text, int64_t classes);

}  // namespace tern::classify

#endif  // TERN_SERVER_CLASSIFY_TOP_K_H_
