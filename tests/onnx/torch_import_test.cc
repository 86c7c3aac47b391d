// Networks that torch exported (tests/interop/torch/export_torchvision.py): each must import,
// and cheap ones must give torch's logits through the reference executor.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>

#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "server/reference/execute.h"

namespace tern::onnx {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return std::move(bytes).str();
}

class TorchImportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* directory = std::getenv("TERN_TORCH_FIXTURES");
    if (directory == nullptr) {
      GTEST_SKIP() << "TERN_TORCH_FIXTURES is not set; make the fixtures with "
                      "tests/interop/torch/export_torchvision.py DIR and set it to DIR";
    }
    directory_ = std::string(directory) + "/";
    networks_ = nlohmann::json::parse(ReadFile(directory_ + "manifest.json")).at("networks");
    ASSERT_FALSE(networks_.empty());
  }

  std::string directory_;
  nlohmann::json networks_;
};

TEST_F(TorchImportTest, ImportsAndOptimisesEveryNetwork) {
  for (const auto& network : networks_) {
    SCOPED_TRACE(network.at("name").get<std::string>());
    const auto graph = Import(ReadFile(directory_ + network.at("onnx").get<std::string>()));
    ASSERT_TRUE(graph.ok()) << graph.status();
    EXPECT_EQ(graph->classes(), network.at("classes").get<int64_t>());
    EXPECT_EQ(graph->shape(graph->input).WithBatch(2).dims(),
              network.at("input_shape").get<std::vector<int64_t>>());
    graph::Graph optimised = *graph;
    graph::Optimize(optimised);
    EXPECT_EQ(graph::Validate(optimised), absl::OkStatus());
    EXPECT_LT(optimised.nodes.size(), graph->nodes.size());
    EXPECT_EQ(optimised.classes(), graph->classes());
  }
}

TEST_F(TorchImportTest, CheapNetworksGiveTorchsLogits) {
  const std::set<std::string> cheap = {"mnasnet0_5", "mobilenet_v3_small", "shufflenet_v2_x1_0",
                                       "squeezenet1_1"};
  int compared = 0;
  for (const auto& network : networks_) {
    if (cheap.count(network.at("name")) == 0) continue;
    SCOPED_TRACE(network.at("name").get<std::string>());
    auto graph = Import(ReadFile(directory_ + network.at("onnx").get<std::string>()));
    ASSERT_TRUE(graph.ok()) << graph.status();
    graph::Optimize(*graph);
    const std::string input = ReadFile(directory_ + network.at("input").get<std::string>());
    const std::string logits = ReadFile(directory_ + network.at("logits").get<std::string>());
    Tensor x(DType::kF32, graph->shape(graph->input).WithBatch(1));  // the first image
    ASSERT_GE(input.size(), x.size_bytes());
    std::memcpy(x.raw(), input.data(), x.size_bytes());
    const auto values = reference::ExecuteFloat(*graph, x);
    ASSERT_TRUE(values.ok()) << values.status();
    const Tensor& y = (*values)[graph->output];
    ASSERT_GE(logits.size(), y.size_bytes());
    std::vector<float> wanted(y.elements());
    std::memcpy(wanted.data(), logits.data(), y.size_bytes());
    float largest = 0, difference = 0;
    for (int64_t i = 0; i < y.elements(); ++i) {
      largest = std::max(largest, std::fabs(wanted[i]));
      difference = std::max(difference, std::fabs(wanted[i] - y.data<float>()[i]));
    }
    // torch sums in single precision: about 1e-5 over this depth.
    EXPECT_LE(difference, 1e-4f * largest);
    ++compared;
  }
  if (compared == 0) GTEST_SKIP() << "none of the cheap networks is among the fixtures";
}

}  // namespace
}  // namespace tern::onnx
