// Logits -> probabilities -> the k best classes.
#ifndef TERN_SERVER_CLASSIFY_TOP_K_H_
#define TERN_SERVER_CLASSIFY_TOP_K_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace tern::classify {

// INTERNAL, naming the first class whose logit is NaN or infinite. Such logits say nothing about
// any class: what comes from outside is told this rather than what the functions below make of
// them.
absl::Status CheckFinite(absl::Span<const float> logits);

struct Prediction {
  int index = 0;
  float probability = 0.0f;  // softmax over all classes
};

// The k (clamped to 1..classes) most probable classes, best first; equal logits: lower index first.
// Non-finite logits count as the lowest. Softmax in double, shifted by the maximum.
std::vector<Prediction> TopK(absl::Span<const float> logits, int k);

// The probabilities of all classes, as TopK gives them.
std::vector<float> Softmax(absl::Span<const float> logits);

// True if `label` is among the k best of `logits` (ties as in TopK).
bool InTopK(absl::Span<const float> logits, int label, int k);

// Shannon entropy of the softmax output, in nats: 0 (one class is certain) to log(classes). Logits
// as in TopK; 0 for none.
double Entropy(absl::Span<const float> logits);

// Kullback-Leibler divergence, in nats, of the candidate's softmax output from the reference's: sum
// p log(p / q), 0 or more. Non-finite logits count as in TopK (probability 0): infinity if the
// candidate excludes a class that the reference does not. Both have the same, non-zero size.
double KlDivergence(absl::Span<const float> reference, absl::Span<const float> candidate);

// One class name per line; trailing blank lines and CR are dropped.
// INVALID_ARGUMENT if the number of names is not `classes` (when classes > 0) or a line is not
// UTF-8.
absl::StatusOr<std::vector<std::string>> ParseLabels(absl::string_view text, int64_t classes);

}  // namespace tern::classify

#endif  // TERN_SERVER_CLASSIFY_TOP_K_H_
