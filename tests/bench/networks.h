// Networks for the benchmarks: an ONNX file's graph, and its quantised forms with directly rounded
// weights, which are as fast as real ones and classify nothing. Errors end the program.
#ifndef TERN_TESTS_BENCH_NETWORKS_H_
#define TERN_TESTS_BENCH_NETWORKS_H_

#include <errno.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/artifact/artifact.h"
#include "server/engine/ops.h"
#include "server/graph/fixed_point.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "tests/engine/quantize_graph.h"

namespace tern::engine {

[[noreturn]] inline void Fail(const std::string& message) {
  std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, message.c_str());
  std::exit(2);
}

template <typename T>
T Check(absl::StatusOr<T> result) {
  if (!result.ok()) Fail(result.status().ToString());
  return *std::move(result);
}

inline int Number(const std::string& text) {
  int value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < 1)
    Fail(absl::StrCat("not a positive number: ", text));
  return value;
}

inline graph::Graph ReadNetwork(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail(absl::StrCat("cannot open ", path));
  graph::Graph graph = Check(onnx::Import(std::string(std::istreambuf_iterator<char>(file), {})));
  graph::Optimize(graph);
  return graph;
}

// Ranges of every value on one random image.
inline testing::Ranges Measure(const graph::Graph& graph) {
  std::vector<Tensor> values(graph.values.size());
  Tensor input(DType::kF32, graph.shape(graph.input).WithBatch(1));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& v : input.data<float>()) v = normal(random);
  for (size_t id = 0; id < values.size(); ++id) {
    values[id] = graph.values[id].constant ? *graph.values[id].constant : Tensor(DType::kF32, {1});
  }
  values[graph.input] = std::move(input);
  for (const graph::Node& node : graph.nodes) {
    std::vector<const Tensor*> inputs;
    for (graph::ValueId id : node.inputs) inputs.push_back(&values[id]);
    values[node.output] = Check(RunFloatNode(graph, node, inputs, 1));
  }
  return testing::RangesOf(values);
}

// `name`: float, int8, int4:N, ternary:N, each also with :dfp8; or the path of a .tern file. What
// follows int8 is the caller's.
inline graph::Graph InScheme(const graph::Graph& graph, const testing::Ranges& ranges,
                             const std::string& name) {
  if (name == "float") return graph;
  if (absl::EndsWith(name, ".tern")) return Check(artifact::Read(name)).graph;
  testing::QuantizeOptions options;
  options.first_and_last_int8 = true;
  const std::vector<std::string> parts = absl::StrSplit(name, ':');
  const std::map<std::string, WeightScheme> schemes{{"int8", WeightScheme::kInt8},
                                                    {"ternary", WeightScheme::kTernaryCluster},
                                                    {"int4", WeightScheme::kInt4Cluster}};
  const auto scheme = schemes.find(parts[0]);
  if (scheme == schemes.end()) Fail(absl::StrCat("unknown scheme ", name));
  options.scheme = scheme->second;
  const bool fixed_point = parts.back() == "dfp8";
  const bool numbered = IsClustered(options.scheme) && parts.size() > (fixed_point ? 2 : 1);
  options.cluster_size = numbered ? Number(parts[1]) : 4;
  graph::Graph result = testing::QuantizeGraph(graph, ranges, options);
  if (!fixed_point) return result;
  if (const absl::Status status = graph::RoundToFixedPoint(result); !status.ok()) {
    Fail(status.ToString());
  }
  return result;
}

}  // namespace tern::engine

#endif  // TERN_TESTS_BENCH_NETWORKS_H_
