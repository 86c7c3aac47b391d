// The memory plan: who shares memory with whom, and how near the arena comes to what must be held
// at once. The oracle knows the steps' reads and writes and the offsets, not the planner.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "server/engine/program.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"

namespace tern::engine {
namespace {

using namespace testing;  // NOLINT(build/namespaces): the builder's vocabulary

// The memory that one tensor occupies while it lives.
struct Life {
  int buffer = 0;
  int first = 0, last = 0;    // steps
  size_t begin = 0, end = 0;  // bytes of the arena
};

std::vector<Life> LivesOf(const Program& program) {
  const int steps = static_cast<int>(program.steps.size());
  std::vector<Life> lives(program.buffers.size());
  const auto root = [&](int b) {
    return program.buffers[b].view_of >= 0 ? program.buffers[b].view_of : b;
  };
  for (size_t b = 0; b < lives.size(); ++b) {
    const Buffer& buffer = program.buffers[b];
    const int samples = buffer.max_samples > 0 ? buffer.max_samples : program.max_batch;
    lives[b] = {static_cast<int>(b), steps, -1, buffer.offset,
                buffer.offset + buffer.sample_bytes * samples};
  }
  const auto touch = [&](int b, int s) {
    Life& life = lives[root(b)];
    life.first = std::min(life.first, s);
    life.last = std::max(life.last, s);
  };
  for (int s = 0; s < steps; ++s) {
    for (int b : program.steps[s].reads) touch(b, s);
    for (int b : program.steps[s].writes) touch(b, s);
  }
  // The caller fills the input before the first step and again before the next run; the result is
  // read after the last.
  touch(program.input, 0);
  touch(program.input, steps);
  touch(program.output, steps);
  std::vector<Life> result;
  for (const Life& life : lives) {
    const Buffer& buffer = program.buffers[life.buffer];
    if (life.last >= 0 && buffer.constant < 0 && buffer.view_of < 0) result.push_back(life);
  }
  return result;
}

// The largest sum of what lives at one step; memory that two share in place counts once.
size_t LeastBytes(const Program& program, const std::vector<Life>& lives) {
  size_t most = 0;
  for (int s = 0; s <= static_cast<int>(program.steps.size()); ++s) {
    std::vector<std::pair<size_t, size_t>> ranges;
    for (const Life& life : lives) {
      if (life.first <= s && s <= life.last) ranges.push_back({life.begin, life.end});
    }
    std::sort(ranges.begin(), ranges.end());
    size_t sum = 0, covered = 0;
    for (const auto& [begin, end] : ranges) {
      sum += end - std::min(end, std::max(begin, covered));
      covered = std::max(covered, end);
    }
    most = std::max(most, sum);
  }
  return most;
}

bool MayShare(const Program& program, const Life& a, const Life& b) {
  if (a.last != b.first || a.begin != b.begin) return false;
  if (a.last >= static_cast<int>(program.steps.size())) return false;
  const auto root = [&](int x) {
    return program.buffers[x].view_of >= 0 ? program.buffers[x].view_of : x;
  };
  const Step& step = program.steps[a.last];
  const auto reads = std::count_if(step.reads.begin(), step.reads.end(),
                                   [&](int read) { return root(read) == a.buffer; });
  if (reads > 1) return false;
  for (const InPlace& wish : step.in_place) {
    if (root(wish.from) == a.buffer && wish.to == b.buffer) return true;
  }
  return false;
}

void Check(const Graph& graph, int max_batch) {
  PlanOptions options;
  options.max_batch = max_batch;
  auto program = Lower(graph, options);
  ASSERT_TRUE(program.ok()) << program.status();
  PlanMemory(*program);
  const std::vector<Life> lives = LivesOf(*program);
  for (size_t i = 0; i < lives.size(); ++i) {
    const Life& a = lives[i];
    EXPECT_LE(a.end, program->arena_bytes) << "buffer " << a.buffer;
    EXPECT_EQ(a.begin % AlignedBuffer::kAlignment, 0u);
    for (size_t j = 0; j < i; ++j) {
      const Life& b = lives[j];
      const bool together = a.first <= b.last && b.first <= a.last;
      const bool overlap = a.begin < b.end && b.begin < a.end;
      EXPECT_FALSE(together && overlap && !MayShare(*program, a, b) && !MayShare(*program, b, a))
          << "buffers " << b.buffer << " and " << a.buffer << " live in the same memory";
    }
  }
  const size_t least = LeastBytes(*program, lives);
  EXPECT_LE(static_cast<double>(program->arena_bytes), 1.3 * static_cast<double>(least))
      << program->arena_bytes << " bytes, at least " << least;
  std::printf("%-28s batch %2d: arena %9zu bytes, %.3f of the least\n", graph.name.c_str(),
              max_batch, program->arena_bytes,
              static_cast<double>(program->arena_bytes) / static_cast<double>(least));
}

// Float, int8, and ternary between int8 ends. Any ranges do: memory does not depend on them.
void CheckSchemes(Graph graph, const std::string& name) {
  const Ranges ranges(graph.values.size(), {-1.0f, 1.0f});
  QuantizeOptions ternary;
  ternary.scheme = WeightScheme::kTernaryCluster;
  ternary.first_and_last_int8 = true;
  std::vector<std::pair<std::string, Graph>> forms;
  forms.emplace_back(" float", graph);
  forms.emplace_back(" int8", QuantizeGraph(graph, ranges, {}));
  forms.emplace_back(" ternary", QuantizeGraph(graph, ranges, ternary));
  for (auto& [suffix, form] : forms) {
    form.name = name + suffix;
    SCOPED_TRACE(form.name);
    for (int max_batch : {1, 8}) Check(form, max_batch);
  }
}

Graph Read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  auto graph = onnx::Import(std::string(std::istreambuf_iterator<char>(file), {}));
  EXPECT_TRUE(graph.ok()) << path << ": " << graph.status();
  if (!graph.ok()) return {};
  graph::Optimize(*graph);
  return *std::move(graph);
}

// The residual of the fully connected layer is another view of its input.
Graph TwoViews() {
  GraphBuilder b({8, 6, 6});
  const ValueId x = b.GlobalAverage(b.Conv(b.input(), 64, 3, Strided(1, 1), kReluRange));
  const ValueId first = b.Flatten(x), second = b.Flatten(x);
  return b.Finish(b.FullyConnected(b.FullyConnected(first, 64, {}, second), 10));
}

class MemoryPlanZooTest : public ::testing::TestWithParam<NamedGraph> {};

TEST_P(MemoryPlanZooTest, SharesOnlyDeadMemoryAndStaysNearTheLeast) {
  CheckSchemes(GetParam().graph, GetParam().name);
}

INSTANTIATE_TEST_SUITE_P(Zoo, MemoryPlanZooTest, ::testing::ValuesIn(Zoo()),
                         [](const auto& info) { return info.param.name; });

TEST(MemoryPlanTest, WhatAStepReadsTwiceIsNotOverwritten) { CheckSchemes(TwoViews(), "two views"); }

TEST(MemoryPlanTest, TheDemoNetworkStaysNearTheLeast) {
  const char* source = std::getenv("TERN_SOURCE_DIR");
  ASSERT_NE(source, nullptr);
  CheckSchemes(Read(std::filesystem::path(source) / "models/demo/model.onnx"), "demo");
}

TEST(MemoryPlanNetworksTest, EveryArchitectureStaysNearTheLeast) {
  const char* folder = std::getenv("TERN_TORCH_FIXTURES");
  if (folder == nullptr)
    GTEST_SKIP() << "TERN_TORCH_FIXTURES is not set: no networks from torchvision";
  int networks = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".onnx") continue;
    ++networks;
    CheckSchemes(Read(entry.path()), entry.path().stem().string());
  }
  EXPECT_GT(networks, 0) << "no .onnx file in " << folder;
}

}  // namespace
}  // namespace tern::engine
