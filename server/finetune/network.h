// A network in torch, built from a graph, so that gradients can be taken: the float network, or a
// quantised one whose rounding is simulated.
//
// Quantised networks compute what docs/quantisation.md, "Inference arithmetic", defines, in f32:
// every value with QuantParams is rounded to its codes, weights are step * scale * code. What is
// trained (docs/finetuning.md):
//   latent weights  one real number per weight, in the unit of the float weights. The code is
//                   clamp(round(latent / s)) with the start version's scale s of the cluster, which
//                   stays fixed, so that moving a scale never changes codes. The gradient passes
//                   the rounding unchanged (straight-through, Bengio et al. 2013); latents are kept
//                   within half a cell beyond the outermost codes.
//   scales          one factor per cluster (int8: per output channel), as its logarithm; put on
//                   the 8-bit grid in every forward pass, straight-through. Fixed-point graphs
//                   keep their steps; biases go to their grid at the end.
//   biases
// Rounding of activations is straight-through inside the range of the codes (and of the fused
// activation), and has gradient 0 outside.
#ifndef TERN_SERVER_FINETUNE_NETWORK_H_
#define TERN_SERVER_FINETUNE_NETWORK_H_

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "server/graph/graph.h"

namespace tern::finetune {

// Not thread safe. Tensors share storage with the network's.
class Network {
 public:
  // Sees the result of each weighted node, in real numbers, before it is rounded to codes.
  using Observer = std::function<void(const graph::Node& node, const at::Tensor& real)>;

  // The float network; nothing is trained. `graph` is valid, optimised and float.
  // INVALID_ARGUMENT if it is quantised; UNIMPLEMENTED naming a node whose operator has no
  // counterpart here.
  static absl::StatusOr<Network> Float(const graph::Graph& graph);

  // The quantised network `start`, with latent weights taken from `source`, the float network it
  // was made from: each lies as near to its float weight as the cell of its code allows, so the
  // codes at first are those of `start`. INVALID_ARGUMENT naming the first difference if the two
  // graphs are not the same network, or the layer whose scales are above the grid; UNIMPLEMENTED
  // as above.
  static absl::StatusOr<Network> Quantised(const graph::Graph& source, const graph::Graph& start);

  // f32 [n, ...sample shape] to logits [n, classes]. Throws what torch throws (c10::Error).
  at::Tensor Forward(const at::Tensor& images) const;
  // Every value by ValueId (undefined: unused). `observer` may be empty.
  std::vector<at::Tensor> ForwardAll(const at::Tensor& images, const Observer& observer) const;

  // What is trained, in the order of the nodes. Empty for float networks.
  const std::vector<at::Tensor>& latents() const { return latents_; }
  const std::vector<at::Tensor>& scales() const { return scales_; }  // log factors, 0 at first
  const std::vector<at::Tensor>& biases() const { return biases_; }

  // The weights that node `index` multiplies by, with gradients; undefined for other nodes.
  at::Tensor Weight(int index) const;

  // Call after each step of the optimiser.
  void ClampLatents();

  // The network as a quantised graph: valid, with the codes, scales and biases of now. INTERNAL if
  // a number is no longer finite.
  absl::StatusOr<graph::Graph> ToGraph() const;

 private:
  struct Layer {
    at::Tensor weight;     // latent, or the float weight
    at::Tensor bias;       // [o]
    at::Tensor log_scale;  // [o, G], trained; undefined if the scales are fixed
    // Of quantised layers:
    at::Tensor start_scales;  // [o, G] real scales of the start version
    at::Tensor start_steps;   // [o, 1]
    at::Tensor start_top;     // [o, 1] largest of start_scales
    at::Tensor unit;          // start_scales stretched to the weight's rank
    at::Tensor cluster;       // s64 [c]: cluster of each input channel; undefined if G = 1
    bool quantised = false;
    bool fixed_step = false;
    bool has_grid = false;  // cluster scales are integers times the step; int8 has steps only
    double max_code = 0, max_scale = 1;
  };
  // Steps [o, 1] and integer scales [o, G] of now, without gradients.
  struct Grid {
    at::Tensor steps, scales;
  };

  explicit Network(const graph::Graph& graph);
  static absl::StatusOr<Layer> MakeLayer(const graph::Node& source, const graph::Node& start,
                                         graph::Arithmetic arithmetic);
  static at::Tensor Codes(const Layer& layer);
  static at::Tensor RealScales(const Layer& layer);  // before rounding to the grid
  static Grid OnGrid(const Layer& layer);
  static at::Tensor Stretch(const Layer& layer, const at::Tensor& scales);
  at::Tensor Round(const at::Tensor& real, graph::ValueId id,
                   const std::optional<graph::ClipRange>& clip) const;
  at::Tensor Evaluate(int index, const std::vector<at::Tensor>& values) const;

  graph::Graph graph_;
  std::vector<at::Tensor> constants_;  // by ValueId
  std::vector<Layer> layers_;          // by node; empty for nodes without weights
  std::vector<at::Tensor> latents_, scales_, biases_;
};

// Sets torch's number of threads and makes denormal numbers count as zero on all of them (gradients
// of saturated layers are full of them, and each costs a hundred cycles).
void UseThreads(int threads);

}  // namespace tern::finetune

#endif  // TERN_SERVER_FINETUNE_NETWORK_H_
