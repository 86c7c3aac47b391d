#include "server/quant/mixed.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"
#include "server/engine/plan.h"
#include "server/quant/distill.h"
#include "server/quant/student.h"
#include "server/quant/weights.h"

namespace tern::quant {
namespace {

using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::ValueId;

// What every layer may become besides int8. Ternary N = 4 costs 3.4 bits in 1x1 layers but 1.8 in
// 3x3 ones; N = 64 is the smallest and fastest.
constexpr std::pair<v1::WeightType, uint32_t> kOffers[] = {
    {v1::INT4_CLUSTER, 4},    {v1::INT4_CLUSTER, 16},    {v1::INT4_CLUSTER, 64},
    {v1::INT3_CLUSTER, 4},    {v1::INT3_CLUSTER, 16},    {v1::INT3_CLUSTER, 64},
    {v1::TERNARY_CLUSTER, 4}, {v1::TERNARY_CLUSTER, 16}, {v1::TERNARY_CLUSTER, 64},
};
// Values of the images that are measured at a time may take this much memory.
constexpr int64_t kMemoryLimit = int64_t{512} << 20;
// Multiply-accumulates of all measurements together, about three minutes of two cores; fewer images
// are measured beyond, but not less than kLeastMeasured.
constexpr double kMeasureWork = 2e13;
constexpr int64_t kLeastMeasured = 32, kMostMeasured = 128;
constexpr int kBins = 4000;  // of a cost in the knapsack
constexpr int kFrontierPoints = 16;
constexpr int kMostTrials = 5;  // networks made in search of a top-1 drop
static_assert(1 << kMostTrials > kFrontierPoints, "the bisection comes to its end");

bool IsSet(const std::atomic<bool>* flag) {
  return flag != nullptr && flag->load(std::memory_order_relaxed);
}
absl::Status Cancelled() { return absl::CancelledError("quantisation cancelled"); }

bool IsWeighted(const Node& node) {
  return node.op == OpType::kConv || node.op == OpType::kFullyConnected;
}

std::vector<int> WeightedNodes(const Graph& graph) {
  std::vector<int> nodes;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (IsWeighted(graph.nodes[i])) nodes.push_back(static_cast<int>(i));
  }
  return nodes;
}

// The schemes that a node may have besides int8.
std::vector<Scheme> Offers(const Graph& graph, const std::vector<int>& weighted, int index) {
  std::vector<Scheme> schemes;
  const Node& node = graph.nodes[index];
  if (node.conv.groups != 1 || index == weighted.front()) return schemes;
  for (const auto& [type, n] : kOffers) {
    if (index == weighted.back() && type == v1::TERNARY_CLUSTER) continue;
    const Scheme scheme = MakeScheme(type, n, node.weight.shape()[1]);
    if (std::find(schemes.begin(), schemes.end(), scheme) == schemes.end())
      schemes.push_back(scheme);
  }
  return schemes;
}

v1::WeightType TypeOf(WeightScheme scheme) {
  switch (scheme) {
    case WeightScheme::kTernaryCluster:
      return v1::TERNARY_CLUSTER;
    case WeightScheme::kInt4Cluster:
      return v1::INT4_CLUSTER;
    case WeightScheme::kInt3Cluster:
      return v1::INT3_CLUSTER;
    default:
      return v1::INT8;
  }
}

// Milliseconds per node of a network, one thread, batch 1: the least of several runs.
absl::StatusOr<std::vector<double>> TimeNodes(const Graph& graph, engine::PlanOptions options,
                                              const std::atomic<bool>* cancelled) {
  options.max_batch = 1;
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const engine::Plan> plan,
                        engine::Plan::Create(graph, options));
  TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(1));
  std::fill(session.input().begin(), session.input().end(), 0.5f);
  std::vector<double> best(plan->layers().size(), std::numeric_limits<double>::infinity());
  constexpr int kRuns = 9;
  for (int run = 0; run < kRuns; ++run) {
    if (IsSet(cancelled)) return Cancelled();
    engine::RunTimes times;
    TERN_RETURN_IF_ERROR(session.RunProfiled(1, times).status());
    for (size_t i = 0; i < best.size(); ++i)
      best[i] = std::min(best[i], absl::ToDoubleMilliseconds(times.layers[i]));
  }
  return best;
}

// One network per offer, nearest codes (time does not depend on them), timed layer by layer.
absl::Status AddTimes(const Graph& graph, const Tensor& calibration, const QuantizeOptions& options,
                      std::vector<LayerOptions>& layers) {
  const std::vector<int64_t> few = {0};
  const Tensor image = TakeImages(calibration, few);
  std::vector<std::pair<v1::WeightType, uint32_t>> all = {{v1::INT8, 0}};
  all.insert(all.end(), std::begin(kOffers), std::end(kOffers));
  for (const auto& [type, n] : all) {
    QuantizeOptions direct;
    direct.recipe = options.recipe;
    direct.recipe.clear_layers();
    direct.recipe.set_weights(type);
    direct.recipe.set_cluster_size(n);
    direct.recipe.set_method(v1::DIRECT);
    direct.recipe.set_quantize_first_and_last_to_weights(true);
    direct.threads = options.threads;
    direct.cancelled = options.cancelled;
    TERN_ASSIGN_OR_RETURN(const QuantizeResult made, Walk(graph, image, direct).Run());
    TERN_ASSIGN_OR_RETURN(const std::vector<double> ms,
                          TimeNodes(made.graph, options.plan, options.cancelled));
    for (LayerOptions& layer : layers) {
      const Scheme scheme = MakeScheme(
          type, n,
          graph.nodes[layer.node].conv.groups == 1 ? graph.nodes[layer.node].weight.shape()[1] : 0);
      for (Option& option : layer.options) {
        if (option.scheme == scheme) option.ms = ms[layer.node];
      }
    }
  }
  return absl::OkStatus();
}

// Adds, for every candidate of every layer, the divergence of the outputs with only it in place.
absl::Status AddDivergences(const Graph& base, const Graph& reference, const Tensor& images,
                            absl::Span<const int64_t> which,
                            const std::vector<std::vector<Candidate>>& candidates,
                            const QuantizeOptions& options, std::vector<LayerOptions>& layers) {
  TERN_ASSIGN_OR_RETURN(const Tensor wanted, RunEngine(reference, images, which, options.plan,
                                                       options.threads, options.cancelled));
  Student network(base, 1, options.threads);
  network.StopAt(options.cancelled);
  const NodeRange whole = network.whole();
  const int64_t batch =
      std::clamp<int64_t>(kMemoryLimit / std::max<int64_t>(1, network.BytesPerImage(whole)), 1, 32);
  const int64_t total = static_cast<int64_t>(which.size()), classes = reference.classes();
  double base_divergence = 0;
  double done = 0, all = 0;
  for (const LayerOptions& layer : layers) {
    const double rest = static_cast<double>(base.nodes.size()) - layer.node;
    all += rest * static_cast<double>(candidates[layer.node].size());
  }
  all *= static_cast<double>((total + batch - 1) / batch);
  const absl::Time start = absl::Now();
  for (int64_t first = 0; first < total; first += batch) {
    const int64_t count = std::min(batch, total - first);
    const Tensor input = TakeImages(images, which.subspan(first, count));
    Tensor target(DType::kF32, Shape{count, classes});
    std::copy_n(wanted.data<float>().begin() + first * classes, count * classes,
                target.data<float>().begin());
    TERN_ASSIGN_OR_RETURN(const std::vector<Tensor> values, network.Forward(whole, input, true));
    const double share = static_cast<double>(count) / static_cast<double>(total);
    base_divergence += share * Compare(target, values[whole.output]).divergence;
    for (LayerOptions& layer : layers) {
      for (const Candidate& candidate : candidates[layer.node]) {
        if (IsSet(options.cancelled)) return Cancelled();
        TERN_ASSIGN_OR_RETURN(
            const Tensor got,
            network.Replay(values, layer.node, Dequantize(candidate.weights), candidate.bias));
        for (Option& option : layer.options) {
          if (option.scheme == candidate.scheme)
            option.divergence += share * Compare(target, got).divergence;
        }
        done += static_cast<double>(base.nodes.size()) - layer.node;
        if (options.progress) {
          Progress progress;
          progress.phase = "sensitivity";
          progress.done = done / all;
          progress.layer = base.nodes[layer.node].name;
          progress.seconds_left = absl::ToDoubleSeconds(absl::Now() - start) * (all - done) / done;
          options.progress(progress);
        }
      }
    }
  }
  // What the int8 network loses anyway is no layer's own.
  for (LayerOptions& layer : layers) {
    for (size_t k = 1; k < layer.options.size(); ++k)
      layer.options[k].divergence = std::max(layer.options[k].divergence - base_divergence, 1e-6);
  }
  return absl::OkStatus();
}

// Expected loss of top-1 if the float network's probabilities are right.
double ExpectedDrop(const Tensor& wanted, const Tensor& got) {
  const int64_t n = wanted.shape()[0], classes = n > 0 ? wanted.elements() / n : 0;
  double drop = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* p = wanted.data<float>().data() + i * classes;
    const float* q = got.data<float>().data() + i * classes;
    const float largest = *std::max_element(p, p + classes);
    double sum = 0;
    for (int64_t k = 0; k < classes; ++k) sum += std::exp(static_cast<double>(p[k] - largest));
    const int64_t answer = std::max_element(q, q + classes) - q;
    drop += (1 - std::exp(static_cast<double>(p[answer] - largest))) / sum;
  }
  return n > 0 ? drop / static_cast<double>(n) : 0;
}

double CostOf(const Option& option, Cost cost) {
  return cost == Cost::kBits ? option.bits : option.ms;
}
double CostOf(const Totals& totals, Cost cost) {
  return cost == Cost::kBits ? totals.bits : totals.ms;
}

}  // namespace

Totals Sum(absl::Span<const LayerOptions> layers, const Assignment& assignment) {
  Totals totals;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Option& option = layers[i].options[assignment[i]];
    totals.divergence += option.divergence;
    totals.bits += option.bits;
    totals.ms += option.ms;
  }
  return totals;
}

std::vector<Assignment> BestAssignments(absl::Span<const LayerOptions> layers, Cost cost,
                                        absl::Span<const double> budgets) {
  double dearest = 0;
  for (const LayerOptions& layer : layers) {
    double most = 0;
    for (const Option& option : layer.options) most = std::max(most, CostOf(option, cost));
    dearest += most;
  }
  const double bin = std::max(dearest, 1e-12) / kBins;
  // The other cost decides between choices of almost the same divergence.
  double other = 0, divergence = 0;
  for (const LayerOptions& layer : layers) {
    for (const Option& option : layer.options) {
      other = std::max(other, cost == Cost::kBits ? option.ms : option.bits);
      divergence = std::max(divergence, option.divergence);
    }
  }
  const double weight = other > 0 ? 1e-3 * divergence / other : 0;

  // least[b]: the best objective with a cost of at most b bins, layers so far.
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  // Rounding each cost up could exceed every budget by a bin per layer; to the nearest errs both
  // ways.
  const auto bins = [&](const Option& option) {
    return static_cast<int>(std::lround(CostOf(option, cost) / bin));
  };
  const int width = kBins + static_cast<int>(layers.size()) + 1;
  std::vector<double> least(width, 0.0);
  std::vector<std::vector<int8_t>> choice(layers.size(), std::vector<int8_t>(width, -1));
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<double> next(width, kInfinity);
    for (size_t k = 0; k < layers[i].options.size(); ++k) {
      const Option& option = layers[i].options[k];
      const int step = bins(option);
      const double objective =
          option.divergence + weight * (cost == Cost::kBits ? option.ms : option.bits);
      for (int b = step; b < width; ++b) {
        if (least[b - step] + objective < next[b]) {
          next[b] = least[b - step] + objective;
          choice[i][b] = static_cast<int8_t>(k);
        }
      }
    }
    least = std::move(next);
  }

  std::vector<Assignment> result;
  for (double budget : budgets) {
    int b = static_cast<int>(std::clamp(std::floor(budget / bin), 0.0, double(width - 1)));
    Assignment assignment(layers.size());
    // Rounding may have let a few bins too much in: step down until the exact sum fits.
    for (;; --b) {
      if (b < 0 || least[b] == kInfinity) {
        for (size_t i = 0; i < layers.size(); ++i) {
          const auto& options = layers[i].options;
          assignment[i] =
              static_cast<int>(std::min_element(options.begin(), options.end(),
                                                [&](const Option& x, const Option& y) {
                                                  return CostOf(x, cost) < CostOf(y, cost);
                                                }) -
                               options.begin());
        }
        break;
      }
      int at = b;
      for (size_t i = layers.size(); i-- > 0;) {
        assignment[i] = choice[i][at];
        at -= bins(layers[i].options[assignment[i]]);
      }
      if (CostOf(Sum(layers, assignment), cost) <= budget) break;
    }
    result.push_back(std::move(assignment));
  }
  return result;
}

absl::StatusOr<std::vector<LayerOptions>> MeasureLayers(const Graph& graph,
                                                        const Tensor& calibration,
                                                        absl::Span<const int64_t> build,
                                                        absl::Span<const int64_t> measure,
                                                        const QuantizeOptions& options) {
  const std::vector<int> weighted = WeightedNodes(graph);
  QuantizeOptions base_options;
  base_options.recipe = options.recipe;
  base_options.recipe.set_weights(v1::INT8);
  base_options.recipe.clear_layers();
  base_options.threads = options.threads;
  base_options.progress = options.progress;
  base_options.cancelled = options.cancelled;
  const Tensor images = TakeImages(calibration, build);
  Walk walk(graph, images, base_options);
  walk.AskForCandidates([&](int node) { return Offers(graph, weighted, node); });
  TERN_ASSIGN_OR_RETURN(const QuantizeResult base, walk.Run());

  std::vector<LayerOptions> layers;
  double work = 0, before = 0;
  for (const Node& node : graph.nodes)
    before += static_cast<double>(graph::MultiplyAccumulates(graph, node));
  for (int index : weighted) {
    const Node& node = base.graph.nodes[index];
    LayerOptions layer;
    layer.node = index;
    layer.weights = node.quantized->codes.elements();
    layer.options.push_back({Scheme{}, 0, static_cast<double>(StoredBits(*node.quantized)), 0});
    for (const Candidate& candidate : walk.candidates()[index]) {
      layer.options.push_back(
          {candidate.scheme, 0, static_cast<double>(StoredBits(candidate.weights)), 0});
    }
    work += before * static_cast<double>(layer.options.size() - 1);
    before -= static_cast<double>(graph::MultiplyAccumulates(graph, graph.nodes[index]));
    layers.push_back(std::move(layer));
  }
  const int64_t affordable =
      std::max(kLeastMeasured,
               std::min(kMostMeasured, static_cast<int64_t>(kMeasureWork / std::max(work, 1.0))));
  const auto few = measure.subspan(0, std::min<size_t>(measure.size(), affordable));
  TERN_RETURN_IF_ERROR(
      AddDivergences(base.graph, graph, calibration, few, walk.candidates(), options, layers));
  TERN_RETURN_IF_ERROR(AddTimes(graph, calibration, options, layers));
  return layers;
}

std::string Describe(absl::Span<const LayerOptions> layers, const Assignment& assignment) {
  std::map<std::string, int> counts;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Scheme& scheme = layers[i].options[assignment[i]].scheme;
    std::string name = scheme.weights == WeightScheme::kInt8          ? "int8"
                       : scheme.weights == WeightScheme::kInt4Cluster ? "int4"
                       : scheme.weights == WeightScheme::kInt3Cluster ? "int3"
                                                                      : "ternary";
    if (scheme.weights != WeightScheme::kInt8) absl::StrAppend(&name, " N=", scheme.cluster_size);
    ++counts[name];
  }
  return absl::StrJoin(counts, ", ", [](std::string* out, const auto& entry) {
    absl::StrAppend(out, entry.second, " ", entry.first);
  });
}

void SetLayers(const Graph& graph, absl::Span<const LayerOptions> layers,
               const Assignment& assignment, v1::Recipe& recipe) {
  recipe.clear_layers();
  for (size_t i = 0; i < layers.size(); ++i) {
    const Scheme& scheme = layers[i].options[assignment[i]].scheme;
    v1::LayerChoice& choice = *recipe.add_layers();
    choice.set_layer(graph.nodes[layers[i].node].name);
    choice.set_weights(TypeOf(scheme.weights));
    choice.set_cluster_size(static_cast<uint32_t>(scheme.cluster_size));
  }
}

absl::StatusOr<QuantizeResult> QuantizeMixed(const Graph& graph, const Tensor& calibration,
                                             absl::Span<const int64_t> train,
                                             absl::Span<const int64_t> held_out,
                                             const QuantizeOptions& options) {
  const v1::Recipe& recipe = options.recipe;
  const Cost cost = recipe.has_target_bits() ? Cost::kBits : Cost::kMilliseconds;
  // Measured on images that the weights have not seen: two fifths of the training ones, and the
  // held-out ones.
  std::vector<int64_t> build, measure(held_out.begin(), held_out.end());
  for (size_t i = 0; i < train.size(); ++i) (i % 5 < 3 ? build : measure).push_back(train[i]);
  TERN_ASSIGN_OR_RETURN(std::vector<LayerOptions> layers,
                        MeasureLayers(graph, calibration, build, measure, options));
  // Layers that the caller decided.
  for (LayerOptions& layer : layers) {
    const Node& node = graph.nodes[layer.node];
    for (const v1::LayerChoice& choice : recipe.layers()) {
      if (choice.layer() != node.name || node.conv.groups != 1) continue;
      const Scheme wanted =
          MakeScheme(choice.weights(), choice.cluster_size(), node.weight.shape()[1]);
      const auto found = std::find_if(layer.options.begin(), layer.options.end(),
                                      [&](const Option& o) { return o.scheme == wanted; });
      if (found == layer.options.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat("recipe.layers: the search for mixed precision does not measure what ",
                         node.name, " is asked to become"));
      }
      layer.options = {*found};
    }
  }

  int64_t weights = 0;
  for (const LayerOptions& layer : layers) weights += layer.weights;
  const double n = static_cast<double>(weights);
  v1::QuantizationReport extra;
  for (const LayerOptions& layer : layers) {
    for (const Option& option : layer.options) {
      v1::LayerSensitivity& entry = *extra.add_sensitivity();
      entry.set_layer(graph.nodes[layer.node].name);
      entry.set_weights(TypeOf(option.scheme.weights));
      entry.set_cluster_size(static_cast<uint32_t>(option.scheme.cluster_size));
      entry.set_divergence(option.divergence);
      entry.set_bits_per_weight(option.bits / static_cast<double>(layer.weights));
      entry.set_ms(option.ms);
    }
  }

  // The frontier, from the least to the most of the cost that the budget is about.
  double least = 0, most = 0;
  for (const LayerOptions& layer : layers) {
    double low = std::numeric_limits<double>::infinity(), high = 0;
    for (const Option& option : layer.options) {
      low = std::min(low, CostOf(option, cost));
      high = std::max(high, CostOf(option, cost));
    }
    least += low;
    most += high;
  }
  std::vector<double> budgets;
  for (int i = 0; i < kFrontierPoints; ++i)
    budgets.push_back(least + (most - least) * i / (kFrontierPoints - 1) * (1 + 1e-9));
  std::vector<Assignment> frontier = BestAssignments(layers, cost, budgets);
  // Duplicates, and points that cost more for no less damage, say nothing.
  std::vector<Assignment> points;
  double reached = std::numeric_limits<double>::infinity();
  for (Assignment& assignment : frontier) {
    const double divergence = Sum(layers, assignment).divergence;
    if (divergence >= reached) continue;
    reached = divergence;
    points.push_back(std::move(assignment));
  }

  // Makes the network of an assignment.
  const auto quantise = [&](const Assignment& assignment) -> absl::StatusOr<QuantizeResult> {
    QuantizeOptions one = options;
    one.recipe.set_weights(v1::INT8);
    SetLayers(graph, layers, assignment, one.recipe);
    return QuantizeAndDistill(graph, calibration, train, held_out, one);
  };
  std::vector<v1::FrontierPoint> reports;
  for (const Assignment& assignment : points) {
    const Totals totals = Sum(layers, assignment);
    v1::FrontierPoint point;
    point.set_bits_per_weight(totals.bits / n);
    point.set_predicted_ms(totals.ms);
    point.set_predicted_divergence(totals.divergence);
    point.set_description(Describe(layers, assignment));
    reports.push_back(std::move(point));
  }
  Tensor wanted;
  if (!held_out.empty()) {
    TERN_ASSIGN_OR_RETURN(wanted, RunEngine(graph, calibration, held_out, options.plan,
                                            options.threads, options.cancelled));
  }
  const auto measure_point = [&](const Graph& made, v1::FrontierPoint& point) -> absl::Status {
    if (held_out.empty()) return absl::OkStatus();
    TERN_ASSIGN_OR_RETURN(const Tensor got, RunEngine(made, calibration, held_out, options.plan,
                                                      options.threads, options.cancelled));
    const Closeness closeness = Compare(wanted, got);
    point.set_measured(true);
    point.set_divergence(closeness.divergence);
    point.set_agreement(closeness.agreement);
    point.set_drop(ExpectedDrop(wanted, got));
    return absl::OkStatus();
  };

  QuantizeResult result;
  std::vector<std::string> warnings;
  if (recipe.has_target_bits() || recipe.has_target_ms()) {
    const double budget = recipe.has_target_bits() ? recipe.target_bits() * n : recipe.target_ms();
    const Assignment assignment =
        BestAssignments(layers, cost, absl::MakeConstSpan(&budget, 1)).front();
    const Totals totals = Sum(layers, assignment);
    if (CostOf(totals, cost) > budget) {
      return absl::FailedPreconditionError(
          cost == Cost::kBits
              ? absl::StrFormat("the smallest assignment takes %.3f bits per weight, "
                                "recipe.target_bits is %.3f",
                                totals.bits / n, recipe.target_bits())
              : absl::StrFormat("the layers of the fastest assignment take %.3g ms, "
                                "recipe.target_ms is %.3g",
                                totals.ms, recipe.target_ms()));
    }
    TERN_ASSIGN_OR_RETURN(result, quantise(assignment));
    v1::FrontierPoint point;
    point.set_bits_per_weight(totals.bits / n);
    point.set_predicted_ms(totals.ms);
    point.set_predicted_divergence(totals.divergence);
    point.set_description(Describe(layers, assignment));
    point.set_chosen(true);
    TERN_RETURN_IF_ERROR(measure_point(result.graph, point));
    reports.push_back(std::move(point));
  } else {
    // The fastest point whose loss is within the budget: a bisection, because loss falls with cost.
    int low = 0, high = static_cast<int>(points.size()) - 1, chosen = -1;
    QuantizeResult made;
    for (int trial = 0; low <= high; ++trial) {
      const int middle = (low + high) / 2;
      if (options.progress) {
        Progress progress;
        progress.phase = "searching";
        progress.done = static_cast<double>(trial) / kMostTrials;
        progress.layer = Describe(layers, points[middle]);
        options.progress(progress);
      }
      TERN_ASSIGN_OR_RETURN(made, quantise(points[middle]));
      TERN_RETURN_IF_ERROR(measure_point(made.graph, reports[middle]));
      if (reports[middle].drop() <= recipe.max_top1_drop()) {
        chosen = middle;
        result = std::move(made);
        high = middle - 1;
      } else {
        low = middle + 1;
      }
    }
    if (chosen < 0) {
      // It was the last to be tried.
      chosen = static_cast<int>(points.size()) - 1;
      result = std::move(made);
      warnings.push_back(absl::StrFormat(
          "no assignment keeps the expected loss of top-1 within %.4f on the %d images set aside; "
          "the most accurate one was taken",
          recipe.max_top1_drop(), static_cast<int>(held_out.size())));
    }
    reports[chosen].set_chosen(true);
  }
  std::stable_sort(reports.begin(), reports.end(), [&](const auto& a, const auto& b) {
    return cost == Cost::kBits ? a.bits_per_weight() < b.bits_per_weight()
                               : a.predicted_ms() < b.predicted_ms();
  });
  *result.report.mutable_sensitivity() = extra.sensitivity();
  for (v1::FrontierPoint& point : reports) *result.report.add_frontier() = std::move(point);
  for (std::string& warning : warnings) result.report.add_warnings(std::move(warning));
  // What was chosen, under the name of what was asked.
  result.report.mutable_recipe()->set_weights(v1::MIXED);
  return result;
}

}  // namespace tern::quant
