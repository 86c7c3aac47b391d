// Compares float plans with PyTorch on networks that tests/interop/torch/export_torchvision.py
// exported. TERN_TORCH_FIXTURES names their folder: <arch>.onnx, <arch>.input.f32 (NCHW),
// <arch>.logits.f32.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "server/engine/plan.h"
#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "tests/engine/graph_builder.h"

namespace tern::engine {
namespace {

using testing::RelativeDifference;

std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<float> ReadFloats(const std::filesystem::path& path) {
  const std::string bytes = ReadAll(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

TEST(TorchParityTest, FloatPlansAgreeWithTorchOnEveryArchitecture) {
  const char* folder = std::getenv("TERN_TORCH_FIXTURES");
  if (folder == nullptr)
    GTEST_SKIP() << "TERN_TORCH_FIXTURES is not set: no networks from torchvision";
  int networks = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".onnx") continue;
    ++networks;
    SCOPED_TRACE(entry.path().stem().string());
    std::filesystem::path input_path = entry.path(), logits_path = entry.path();
    input_path.replace_extension(".input.f32");
    logits_path.replace_extension(".logits.f32");
    auto graph = onnx::Import(ReadAll(entry.path()));
    EXPECT_TRUE(graph.ok()) << graph.status();
    if (!graph.ok()) continue;
    graph::Optimize(*graph);
    const std::vector<float> input = ReadFloats(input_path), logits = ReadFloats(logits_path);
    const Shape& shape = graph->shape(graph->input);
    const int64_t batch = static_cast<int64_t>(input.size()) / shape.elements();
    ASSERT_GE(batch, 1);
    ASSERT_EQ(static_cast<int64_t>(logits.size()), batch * graph->classes());
    PlanOptions options;
    options.max_batch = static_cast<int>(batch);
    auto plan = Plan::Create(*graph, options);
    EXPECT_TRUE(plan.ok()) << plan.status();
    if (!plan.ok()) continue;
    auto session = (*plan)->NewSession(2);
    ASSERT_TRUE(session.ok()) << session.status();
    NchwToNhwc(input.data(), batch, shape[0], shape[1], shape[2], session->input().data());
    const auto got = session->Run(static_cast<int>(batch));
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_LE(RelativeDifference(*got, logits), 1e-3f);
  }
  EXPECT_GT(networks, 0) << "no .onnx file in " << folder;
}

}  // namespace
}  // namespace tern::engine
