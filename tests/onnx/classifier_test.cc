#include "server/onnx/classifier.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "server/graph/passes.h"
#include "server/reference/execute.h"
#include "tests/onnx/model_builder.h"

namespace tern::onnx {
namespace {

using tern::testing::Dims;
using tern::testing::Floats;
using tern::testing::ModelBuilder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The outputs for an image of one pixel with the value 2.
std::vector<float> Logits(const std::string& bytes) {
  absl::StatusOr<graph::Graph> graph = ImportClassifier(bytes);
  if (!graph.ok()) {
    ADD_FAILURE() << graph.status();
    return {};
  }
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
  graph::Optimize(*graph);
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
  const auto values =
      reference::ExecuteFloat(*graph, Tensor::Of(Shape{1, 1, 1, 1}, std::vector<float>{2}));
  EXPECT_TRUE(values.ok()) << values.status();
  EXPECT_EQ(graph->shape(graph->output).rank(), 1);
  const auto out = (*values)[graph->output].data<float>();
  return {out.begin(), out.end()};
}

// A 1x1 convolution to the classes, whose logits for that image are 2, 4 and 6.
ModelBuilder Network(int opset = 13, std::vector<float> weights = {1, 2, 3}) {
  ModelBuilder m(opset, {1, 1, 1});
  const int64_t classes = static_cast<int64_t>(weights.size());
  m.Weight("w", Floats({classes, 1, 1, 1}, weights));
  m.Node("Conv", {"input", "w"}, {"maps"});
  return m;
}

TEST(ImportClassifierTest, ANetworkThatEndsWithLogitsKeepsThem) {
  EXPECT_THAT(Logits(Network().Node("Flatten", {"maps"}, {"y"}).Finish("y")), ElementsAre(2, 4, 6));
}

TEST(ImportClassifierTest, ASoftmaxAtTheEndIsLeftOut) {
  EXPECT_THAT(Logits(Network()
                         .Node("Flatten", {"maps"}, {"flat"})
                         .Node("Softmax", {"flat"}, {"y"}, {{"axis", 1}})
                         .Finish("y")),
              ElementsAre(2, 4, 6));
}

TEST(ImportClassifierTest, SoDoesOneBeforeTheFlattening) {
  EXPECT_THAT(Logits(Network()
                         .Node("Softmax", {"maps"}, {"p"}, {{"axis", 1}})
                         .Node("Flatten", {"p"}, {"y"})
                         .Finish("y")),
              ElementsAre(2, 4, 6));
  EXPECT_THAT(Logits(Network().Node("Softmax", {"maps"}, {"y"}, {{"axis", 1}}).Finish("y")),
              ElementsAre(2, 4, 6));
}

TEST(ImportClassifierTest, ASoftmaxWhoseOutputIsHeldAsCodesIsLeftOutWithThem) {
  ModelBuilder m = Network();
  m.Weight("scale", Floats({}, {1.0f / 256}));
  m.Weight("zero", tern::testing::Bytes(::onnx::TensorProto::UINT8, {}, {0}));
  m.Node("Flatten", {"maps"}, {"flat"}).Node("Softmax", {"flat"}, {"p"}, {{"axis", 1}});
  m.Node("QuantizeLinear", {"p", "scale", "zero"}, {"q"});
  m.Node("DequantizeLinear", {"q", "scale", "zero"}, {"y"});
  EXPECT_THAT(Logits(m.Finish("y")), ElementsAre(2, 4, 6));
}

TEST(ImportClassifierTest, ASoftmaxInsideTheNetworkStays) {
  ModelBuilder m = Network();
  m.Node("Flatten", {"maps"}, {"flat"}).Node("Softmax", {"flat"}, {"p"}, {{"axis", 1}});
  m.Weight("two", Floats({1}, {2})).Node("Mul", {"p", "two"}, {"y"});
  const std::vector<float> got = Logits(m.Finish("y"));
  ASSERT_EQ(got.size(), 3u);
  EXPECT_NEAR(got[0] + got[1] + got[2], 2, 1e-5);
}

TEST(ImportClassifierTest, IndependentLabelsAreRefused) {
  const auto got = ImportClassifier(
      Network().Node("Flatten", {"maps"}, {"flat"}).Node("Sigmoid", {"flat"}, {"y"}).Finish("y"));
  EXPECT_EQ(got.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(got.status().message(), HasSubstr("ends in Sigmoid"));
}

TEST(ImportClassifierTest, ANetworkOfOneClassIsRefused) {
  const auto got = ImportClassifier(Network(13, {1}).Node("Flatten", {"maps"}, {"y"}).Finish("y"));
  EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(got.status().message(), HasSubstr("1 class"));
}

TEST(ImportClassifierTest, NumbersThatAreNotFiniteAreRefusedByName) {
  for (float bad : {kInf, -kInf, kNan}) {
    ModelBuilder m(13, {1, 1, 1});
    m.Weight("w", Floats({2, 1, 1, 1}, {1, bad})).Node("Conv", {"input", "w"}, {"maps"});
    const auto weight = ImportClassifier(m.Node("Flatten", {"maps"}, {"y"}).Finish("y"));
    EXPECT_EQ(weight.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(weight.status().message(), HasSubstr("a weight is infinite or not a number"));

    ModelBuilder added = Network();
    added.Weight("k", Floats({3}, {0, bad, 0})).Node("Flatten", {"maps"}, {"flat"});
    const auto constant = ImportClassifier(added.Node("Add", {"flat", "k"}, {"y"}).Finish("y"));
    EXPECT_EQ(constant.status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(ImportClassifierTest, ANegativeVarianceIsRefused) {
  ModelBuilder m = Network();
  m.Weight("gamma", Floats({3}, {1, 1, 1})).Weight("beta", Floats({3}, {0, 0, 0}));
  m.Weight("mean", Floats({3}, {0, 0, 0})).Weight("var", Floats({3}, {1, -1, 1}));
  m.Node("BatchNormalization", {"maps", "gamma", "beta", "mean", "var"}, {"bn"});
  const auto got = ImportClassifier(m.Node("Flatten", {"bn"}, {"y"}).Finish("y"));
  EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::onnx
