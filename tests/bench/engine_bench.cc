// Milliseconds per image of one network in float, int8, ternary and 4-bit, side by side.
//
//   engine_bench --onnx FILE [--isa scalar|avx2|native] [--batch 1,8] [--threads 1] [--rounds 15]
//                [--schemes float,int8,ternary:64,int8:dfp8,ternary:4:dfp8] [--layers] [--expand]
//                [--serve]
//
// :dfp8 is the fixed-point form of a scheme, int8:onednn leaves every int8 layer to oneDNN, a
// scheme ending in .tern is an artifact of the same network; --expand lets cluster layers that fit
// run as int8 where VNNI exists. Rounds are interleaved, so that a slow moment of the machine meets
// every scheme. Weights are rounded directly: the numbers are typical, the accuracy is not. First
// and last layers are int8 in every quantised network.
//
// --serve, with one batch size, is for programs that interleave these runs with others'
// (bench/compare_peers.py): one line of JSON says what is ready; then each line of input
// "SCHEME RUNS" is answered with {"ms": [per image, ...]}, after one run that is not timed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "server/artifact/artifact.h"
#include "server/engine/ops.h"
#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "tests/engine/quantize_graph.h"

namespace tern::engine {
namespace {

struct Flags {
  std::string onnx, isa = "native";
  std::vector<int> batches{1, 8};
  std::vector<std::string> schemes{"float",      "int8",       "ternary:4",
                                   "ternary:16", "ternary:64", "int4:64"};
  int threads = 1;
  int rounds = 15;
  bool layers = false;
  bool expand = false;
  bool serve = false;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "engine_bench: %s\n", message.c_str());
  std::exit(2);
}

template <typename T>
T Check(absl::StatusOr<T> result) {
  if (!result.ok()) Fail(result.status().ToString());
  return *std::move(result);
}

int Number(const std::string& text) {
  int value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < 1)
    Fail(absl::StrCat("not a positive number: ", text));
  return value;
}

Flags Parse(int argc, char** argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--layers") {
      flags.layers = true;
      continue;
    }
    if (flag == "--expand") {
      flags.expand = true;
      continue;
    }
    if (flag == "--serve") {
      flags.serve = true;
      continue;
    }
    if (i + 1 >= argc) Fail(absl::StrCat("no value for ", flag));
    const std::string value = argv[++i];
    if (flag == "--onnx") {
      flags.onnx = value;
    } else if (flag == "--isa") {
      flags.isa = value;
    } else if (flag == "--threads") {
      flags.threads = Number(value);
    } else if (flag == "--rounds") {
      flags.rounds = Number(value);
    } else if (flag == "--schemes") {
      flags.schemes = absl::StrSplit(value, ',');
    } else if (flag == "--batch") {
      flags.batches.clear();
      for (absl::string_view batch : absl::StrSplit(value, ','))
        flags.batches.push_back(Number(std::string(batch)));
    } else {
      Fail(absl::StrCat("unknown flag ", flag));
    }
  }
  if (flags.onnx.empty()) Fail("--onnx FILE is missing");
  if (flags.serve && flags.batches.size() != 1) Fail("--serve takes one batch size");
  return flags;
}

// Ranges of every value on one random image.
testing::Ranges Measure(const graph::Graph& graph) {
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

graph::Graph InScheme(const graph::Graph& graph, const testing::Ranges& ranges,
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

struct Contender {
  std::string name;
  std::shared_ptr<const Plan> plan;
  Session session;
  std::vector<double> milliseconds;    // per image
  std::vector<absl::Duration> layers;  // the least of all rounds
};

// Minima of single layers hardly feel a busy machine; their sum is what the network takes on a
// quiet one.
void PrintLayers(const std::vector<Contender>& contenders, int batch) {
  std::printf("\n%-44s %9s", "layer, us per image", "MMAC");
  for (const Contender& c : contenders) std::printf(" %36s", c.name.c_str());
  std::printf("\n");
  for (size_t i = 0; i < contenders[0].layers.size(); ++i) {
    const LayerInfo& first = contenders[0].plan->layers()[i];
    std::printf("%-44.44s %9.2f", absl::StrCat(first.op, " ", first.name).c_str(),
                first.macs / 1e6);
    for (const Contender& c : contenders) {
      std::printf(" %9.1f %-26.26s", absl::ToDoubleMicroseconds(c.layers[i]) / batch,
                  c.plan->layers()[i].implementation.c_str());
    }
    std::printf("\n");
  }
  std::printf("%-54s", "sum of minima, ms per image");
  for (const Contender& c : contenders) {
    absl::Duration sum;
    for (const absl::Duration time : c.layers) sum += time;
    std::printf(" %9.3f %-26s", absl::ToDoubleMilliseconds(sum) / batch, "");
  }
  std::printf("\n");
}

std::vector<Contender> MakeContenders(const Flags& flags, const graph::Graph& graph,
                                      const testing::Ranges& ranges, kernels::Isa isa, int batch) {
  std::vector<Contender> contenders;
  for (const std::string& name : flags.schemes) {
    PlanOptions options;
    options.isa = isa;
    options.max_batch = batch;
    // Ternary is measured on our kernels even where int8 would serve it, unless told otherwise.
    options.expand_on_vnni = flags.expand;
    options.own_int8 = !absl::EndsWith(name, ":onednn");
    auto plan = Check(Plan::Create(InScheme(graph, ranges, name), options));
    Session session = Check(plan->NewSession(flags.threads));
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (float& v : session.input()) v = normal(random);
    contenders.push_back({name, plan, std::move(session), {}, {}});
  }
  return contenders;
}

// Milliseconds per image of one run; of each layer too where `layers` is given.
double Time(Contender& contender, int batch, std::vector<absl::Duration>* layers) {
  const auto begin = std::chrono::steady_clock::now();
  const absl::Status status = layers != nullptr
                                  ? contender.session.RunProfiled(batch, *layers).status()
                                  : contender.session.Run(batch).status();
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
  if (!status.ok()) Fail(status.ToString());
  return time.count() / batch;
}

void Serve(const Flags& flags, std::vector<Contender> contenders, kernels::Isa isa, int batch) {
  nlohmann::json ready{{"isa", kernels::IsaName(isa)},
                       {"onednn", OneDnnVersion()},
                       {"threads", flags.threads},
                       {"batch", batch}};
  for (const Contender& c : contenders) {
    std::map<std::string, int> implementations;
    for (const LayerInfo& layer : c.plan->layers()) ++implementations[layer.implementation];
    ready["schemes"][c.name] = {{"weight_bytes", c.plan->weight_bytes()},
                                {"activation_bytes", c.plan->activation_bytes()},
                                {"implementations", implementations}};
  }
  std::cout << ready.dump() << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ');
    const auto contender = std::find_if(contenders.begin(), contenders.end(),
                                        [&](const Contender& c) { return c.name == words[0]; });
    if (words.size() != 2 || contender == contenders.end()) {
      Fail(absl::StrCat("want \"SCHEME RUNS\", got \"", line, "\""));
    }
    Time(*contender, batch, nullptr);
    std::vector<double> milliseconds(Number(words[1]));
    for (double& ms : milliseconds) ms = Time(*contender, batch, nullptr);
    std::cout << nlohmann::json{{"ms", milliseconds}}.dump() << std::endl;
  }
}

int Main(int argc, char** argv) {
  const Flags flags = Parse(argc, argv);
  const kernels::Isa isa = Check(kernels::SelectIsa(flags.isa));
  if (const absl::Status status = CapOneDnnIsa(isa); !status.ok()) Fail(status.ToString());
  std::ifstream file(flags.onnx, std::ios::binary);
  if (!file) Fail(absl::StrCat("cannot open ", flags.onnx));
  graph::Graph graph = Check(onnx::Import(std::string(std::istreambuf_iterator<char>(file), {})));
  graph::Optimize(graph);
  const testing::Ranges ranges = Measure(graph);
  if (flags.serve) {
    const int batch = flags.batches[0];
    Serve(flags, MakeContenders(flags, graph, ranges, isa, batch), isa, batch);
    return 0;
  }
  std::printf("%s, isa %s, %d threads\n", flags.onnx.c_str(), kernels::IsaName(isa), flags.threads);

  for (int batch : flags.batches) {
    std::vector<Contender> contenders = MakeContenders(flags, graph, ranges, isa, batch);
    for (int round = -1; round < flags.rounds; ++round) {
      for (Contender& c : contenders) {
        std::vector<absl::Duration> layers;
        const double milliseconds = Time(c, batch, flags.layers ? &layers : nullptr);
        if (round < 0) continue;
        c.milliseconds.push_back(milliseconds);
        if (c.layers.empty()) c.layers = layers;
        for (size_t i = 0; i < layers.size(); ++i) c.layers[i] = std::min(c.layers[i], layers[i]);
      }
    }
    std::printf("\nbatch %d\n%-14s %10s %10s %12s %12s %12s %12s\n", batch, "scheme", "min ms",
                "median ms", "min/float", "min/int8", "weights MiB", "arena MiB");
    std::map<std::string, double> best;
    for (Contender& c : contenders) {
      std::sort(c.milliseconds.begin(), c.milliseconds.end());
      best[c.name] = c.milliseconds[0];
    }
    for (const Contender& c : contenders) {
      const auto speed = [&](const char* base) {
        return best.count(base) != 0 ? best[base] / best[c.name] : 0.0;
      };
      std::printf("%-14s %10.3f %10.3f %11.2fx %11.2fx %12.1f %12.1f\n", c.name.c_str(),
                  best[c.name], c.milliseconds[c.milliseconds.size() / 2], speed("float"),
                  speed("int8"), static_cast<double>(c.plan->weight_bytes()) / (1 << 20),
                  static_cast<double>(c.plan->activation_bytes()) / (1 << 20));
    }
    if (flags.layers) PrintLayers(contenders, batch);
  }
  return 0;
}

}  // namespace
}  // namespace tern::engine

int main(int argc, char** argv) { return tern::engine::Main(argc, argv); }
