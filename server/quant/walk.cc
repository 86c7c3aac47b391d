#include "server/quant/walk.h"

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/engine/ops.h"
#include "server/graph/fixed_point.h"
#include "server/quant/im2col.h"
#include "server/quant/measure.h"
#include "server/quant/observe.h"
#include "statistics/statistics.h"

namespace tern::quant {
namespace {

using graph::Node;
using graph::OpType;
using graph::ValueId;

// Activations of the calibration images, and what a layer works on, may take this much memory;
// fewer images are used otherwise.
constexpr int64_t kMemoryLimit = int64_t{2304} << 20;
// Fewer calibration images than this are used twice, the second time mirrored.
constexpr int64_t kFewImages = 1000;
// Elements of the network's largest value in one batch.
constexpr int64_t kBatchElements = int64_t{1} << 24;
constexpr int64_t kMostInBatch = 128;
// Output positions that feed a layer's second moments.
constexpr int64_t kMaxPositions = 100'000;
// Layers with more columns are not compensated: their covariance would take gigabytes.
constexpr int kMaxCompensatedColumns = 6144;
// Floats of im2col in memory at a time.
constexpr int64_t kGatherElements = int64_t{1} << 24;

bool IsWeighted(const Node& node) {
  return node.op == OpType::kConv || node.op == OpType::kFullyConnected;
}

WeightScheme SchemeOf(v1::WeightType type) {
  switch (type) {
    case v1::TERNARY_CLUSTER:
      return WeightScheme::kTernaryCluster;
    case v1::INT4_CLUSTER:
      return WeightScheme::kInt4Cluster;
    case v1::INT3_CLUSTER:
      return WeightScheme::kInt3Cluster;
    default:
      return WeightScheme::kInt8;
  }
}

int64_t PlaneSize(const Tensor& t) {
  return t.shape().rank() == 4 ? t.shape()[2] * t.shape()[3] : 1;
}

// A uniform number in [0, 1) that does not depend on the standard library.
double Uniform(std::mt19937_64& random) { return static_cast<double>(random() >> 11) * 0x1.0p-53; }

// Weights and bias alone, without residual and activation.
Node Plain(const Node& node, Tensor weight) {
  Node plain = node;
  plain.inputs.resize(1);
  plain.clip.reset();
  plain.weight = std::move(weight);
  return plain;
}

// y += sign * x
void Accumulate(const Tensor& x, float sign, Tensor& y) {
  const auto source = x.data<float>();
  auto target = y.data<float>();
  for (size_t i = 0; i < target.size(); ++i) target[i] += sign * source[i];
}

void ApplyClip(const std::optional<graph::ClipRange>& clip, Tensor& y) {
  if (!clip) return;
  for (float& v : y.data<float>()) v = std::min(std::max(v, clip->lo), clip->hi);
}

// Adds bias[o] to every value of output channel o.
void AddPerChannel(const std::vector<float>& bias, Tensor& y) {
  const int64_t n = y.shape()[0], channels = y.shape()[1], plane = PlaneSize(y);
  float* data = y.data<float>().data();
  for (int64_t row = 0; row < n * channels; ++row) {
    const float b = bias[row % channels];
    for (int64_t i = 0; i < plane; ++i) data[row * plane + i] += b;
  }
}

// Sums and sums of squares per channel, added to `sum` and `square` [channels].
void AddChannelSums(const Tensor& y, std::vector<double>& sum, std::vector<double>& square) {
  const int64_t n = y.shape()[0], channels = y.shape()[1], plane = PlaneSize(y);
  const float* data = y.data<float>().data();
  for (int64_t row = 0; row < n * channels; ++row) {
    double s = 0, q = 0;
    for (int64_t i = 0; i < plane; ++i) {
      const double v = data[row * plane + i];
      s += v;
      q += v * v;
    }
    sum[row % channels] += s;
    square[row % channels] += q;
  }
}

}  // namespace

PackedTensor Pack(const Tensor& tensor) {
  PackedTensor packed;
  packed.shape = tensor.shape();
  const auto values = tensor.data<float>();
  float largest = 0;
  bool finite = true;
  for (float v : values) {
    finite &= std::fabs(v) <= FLT_MAX;
    largest = std::max(largest, std::fabs(v));
  }
  packed.finite = finite;
  packed.codes.resize(values.size());
  if (!finite || largest < 1e-30f) return packed;
  packed.scale = largest / 32767.0f;
  const float inverse = 32767.0f / largest;
  for (size_t i = 0; i < values.size(); ++i)
    packed.codes[i] = static_cast<int16_t>(RoundToEven(values[i] * inverse));
  return packed;
}

Tensor Unpack(const PackedTensor& packed) {
  Tensor tensor(DType::kF32, packed.shape);
  const auto values = tensor.data<float>();
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = packed.scale * static_cast<float>(packed.codes[i]);
  return tensor;
}

Walk::Walk(const graph::Graph& graph, const Tensor& calibration, const QuantizeOptions& options)
    : graph_(graph),
      calibration_(calibration),
      options_(options),
      recipe_(options.recipe),
      placement_(Place(graph)),
      last_reader_(graph.values.size(), -1),
      live_(graph.values.size()),
      report_of_(graph.values.size(), -1),
      started_(absl::Now()) {
  result_.graph = graph;
  candidates_.resize(graph.nodes.size());
  const int nodes = static_cast<int>(graph.nodes.size());
  for (int i = 0; i < nodes; ++i) {
    for (ValueId id : graph.nodes[i].inputs) last_reader_[id] = i;
    if (IsWeighted(graph.nodes[i])) weighted_.push_back(i);
  }
  last_reader_[graph.output] = nodes;
}

Scheme MakeScheme(v1::WeightType weights, uint32_t n, int64_t channels) {
  const WeightScheme scheme = SchemeOf(weights);
  if (!IsClustered(scheme)) return {};
  const int64_t size = n == 0 ? channels : std::min<int64_t>(n, channels);
  return {scheme, static_cast<int>(size)};
}

Scheme Walk::SchemeFor(int index) const {
  const Node& node = graph_.nodes[index];
  // Grouped layers have too few weights per output for clusters.
  if (node.conv.groups != 1) return {};
  const int64_t channels = node.weight.shape()[1];
  for (const v1::LayerChoice& choice : recipe_.layers()) {
    if (choice.layer() == node.name)
      return MakeScheme(choice.weights(), choice.cluster_size(), channels);
  }
  const bool end = index == weighted_.front() || index == weighted_.back();
  if (end && !recipe_.quantize_first_and_last_to_weights()) return {};
  return MakeScheme(recipe_.weights(), recipe_.cluster_size(), channels);
}

absl::Status Walk::CheckCancelled() const {
  if (options_.cancelled != nullptr && options_.cancelled->load(std::memory_order_relaxed)) {
    return absl::CancelledError("quantisation cancelled");
  }
  return absl::OkStatus();
}

void Walk::ReportProgress(const Node* node) {
  if (!options_.progress) return;
  Progress progress;
  progress.layers_done = layers_done_;
  progress.layers = static_cast<int>(weighted_.size());
  progress.done = cost_all_ > 0 ? cost_done_ / cost_all_ : 0;
  if (node != nullptr) progress.layer = node->name;
  if (cost_done_ > 0) {
    const double elapsed = absl::ToDoubleSeconds(absl::Now() - started_);
    progress.seconds_left = elapsed * (cost_all_ - cost_done_) / cost_done_;
  }
  options_.progress(progress);
}

void Walk::Warn(std::string message) { result_.report.add_warnings(std::move(message)); }

WalkMemory MemoryOf(const graph::Graph& graph) {
  const Placement placement = Place(graph);
  const int nodes = static_cast<int>(graph.nodes.size());
  std::vector<int> last_reader(graph.values.size(), -1);
  for (int i = 0; i < nodes; ++i) {
    for (ValueId id : graph.nodes[i].inputs) last_reader[id] = i;
  }
  last_reader[graph.output] = nodes;
  // A 16-bit and a u8 (or f32) copy of each live value.
  const auto bytes = [&](ValueId id) {
    const int64_t quantised =
        placement.values[id] == Codes::kFloat || placement.values[id] == Codes::kConcat ? 4 : 1;
    return graph.shape(id).elements() * (2 + quantised);
  };
  WalkMemory memory;
  int64_t live = bytes(graph.input), working = 0;
  int64_t largest = graph.shape(graph.input).elements();
  memory.held = live;
  for (int i = 0; i < nodes; ++i) {
    const Node& node = graph.nodes[i];
    const int64_t output = graph.shape(node.output).elements();
    live += bytes(node.output);
    memory.held = std::max(memory.held, live);
    largest = std::max(largest, output);
    std::vector<ValueId> inputs = node.inputs;
    std::sort(inputs.begin(), inputs.end());
    inputs.erase(std::unique(inputs.begin(), inputs.end()), inputs.end());
    int64_t operands = 0;
    for (ValueId id : inputs) {
      if (graph.values[id].constant) continue;
      operands += graph.shape(id).elements();
      if (last_reader[id] == i) live -= bytes(id);
    }
    // In f32: operands and result, oneDNN's copies of them in its own layout, and the target of a
    // layer that repairs its residual.
    working = std::max(working, 4 * (2 * operands + 3 * output));
  }
  memory.batch = std::clamp<int64_t>(kBatchElements / largest, 1, kMostInBatch);
  memory.working = memory.batch * working;
  memory.images = std::max<int64_t>(1, (kMemoryLimit - memory.working) / memory.held);
  return memory;
}

void Walk::ChooseImages() {
  const WalkMemory memory = MemoryOf(graph_);
  const int64_t available = calibration_.shape()[0];
  int64_t images = std::min(memory.images, available);
  if (images < available) {
    Warn(absl::StrCat("only ", images, " of ", available,
                      " calibration images are used: the activations of all would take ",
                      (available * memory.held + memory.working) >> 20, " MiB, more than ",
                      kMemoryLimit >> 20));
  }
  images_.resize(images);
  for (int64_t i = 0; i < images; ++i) images_[i] = {i * available / images, false};
  // Few images say more if they are also seen mirrored.
  if (recipe_.method() == v1::COMPENSATED && images == available && images < kFewImages &&
      2 * images <= memory.images) {
    for (int64_t i = 0; i < available; ++i) images_.push_back({i, true});
    images *= 2;
  }
  for (int64_t i = 0; i < images; i += memory.batch) batches_.push_back(static_cast<int>(i));
  batches_.push_back(static_cast<int>(images));

  const v1::Method method = recipe_.method();
  for (const Node& node : graph_.nodes) {
    double cost = 2.0 * static_cast<double>(images) * graph_.shape(node.output).elements();
    if (IsWeighted(node)) {
      cost += 5.0 * static_cast<double>(images) * MultiplyAccumulates(graph_, node);
      const double outputs = static_cast<double>(node.weight.shape()[0]);
      const double columns = static_cast<double>(node.weight.elements()) / outputs;
      const double positions =
          static_cast<double>(graph_.shape(node.output).elements()) / outputs * images;
      if (method == v1::COMPENSATED && node.conv.groups == 1 && columns <= kMaxCompensatedColumns) {
        cost += columns * columns *
                (0.6 * std::min<double>(positions, kMaxPositions) + 10 * outputs + 8 * columns);
      }
    }
    cost_.push_back(cost);
    cost_all_ += cost;
  }
}

absl::StatusOr<QuantizeResult> Walk::Run() {
  // oneDNN's sgemm takes its threads from OpenMP's setting for the calling thread.
  struct ThreadsRestored {
    int before = omp_get_max_threads();
    ~ThreadsRestored() { omp_set_num_threads(before); }
  } threads_restored;
  omp_set_num_threads(options_.threads);

  ChooseImages();
  if (calibration_.shape()[0] < 100) {
    Warn(absl::StrCat("only ", calibration_.shape()[0],
                      " calibration images; 300 or more are advised"));
  }
  ReportProgress(nullptr);
  TERN_RETURN_IF_ERROR(StartWithInput());
  for (int i = 0; i < static_cast<int>(graph_.nodes.size()); ++i) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    const Node& node = graph_.nodes[i];
    if (IsWeighted(node)) {
      ReportProgress(&node);
      TERN_RETURN_IF_ERROR(Annotate(RunWeighted(i), node.name));
      ++layers_done_;
    } else {
      TERN_RETURN_IF_ERROR(Annotate(RunOther(i), node.name));
    }
    cost_done_ += cost_[i];
    Release(i);
  }
  if (recipe_.activations() == v1::DFP8) {
    TERN_RETURN_IF_ERROR(graph::RoundToFixedPoint(result_.graph));
  }
  FillReport();
  ReportProgress(nullptr);
  TERN_RETURN_IF_ERROR(Annotate(graph::Validate(result_.graph), "quantised network"));
  return std::move(result_);
}

Tensor Walk::InputBatch(int batch) const {
  const Shape& sample = graph_.shape(graph_.input);
  const int64_t elements = sample.elements(), width = sample[sample.rank() - 1];
  const float* source = calibration_.data<float>().data();
  Tensor result(DType::kF32, sample.WithBatch(batch_images(batch)));
  for (int i = 0; i < batch_images(batch); ++i) {
    const auto [image, mirrored] = images_[batches_[batch] + i];
    float* target = result.data<float>().data() + i * elements;
    std::memcpy(target, source + image * elements, elements * sizeof(float));
    if (!mirrored) continue;
    for (int64_t row = 0; row < elements; row += width)
      std::reverse(target + row, target + row + width);
  }
  return result;
}

absl::Status Walk::StartWithInput() {
  for (int b = 0; b < batch_count(); ++b)
    live_[graph_.input].reference.push_back(Pack(InputBatch(b)));
  return FillQuantised(graph_.input, [&](int b) { return InputBatch(b); });
}

absl::StatusOr<Tensor> Walk::RunNodeOn(const Node& node, bool reference, int batch) const {
  std::vector<Tensor> reals;
  reals.reserve(node.inputs.size());
  std::vector<const Tensor*> inputs;
  for (ValueId id : node.inputs) {
    if (graph_.values[id].constant) {
      inputs.push_back(&*graph_.values[id].constant);
      continue;
    }
    reals.push_back(reference ? Unpack(live_[id].reference[batch]) : Real(id, batch));
    inputs.push_back(&reals.back());
  }
  return engine::RunFloatNode(graph_, node, inputs, options_.threads);
}

absl::Status Walk::RunOther(int index) {
  const Node& node = graph_.nodes[index];
  Activation& out = live_[node.output];
  for (int b = 0; b < batch_count(); ++b) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    TERN_ASSIGN_OR_RETURN(const Tensor reference, RunNodeOn(node, true, b));
    out.reference.push_back(Pack(reference));
  }
  TERN_RETURN_IF_ERROR(CheckFinite(node, out));
  return FillQuantised(node.output, [&](int b) { return RunNodeOn(node, false, b); });
}

absl::Status Walk::RunReference(LayerData& data, const ClusterLayout& layout, Moments* moments,
                                Activation& out) {
  const Node& node = *data.node;
  const Node plain = Plain(node, node.weight);
  const ValueId residual = node.has_residual() ? node.inputs[1] : graph::kNoValue;
  const int64_t outputs = node.weight.shape()[0];
  data.target_sum.assign(outputs, 0);
  data.target_square.assign(outputs, 0);
  const int64_t plane = graph_.shape(node.output).elements() / outputs;
  const double share =
      std::min(1.0, static_cast<double>(kMaxPositions) /
                        static_cast<double>(plane * static_cast<int64_t>(images_.size())));
  const int64_t chunk = std::max<int64_t>(256, kGatherElements / layout.columns());
  std::mt19937_64 random(recipe_.seed() * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(node.output));
  std::vector<float> x, z;
  for (int b = 0; b < batch_count(); ++b) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    const Tensor x_float = Unpack(live_[node.inputs[0]].reference[b]);
    TERN_ASSIGN_OR_RETURN(Tensor y,
                          engine::RunFloatNode(graph_, plain, {&x_float}, options_.threads));
    const bool repairs = residual != graph::kNoValue && data.method == v1::COMPENSATED;
    Tensor repaired;
    if (repairs) {
      // The layer also repairs what the skip connection has lost so far.
      Accumulate(Unpack(live_[residual].reference[b]), 1.0f, y);
      repaired = y;
      Accumulate(Real(residual, b), -1.0f, repaired);
    }
    const Tensor& target = repairs ? repaired : y;
    AddChannelSums(target, data.target_sum, data.target_square);
    data.count += plane * batch_images(b);
    if (moments != nullptr) {
      const int64_t all = plane * batch_images(b);
      const int64_t keep =
          std::max<int64_t>(1, static_cast<int64_t>(share * static_cast<double>(all)));
      const Tensor input = Real(node.inputs[0], b);
      for (int64_t first = 0; first < keep; first += chunk) {
        TERN_RETURN_IF_ERROR(CheckCancelled());
        std::vector<int64_t> positions(std::min(chunk, keep - first));
        // One position in each of `keep` equal stretches.
        for (size_t i = 0; i < positions.size(); ++i) {
          const double at = static_cast<double>(first) + static_cast<double>(i) +
                            (keep == all ? 0.5 : Uniform(random));
          positions[i] = std::min(all - 1, static_cast<int64_t>(at * static_cast<double>(all) /
                                                                static_cast<double>(keep)));
        }
        GatherColumns(graph_, node, layout, input, positions, x);
        GatherOutputs(target, positions, z);
        moments->Add(static_cast<int64_t>(positions.size()), x.data(), z.data());
      }
    }
    if (residual != graph::kNoValue && !repairs)
      Accumulate(Unpack(live_[residual].reference[b]), 1.0f, y);
    ApplyClip(node.clip, y);
    out.reference.push_back(Pack(y));
  }
  return CheckFinite(node, out);
}

absl::StatusOr<Tensor> Walk::RunQuantised(const Node& node, int batch) const {
  const Tensor input = Real(node.inputs[0], batch);
  return engine::RunFloatNode(graph_, node, {&input}, options_.threads);
}

absl::Status Walk::SumQuantised(const Node& node, std::vector<double>& sum,
                                std::vector<double>& square) const {
  sum.assign(node.weight.shape()[0], 0);
  square.assign(node.weight.shape()[0], 0);
  for (int b = 0; b < batch_count(); ++b) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    TERN_ASSIGN_OR_RETURN(const Tensor y, RunQuantised(node, b));
    AddChannelSums(y, sum, square);
  }
  return absl::OkStatus();
}

absl::StatusOr<QuantizedWeights> Walk::ChooseWeights(const Node& node, const Scheme& scheme,
                                                     const ClusterLayout& layout,
                                                     const Moments* moments) {
  const bool fixed_point = recipe_.activations() == v1::DFP8;
  if (moments == nullptr && scheme.weights == WeightScheme::kInt8) {
    return NearestInt8(node.weight, fixed_point);
  }
  const int columns = layout.columns();
  const int outputs = static_cast<int>(node.weight.shape()[0]);
  const std::vector<float> rows = ToLayout(layout, node.weight.data<float>());
  CompensateOptions options;
  options.max_code = MaxCode(scheme.weights);
  if (scheme.weights == WeightScheme::kInt8) {
    options.max_code = MaxInt8CodeWithoutOverflow(columns);
    // In fixed point the scale is the step's multiplier, and no factor of the s32 sums.
    if (!fixed_point) options.grid.max_scale = 1;
  } else {
    options.grid.max_scale = MaxClusterScale(scheme.weights, columns, fixed_point);
    options.other_scales = true;
  }
  options.grid.power_of_two_step = fixed_point;
  CodedWeights coded;
  if (moments == nullptr) {
    coded = NearestWeights(layout, outputs, rows, options.max_code, options.grid);
  } else {
    options.threads = options_.threads;
    options.cancelled = options_.cancelled;
    TERN_ASSIGN_OR_RETURN(coded, Compensate(layout, rows, *moments, options));
  }
  return ToQuantizedWeights(layout, coded, scheme.weights, scheme.cluster_size,
                            node.weight.shape());
}

absl::Status Walk::MakeCandidates(int index, const LayerData& data, const ClusterLayout& layout,
                                  const Moments* moments) {
  const Node& node = graph_.nodes[index];
  const int channels = static_cast<int>(node.weight.shape()[1]);
  const int columns = layout.columns(), outputs = static_cast<int>(node.weight.shape()[0]);
  std::vector<int> position(columns);  // of OIHW column j in `layout`
  for (int j = 0; j < columns; ++j) position[layout.column[j]] = j;
  for (const Scheme& scheme : schemes_of_(index)) {
    const ClusterLayout other =
        MakeClusterLayout(channels, columns / channels, scheme.cluster_size);
    Candidate candidate;
    candidate.scheme = scheme;
    candidate.bias = node.bias;
    const auto bias = candidate.bias.data<float>();
    if (moments == nullptr) {
      TERN_ASSIGN_OR_RETURN(candidate.weights, ChooseWeights(node, scheme, other, nullptr));
      if (data.method != v1::DIRECT) {
        TERN_RETURN_IF_ERROR(MatchVariance(data, candidate.weights));
        TERN_ASSIGN_OR_RETURN(const std::vector<float> correction,
                              MeanCorrection(data, Plain(node, Dequantize(candidate.weights))));
        for (int o = 0; o < outputs; ++o) bias[o] += correction[o];
      }
    } else {
      std::vector<int> order(columns);
      for (int j = 0; j < columns; ++j) order[j] = position[other.column[j]];
      const Moments permuted = moments->Permuted(order);
      TERN_ASSIGN_OR_RETURN(candidate.weights, ChooseWeights(node, scheme, other, &permuted));
      // The bias that gives every output channel its wanted mean.
      const Tensor real = Dequantize(candidate.weights);
      const std::vector<float> rows = ToLayout(other, real.data<float>());
      const std::vector<double> input_mean = permuted.InputMean();
      const std::vector<double> output_mean = permuted.OutputMean();
      for (int o = 0; o < outputs; ++o) {
        double mean = 0;
        for (int j = 0; j < columns; ++j)
          mean += rows[static_cast<size_t>(o) * columns + j] * input_mean[j];
        bias[o] = static_cast<float>(output_mean[o] - mean);
      }
    }
    candidates_[index].push_back(std::move(candidate));
  }
  return absl::OkStatus();
}

absl::Status Walk::MatchVariance(const LayerData& data, QuantizedWeights& weights) {
  std::vector<double> sum, square;
  TERN_RETURN_IF_ERROR(SumQuantised(Plain(*data.node, Dequantize(weights)), sum, square));
  const double n = static_cast<double>(data.count);
  std::vector<double> factor(sum.size());
  for (size_t o = 0; o < factor.size(); ++o) {
    const double wanted =
        data.target_square[o] / n - data.target_sum[o] / n * data.target_sum[o] / n;
    const double got = square[o] / n - sum[o] / n * sum[o] / n;
    // The bounds keep a channel that is nearly constant on the calibration images from exploding.
    factor[o] = got > 1e-12 ? std::clamp(std::sqrt(std::max(wanted, 0.0) / got), 0.3, 3.0) : 1.0;
  }
  const size_t clusters = weights.cluster_scales.elements() / factor.size();
  std::vector<double> repeated;
  for (double f : factor) repeated.insert(repeated.end(), clusters, f);
  RescaleClusters(repeated, recipe_.activations() == v1::DFP8, weights);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Walk::MeanCorrection(const LayerData& data, const Node& plain) {
  std::vector<double> sum, square;
  TERN_RETURN_IF_ERROR(SumQuantised(plain, sum, square));
  std::vector<float> correction(sum.size());
  for (size_t o = 0; o < sum.size(); ++o) {
    correction[o] =
        static_cast<float>((data.target_sum[o] - sum[o]) / static_cast<double>(data.count));
  }
  return correction;
}

absl::Status Walk::RunWeighted(int index) {
  const Node& node = graph_.nodes[index];
  const int outputs = static_cast<int>(node.weight.shape()[0]);
  const int columns = static_cast<int>(node.weight.elements() / outputs);
  const Scheme scheme = SchemeFor(index);
  const bool clustered = scheme.weights != WeightScheme::kInt8;
  LayerData data;
  data.node = &node;
  data.method = recipe_.method();
  const int channels = static_cast<int>(node.weight.shape()[1]);
  const ClusterLayout layout = MakeClusterLayout(channels, columns / channels, scheme.cluster_size);

  // int8 layers too: seven-bit codes that lean on each other are as good as eight-bit nearest ones.
  bool compensate = data.method == v1::COMPENSATED && node.conv.groups == 1;
  if (compensate && columns > kMaxCompensatedColumns) {
    if (clustered) {
      Warn(absl::StrCat(node.name, " has ", columns, " weights per output, more than ",
                        kMaxCompensatedColumns, ": corrected instead of compensated"));
      data.method = v1::CORRECTED;
    }
    compensate = false;
  }

  Activation& out = live_[node.output];
  std::optional<Moments> moments;
  if (compensate) moments.emplace(columns, outputs);
  TERN_RETURN_IF_ERROR(RunReference(data, layout, moments ? &*moments : nullptr, out));
  ReportProgress(&node);
  TERN_ASSIGN_OR_RETURN(QuantizedWeights weights,
                        ChooseWeights(node, scheme, layout, moments ? &*moments : nullptr));
  if (schemes_of_) {
    TERN_RETURN_IF_ERROR(MakeCandidates(index, data, layout, moments ? &*moments : nullptr));
  }
  moments.reset();
  if (clustered && data.method == v1::CORRECTED) TERN_RETURN_IF_ERROR(MatchVariance(data, weights));
  ReportProgress(&node);

  const Node plain = Plain(node, Dequantize(weights));
  std::vector<float> correction(outputs, 0.0f);
  Node& quantised = result_.graph.nodes[index];
  if (data.method != v1::DIRECT) {
    TERN_ASSIGN_OR_RETURN(correction, MeanCorrection(data, plain));
    auto bias = quantised.bias.data<float>();
    for (int o = 0; o < outputs; ++o) bias[o] += correction[o];
  }
  quantised.quantized = std::move(weights);
  quantised.weight = Tensor();
  report_of_[node.output] = result_.report.layers_size();
  FillLayerReport(index, data);
  TERN_RETURN_IF_ERROR(FillQuantised(node.output, [&](int b) -> absl::StatusOr<Tensor> {
    TERN_ASSIGN_OR_RETURN(Tensor y, RunQuantised(plain, b));
    AddPerChannel(correction, y);
    if (node.has_residual()) Accumulate(Real(node.inputs[1], b), 1.0f, y);
    ApplyClip(node.clip, y);
    return y;
  }));

  // Against the float network, after the output's own rounding.
  std::vector<double> signals(batch_count()), noises(batch_count());
#pragma omp parallel for num_threads(options_.threads) schedule(dynamic)
  for (int b = 0; b < batch_count(); ++b) {
    // Element by element: tensors of reals, one for each thread, would be as large as all codes.
    const Tensor& got = out.quantised[b];
    const PackedTensor& reference = out.reference[b];
    const auto& params = result_.graph.values[node.output].quant;
    const uint8_t* codes = got.dtype() == DType::kU8 ? got.data<uint8_t>().data() : nullptr;
    const float* reals = codes == nullptr ? got.data<float>().data() : nullptr;
    double signal = 0, noise = 0;
    for (size_t i = 0; i < reference.codes.size(); ++i) {
      const float value = codes != nullptr ? params->Dequantize(codes[i]) : reals[i];
      const float wanted = reference.scale * static_cast<float>(reference.codes[i]);
      const double error = static_cast<double>(value) - wanted;
      signal += static_cast<double>(wanted) * wanted;
      noise += error * error;
    }
    signals[b] = signal;
    noises[b] = noise;
  }
  const double signal = std::accumulate(signals.begin(), signals.end(), 0.0);
  const double noise = std::accumulate(noises.begin(), noises.end(), 0.0);
  result_.report.mutable_layers(report_of_[node.output])
      ->set_output_sqnr_db(Decibels(signal, noise));
  return absl::OkStatus();
}

Tensor Walk::Real(ValueId id, int batch) const {
  const Tensor& tensor = live_[id].quantised[batch];
  if (tensor.dtype() == DType::kF32) return tensor;
  return ToReal(tensor, *result_.graph.values[id].quant);
}

absl::Status Walk::FillQuantised(ValueId id, const BatchSource& source) {
  std::vector<Tensor>& batches = live_[id].quantised;
  switch (placement_.values[id]) {
    case Codes::kFloat:
    case Codes::kConcat:
      for (int b = 0; b < batch_count(); ++b) {
        TERN_RETURN_IF_ERROR(CheckCancelled());
        TERN_ASSIGN_OR_RETURN(batches.emplace_back(), source(b));
      }
      return absl::OkStatus();
    case Codes::kPassThrough:
      return Encode(id, *result_.graph.values[graph_.nodes[graph_.ProducerOf(id)].inputs[0]].quant,
                    source);
    case Codes::kOwn:
      break;
  }
  Observer observer(graph_.shape(id).elements() * static_cast<int64_t>(images_.size()));
  for (int b = 0; b < batch_count(); ++b) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    TERN_ASSIGN_OR_RETURN(const Tensor batch, source(b));
    observer.Feed(batch.data<float>());
  }
  return Encode(id, observer.Choose(recipe_.activations()), source);
}

absl::Status Walk::Encode(ValueId id, const QuantParams& params, const BatchSource& source) {
  int64_t clipped = 0;
  for (int b = 0; b < batch_count(); ++b) {
    TERN_RETURN_IF_ERROR(CheckCancelled());
    TERN_ASSIGN_OR_RETURN(const Tensor batch, source(b));
    clipped += CountClipped(batch, params);
    live_[id].quantised.push_back(ToCodes(batch, params));
  }
  SetParams(id, params, clipped);
  return absl::OkStatus();
}

void Walk::SetParams(ValueId id, const QuantParams& params, int64_t clipped) {
  result_.graph.values[id].quant = params;
  if (report_of_[id] >= 0) {
    v1::LayerReport& report = *result_.report.mutable_layers(report_of_[id]);
    report.set_output_scale(params.scale);
    report.set_output_zero_point(params.zero_point);
    const double all =
        static_cast<double>(graph_.shape(id).elements()) * static_cast<double>(images_.size());
    report.set_output_clipped(static_cast<double>(clipped) / all);
  }
  const int producer = graph_.ProducerOf(id);
  if (producer < 0 || graph_.nodes[producer].op != OpType::kConcat) return;
  for (ValueId part : graph_.nodes[producer].inputs) {
    if (placement_.values[part] != Codes::kConcat || result_.graph.values[part].quant) continue;
    int64_t clipped_in_part = 0;  // of a part that is still held
    for (const Tensor& batch : live_[part].quantised)
      clipped_in_part += CountClipped(batch, params);
    SetParams(part, params, clipped_in_part);
  }
}

absl::Status Walk::CheckFinite(const Node& node, const Activation& activation) const {
  for (const PackedTensor& batch : activation.reference) {
    if (!batch.finite) {
      return absl::FailedPreconditionError(
          absl::StrCat("the float network produces non-finite values on the calibration images in ",
                       node.name, " (", graph::Name(node.op), ")"));
    }
  }
  return absl::OkStatus();
}

void Walk::Release(int index) {
  for (ValueId id : graph_.nodes[index].inputs) {
    if (last_reader_[id] == index) live_[id] = Activation();
  }
  // A result that nobody reads; the graph is normally free of them.
  if (last_reader_[graph_.nodes[index].output] < 0)
    live_[graph_.nodes[index].output] = Activation();
}

void Walk::FillLayerReport(int index, const LayerData& data) {
  const Node& node = result_.graph.nodes[index];
  const QuantizedWeights& weights = *node.quantized;
  v1::LayerReport& layer = *result_.report.add_layers();
  layer.set_name(node.name);
  layer.set_op(graph::Name(node.op));
  layer.set_scheme(Name(weights.scheme));
  layer.set_cluster_size(static_cast<uint32_t>(weights.cluster_size));
  layer.set_weights(static_cast<uint64_t>(weights.codes.elements()));
  layer.set_bits_per_weight(static_cast<double>(StoredBits(weights)) /
                            static_cast<double>(weights.codes.elements()));
  layer.set_macs(static_cast<uint64_t>(MultiplyAccumulates(graph_, graph_.nodes[index])));
  layer.set_multiplications_removed(MultiplicationsRemoved(weights));
  layer.set_weight_bits(weights.scheme == WeightScheme::kInt8 ? 7 : CodeBits(weights.scheme));
}

void Walk::FillReport() {
  v1::QuantizationReport& report = result_.report;
  *report.mutable_recipe() = recipe_;
  report.set_calibration_images(
      std::min<int64_t>(calibration_.shape()[0], static_cast<int64_t>(images_.size())));
  double weights = 0, bits = 0, macs = 0, removed = 0;
  // 3-bit codes with N = 64 take 3 + 6/64 in 1x1 layers, ternary ones with N = 4 take 1.6 + 7/4.
  constexpr double kThreeBits = 3.1;
  int ternary_pointwise = 0;
  for (const v1::LayerReport& layer : report.layers()) {
    weights += static_cast<double>(layer.weights());
    bits += layer.bits_per_weight() * static_cast<double>(layer.weights());
    macs += static_cast<double>(layer.macs());
    removed += layer.multiplications_removed() * static_cast<double>(layer.macs());
    if (layer.scheme() == Name(WeightScheme::kTernaryCluster) &&
        layer.bits_per_weight() > kThreeBits)
      ++ternary_pointwise;
  }
  report.set_bits_per_weight(weights > 0 ? bits / weights : 0);
  report.set_float_bytes(static_cast<uint64_t>(4 * weights));
  report.set_multiplications_removed(macs > 0 ? removed / macs : 0);
  for (size_t i = 0; i < graph_.nodes.size(); ++i) {
    if (!placement_.integer_node[i]) report.add_float_nodes(graph_.nodes[i].name);
  }

  const Activation& output = live_[graph_.output];
  double signal = 0, noise = 0;
  uint64_t same = 0, plain = 0;
  const int64_t classes = graph_.classes();
  for (int b = 0; b < batch_count(); ++b) {
    const Tensor real = Real(graph_.output, b);
    const float* got = real.data<float>().data();
    const Tensor reference = Unpack(output.reference[b]);
    const float* wanted = reference.data<float>().data();
    for (int i = 0; i < batch_images(b); ++i, got += classes, wanted += classes) {
      for (int64_t k = 0; k < classes; ++k) {
        signal += static_cast<double>(wanted[k]) * wanted[k];
        noise +=
            (static_cast<double>(got[k]) - wanted[k]) * (static_cast<double>(got[k]) - wanted[k]);
      }
      if (images_[batches_[b] + i].mirrored) continue;
      ++plain;
      same += std::max_element(got, got + classes) - got ==
              std::max_element(wanted, wanted + classes) - wanted;
    }
  }
  report.set_sqnr_db(Decibels(signal, noise));
  *report.mutable_calibration_agreement() = statistics::MakeProportion(same, plain);
  report.set_seconds(absl::ToDoubleSeconds(absl::Now() - started_));

  if (report.calibration_agreement().value() < 0.8) {
    Warn(absl::StrFormat(
        "the quantised network agrees with the float one on only %.1f %% of the calibration images",
        100 * report.calibration_agreement().value()));
  }
  if (ternary_pointwise > 0) {
    Warn(absl::StrCat(
        ternary_pointwise,
        " ternary layers take more than 3.1 bits per weight with N = ", recipe_.cluster_size(),
        "; 3-bit codes with N = 64, as mixed precision takes them, would be smaller "
        "and more accurate there"));
  }
}

}  // namespace tern::quant
