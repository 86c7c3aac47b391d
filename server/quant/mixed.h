// Mixed precision by budget: which layer gets which weights (docs/quantisation.md, "Mixed
// precision"; the paper's title).
//
// Every layer is made in several schemes; each is judged by what it costs (stored bits, time on
// this machine) and by how far the network's outputs move when only this layer is made so. Damages
// of layers are taken to add up, which makes the best choice for every budget a knapsack problem.
#ifndef TERN_SERVER_QUANT_MIXED_H_
#define TERN_SERVER_QUANT_MIXED_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/graph/graph.h"
#include "server/quant/quantize.h"
#include "server/quant/walk.h"

namespace tern::quant {

// One layer made in one way.
struct Option {
  Scheme scheme;
  double divergence = 0;  // of the outputs from the float network's, nats, if only this layer is so
  double bits = 0;        // of the whole layer
  double ms = 0;          // of the layer per image, one thread, batch 1
};

// The options of one weighted layer; never empty, the first is int8.
struct LayerOptions {
  int node = 0;
  int64_t weights = 0;
  std::vector<Option> options;
};

// Index of the chosen option by layer.
using Assignment = std::vector<int>;

struct Totals {
  double divergence = 0, bits = 0, ms = 0;
};
Totals Sum(absl::Span<const LayerOptions> layers, const Assignment& assignment);

enum class Cost { kBits, kMilliseconds };

// For `budgets` (of total bits or ms): the assignment of least divergence, and among those equal to
// within a thousandth the cheapest in the other cost. A budget that even the cheapest options
// exceed gives them. Exact up to rounding costs up to 1/4000 of the dearest assignment.
std::vector<Assignment> BestAssignments(absl::Span<const LayerOptions> layers, Cost cost,
                                        absl::Span<const double> budgets);

// Measures the options of every weighted layer of `graph`: `build` (image indices of `calibration`)
// for making the weights, `measure` for the divergences. Grouped layers and the first are int8
// only; the last is int8 or 4-bit. CANCELLED, and what Quantize returns.
absl::StatusOr<std::vector<LayerOptions>> MeasureLayers(const graph::Graph& graph,
                                                        const Tensor& calibration,
                                                        absl::Span<const int64_t> build,
                                                        absl::Span<const int64_t> measure,
                                                        const QuantizeOptions& options);

// "12 ternary N=64, 30 int4 N=64, 11 int8"
std::string Describe(absl::Span<const LayerOptions> layers, const Assignment& assignment);

// The recipe's per-layer choices for an assignment.
void SetLayers(const graph::Graph& graph, absl::Span<const LayerOptions> layers,
               const Assignment& assignment, v1::Recipe& recipe);

// The network quantised by a recipe whose weights are MIXED: measures, searches, quantises. `train`
// and `held_out` partition the calibration images; the held-out ones judge candidates.
absl::StatusOr<QuantizeResult> QuantizeMixed(const graph::Graph& graph, const Tensor& calibration,
                                             absl::Span<const int64_t> train,
                                             absl::Span<const int64_t> held_out,
                                             const QuantizeOptions& options);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_MIXED_H_
