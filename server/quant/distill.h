// Label-free distillation: scales and biases of a quantised network are trained until its outputs
// resemble the float network's on the calibration images. Codes, and with them the integer weights'
// sparsity and size, stay as they are (docs/quantisation.md, "Distillation").
#ifndef TERN_SERVER_QUANT_DISTILL_H_
#define TERN_SERVER_QUANT_DISTILL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/engine/plan.h"
#include "server/graph/graph.h"
#include "server/tensor/tensor.h"
#include "tern/v1/model.pb.h"

namespace tern::quant {

struct DistillOptions {
  // DISTILL_NETWORK: towards the float network's logits. DISTILL_BLOCKS: block by block towards the
  // float network's value at the end of the block. DISTILL_AUTO: as DISTILL_NETWORK, but the result
  // is dropped unless the divergence on the held-out images falls.
  v1::Distillation kind = v1::DISTILL_AUTO;
  uint64_t seed = 0;
  int steps = 0;                    // of DISTILL_NETWORK; 0: by the network's size
  bool power_of_two_steps = false;  // DFP8: scales go back to such a grid
  int threads = 1;
  engine::PlanOptions plan;  // of the networks that answer; max_batch is not taken
  // Share done, 0..1; called on the calling thread. May be empty.
  std::function<void(double done)> progress;
  // Distill returns CANCELLED within about a second of this becoming true. May be null.
  const std::atomic<bool>* cancelled = nullptr;
};

// How far a network's answers are from the float network's on some images.
struct Closeness {
  double divergence = 0;  // mean Kullback-Leibler divergence of the outputs, nats
  double agreement = 0;   // share of images with the same top-1
};

// Trains `quantised`, made from `reference` (the same nodes in the same order), on the images
// `train` of `images` (f32 NCHW [n, ...]); `held_out` are images that neither this training nor,
// ideally, anything before has seen: both empty sets are allowed, but AUTO keeps nothing it could
// not check. On return `quantised` holds the trained network, or is as before if the report says
// kept = false. INVALID_ARGUMENT if the graphs do not match, CANCELLED; other errors are oneDNN's.
absl::StatusOr<v1::DistillationReport> Distill(const graph::Graph& reference, const Tensor& images,
                                               absl::Span<const int64_t> train,
                                               absl::Span<const int64_t> held_out,
                                               const DistillOptions& options,
                                               graph::Graph& quantised);

// The images `which` of `images` [n, ...].
Tensor TakeImages(const Tensor& images, absl::Span<const int64_t> which);

// The outputs of a network, float or quantised, run by the engine: [n, classes]. max_batch of
// `plan` is not taken.
absl::StatusOr<Tensor> RunEngine(const graph::Graph& graph, const Tensor& images,
                                 absl::Span<const int64_t> which, const engine::PlanOptions& plan,
                                 int threads, const std::atomic<bool>* cancelled);

// Compares two sets of outputs [n, classes]: the divergence of `got` from `wanted`.
Closeness Compare(const Tensor& wanted, const Tensor& got);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_DISTILL_H_
