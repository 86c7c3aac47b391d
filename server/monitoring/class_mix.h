// Whether the classes that a network answers come in other proportions than they used to.
#ifndef TERN_SERVER_MONITORING_CLASS_MIX_H_
#define TERN_SERVER_MONITORING_CLASS_MIX_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace tern::monitoring {

// The index grows with the number of groups even where nothing changed, by about
// (groups - 1) (1/reference images + 1/live images): a thousand classes would drown in that.
inline constexpr int kMostGroups = 20;

// The group, 0.., of each class: its own if there are at most kMostGroups classes; else kMostGroups
// ranges of neighbouring classes of about equal shares of `reference` (images per class; each
// counts half an image more, so that classes without any are spread too). Neighbours, because data
// sets number related classes one after the other.
std::vector<int> GroupClasses(absl::Span<const uint32_t> reference);

// Population stability index of two counts over the same groups: the sum of (a - e) ln(a / e) over
// the shares a of `live` and e of `reference`, each count raised by a half (Jeffreys), so that an
// empty group is no infinity; a group that is empty in both counts for nothing. 0 for equal shares;
// by convention below 0.1 is no shift, above 0.25 a large one.
double StabilityIndex(absl::Span<const uint64_t> reference, absl::Span<const uint64_t> live);

}  // namespace tern::monitoring

#endif  // TERN_SERVER_MONITORING_CLASS_MIX_H_
