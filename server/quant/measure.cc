#include "server/quant/measure.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "server/base/status_macros.h"
#include "server/engine/ops.h"
#include "server/quant/distill.h"
#include "server/quant/rounding.h"
#include "server/quant/walk.h"
#include "statistics/statistics.h"

namespace tern::quant {
namespace {

using graph::Graph;
using graph::Node;
using graph::ValueId;

struct Sums {
  double signal = 0, noise = 0;
  int64_t clipped = 0, count = 0;

  void Add(const Tensor& wanted_values, const Tensor& got_values) {
    const auto wanted = wanted_values.data<float>(), got = got_values.data<float>();
    for (size_t i = 0; i < got.size(); ++i) {
      const double error = static_cast<double>(got[i]) - wanted[i];
      signal += static_cast<double>(wanted[i]) * wanted[i];
      noise += error * error;
    }
    count += got_values.elements();
  }
};

}  // namespace

Tensor ToCodes(const Tensor& real, const QuantParams& params) {
  Tensor codes(DType::kU8, real.shape());
  const auto source = real.data<float>();
  auto target = codes.data<uint8_t>();
  // The range is clamped before the zero point is added, so that the rounding trick sees small
  // numbers.
  const float lo = static_cast<float>(-params.zero_point),
              hi = static_cast<float>(255 - params.zero_point);
  const float zero = static_cast<float>(params.zero_point);
  for (size_t i = 0; i < source.size(); ++i) {
    target[i] =
        static_cast<uint8_t>(static_cast<int>(RoundInto(source[i] / params.scale, lo, hi) + zero));
  }
  return codes;
}

Tensor ToReal(const Tensor& codes, const QuantParams& params) {
  Tensor real(DType::kF32, codes.shape());
  const auto source = codes.data<uint8_t>();
  auto target = real.data<float>();
  const float zero = static_cast<float>(params.zero_point);
  for (size_t i = 0; i < source.size(); ++i)
    target[i] = params.scale * (static_cast<float>(source[i]) - zero);
  return real;
}

int64_t CountClipped(const Tensor& real, const QuantParams& params) {
  const float lo = (-0.5f - static_cast<float>(params.zero_point)) * params.scale;
  const float hi = (255.5f - static_cast<float>(params.zero_point)) * params.scale;
  int64_t clipped = 0;
  for (float v : real.data<float>()) clipped += v < lo || v > hi;
  return clipped;
}

double Decibels(double signal, double noise) {
  if (noise <= 0) return 200.0;  // exact; more is beyond f32
  return std::clamp(10.0 * std::log10(std::max(signal, 1e-30) / noise), -200.0, 200.0);
}

absl::Status MeasureOutputs(const Graph& reference, const Graph& quantised, const Tensor& images,
                            absl::Span<const int64_t> which, int threads,
                            const std::atomic<bool>* cancelled, v1::QuantizationReport& report) {
  const size_t values = quantised.values.size(), nodes = quantised.nodes.size();
  std::vector<Node> real_nodes = quantised.nodes;
  std::vector<size_t> last_reader(values, 0);
  for (size_t i = 0; i < nodes; ++i) {
    Node& node = real_nodes[i];
    if (node.quantized) node.weight = Dequantize(*node.quantized);
    for (ValueId id : node.inputs) last_reader[id] = i;
  }
  last_reader[quantised.output] = nodes;
  const auto run = [&](const Graph& graph, const Node& node, const std::vector<Tensor>& known) {
    std::vector<const Tensor*> inputs;
    for (ValueId id : node.inputs) {
      const auto& constant = graph.values[id].constant;
      inputs.push_back(constant ? &*constant : &known[id]);
    }
    return engine::RunFloatNode(graph, node, inputs, threads);
  };
  const auto rounded = [&](Tensor real, ValueId id) {
    const auto& params = quantised.values[id].quant;
    return params ? ToReal(ToCodes(real, *params), *params) : std::move(real);
  };

  std::vector<Sums> sums(nodes);
  Sums logits;
  uint64_t same = 0;
  const size_t batch = MemoryOf(reference).batch;
  for (size_t first = 0; first < which.size(); first += batch) {
    const auto part = which.subspan(first, std::min(batch, which.size() - first));
    std::vector<Tensor> wanted(values), got(values);
    wanted[reference.input] = TakeImages(images, part);
    got[quantised.input] = rounded(wanted[reference.input], quantised.input);
    for (size_t i = 0; i < nodes; ++i) {
      if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed))
        return absl::CancelledError("quantisation cancelled");
      const ValueId id = quantised.nodes[i].output;
      TERN_ASSIGN_OR_RETURN(wanted[id], run(reference, reference.nodes[i], wanted));
      TERN_ASSIGN_OR_RETURN(Tensor y, run(quantised, real_nodes[i], got));
      const auto& params = quantised.values[id].quant;
      if (params) sums[i].clipped += CountClipped(y, *params);
      got[id] = rounded(std::move(y), id);
      if (quantised.nodes[i].quantized) sums[i].Add(wanted[id], got[id]);
      for (ValueId input : quantised.nodes[i].inputs) {
        if (last_reader[input] == i) wanted[input] = got[input] = Tensor();
      }
    }
    const Tensor &float_logits = wanted[reference.output], &own_logits = got[quantised.output];
    logits.Add(float_logits, own_logits);
    const int64_t classes = quantised.classes();
    for (size_t k = 0; k < part.size(); ++k) {
      const float* a = float_logits.data<float>().data() + k * classes;
      const float* b = own_logits.data<float>().data() + k * classes;
      same += std::max_element(a, a + classes) - a == std::max_element(b, b + classes) - b;
    }
  }
  int layer = 0;
  for (size_t i = 0; i < nodes; ++i) {
    if (!quantised.nodes[i].quantized) continue;
    v1::LayerReport& entry = *report.mutable_layers(layer++);
    entry.set_output_sqnr_db(Decibels(sums[i].signal, sums[i].noise));
    entry.set_output_clipped(static_cast<double>(sums[i].clipped) /
                             static_cast<double>(std::max<int64_t>(1, sums[i].count)));
  }
  report.set_sqnr_db(Decibels(logits.signal, logits.noise));
  *report.mutable_calibration_agreement() = statistics::MakeProportion(same, which.size());
  return absl::OkStatus();
}

}  // namespace tern::quant
