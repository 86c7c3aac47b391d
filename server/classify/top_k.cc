#include "server/classify/top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace tern::classify {
namespace {

// The logit as it ranks: NaN and infinities are below every number.
double Rank(float logit) {
  return std::isfinite(logit) ? static_cast<double>(logit)
                              : -std::numeric_limits<double>::infinity();
}

// True for well-formed UTF-8 (RFC 3629: no overlong forms, no surrogates, at most U+10FFFF).
bool IsUtf8(absl::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    int more;
    uint32_t code;
    uint32_t lowest;
    if (lead < 0x80) {
      ++i;
      continue;
    } else if ((lead & 0xe0) == 0xc0) {
      more = 1, code = lead & 0x1f, lowest = 0x80;
    } else if ((lead & 0xf0) == 0xe0) {
      more = 2, code = lead & 0x0f, lowest = 0x800;
    } else if ((lead & 0xf8) == 0xf0) {
      more = 3, code = lead & 0x07, lowest = 0x10000;
    } else {
      return false;
    }
    if (text.size() - i <= static_cast<size_t>(more)) return false;
    for (int j = 1; j <= more; ++j) {
      const uint8_t next = static_cast<uint8_t>(text[i + j]);
      if ((next & 0xc0) != 0x80) return false;
      code = code << 6 | (next & 0x3f);
    }
    if (code < lowest || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return false;
    i += more + 1;
  }
  return true;
}

// What softmax needs to know of all classes. Without one finite logit all are equally low, hence
// equally probable.
class Normaliser {
 public:
  explicit Normaliser(absl::Span<const float> logits) {
    for (float logit : logits) best_ = std::max(best_, Rank(logit));
    for (float logit : logits) sum_ += Weight(logit);
  }
  float Probability(float logit) const { return static_cast<float>(Weight(logit) / sum_); }

 private:
  double Weight(float logit) const {
    return std::isfinite(best_) ? std::exp(Rank(logit) - best_) : 1.0;
  }
  double best_ = -std::numeric_limits<double>::infinity();
  double sum_ = 0;
};

// log(softmax), in double; -infinity for classes without a finite logit. If no logit is finite all
// classes are equally probable, as in TopK.
std::vector<double> LogSoftmax(absl::Span<const float> logits) {
  std::vector<double> result(logits.size());
  std::transform(logits.begin(), logits.end(), result.begin(), Rank);
  const double best = *std::max_element(result.begin(), result.end());
  if (!std::isfinite(best)) std::fill(result.begin(), result.end(), 0.0);
  const double shift = std::isfinite(best) ? best : 0.0;
  double sum = 0;
  for (double x : result) sum += std::exp(x - shift);
  for (double& x : result) x -= shift + std::log(sum);
  return result;
}

}  // namespace

absl::Status CheckFinite(absl::Span<const float> logits) {
  const auto bad =
      std::find_if(logits.begin(), logits.end(), [](float logit) { return !std::isfinite(logit); });
  if (bad == logits.end()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the network's output is not finite: class ",
                                          bad - logits.begin(), " of ", logits.size(), " is ",
                                          *bad));
}

std::vector<Prediction> TopK(absl::Span<const float> logits, int k) {
  if (logits.empty()) return {};
  const int classes = static_cast<int>(logits.size());
  k = std::clamp(k, 1, classes);
  const Normaliser normaliser(logits);

  std::vector<int> order(classes);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int a, int b) {
    const double x = Rank(logits[a]), y = Rank(logits[b]);
    return x != y ? x > y : a < b;
  });
  std::vector<Prediction> result(k);
  for (int i = 0; i < k; ++i) {
    result[i] = {order[i], normaliser.Probability(logits[order[i]])};
  }
  return result;
}

std::vector<float> Softmax(absl::Span<const float> logits) {
  const Normaliser normaliser(logits);
  std::vector<float> result(logits.size());
  std::transform(logits.begin(), logits.end(), result.begin(),
                 [&](float logit) { return normaliser.Probability(logit); });
  return result;
}

bool InTopK(absl::Span<const float> logits, int label, int k) {
  const int classes = static_cast<int>(logits.size());
  if (label < 0 || label >= classes) return false;
  k = std::clamp(k, 1, classes);
  const double mine = Rank(logits[label]);
  int better = 0;
  for (int i = 0; i < classes; ++i) {
    const double other = Rank(logits[i]);
    if (other > mine || (other == mine && i < label)) ++better;
  }
  return better < k;
}

double Entropy(absl::Span<const float> logits) {
  double best = -std::numeric_limits<double>::infinity();
  for (float logit : logits) best = std::max(best, Rank(logit));
  if (!std::isfinite(best))
    return logits.empty() ? 0 : std::log(static_cast<double>(logits.size()));
  // With x = logit - best and z = sum e^x: -sum (e^x / z) log(e^x / z) = log z - (sum x e^x) / z.
  double sum = 0, weighted = 0;
  for (float logit : logits) {
    const double x = Rank(logit) - best;
    const double weight = std::exp(x);
    if (weight == 0) continue;  // 0 log 0 = 0
    sum += weight;
    weighted += x * weight;
  }
  return std::max(0.0, std::log(sum) - weighted / sum);
}

double KlDivergence(absl::Span<const float> reference, absl::Span<const float> candidate) {
  const std::vector<double> p = LogSoftmax(reference), q = LogSoftmax(candidate);
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (std::isfinite(p[i])) sum += std::exp(p[i]) * (p[i] - q[i]);
  }
  return std::max(0.0, sum);  // rounding can make the divergence of equals -1e-17
}

absl::StatusOr<std::vector<std::string>> ParseLabels(absl::string_view text, int64_t classes) {
  std::vector<std::string> labels;
  if (text.substr(0, 3) == "\xef\xbb\xbf") text.remove_prefix(3);  // byte-order mark
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (!IsUtf8(line)) {
      return absl::InvalidArgumentError(
          absl::StrCat("labels: line ", labels.size() + 1, " is not UTF-8"));
    }
    labels.emplace_back(line);
  }
  while (!labels.empty() && labels.back().find_first_not_of(" \t") == std::string::npos)
    labels.pop_back();
  if (classes > 0 && static_cast<int64_t>(labels.size()) != classes) {
    return absl::InvalidArgumentError(
        absl::StrCat("labels: got ", labels.size(), " names, want ", classes));
  }
  return labels;
}

}  // namespace tern::classify
