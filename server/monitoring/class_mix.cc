#include "server/monitoring/class_mix.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tern::monitoring {

std::vector<int> GroupClasses(absl::Span<const uint32_t> reference) {
  std::vector<int> group(reference.size());
  if (reference.size() <= static_cast<size_t>(kMostGroups)) {
    std::iota(group.begin(), group.end(), 0);
    return group;
  }
  double total = 0;
  for (const uint32_t images : reference) total += images + 0.5;
  double before = 0;
  for (size_t c = 0; c < reference.size(); ++c) {
    // By the middle of the class's own share.
    const double share = (before + (reference[c] + 0.5) / 2) / total;
    group[c] = std::min(kMostGroups - 1, static_cast<int>(share * kMostGroups));
    before += reference[c] + 0.5;
  }
  return group;
}

double StabilityIndex(absl::Span<const uint64_t> reference, absl::Span<const uint64_t> live) {
  const auto total = [](absl::Span<const uint64_t> counts) {
    return std::accumulate(counts.begin(), counts.end(), 0.5 * static_cast<double>(counts.size()));
  };
  const double of_reference = total(reference), of_live = total(live);
  double index = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    if (reference[i] == 0 && live[i] == 0) continue;
    const double e = (static_cast<double>(reference[i]) + 0.5) / of_reference;
    const double a = (static_cast<double>(live[i]) + 0.5) / of_live;
    index += (a - e) * std::log(a / e);
  }
  return index;
}

}  // namespace tern::monitoring
