#include "server/onnx/import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/graph/passes.h"
#include "server/reference/execute.h"
#include "tests/onnx/model_builder.h"

namespace tern::onnx {
namespace {

using tern::testing::Attribute;
using tern::testing::Dims;
using tern::testing::Floats;
using tern::testing::Ints;
using tern::testing::List;
using tern::testing::ModelBuilder;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::FloatEq;
using ::testing::FloatNear;
using ::testing::HasSubstr;

// Imports and evaluates, before and after optimisation.
std::vector<float> Evaluate(const std::string& bytes, const std::vector<float>& input,
                            int64_t n = 1) {
  absl::StatusOr<graph::Graph> graph = Import(bytes);
  if (!graph.ok()) {
    ADD_FAILURE() << graph.status();
    return {};
  }
  const Tensor x = Tensor::Of(graph->shape(graph->input).WithBatch(n), input);
  EXPECT_EQ(x.elements(), static_cast<int64_t>(input.size()));
  const auto before = reference::ExecuteFloat(*graph, x);
  EXPECT_TRUE(before.ok()) << before.status();
  const auto plain = (*before)[graph->output].data<float>();
  const std::vector<float> result(plain.begin(), plain.end());
  graph::Optimize(*graph);
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
  const auto after = reference::ExecuteFloat(*graph, x);
  EXPECT_TRUE(after.ok()) << after.status();
  const auto optimised = (*after)[graph->output].data<float>();
  EXPECT_EQ(optimised.size(), result.size());
  for (size_t i = 0; i < result.size() && i < optimised.size(); ++i) {
    EXPECT_NEAR(optimised[i], result[i], 1e-4);
  }
  return result;
}

// A model of one node over a [1,2,3] image, input 0 1 2 / 3 4 5.
std::vector<float> Unary(int opset, const std::string& type, std::vector<Attribute> attributes = {},
                         std::vector<::onnx::TensorProto> operands = {}) {
  ModelBuilder m(opset, {1, 2, 3});
  std::vector<std::string> inputs = {"input"};
  for (auto& operand : operands) {
    inputs.push_back("k" + std::to_string(inputs.size()));
    m.Weight(inputs.back(), operand);
  }
  return Evaluate(m.Node(type, inputs, {"y"}, std::move(attributes)).Finish("y"),
                  {0, 1, 2, 3, 4, 5});
}

// ---- layers ----

TEST(ImportLayersTest, ConvTakesPadsStridesGroupsAndAMissingBias) {
  ModelBuilder m(13, {2, 2, 2});
  m.Weight("w", Floats({2, 1, 2, 2}, {1, 10, 100, 1000, 2, 20, 200, 2000}));
  m.Node("Conv", {"input", "w"}, {"y"},
         {{"pads", {1, 0, 0, 0}}, {"strides", {1, 1}}, {"group", 2}, {"kernel_shape", {2, 2}}});
  EXPECT_THAT(Evaluate(m.Finish("y"), {1, 2, 3, 4, 5, 6, 7, 8}),
              ElementsAre(2100, 4321, 13000, 17530));
}

TEST(ImportLayersTest, ConvAddsItsBiasAndPlacesAutoPads) {
  // A kernel of 1 10 over 1 2 3 4 with stride 2: SAME needs no pad; with stride 1 it needs one
  // on the right (UPPER) or left (LOWER).
  const auto conv = [](const char* auto_pad) {
    ModelBuilder m(11, {1, 1, 4});
    m.Weight("w", Floats({1, 1, 1, 2}, {1, 10})).Weight("b", Floats({1}, {0.5f}));
    m.Node("Conv", {"input", "w", "b"}, {"y"}, {{"auto_pad", auto_pad}});
    return Evaluate(m.Finish("y"), {1, 2, 3, 4});
  };
  EXPECT_THAT(conv("SAME_UPPER"), ElementsAre(21.5f, 32.5f, 43.5f, 4.5f));
  EXPECT_THAT(conv("SAME_LOWER"), ElementsAre(10.5f, 21.5f, 32.5f, 43.5f));
  EXPECT_THAT(conv("VALID"), ElementsAre(21.5f, 32.5f, 43.5f));
  EXPECT_THAT(conv("NOTSET"), ElementsAre(21.5f, 32.5f, 43.5f));
}

TEST(ImportLayersTest, GemmTransposesScalesAndBroadcastsItsBias) {
  const std::vector<float> image = {1, 2};
  const auto gemm = [&](std::vector<Attribute> attributes, ::onnx::TensorProto w,
                        std::vector<::onnx::TensorProto> c) {
    ModelBuilder m(13, {2, 1, 1});
    m.Node("Flatten", {"input"}, {"x"}).Weight("w", w);
    std::vector<std::string> inputs = {"x", "w"};
    if (!c.empty()) inputs.push_back("c");
    if (!c.empty()) m.Weight("c", c[0]);
    return Evaluate(m.Node("Gemm", inputs, {"y"}, std::move(attributes)).Finish("y"), image);
  };
  // [1 2] x [1 2 3; 4 5 6]
  const auto w = Floats({2, 3}, {1, 2, 3, 4, 5, 6});
  EXPECT_THAT(gemm({}, w, {}), ElementsAre(9, 12, 15));
  EXPECT_THAT(gemm({{"alpha", 2.0f}, {"beta", 0.5f}}, w, {Floats({3}, {2, 4, 6})}),
              ElementsAre(19, 26, 33));
  EXPECT_THAT(gemm({}, w, {Floats({1, 1}, {1})}), ElementsAre(10, 13, 16));
  // [1 2] x [1 2; 3 4; 5 6]^T
  EXPECT_THAT(
      gemm({{"transB", 1}}, Floats({3, 2}, {1, 2, 3, 4, 5, 6}), {Floats({1, 3}, {0, 1, 0})}),
      ElementsAre(5, 12, 17));
}

TEST(ImportLayersTest, MatMulByAnAddedTransposeFoldsToOneLayer) {
  ModelBuilder m(9, {2, 1, 1});
  m.Weight("w", Floats({3, 2}, {1, 2, 3, 4, 5, 6})).Weight("b", Floats({3}, {1, 1, 1}));
  m.Node("Flatten", {"input"}, {"x"})
      .Node("Transpose", {"w"}, {"wt"}, {{"perm", {1, 0}}})
      .Node("MatMul", {"x", "wt"}, {"p"})
      .Node("Add", {"b", "p"}, {"y"});
  const std::string bytes = m.Finish("y");
  EXPECT_THAT(Evaluate(bytes, {1, 2}), ElementsAre(6, 12, 18));
  graph::Graph graph = *Import(bytes);
  graph::Optimize(graph);
  EXPECT_EQ(graph.nodes.size(), 2u);  // flatten, fully connected
}

TEST(ImportLayersTest, BatchNormalizationFoldsItsStatistics) {
  ModelBuilder m(9, {2, 1, 1});
  m.Weight("scale", Floats({2}, {2, 3})).Weight("bias", Floats({2}, {1, 0}));
  m.Weight("mean", Floats({2}, {5, -1})).Weight("var", Floats({2}, {3.99f, 0.24f}));
  m.Node("BatchNormalization", {"input", "scale", "bias", "mean", "var"}, {"y"},
         {{"epsilon", 0.01f}, {"momentum", 0.9f}});
  // 2 * (9 - 5) / 2 + 1; 3 * (0 + 1) / 0.5
  EXPECT_THAT(Evaluate(m.Finish("y"), {9, 0}), ElementsAre(FloatNear(5, 1e-5), FloatNear(6, 1e-5)));
}

TEST(ImportLayersTest, Pools) {
  EXPECT_THAT(Unary(13, "MaxPool", {{"kernel_shape", {2, 2}}}), ElementsAre(4, 5));
  EXPECT_THAT(Unary(13, "AveragePool", {{"kernel_shape", {2, 2}}}), ElementsAre(2, 3));
  EXPECT_THAT(
      Unary(13, "MaxPool", {{"kernel_shape", {2, 2}}, {"strides", {2, 2}}, {"ceil_mode", 1}}),
      ElementsAre(4, 5));
  EXPECT_THAT(Unary(13, "AveragePool",
                    {{"kernel_shape", {1, 3}}, {"pads", {0, 1, 0, 1}}, {"strides", {1, 2}}}),
              ElementsAre(0.5f, 1.5f, 3.5f, 4.5f));
  EXPECT_THAT(Unary(13, "AveragePool",
                    {{"kernel_shape", {1, 3}},
                     {"pads", {0, 1, 0, 1}},
                     {"strides", {1, 2}},
                     {"count_include_pad", 1}}),
              ElementsAre(FloatEq(1 / 3.f), 1, FloatEq(7 / 3.f), 3));
  EXPECT_THAT(Unary(13, "GlobalAveragePool"), ElementsAre(2.5f));
  EXPECT_THAT(Unary(13, "GlobalMaxPool"), ElementsAre(5));
}

TEST(ImportLayersTest, ReduceMeanKeepsOrDropsItsAxes) {
  EXPECT_THAT(Unary(13, "ReduceMean", {{"axes", {2, 3}}, {"keepdims", 0}}), ElementsAre(2.5f));
  EXPECT_THAT(Unary(13, "ReduceMean", {{"axes", {-1, -2}}}), ElementsAre(2.5f));
  EXPECT_THAT(Unary(13, "ReduceMean", {{"axes", Dims{2}}}), ElementsAre(1.5f, 2.5f, 3.5f));
}

TEST(ImportLayersTest, SoftmaxKnowsBothDefaultsOfItsAxis) {
  const float e = std::exp(1.0f);
  ModelBuilder m(11, {2, 1, 1});
  m.Node("Softmax", {"input"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {0, 1}),
              ElementsAre(FloatEq(1 / (1 + e)), FloatEq(e / (1 + e))));
  ModelBuilder last(13, {1, 1, 2});
  last.Node("Softmax", {"input"}, {"y"});
  EXPECT_THAT(Evaluate(last.Finish("y"), {0, 1}),
              ElementsAre(FloatEq(1 / (1 + e)), FloatEq(e / (1 + e))));
}

// ---- element-wise ----

TEST(ImportArithmeticTest, Activations) {
  EXPECT_THAT(Unary(13, "Relu"), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(14, "HardSwish")[1], FloatEq(4.0f / 6.0f));
  EXPECT_THAT(Unary(9, "HardSigmoid")[1], FloatEq(0.7f));
  EXPECT_THAT(Unary(9, "HardSigmoid", {{"alpha", 0.1f}, {"beta", 0.25f}})[5], FloatEq(0.75f));
  EXPECT_THAT(Unary(13, "Sigmoid")[0], FloatEq(0.5f));
  EXPECT_THAT(Unary(13, "Identity"), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(9, "Dropout", {{"ratio", 0.5f}}), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(13, "Cast", {{"to", 1}}), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST(ImportArithmeticTest, ClipTakesBoundsAsAttributesOrInputs) {
  EXPECT_THAT(Unary(9, "Clip", {{"min", 1.0f}, {"max", 3.5f}}),
              ElementsAre(1, 1, 2, 3, 3.5f, 3.5f));
  EXPECT_THAT(Unary(11, "Clip", {}, {Floats({}, {1}), Floats({}, {3.5f})}),
              ElementsAre(1, 1, 2, 3, 3.5f, 3.5f));
  ModelBuilder m(13, {1, 1, 2});
  m.Weight("hi", Floats({}, {1})).Node("Clip", {"input", "", "hi"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {-5, 5}), ElementsAre(-5, 1));
}

TEST(ImportArithmeticTest, BroadcastsConstantsWithAndWithoutABatchAxis) {
  EXPECT_THAT(Unary(13, "Add", {}, {Floats({1, 1, 2, 1}, {10, 20})}),
              ElementsAre(10, 11, 12, 23, 24, 25));
  EXPECT_THAT(Unary(13, "Mul", {}, {Floats({3}, {1, 2, 3})}), ElementsAre(0, 2, 6, 3, 8, 15));
  EXPECT_THAT(Unary(13, "Sub", {}, {Floats({}, {1})}), ElementsAre(-1, 0, 1, 2, 3, 4));
  EXPECT_THAT(Unary(13, "Div", {}, {Floats({}, {2})}), ElementsAre(0, .5f, 1, 1.5f, 2, 2.5f));
}

TEST(ImportArithmeticTest, FoldsConstantArithmetic) {
  ModelBuilder m(13, {1, 1, 2});
  m.Weight("a", Floats({2, 1}, {1, 4})).Weight("b", Floats({2}, {3, 5}));
  m.Node("Sqrt", {"a"}, {"root"})               // 1; 2
      .Node("Mul", {"root", "b"}, {"product"})  // 3 5; 6 10
      .Node("Neg", {"product"}, {"negative"})
      .Node("Slice", {"negative", "one", "two"}, {"row"})  // -6 -10
      .Weight("one", List({1}))
      .Weight("two", List({2}))
      .Node("Add", {"input", "row"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {1, 2}), ElementsAre(-5, -8));
}

// ---- movement ----

TEST(ImportMovementTest, SliceByAttributesAndByInputs) {
  EXPECT_THAT(Unary(9, "Slice", {{"axes", {2, 3}}, {"starts", {1, -2}}, {"ends", {2, 1000}}}),
              ElementsAre(4, 5));
  EXPECT_THAT(Unary(13, "Slice", {},
                    {List({0, 0}), List({2147483647, INT64_MAX}), List({2, -1}), List({1, 2})}),
              ElementsAre(0, 2, 3, 5));
  EXPECT_THAT(Unary(13, "Slice", {}, {List({0}), List({INT64_MAX}), List({0})}),
              ElementsAre(0, 1, 2, 3, 4, 5));  // all of the batch
}

TEST(ImportMovementTest, SplitPadConcatTransposeGather) {
  ModelBuilder split(13, {3, 1, 1});
  split.Weight("parts", List({1, 2})).Node("Split", {"input", "parts"}, {"a", "b"}, {{"axis", 1}});
  split.Node("Concat", {"b", "a"}, {"y"}, {{"axis", -3}});
  EXPECT_THAT(Evaluate(split.Finish("y"), {1, 2, 3}), ElementsAre(2, 3, 1));

  ModelBuilder equal(11, {4, 1, 1});
  equal.Node("Split", {"input"}, {"a", "b"}, {{"axis", 1}}).Node("Sub", {"a", "b"}, {"y"});
  EXPECT_THAT(Evaluate(equal.Finish("y"), {1, 2, 5, 9}), ElementsAre(-4, -7));

  EXPECT_THAT(Unary(9, "Pad", {{"pads", {0, 0, 1, 0, 0, 0, 0, 1}}, {"value", 9.0f}}),
              ElementsAre(9, 9, 9, 9, 0, 1, 2, 9, 3, 4, 5, 9));
  EXPECT_THAT(
      Unary(11, "Pad", {{"mode", "constant"}}, {List({0, 0, 0, 1, 0, 0, 0, 0}), Floats({}, {7})}),
      ElementsAre(7, 0, 1, 2, 7, 3, 4, 5));
  EXPECT_THAT(Unary(13, "Pad", {}, {List({0, 0, 0, 0, 0, 0, 0, 0})}),
              ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(13, "Transpose", {{"perm", {0, 3, 1, 2}}}), ElementsAre(0, 3, 1, 4, 2, 5));
  EXPECT_THAT(Unary(13, "Gather", {{"axis", 3}}, {Ints({}, {-1})}), ElementsAre(2, 5));
  EXPECT_THAT(Unary(13, "Gather", {{"axis", 3}}, {List({2, 0})}), ElementsAre(2, 0, 5, 3));
}

TEST(ImportMovementTest, ReshapesKeepTheBatch) {
  for (const std::vector<int64_t>& target :
       {std::vector<int64_t>{-1, 6}, {0, -1}, {0, 6}, {-1, 3, 2}, {0, 0, 0, 0}, {0, 3, -1, 1}}) {
    EXPECT_THAT(Unary(13, "Reshape", {}, {List(target)}), ElementsAre(0, 1, 2, 3, 4, 5));
  }
  EXPECT_THAT(Unary(13, "Unsqueeze", {}, {List({1, -1})}), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(11, "Unsqueeze", {{"axes", Dims{2}}}), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(11, "Squeeze", {{"axes", Dims{1}}}), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(13, "Squeeze"), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Unary(13, "Flatten", {{"axis", -3}}), ElementsAre(0, 1, 2, 3, 4, 5));
}

// The program that torch writes for x.view(N, 2, c // 2, h, w).transpose(1, 2).
TEST(ImportMovementTest, FoldsTheShapeProgramOfAChannelShuffle) {
  ModelBuilder m(13, {4, 1, 1});
  m.Weight("zero", Ints({}, {0})).Weight("one", Ints({}, {1})).Weight("two", Ints({}, {2}));
  m.Weight("axis", List({0})).Weight("tail", List({1, 1})).Weight("c", List({4}));
  m.Node("Shape", {"input"}, {"shape"})
      .Node("Gather", {"shape", "zero"}, {"n"}, {{"axis", 0}})
      .Node("Gather", {"shape", "one"}, {"channels"}, {{"axis", 0}})
      .Node("Div", {"channels", "two"}, {"half"})
      .Node("Cast", {"half"}, {"half64"}, {{"to", 7}})
      .Node("Unsqueeze", {"n", "axis"}, {"n1"})
      .Node("Unsqueeze", {"two", "axis"}, {"two1"})
      .Node("Unsqueeze", {"half64", "axis"}, {"half1"})
      .Node("Concat", {"n1", "two1", "half1", "tail"}, {"split_shape"}, {{"axis", 0}})
      .Node("Reshape", {"input", "split_shape"}, {"split"})
      .Node("Transpose", {"split"}, {"swapped"}, {{"perm", {0, 2, 1, 3, 4}}})
      .Node("Concat", {"n1", "c", "tail"}, {"joined_shape"}, {{"axis", 0}})
      .Node("Reshape", {"swapped", "joined_shape"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {1, 2, 3, 4, 5, 6, 7, 8}, 2),
              ElementsAre(1, 3, 2, 4, 5, 7, 6, 8));
}

TEST(ImportMovementTest, MakesConstants) {
  ModelBuilder m(13, {1, 1, 2});
  m.Weight("dims", List({1, 1, 1, 2}));
  m.Node("ConstantOfShape", {"dims"}, {"twos"}, {{"value", Floats({1}, {2})}})
      .Node("Constant", {}, {"k"}, {{"value_float", 0.5f}})
      .Node("Mul", {"twos", "k"}, {"ones"})
      .Node("Add", {"input", "ones"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {3, 4}), ElementsAre(4, 5));
}

// ---- the file ----

TEST(ImportFileTest, TakesABatchOfOneWrittenAsNumbers) {
  ModelBuilder m(13, {2, 1, 1});
  m.graph()
      .mutable_input(0)
      ->mutable_type()
      ->mutable_tensor_type()
      ->mutable_shape()
      ->mutable_dim(0)
      ->set_dim_value(1);
  m.Weight("shape", List({1, 2, 1})).Node("Reshape", {"input", "shape"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {1, 2, 3, 4}, 2), ElementsAre(1, 2, 3, 4));
}

TEST(ImportFileTest, TakesOutputsOfOneByOnePixels) {
  ModelBuilder m(13, {2, 3, 3});
  m.Node("GlobalAveragePool", {"input"}, {"pooled"}).graph().add_output()->set_name("pooled");
  const auto graph = Import(m.model.SerializeAsString());
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->shape(graph->output), Shape{2});
  EXPECT_EQ(graph->classes(), 2);
}

TEST(ImportFileTest, KeepsNamesUniqueAndPrintable) {
  ModelBuilder m(13, {2, 1, 1});
  for (int i = 0; i < 3; ++i) {
    m.Node("Relu", {i == 0 ? "input" : "y" + std::to_string(i - 1)}, {"y" + std::to_string(i)});
    m.graph().mutable_node(i)->set_name("a\nb\xff");
  }
  const auto graph = Import(m.Finish("y2"));
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->nodes[0].name, "a_b_");
  EXPECT_EQ(graph->nodes[1].name, "a_b__2");
  EXPECT_EQ(graph->nodes[2].name, "a_b__3");
}

TEST(ImportFileTest, ReadsWeightsFromEveryField) {
  ::onnx::TensorProto floats = Floats({2}, {}), doubles = Floats({2}, {});
  floats.clear_raw_data();
  floats.add_float_data(1);
  floats.add_float_data(2);
  doubles.clear_raw_data();
  doubles.set_data_type(::onnx::TensorProto::DOUBLE);
  doubles.add_double_data(10);
  doubles.add_double_data(20);
  ModelBuilder m(13, {1, 1, 2});
  m.Weight("f", floats).Weight("d", doubles);
  m.Node("Add", {"input", "f"}, {"x"}).Node("Add", {"x", "d"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {0, 0}), ElementsAre(11, 22));
}

// ---- what is refused ----

struct Refused {
  const char* name;
  absl::StatusCode code;
  const char* message;
  void (*change)(ModelBuilder& m);  // of a good model
};

class ImportRefusesTest : public ::testing::TestWithParam<Refused> {};

TEST_P(ImportRefusesTest, WithTheReason) {
  ModelBuilder m(13, {2, 3, 3});
  m.Weight("w", Floats({2, 2, 1, 1}, {1, 2, 3, 4}));
  m.Node("Conv", {"input", "w"}, {"x"});
  m.Node("Relu", {"x"}, {"y"});
  m.Finish("y");
  ASSERT_TRUE(Import(m.model.SerializeAsString()).ok());
  GetParam().change(m);
  const absl::Status status = Import(m.model.SerializeAsString()).status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    All, ImportRefusesTest,
    ::testing::Values(
        Refused{"UnknownOperator", kUnimplemented, "node 'Relu_2': operator Celu is not supported",
                [](auto& m) { m.graph().mutable_node(1)->set_op_type("Celu"); }},
        Refused{"OtherDomain", kUnimplemented, "operator com.acme.Relu",
                [](auto& m) { m.graph().mutable_node(1)->set_domain("com.acme"); }},
        Refused{"UnknownAttribute", kUnimplemented, "attribute 'leak'",
                [](auto& m) {
                  auto* a = m.graph().mutable_node(1)->add_attribute();
                  a->set_name("leak");
                  a->set_type(::onnx::AttributeProto::INT);
                }},
        Refused{"AttributeOfTheWrongType", kInvalid, "attribute 'group' has type",
                [](auto& m) {
                  auto* a = m.graph().mutable_node(0)->add_attribute();
                  a->set_name("group");
                  a->set_type(::onnx::AttributeProto::FLOAT);
                }},
        Refused{"AttributeGivenTwice", kInvalid, "given twice",
                [](auto& m) {
                  for (int i = 0; i < 2; ++i) {
                    auto* a = m.graph().mutable_node(0)->add_attribute();
                    a->set_name("group");
                    a->set_type(::onnx::AttributeProto::INT);
                    a->set_i(1);
                  }
                }},
        Refused{"OldOpset", kInvalid, "opset 6", [](auto& m) { m.model.mutable_opset_import(0)->set_version(6); }},
        Refused{"NewOpset", kInvalid, "opset 18", [](auto& m) { m.model.mutable_opset_import(0)->set_version(18); }},
        Refused{"NoOpset", kInvalid, "not an ONNX model", [](auto& m) { m.model.clear_opset_import(); }},
        Refused{"NoGraph", kInvalid, "not an ONNX model", [](auto& m) { m.model.clear_graph(); }},
        Refused{"SecondInput", kInvalid, "several inputs",
                [](auto& m) {
                  const auto copy = m.graph().input(0);
                  *m.graph().add_input() = copy;
                  m.graph().mutable_input(1)->set_name("other");
                }},
        Refused{"NoInput", kInvalid, "no input", [](auto& m) { m.graph().clear_input(); }},
        Refused{"SecondOutput", kInvalid, "2 outputs", [](auto& m) { m.graph().add_output()->set_name("x"); }},
        Refused{"OutputThatIsAWeight", kInvalid, "not computed from the image",
                [](auto& m) { m.graph().mutable_output(0)->set_name("w"); }},
        Refused{"OutputThatIsAnImage", kInvalid, "wanted [classes]",
                [](auto& m) { m.graph().mutable_output(0)->set_name("y"); }},
        Refused{"UnknownOutput", kInvalid, "nothing before defines",
                [](auto& m) { m.graph().mutable_output(0)->set_name("nowhere"); }},
        Refused{"IntegerInput", kInvalid, "wanted float",
                [](auto& m) {
                  m.graph().mutable_input(0)->mutable_type()->mutable_tensor_type()->set_elem_type(
                      ::onnx::TensorProto::UINT8);
                }},
        Refused{"InputOfRank3", kInvalid, "wanted 4",
                [](auto& m) {
                  m.graph().mutable_input(0)->mutable_type()->mutable_tensor_type()->mutable_shape()
                      ->mutable_dim()->RemoveLast();
                }},
        Refused{"FixedBatch", kInvalid, "fixed to 8",
                [](auto& m) {
                  m.graph().mutable_input(0)->mutable_type()->mutable_tensor_type()->mutable_shape()
                      ->mutable_dim(0)->set_dim_value(8);
                }},
        Refused{"SymbolicHeight", kInvalid, "must have fixed c, h, w",
                [](auto& m) {
                  m.graph().mutable_input(0)->mutable_type()->mutable_tensor_type()->mutable_shape()
                      ->mutable_dim(2)->set_dim_param("h");
                }},
        Refused{"HugeInput", kInvalid, "exceeds",
                [](auto& m) {
                  for (int i : {1, 2, 3}) {
                    m.graph().mutable_input(0)->mutable_type()->mutable_tensor_type()
                        ->mutable_shape()->mutable_dim(i)->set_dim_value(INT64_MAX);
                  }
                }},
        Refused{"Cycle", kInvalid, "nothing before defines",
                [](auto& m) { m.graph().mutable_node(0)->set_input(0, "y"); }},
        Refused{"WrongOrder", kInvalid, "nothing before defines",
                [](auto& m) { m.graph().mutable_node()->SwapElements(0, 1); }},
        Refused{"NameDefinedTwice", kInvalid, "defined twice",
                [](auto& m) { m.graph().mutable_node(1)->set_output(0, "x"); }},
        Refused{"WeightDefinedTwice", kInvalid, "defined twice",
                [](auto& m) {
                  const auto copy = m.graph().initializer(0);
                  *m.graph().add_initializer() = copy;
                }},
        Refused{"MissingWeight", kInvalid, "'w' is read", [](auto& m) { m.graph().clear_initializer(); }},
        Refused{"MissingInput", kInvalid, "input 1 is missing",
                [](auto& m) { m.graph().mutable_node(0)->set_input(1, ""); }},
        Refused{"TooManyInputs", kInvalid, "has 2 inputs",
                [](auto& m) { m.graph().mutable_node(1)->add_input("x"); }},
        Refused{"NoOutputName", kInvalid, "has no output",
                [](auto& m) { m.graph().mutable_node(1)->clear_output(); }},
        Refused{"ShortWeight", kInvalid, "has 12 bytes, wanted 16",
                [](auto& m) { m.graph().mutable_initializer(0)->mutable_raw_data()->resize(12); }},
        Refused{"WeightWithoutData", kInvalid, "lacks its data",
                [](auto& m) {
                  m.graph().mutable_initializer(0)->clear_raw_data();
                  m.graph().mutable_initializer(0)->set_dims(0, 1 << 20);
                }},
        Refused{"WeightOfNegativeExtent", kInvalid, "impossible extents",
                [](auto& m) { m.graph().mutable_initializer(0)->set_dims(0, -2); }},
        Refused{"WeightWhoseExtentsOverflow", kInvalid, "impossible extents",
                [](auto& m) {
                  for (int i = 0; i < 4; ++i) m.graph().mutable_initializer(0)->set_dims(i, 1L << 31);
                }},
        Refused{"ExternalData", kInvalid, "another file",
                [](auto& m) {
                  m.graph().mutable_initializer(0)->set_data_location(::onnx::TensorProto::EXTERNAL);
                }},
        Refused{"Float16Weight", kUnimplemented, "element type 10",
                [](auto& m) {
                  m.graph().mutable_initializer(0)->set_data_type(::onnx::TensorProto::FLOAT16);
                }},
        Refused{"ChannelsThatDoNotFit", kInvalid, "node 'Conv_1' (Conv)",
                [](auto& m) {
                  m.graph().mutable_initializer(0)->set_dims(0, 1);
                  m.graph().mutable_initializer(0)->set_dims(1, 4);
                }},
        Refused{"ZeroGroups", kInvalid, "group is 0",
                [](auto& m) {
                  auto* a = m.graph().mutable_node(0)->add_attribute();
                  a->set_name("group");
                  a->set_type(::onnx::AttributeProto::INT);
                }},
        Refused{"SparseWeights", kUnimplemented, "sparse",
                [](auto& m) { m.graph().add_sparse_initializer(); }}),
    [](const auto& info) { return info.param.name; });

absl::Status StatusOf(int opset, const std::string& type, std::vector<Attribute> attributes = {},
                      std::vector<::onnx::TensorProto> operands = {}) {
  ModelBuilder m(opset, {1, 2, 3});
  std::vector<std::string> inputs = {"input"};
  for (auto& operand : operands) {
    inputs.push_back("k" + std::to_string(inputs.size()));
    m.Weight(inputs.back(), operand);
  }
  return Import(m.Node(type, inputs, {"y"}, std::move(attributes)).Finish("y")).status();
}

TEST(ImportRefusesTest, WhatMovesTheBatch) {
  EXPECT_EQ(StatusOf(13, "Transpose", {{"perm", {1, 0, 2, 3}}}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Transpose").code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Reshape", {}, {List({6, -1})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Reshape", {}, {List({1, 6})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Reshape", {}, {List({-1, 3})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Concat", {{"axis", 0}}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Slice", {}, {List({1}), List({INT64_MAX}), List({0})}).code(),
            kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Pad", {}, {List({1, 0, 0, 0, 0, 0, 0, 0})}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "ReduceMean").code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Softmax", {{"axis", 0}}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Add", {}, {Floats({2, 1, 1, 1}, {1, 2})}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Unsqueeze", {}, {List({0})}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Squeeze", {}, {List({0})}).code(), kInvalid);
}

TEST(ImportRefusesTest, WhatOperatorsLack) {
  EXPECT_EQ(StatusOf(13, "MaxPool", {{"kernel_shape", {2, 2}}, {"dilations", {2, 1}}}).code(),
            kUnimplemented);
  EXPECT_EQ(StatusOf(13, "MaxPool", {{"kernel_shape", Dims{2}}}).code(), kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Pad", {{"mode", "reflect"}}, {List({0, 0, 1, 0, 0, 0, 0, 0})}).code(),
            kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Slice", {}, {List({2}), List({0}), List({2}), List({-1})}).code(),
            kUnimplemented);
  EXPECT_EQ(StatusOf(13, "Cast", {{"to", 7}}).code(), kUnimplemented);
}

TEST(ImportRefusesTest, NumbersOutOfRange) {
  EXPECT_EQ(StatusOf(13, "MaxPool", {{"kernel_shape", {int64_t{1} << 40, 1}}}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "MaxPool", {{"kernel_shape", {2, 2}}, {"strides", Dims{0, 1}}}).code(),
            kInvalid);
  EXPECT_EQ(
      StatusOf(13, "MaxPool", {{"kernel_shape", {2, 2}}, {"pads", {1L << 40, 0, 0, 0}}}).code(),
      kInvalid);
  EXPECT_EQ(StatusOf(13, "Slice", {}, {List({2}), List({2}), List({3})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Slice", {}, {List({0}), List({2}), List({3}), List({0})}).code(),
            kInvalid);
  EXPECT_EQ(StatusOf(13, "Slice", {}, {List({0}), List({2}), List({9})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Gather", {{"axis", 3}}, {Ints({}, {3})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Reshape", {}, {List({-1, INT64_MAX, 4})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Reshape", {}, {List({0, -1, -1})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(13, "Reshape", {}, {List({})}).code(), kInvalid);
  EXPECT_EQ(StatusOf(9, "Clip", {{"min", 2.0f}, {"max", 1.0f}}).code(), kInvalid);
  EXPECT_EQ(
      StatusOf(13, "Pad", {}, {List({0, 0, INT64_MAX, INT64_MAX, 0, 0, INT64_MAX, 0})}).code(),
      kInvalid);
}

// A file of a few hundred bytes must not be able to ask for gigabytes.
TEST(ImportRefusesTest, ConstantsThatGrowWithoutBound) {
  ModelBuilder m(13, {1, 1, 2});
  m.Weight("dims", List({1 << 26}));
  m.Node("ConstantOfShape", {"dims"}, {"c0"});
  for (int i = 0; i < 40; ++i) {
    m.Node("Concat", {"c" + std::to_string(i), "c" + std::to_string(i)},
           {"c" + std::to_string(i + 1)}, {{"axis", 0}});
  }
  m.Node("Relu", {"input"}, {"y"});
  EXPECT_FALSE(Import(m.Finish("y")).ok());
}

TEST(ImportRefusesTest, ArithmeticThatOverflowsOrDividesByZero) {
  const auto fold = [](const char* type, int64_t a, int64_t b) {
    ModelBuilder m(13, {1, 1, 2});
    m.Weight("a", List({a})).Weight("b", List({b})).Node(type, {"a", "b"}, {"c"});
    return Import(m.Node("Relu", {"input"}, {"y"}).Finish("y")).status().code();
  };
  EXPECT_EQ(fold("Add", INT64_MAX, 1), kInvalid);
  EXPECT_EQ(fold("Sub", INT64_MIN, 1), kInvalid);
  EXPECT_EQ(fold("Mul", INT64_MAX, 2), kInvalid);
  EXPECT_EQ(fold("Div", 1, 0), kInvalid);
  EXPECT_EQ(fold("Div", INT64_MIN, -1), kInvalid);
  EXPECT_EQ(fold("Div", 7, -2), absl::StatusCode::kOk);
}

}  // namespace
}  // namespace tern::onnx
