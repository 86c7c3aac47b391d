// The layer-by-layer walk of quantisation: the float network and the network quantised so far run
// side by side over the calibration images, and every layer is quantised when it is reached.
#ifndef TERN_SERVER_QUANT_WALK_H_
#define TERN_SERVER_QUANT_WALK_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/quant/compensate.h"
#include "server/quant/placement.h"
#include "server/quant/quantize.h"

namespace tern::quant {

// An f32 tensor in half the memory: 16-bit codes with one scale, 2^-15 of the largest magnitude.
struct PackedTensor {
  Shape shape;
  float scale = 0;
  bool finite = true;  // false: it held an infinity or a NaN, and is not to be used
  std::vector<int16_t> codes;
};
PackedTensor Pack(const Tensor& tensor);
Tensor Unpack(const PackedTensor& packed);

// A tensor on the calibration images, in batches: in the float network, and in the quantised one,
// as u8 codes with the value's parameters or as f32 where it has none (yet).
struct Activation {
  std::vector<PackedTensor> reference;
  std::vector<Tensor> quantised;
};

// A way to make one layer.
struct Scheme {
  WeightScheme weights = WeightScheme::kInt8;
  int cluster_size = 0;  // 0 for int8
  friend bool operator==(const Scheme&, const Scheme&) = default;
};

// `n` input channels to a cluster, 0 = all, for a layer that has `channels` of them.
Scheme MakeScheme(v1::WeightType weights, uint32_t n, int64_t channels);

// One layer made in one way, from the same inputs as the walk's own choice.
struct Candidate {
  Scheme scheme;
  QuantizedWeights weights;
  Tensor bias;
};

// What a walk over `graph` keeps within its limit of 2.25 GiB.
struct WalkMemory {
  int64_t held = 0;     // bytes per image, at the fullest moment
  int64_t batch = 1;    // images that run at a time
  int64_t working = 0;  // bytes of a batch in the layer that needs most
  int64_t images = 1;   // that fit
};
WalkMemory MemoryOf(const graph::Graph& graph);

// One quantisation. Use once, on one thread.
class Walk {
 public:
  // All must outlive the walk; the recipe is valid and the calibration fits the graph.
  Walk(const graph::Graph& graph, const Tensor& calibration, const QuantizeOptions& options);

  // Before Run: layers are also made in the schemes that `schemes_of` gives for their node, only to
  // be kept in candidates().
  void AskForCandidates(std::function<std::vector<Scheme>(int node)> schemes_of) {
    schemes_of_ = std::move(schemes_of);
  }
  // By node.
  const std::vector<std::vector<Candidate>>& candidates() const { return candidates_; }

  absl::StatusOr<QuantizeResult> Run();

 private:
  // What is gathered about a weighted layer in the first pass over its inputs.
  struct LayerData {
    const graph::Node* node = nullptr;
    v1::Method method = v1::COMPENSATED;
    std::vector<double> target_sum,
        target_square;  // per output channel, of what the layer should give
    int64_t count = 0;  // values per output channel
  };

  // What the recipe wants for a weighted node.
  Scheme SchemeFor(int index) const;

  absl::Status CheckCancelled() const;
  void ReportProgress(const graph::Node* node);
  void Warn(std::string message);

  // Decides how many images fit in memory and splits them into batches_.
  void ChooseImages();
  Tensor InputBatch(int batch) const;
  absl::Status StartWithInput();
  absl::Status RunOther(int index);
  absl::Status RunWeighted(int index);

  // Float outputs (with the residual and the clip) into `out`, statistics into `data` and `moments`
  // (may be null).
  absl::Status RunReference(LayerData& data, const ClusterLayout& layout, Moments* moments,
                            Activation& out);
  // A layer of one input, on the quantised network's batch: f32.
  absl::StatusOr<Tensor> RunQuantised(const graph::Node& node, int batch) const;
  // Sums of that over all batches, per output channel.
  absl::Status SumQuantised(const graph::Node& node, std::vector<double>& sum,
                            std::vector<double>& square) const;
  absl::StatusOr<QuantizedWeights> ChooseWeights(const graph::Node& node, const Scheme& scheme,
                                                 const ClusterLayout& layout,
                                                 const Moments* moments);
  // `moments`, in the order of `layout`, are null where the layer is not compensated: then nearest
  // codes, corrected unless the method is DIRECT.
  absl::Status MakeCandidates(int index, const LayerData& data, const ClusterLayout& layout,
                              const Moments* moments);
  // Rescales rows so that the variance of the layer's output matches the float network's.
  absl::Status MatchVariance(const LayerData& data, QuantizedWeights& weights);
  // What the biases of `plain`, the layer with its new weights, lack to give the float network's
  // means.
  absl::StatusOr<std::vector<float>> MeanCorrection(const LayerData& data,
                                                    const graph::Node& plain);

  // Makes batch b of a value, f32; the same at every call.
  using BatchSource = std::function<absl::StatusOr<Tensor>(int batch)>;
  // Fills the quantised side of value `id`. One that has parameters of its own is made twice, to
  // learn its range and to be held as codes: the f32 results of all images would be most of the
  // walk's memory.
  absl::Status FillQuantised(graph::ValueId id, const BatchSource& source);
  // Holds the value as codes with these parameters.
  absl::Status Encode(graph::ValueId id, const QuantParams& params, const BatchSource& source);
  // Sets the parameters of a value of which so many elements are clipped; concatenated parts
  // follow.
  void SetParams(graph::ValueId id, const QuantParams& params, int64_t clipped);
  // The f32 tensor of a quantised activation's batch.
  Tensor Real(graph::ValueId id, int batch) const;
  absl::StatusOr<Tensor> RunNodeOn(const graph::Node& node, bool reference, int batch) const;
  absl::Status CheckFinite(const graph::Node& node, const Activation& activation) const;
  void Release(int index);
  void FillLayerReport(int index, const LayerData& data);
  void FillReport();

  int batch_images(int batch) const { return batches_[batch + 1] - batches_[batch]; }
  int batch_count() const { return static_cast<int>(batches_.size()) - 1; }

  const graph::Graph& graph_;
  const Tensor& calibration_;
  const QuantizeOptions& options_;
  const v1::Recipe& recipe_;
  const Placement placement_;
  QuantizeResult result_;
  std::vector<int> last_reader_;  // by ValueId: the last node that reads it
  std::vector<int> weighted_;     // node indices
  struct Image {
    int64_t index;  // in calibration_
    bool mirrored;
  };
  std::vector<Image> images_;     // in use
  std::vector<int> batches_;      // batch b is images_[batches_[b]] .. images_[batches_[b + 1] - 1]
  std::vector<Activation> live_;  // by ValueId
  std::vector<int> report_of_;    // by ValueId: index of the layer report of its producer, or -1
  std::vector<double> cost_;  // by node, in multiply-accumulates or so, for the estimate of time
  double cost_done_ = 0, cost_all_ = 0;
  int layers_done_ = 0;
  std::function<std::vector<Scheme>(int node)> schemes_of_;
  std::vector<std::vector<Candidate>> candidates_;
  absl::Time started_;
};

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_WALK_H_
