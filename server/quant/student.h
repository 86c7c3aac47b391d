// A quantised network as a differentiable function of its scales and biases.
//
// Weights are the reals that codes and scales stand for; activations are floats, clamped to the
// range of their QuantParams but not rounded, so that derivatives are exact. Parameters per
// weighted layer: theta [o][g], the logarithm of a factor on each cluster scale (int8: one per
// output channel), and beta [o], a shift of the bias in units of a sixth of the output's range.
#ifndef TERN_SERVER_QUANT_STUDENT_H_
#define TERN_SERVER_QUANT_STUDENT_H_

#include <atomic>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/graph/graph.h"
#include "server/tensor/tensor.h"

namespace tern::quant {

// Nodes first .. last - 1 of a graph, which read nothing from outside but `input` and constants,
// and of whose results only `output` is read outside.
struct NodeRange {
  int first = 0, last = 0;
  graph::ValueId input = graph::kNoValue, output = graph::kNoValue;
};

// Not thread safe.
class Student {
 public:
  // `quantised` must outlive nothing: it is copied. logit_unit: the unit of beta where the output
  // is not quantised.
  Student(const graph::Graph& quantised, float logit_unit, int threads);

  // Forward, Replay and Backward return CANCELLED between two nodes once this becomes true.
  void StopAt(const std::atomic<bool>* cancelled) { cancelled_ = cancelled; }

  NodeRange whole() const;
  // The finest partition of the network into ranges with at least one weighted layer each.
  std::vector<NodeRange> Blocks() const;

  // Results of the range's nodes on `input` [n, ...] by ValueId; `keep` false: only the output's.
  absl::StatusOr<std::vector<Tensor>> Forward(const NodeRange& range, const Tensor& input,
                                              bool keep) const;

  // The output if node `index` had other weights and bias, given `values` of the whole network with
  // keep.
  absl::StatusOr<Tensor> Replay(const std::vector<Tensor>& values, int index, Tensor weight,
                                Tensor bias) const;

  // Adds the derivatives of a loss to those of the parameters, given `values` of Forward with keep
  // and the loss's derivatives with respect to the output.
  absl::Status Backward(const NodeRange& range, const std::vector<Tensor>& values,
                        Tensor output_gradient);

  struct Rates {
    float theta = 0, beta = 0;
  };
  // One step of Adam on the range's parameters by the sum of the derivatives so far, which is
  // cleared.
  void Step(const NodeRange& range, const Rates& rates);

  // Writes scales (rounded to 8 bits) and biases into the graph that this was made from.
  void Store(bool power_of_two_steps, graph::Graph& quantised) const;

  // Bytes of all values of a range for one image, about.
  int64_t BytesPerImage(const NodeRange& range) const;

 private:
  struct Parameters {
    std::vector<float> value, gradient, first, second;  // Adam's two moments
    explicit Parameters(size_t n = 0) : value(n), gradient(n), first(n), second(n) {}
    void Step(float rate, int step);
  };
  struct Layer {
    bool trained = false;
    int clusters = 1;
    std::vector<int> cluster_of;    // [columns of OIHW]
    std::vector<float> base, bias;  // at theta = beta = 0
    float unit = 1;                 // of beta
    int step = 0;
    Parameters theta, beta;
  };

  absl::Status CheckCancelled() const;
  void UpdateWeights(int node);
  // Brings a value into the range of its QuantParams.
  void Clamp(graph::ValueId id, Tensor& value) const;

  graph::Graph graph_;  // float weights
  const int threads_;
  const std::atomic<bool>* cancelled_ = nullptr;
  std::vector<int> last_reader_;  // by ValueId
  std::vector<Layer> layers_;     // by node
};

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_STUDENT_H_
