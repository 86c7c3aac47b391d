// Post-training quantisation of a float network from calibration images.
#ifndef TERN_SERVER_QUANT_QUANTIZE_H_
#define TERN_SERVER_QUANT_QUANTIZE_H_

#include <atomic>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/engine/plan.h"
#include "server/graph/graph.h"
#include "tern/v1/model.pb.h"

namespace tern::quant {

struct Progress {
  std::string phase = "calibrating";  // or "sensitivity", "searching", "distilling"
  double done = 0;                    // 0..1 of the phase
  int layers_done = 0;
  int layers = 0;
  std::string layer;         // the one in work
  double seconds_left = -1;  // estimate; negative while unknown
};

struct QuantizeOptions {
  v1::Recipe recipe;
  int threads = 1;
  // Of the plans that are timed and compared with the float network; max_batch is not taken.
  engine::PlanOptions plan;
  // Called between layers and inside long ones, on the calling thread. May be empty.
  std::function<void(const Progress&)> progress;
  // Set to true by anyone: Quantize returns CANCELLED within about a second. May be null.
  const std::atomic<bool>* cancelled = nullptr;
};

struct QuantizeResult {
  graph::Graph graph;  // quantised; valid
  // Fills: recipe, calibration_images, layers, float_nodes, bits_per_weight,
  // float_bytes, multiplications_removed, sqnr_db, calibration_agreement, seconds, warnings. The
  // caller adds the rest.
  v1::QuantizationReport report;
};

// Quantises `graph` (float, after graph::Optimize) with `calibration`, f32 NCHW [n, c, h, w], n >=
// 1, already preprocessed. Deterministic for a recipe (its seed included), images and thread count.
// INVALID_ARGUMENT: recipe out of range (ValidateRecipe) or naming a layer that is not there, a
// network that graph::Validate refuses or that ends in a softmax instead of its logits, calibration
// of another shape or with non-finite values; FAILED_PRECONDITION: the network produces
// non-finite values on the calibration images (names the layer); CANCELLED.
absl::StatusOr<QuantizeResult> Quantize(const graph::Graph& graph, const Tensor& calibration,
                                        const QuantizeOptions& options);

// Quantises with the images `train` and distils, `held_out` apart to judge by; the layers' weights
// are the recipe's, not MIXED. For Quantize and the search for mixed precision.
absl::StatusOr<QuantizeResult> QuantizeAndDistill(const graph::Graph& graph,
                                                  const Tensor& calibration,
                                                  absl::Span<const int64_t> train,
                                                  absl::Span<const int64_t> held_out,
                                                  const QuantizeOptions& options);

// INVALID_ARGUMENT naming field, value and limit if the recipe is not one that Quantize takes.
absl::Status ValidateRecipe(const v1::Recipe& recipe);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_QUANTIZE_H_
