// Milliseconds per image of one network in float, int8, ternary and 4-bit, side by side.
//
//   engine_bench --onnx FILE [--isa scalar|avx2|native] [--batch 1,8] [--threads 1] [--rounds 15]
//                [--schemes float,int8,ternary:64,int8:dfp8,ternary:4:dfp8] [--layers] [--expand]
//                [--load-threads 1] [--serve]
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
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "server/artifact/artifact.h"
#include "server/engine/ops.h"
#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "tests/bench/networks.h"

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
  int load_threads = 1;
  bool serve = false;
};

Flags Parse(int argc, char** argv) {
  Flags flags;
  CLI::App app("Milliseconds per image of one network in several schemes, side by side");
  app.add_option("--onnx", flags.onnx, "The network")->required()->check(CLI::ExistingFile);
  app.add_option("--isa", flags.isa, "Highest instruction set: scalar, avx2, avx512vnni or native");
  app.add_option("--batch", flags.batches, "Batch sizes")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  app.add_option("--schemes", flags.schemes,
                 "float, int8, ternary:N, int4:N, each also with :dfp8; or .tern files")
      ->delimiter(',');
  app.add_option("--threads", flags.threads, "Threads of one inference")
      ->check(CLI::PositiveNumber);
  app.add_option("--rounds", flags.rounds, "Interleaved rounds")->check(CLI::PositiveNumber);
  app.add_flag("--layers", flags.layers, "A table of layers, too");
  app.add_option("--load-threads", flags.load_threads, "Threads that make a plan")
      ->check(CLI::PositiveNumber);
  app.add_flag("--expand", flags.expand, "Cluster layers may run as int8 where VNNI exists");
  app.add_flag("--serve", flags.serve, "Runs what standard input asks for; one batch size");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::exit(app.exit(error));
  }
  if (flags.serve && flags.batches.size() != 1) Fail("--serve takes one batch size");
  return flags;
}

struct Contender {
  std::string name;
  std::shared_ptr<const Plan> plan;
  Session session;
  std::vector<double> milliseconds;  // per image
  std::optional<RunTimes> least;     // of all rounds, each part by itself
  double plan_ms = 0, session_ms = 0;
};

// Minima of single layers hardly feel a busy machine; their sum is what the network takes on a
// quiet one.
void PrintLayers(const std::vector<Contender>& contenders, int batch) {
  std::printf("\n%-44s %9s", "layer, us per image", "MMAC");
  for (const Contender& c : contenders) std::printf(" %36s", c.name.c_str());
  std::printf("\n");
  for (size_t i = 0; i < contenders[0].least->layers.size(); ++i) {
    const LayerInfo& first = contenders[0].plan->layers()[i];
    std::printf("%-44.44s %9.2f", absl::StrCat(first.op, " ", first.name).c_str(),
                first.macs / 1e6);
    for (const Contender& c : contenders) {
      std::printf(" %9.1f %-26.26s", absl::ToDoubleMicroseconds(c.least->layers[i]) / batch,
                  c.plan->layers()[i].implementation.c_str());
    }
    std::printf("\n");
  }
  for (int i = 0; i < kConversions; ++i) {
    std::printf("%-54s", Name(static_cast<Conversion>(i)).c_str());
    for (const Contender& c : contenders) {
      std::printf(" %9.1f %-26s", absl::ToDoubleMicroseconds(c.least->conversions[i]) / batch, "");
    }
    std::printf("\n");
  }
  std::string outside = absl::StrFormat("%-54s", "outside Conv and FullyConnected");
  std::printf("%-54s", "sum of minima, ms per image");
  for (const Contender& c : contenders) {
    absl::Duration sum, inside;
    for (size_t i = 0; i < c.least->layers.size(); ++i) {
      sum += c.least->layers[i];
      if (c.plan->layers()[i].macs > 0) inside += c.least->layers[i];
    }
    for (const absl::Duration time : c.least->conversions) sum += time;
    std::printf(" %9.3f %-26s", absl::ToDoubleMilliseconds(sum) / batch, "");
    absl::StrAppendFormat(&outside, " %8.1f%% %-26s", 100 * (1 - absl::FDivDuration(inside, sum)),
                          "");
  }
  std::printf("\n%s\n", outside.c_str());
}

// In milliseconds.
double Since(std::chrono::steady_clock::time_point begin) {
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
  return time.count();
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
    options.load_threads = flags.load_threads;
    const graph::Graph network = InScheme(graph, ranges, name);
    const auto begin = std::chrono::steady_clock::now();
    auto plan = Check(Plan::Create(network, options));
    const double plan_ms = Since(begin);
    const auto made = std::chrono::steady_clock::now();
    Session session = Check(plan->NewSession(flags.threads));
    const double session_ms = Since(made);
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (float& v : session.input()) v = normal(random);
    contenders.push_back({name, plan, std::move(session), {}, {}, plan_ms, session_ms});
  }
  return contenders;
}

// Milliseconds per image of one run; of each layer too where `layers` is given.
double Time(Contender& contender, int batch, RunTimes* times) {
  const auto begin = std::chrono::steady_clock::now();
  const absl::Status status = times != nullptr
                                  ? contender.session.RunProfiled(batch, *times).status()
                                  : contender.session.Run(batch).status();
  const double milliseconds = Since(begin);
  if (!status.ok()) Fail(status.ToString());
  return milliseconds / batch;
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
  const graph::Graph graph = ReadNetwork(flags.onnx);
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
        RunTimes times;
        const double milliseconds = Time(c, batch, flags.layers ? &times : nullptr);
        if (round < 0) continue;
        c.milliseconds.push_back(milliseconds);
        if (!c.least) c.least = times;
        for (size_t i = 0; i < times.layers.size(); ++i)
          c.least->layers[i] = std::min(c.least->layers[i], times.layers[i]);
        for (int i = 0; i < kConversions; ++i)
          c.least->conversions[i] = std::min(c.least->conversions[i], times.conversions[i]);
      }
    }
    std::printf("\nbatch %d\n%-14s %10s %10s %12s %12s %12s %12s %9s %10s\n", batch, "scheme",
                "min ms", "median ms", "min/float", "min/int8", "weights MiB", "arena MiB",
                "plan ms", "session ms");
    std::map<std::string, double> best;
    for (Contender& c : contenders) {
      std::sort(c.milliseconds.begin(), c.milliseconds.end());
      best[c.name] = c.milliseconds[0];
    }
    for (const Contender& c : contenders) {
      const auto speed = [&](const char* base) {
        return best.count(base) != 0 ? best[base] / best[c.name] : 0.0;
      };
      std::printf(
          "%-14s %10.3f %10.3f %11.2fx %11.2fx %12.1f %12.1f %9.1f %10.2f\n", c.name.c_str(),
          best[c.name], c.milliseconds[c.milliseconds.size() / 2], speed("float"), speed("int8"),
          static_cast<double>(c.plan->weight_bytes()) / (1 << 20),
          static_cast<double>(c.plan->activation_bytes()) / (1 << 20), c.plan_ms, c.session_ms);
    }
    if (flags.layers) PrintLayers(contenders, batch);
  }
  return 0;
}

}  // namespace
}  // namespace tern::engine

int main(int argc, char** argv) { return tern::engine::Main(argc, argv); }
