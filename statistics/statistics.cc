#include "statistics/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tern::statistics {
namespace {

constexpr double kZ = 1.959963984540054;  // the 97.5 % quantile of the normal distribution

// log of the gamma function. std::lgamma writes a global.
double LogGamma(double x) {
  int sign;
  return lgamma_r(x, &sign);
}

}  // namespace

Interval WilsonInterval(uint64_t hits, uint64_t total) {
  if (total == 0) return {};
  const double n = static_cast<double>(total);
  const double p = static_cast<double>(hits) / n;
  const double middle = (p + kZ * kZ / (2 * n)) / (1 + kZ * kZ / n);
  const double half = kZ / (1 + kZ * kZ / n) * std::sqrt(p * (1 - p) / n + kZ * kZ / (4 * n * n));
  // At 0 and 1 the bound is exact; rounding must not put the value outside its own interval.
  return {p, std::clamp(middle - half, 0.0, p), std::clamp(middle + half, p, 1.0)};
}

Interval PairedDifference(uint64_t only_reference, uint64_t only_candidate, uint64_t total) {
  if (total == 0) return {0, -1, 1};
  const double b = static_cast<double>(only_reference), c = static_cast<double>(only_candidate);
  const double n = static_cast<double>(total);
  const double lost = (b + 1) / (n + 2), won = (c + 1) / (n + 2);
  const double middle = lost - won;
  const double half = kZ * std::sqrt(std::max(0.0, lost + won - middle * middle) / (n + 2));
  return {(b - c) / n, std::max(-1.0, middle - half), std::min(1.0, middle + half)};
}

double McNemarExact(uint64_t only_reference, uint64_t only_candidate) {
  const uint64_t smaller = std::min(only_reference, only_candidate);
  const double n = static_cast<double>(only_reference) + static_cast<double>(only_candidate);
  if (only_reference == only_candidate) return 1;
  // From the largest term, C(n, smaller) / 2^n, downwards: the ratios fall, so the sum ends once a
  // term no longer counts, after a few times sqrt(n) terms at most.
  const double k = static_cast<double>(smaller);
  const double log_largest =
      LogGamma(n + 1) - LogGamma(k + 1) - LogGamma(n - k + 1) - n * std::log(2.0);
  double sum = 0, term = 1;
  for (double i = k; term > sum * std::numeric_limits<double>::epsilon(); --i) {
    sum += term;
    term *= i / (n - i + 1);
  }
  return std::min(1.0, 2 * std::exp(log_largest + std::log(sum)));
}

v1::Proportion MakeProportion(uint64_t hits, uint64_t total) {
  const Interval interval = WilsonInterval(hits, total);
  v1::Proportion proportion;
  proportion.set_value(interval.value);
  proportion.set_low(interval.low);
  proportion.set_high(interval.high);
  proportion.set_hits(hits);
  proportion.set_total(total);
  return proportion;
}

v1::PairedComparison MakeComparison(uint64_t both_right, uint64_t only_reference_right,
                                    uint64_t only_candidate_right, uint64_t both_wrong) {
  const Interval drop =
      PairedDifference(only_reference_right, only_candidate_right,
                       both_right + only_reference_right + only_candidate_right + both_wrong);
  v1::PairedComparison comparison;
  comparison.set_both_right(both_right);
  comparison.set_only_reference_right(only_reference_right);
  comparison.set_only_candidate_right(only_candidate_right);
  comparison.set_both_wrong(both_wrong);
  comparison.set_drop(drop.value);
  comparison.set_drop_low(drop.low);
  comparison.set_drop_high(drop.high);
  comparison.set_p_value(McNemarExact(only_reference_right, only_candidate_right));
  return comparison;
}

}  // namespace tern::statistics
