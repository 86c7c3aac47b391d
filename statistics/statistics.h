// What a count of right answers says about a network: intervals and tests, all at 95 %.
//
// Plain functions of counts; thread safe, no errors. Server and client both include this folder, so
// that a figure is computed by one definition wherever it is shown.
#ifndef TERN_STATISTICS_STATISTICS_H_
#define TERN_STATISTICS_STATISTICS_H_

#include <cstdint>

#include "tern/v1/model.pb.h"

namespace tern::statistics {

struct Interval {
  double value = 0, low = 0, high = 1;
};

// Score interval of hits / total (Wilson 1927); total 0 gives {0, 0, 1}.
Interval WilsonInterval(uint64_t hits, uint64_t total);

// Share that only the reference gets right minus share that only the candidate gets right, of
// `total` pairs, with the adjusted Wald interval for paired proportions (Bonett and Price 2012: one
// is added to both counts and two to the total), cut to -1..1. It depends on the pairs that differ
// only, and keeps its coverage where there are few or none: 0 of n gives about +-2.8 / n, close to
// the rule of three. total 0 gives {0, -1, 1}.
Interval PairedDifference(uint64_t only_reference, uint64_t only_candidate, uint64_t total);

// McNemar's exact test, two-sided: the probability of a split at least as uneven as
// only_reference : only_candidate if both were equally likely, min(1, 2 P(X <= smaller)) with X
// binomial(sum, 1/2). 1 if both are 0. Right to 1e-6 relative for counts up to 1e9; work grows with
// the square root of the counts.
double McNemarExact(uint64_t only_reference, uint64_t only_candidate);

// The messages with their intervals and the test.
v1::Proportion MakeProportion(uint64_t hits, uint64_t total);
v1::PairedComparison MakeComparison(uint64_t both_right, uint64_t only_reference_right,
                                    uint64_t only_candidate_right, uint64_t both_wrong);

}  // namespace tern::statistics

#endif  // TERN_STATISTICS_STATISTICS_H_
