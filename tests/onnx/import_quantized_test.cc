// Quantised files in the form of onnxruntime's quantize_static: QuantizeLinear and DequantizeLinear
// around float operators.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "server/reference/execute.h"
#include "tests/onnx/model_builder.h"

namespace tern::onnx {
namespace {

using graph::Graph;
using graph::OpType;
using ::onnx::TensorProto;
using tern::testing::Bytes;
using tern::testing::Floats;
using tern::testing::Ints32;
using tern::testing::List;
using tern::testing::ModelBuilder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A [2,1,1] image -> 1x1 convolution to 2 channels. Image codes: scale 0.5, zero point `x_zero`;
// result codes: scale 0.25, zero point `y_zero`; int32 bias of scale 0.5 * 0.125.
struct Convolution {
  TensorProto::DataType activations = TensorProto::UINT8;
  int x_zero = 4, y_zero = 128;
  TensorProto weights = Bytes(TensorProto::INT8, {2, 2, 1, 1}, {100, -127, 3, 64});
  TensorProto weight_scales = Floats({2}, {0.125f, 0.25f});
  TensorProto weight_zeros = Bytes(TensorProto::INT8, {2}, {0, 0});
  int axis = 0;
  bool relu = false;

  ModelBuilder Build() const {
    ModelBuilder m(13, {2, 1, 1});
    m.Weight("x_scale", Floats({}, {0.5f})).Weight("y_scale", Floats({}, {0.25f}));
    m.Weight("x_zero", Bytes(activations, {}, {x_zero}));
    m.Weight("y_zero", Bytes(activations, {}, {y_zero}));
    m.Weight("w", weights).Weight("w_scale", weight_scales).Weight("w_zero", weight_zeros);
    m.Weight("b", Ints32({2}, {16, -32})).Weight("b_scale", Floats({2}, {0.0625f, 0.125f}));
    m.Weight("b_zero", Ints32({2}, {0, 0}));
    m.Node("QuantizeLinear", {"input", "x_scale", "x_zero"}, {"xq"});
    m.Node("DequantizeLinear", {"xq", "x_scale", "x_zero"}, {"x"});
    m.Node("DequantizeLinear", {"w", "w_scale", "w_zero"}, {"wd"}, {{"axis", axis}});
    m.Node("DequantizeLinear", {"b", "b_scale", "b_zero"}, {"bd"}, {{"axis", 0}});
    m.Node("Conv", {"x", "wd", "bd"}, {relu ? "c" : "y"}, {{"kernel_shape", {1, 1}}});
    if (relu) m.Node("Relu", {"c"}, {"y"});
    m.Node("QuantizeLinear", {"y", "y_scale", "y_zero"}, {"yq"});
    m.Node("DequantizeLinear", {"yq", "y_scale", "y_zero"}, {"yd"});
    return m;
  }
  std::string Bytes_() const { return Build().Finish("yd"); }
};

absl::StatusOr<Graph> Optimised(const std::string& bytes) {
  auto graph = Import(bytes);
  if (!graph.ok()) return graph;
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
  graph::Optimize(*graph);
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
  return graph;
}

// The dequantised results of one image, before and after the passes, which must agree.
std::vector<float> Evaluate(const std::string& bytes, const std::vector<float>& image) {
  std::vector<std::vector<float>> results;
  for (const bool optimised : {false, true}) {
    const auto graph = optimised ? Optimised(bytes) : Import(bytes);
    if (!graph.ok()) {
      ADD_FAILURE() << graph.status();
      return {};
    }
    const Tensor x = Tensor::Of(graph->shape(graph->input).WithBatch(1), image);
    const auto values = reference::ExecuteQuantized(*graph, x);
    EXPECT_TRUE(values.ok()) << values.status();
    const Tensor& y = (*values)[graph->output];
    std::vector<float> result;
    for (int64_t i = 0; i < y.elements(); ++i) {
      result.push_back(y.dtype() == DType::kU8
                           ? graph->values[graph->output].quant->Dequantize(y.data<uint8_t>()[i])
                           : y.data<float>()[i]);
    }
    results.push_back(result);
  }
  EXPECT_EQ(results[0], results[1]);
  return results[1];
}

TEST(ImportQuantizedTest, AConvolutionHoldsCodesWeightsAndBias) {
  const auto graph = Optimised(Convolution{}.Bytes_());
  ASSERT_TRUE(graph.ok()) << graph.status();
  ASSERT_EQ(graph->nodes.size(), 2u);  // and the reshape to classes
  const graph::Node& conv = graph->nodes[0];
  EXPECT_EQ(conv.op, OpType::kConv);
  ASSERT_TRUE(conv.quantized);
  EXPECT_TRUE(conv.weight.empty());
  EXPECT_EQ(conv.quantized->scheme, WeightScheme::kInt8);
  EXPECT_THAT(conv.quantized->codes.data<int8_t>(), ElementsAre(100, -127, 3, 64));
  EXPECT_THAT(conv.quantized->steps, ElementsAre(0.125f, 0.25f));
  EXPECT_THAT(conv.bias.data<float>(), ElementsAre(1, -4));
  EXPECT_EQ(graph->values[graph->input].quant, (QuantParams{0.5f, 4}));
  EXPECT_EQ(graph->values[conv.output].quant, (QuantParams{0.25f, 128}));
  EXPECT_EQ(graph->values[graph->input].name, "input");
}

TEST(ImportQuantizedTest, TheConvolutionsArithmeticIsThatOfTheDefinition) {
  // Image 1.0, -0.6 -> codes 6, 3 -> reals 1, -0.5. Sums 12.5 + 7.9375 + 1 and 0.75 - 8 - 4, in
  // steps of 0.25: 85.75 -> 86 (21.5) and -45 (-11.25).
  EXPECT_THAT(Evaluate(Convolution{}.Bytes_(), {1.0f, -0.6f}), ElementsAre(21.5f, -11.25f));
}

TEST(ImportQuantizedTest, SignedActivationsGiveTheSameNumbersAsUnsignedOnes) {
  Convolution c;
  c.activations = TensorProto::INT8;
  c.x_zero -= 128;
  c.y_zero -= 128;
  EXPECT_THAT(Evaluate(c.Bytes_(), {1.0f, -0.6f}), ElementsAre(21.5f, -11.25f));
  const auto graph = Optimised(c.Bytes_());
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->values[graph->input].quant, (QuantParams{0.5f, 4}));
}

TEST(ImportQuantizedTest, SymmetricUnsignedWeightsAreTaken) {
  Convolution c;
  c.weights = Bytes(TensorProto::UINT8, {2, 2, 1, 1}, {228, 1, 131, 192});
  c.weight_zeros = Bytes(TensorProto::UINT8, {2}, {128, 128});
  EXPECT_THAT(Evaluate(c.Bytes_(), {1.0f, -0.6f}), ElementsAre(21.5f, -11.25f));
}

// uint8 with zero point 128 has one code more below it than above.
TEST(ImportQuantizedTest, TheLeastCodeIsTakenButNotNegated) {
  Convolution c;
  c.weights = Bytes(TensorProto::UINT8, {2, 2, 1, 1}, {0, 1, 131, 192});
  c.weight_zeros = Bytes(TensorProto::UINT8, {2}, {128, 128});
  ModelBuilder m = c.Build();
  m.Weight("s", Floats({2}, {-2, 0.5f})).Weight("o", Floats({2}, {0, 0}));
  m.Weight("zero", Floats({2}, {0, 0})).Weight("one", Floats({2}, {1, 1}));
  m.Node("Conv", {"x", "wd", "bd"}, {"c"});
  m.Node("BatchNormalization", {"c", "s", "o", "zero", "one"}, {"n"}, {{"epsilon", 0.0f}});
  const std::string bytes = m.Finish("n");
  const auto graph = Optimised(bytes);
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_THAT(graph->nodes[0].quantized->codes.data<int8_t>(), ElementsAre(-128, -127, 3, 64));
  EXPECT_EQ(graph->nodes[1].op, OpType::kBatchNorm);
  // -16 + 7.9375 + 1 = -7.0625 and -11.25, times -2 and 0.5.
  EXPECT_THAT(Evaluate(bytes, {1.0f, -0.6f}), ElementsAre(14.125f, -5.625f));
}

TEST(ImportQuantizedTest, OneScaleForAllWeightsIsSpreadOverTheChannels) {
  Convolution c;
  c.weight_scales = Floats({}, {0.125f});
  c.weight_zeros = Bytes(TensorProto::INT8, {}, {0});
  const auto graph = Optimised(c.Bytes_());
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_THAT(graph->nodes[0].quantized->steps, ElementsAre(0.125f, 0.125f));
}

TEST(ImportQuantizedTest, AnActivationBeforeTheCodesIsFused) {
  Convolution c;
  c.relu = true;
  const auto graph = Optimised(c.Bytes_());
  ASSERT_TRUE(graph.ok()) << graph.status();
  ASSERT_EQ(graph->nodes.size(), 2u);
  EXPECT_EQ(graph->nodes[0].clip->lo, 0.0f);
  EXPECT_THAT(Evaluate(c.Bytes_(), {1.0f, -0.6f}), ElementsAre(21.5f, 0.0f));
}

TEST(ImportQuantizedTest, AResidualIsFusedOnlyWhereTheSumAloneIsRounded) {
  for (const bool rounded : {false, true}) {
    ModelBuilder m = Convolution{}.Build();
    m.Node("Conv", {"x", "wd"}, {"c"});
    if (rounded) {
      m.Node("QuantizeLinear", {"c", "y_scale", "y_zero"}, {"cq"});
      m.Node("DequantizeLinear", {"cq", "y_scale", "y_zero"}, {"cd"});
    }
    m.Node("Add", {rounded ? "cd" : "c", "yd"}, {"s"}).Node("Relu", {"s"}, {"r"});
    m.Node("QuantizeLinear", {"r", "y_scale", "y_zero"}, {"rq"});
    m.Node("DequantizeLinear", {"rq", "y_scale", "y_zero"}, {"rd"});
    const auto graph = Optimised(m.Finish("rd"));
    ASSERT_TRUE(graph.ok()) << graph.status();
    ASSERT_EQ(graph->nodes.size(), rounded ? 4u : 3u);
    const graph::Node& last = graph->nodes[graph->nodes.size() - 2];
    EXPECT_EQ(last.op, rounded ? OpType::kAdd : OpType::kConv);
    EXPECT_EQ(last.has_residual(), !rounded);
    EXPECT_TRUE(last.clip);
    EXPECT_TRUE(graph->values[last.output].quant);
  }
}

TEST(ImportQuantizedTest, BatchNormalisationGoesIntoTheStepsAndSigns) {
  const auto build = [](bool folded) {
    ModelBuilder m = Convolution{}.Build();
    m.Weight("s", Floats({2}, {-2, 0.5f})).Weight("o", Floats({2}, {1, 2}));
    m.Weight("zero", Floats({2}, {0, 0})).Weight("one", Floats({2}, {1, 1}));
    m.Node("Conv", {"x", "wd", "bd"}, {"c"});
    if (!folded) {  // read once more, so that it stays
      m.Node("BatchNormalization", {"c", "s", "o", "zero", "one"}, {"other"}, {{"epsilon", 0.0f}});
    }
    m.Node("BatchNormalization", {"c", "s", "o", "zero", "one"}, {"n"}, {{"epsilon", 0.0f}});
    return folded ? m.Finish("n")
                  : m.Node("Concat", {"n", "other"}, {"j"}, {{"axis", 1}}).Finish("j");
  };
  const auto graph = Optimised(build(true));
  ASSERT_TRUE(graph.ok()) << graph.status();
  const graph::Node& conv = graph->nodes[0];
  EXPECT_THAT(conv.quantized->codes.data<int8_t>(), ElementsAre(-100, 127, 3, 64));
  EXPECT_THAT(conv.quantized->steps, ElementsAre(0.25f, 0.125f));
  EXPECT_THAT(conv.bias.data<float>(), ElementsAre(-1, 0));
  EXPECT_THAT(Evaluate(build(true), {1.0f, -0.6f}), ElementsAre(-41.875f, -3.625f));
  EXPECT_THAT(Evaluate(build(false), {1.0f, -0.6f}),
              ElementsAre(-41.875f, -3.625f, -41.875f, -3.625f));
}

TEST(ImportQuantizedTest, FullyConnectedLayersTakeEitherOrderOfTheirWeights) {
  for (const std::string type : {"Gemm", "GemmT", "MatMul"}) {
    SCOPED_TRACE(type);
    ModelBuilder m(13, {2, 1, 1});
    m.Weight("x_scale", Floats({}, {0.5f})).Weight("x_zero", Bytes(TensorProto::UINT8, {}, {4}));
    const bool t = type == "GemmT";  // [o,c]
    m.Weight("w", t ? Bytes(TensorProto::INT8, {3, 2}, {1, 4, 2, 5, 3, 6})
                    : Bytes(TensorProto::INT8, {2, 3}, {1, 2, 3, 4, 5, 6}));
    m.Weight("w_scale", Floats({3}, {1, 2, 4}));
    m.Node("QuantizeLinear", {"input", "x_scale", "x_zero"}, {"xq"});
    m.Node("DequantizeLinear", {"xq", "x_scale", "x_zero"}, {"x"});
    m.Node("DequantizeLinear", {"w", "w_scale"}, {"wd"}, {{"axis", t ? 0 : 1}});
    m.Node("Flatten", {"x"}, {"f"});
    m.Node(t ? "Gemm" : type, {"f", "wd"}, {"y"});
    if (t) {
      auto* attribute = m.graph().mutable_node(m.graph().node_size() - 1)->add_attribute();
      attribute->set_name("transB");
      attribute->set_type(::onnx::AttributeProto::INT);
      attribute->set_i(1);
    }
    EXPECT_THAT(Evaluate(m.Finish("y"), {1.0f, -0.5f}), ElementsAre(-1, -1, 0));
    const auto graph = Optimised(m.model.SerializeAsString());
    ASSERT_TRUE(graph.ok()) << graph.status();
    bool found = false;
    for (const graph::Node& node : graph->nodes) {
      if (node.op != OpType::kFullyConnected) continue;
      found = true;
      EXPECT_THAT(node.quantized->codes.data<int8_t>(), ElementsAre(1, 4, 2, 5, 3, 6));
    }
    EXPECT_TRUE(found);
  }
}

TEST(ImportQuantizedTest, FloatWeightsThatTheFileQuantisesItselfAreRounded) {
  Convolution c;
  ModelBuilder m = c.Build();
  for (TensorProto& tensor : *m.graph().mutable_initializer()) {
    if (tensor.name() != "w") continue;
    tensor = Floats({2, 2, 1, 1}, {12.52f, -15.83f, 0.7f, 99.0f});  // 99 / 0.25 saturates
    tensor.set_name("w_real");
  }
  m.Node("QuantizeLinear", {"w_real", "w_scale", "w_zero"}, {"w"}, {{"axis", 0}});
  // Definitions come before uses.
  for (int i = m.graph().node_size() - 1; i > 0; --i) {
    m.graph().mutable_node()->SwapElements(i, i - 1);
  }
  const auto graph = Optimised(m.Finish("yd"));
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_THAT(graph->nodes[0].quantized->codes.data<int8_t>(), ElementsAre(100, -127, 3, 127));
}

TEST(ImportQuantizedTest, AnOperandStoredAsCodesIsAFloatConstant) {
  ModelBuilder m(13, {2, 1, 1});
  m.Weight("k", Bytes(TensorProto::UINT8, {1, 2, 1, 1}, {10, 200}));
  m.Weight("s", Floats({}, {0.5f})).Weight("z", Bytes(TensorProto::UINT8, {}, {100}));
  m.Node("DequantizeLinear", {"k", "s", "z"}, {"kd"}).Node("Add", {"input", "kd"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {1, 2}), ElementsAre(-44, 52));
}

TEST(ImportQuantizedTest, AValueThatFloatNodesAlsoReadStaysFloatForThem) {
  ModelBuilder m(13, {2, 1, 1});
  m.Weight("s", Floats({}, {1})).Weight("z", Bytes(TensorProto::UINT8, {}, {0}));
  m.Node("QuantizeLinear", {"input", "s", "z"}, {"q"})
      .Node("DequantizeLinear", {"q", "s", "z"}, {"d"});
  m.Node("Add", {"d", "input"}, {"y"});
  EXPECT_THAT(Evaluate(m.Finish("y"), {1.25f, 2.75f}), ElementsAre(2.25f, 5.75f));
}

// A slice of two axes is two nodes here; padding and pools that nobody quantises again move codes
// too.
TEST(ImportQuantizedTest, WhatOnlyMovesCodesNeedsNoQuantisationOfItsOwn) {
  ModelBuilder m(13, {2, 4, 4});
  m.Weight("s", Floats({}, {1})).Weight("z", Bytes(TensorProto::UINT8, {}, {7}));
  m.Weight("starts", List({1, 0})).Weight("ends", List({4, 4})).Weight("axes", List({2, 3}));
  m.Weight("steps", List({2, 2})).Weight("pads", List({0, 0, 1, 0, 0, 0, 0, 0}));
  m.Node("QuantizeLinear", {"input", "s", "z"}, {"q"});
  m.Node("DequantizeLinear", {"q", "s", "z"}, {"d"});
  m.Node("Slice", {"d", "starts", "ends", "axes", "steps"}, {"c"});
  m.Node("Pad", {"c", "pads"}, {"p"}).Node("MaxPool", {"p"}, {"m"}, {{"kernel_shape", {2, 1}}});
  m.Node("Transpose", {"m"}, {"t"}, {{"perm", {0, 1, 3, 2}}}).Node("Relu", {"t"}, {"r"});
  m.Node("QuantizeLinear", {"r", "s", "z"}, {"rq"});
  m.Node("DequantizeLinear", {"rq", "s", "z"}, {"rd"});
  const std::string bytes = m.Finish("rd");
  const auto graph = Optimised(bytes);
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (const graph::Node& node : graph->nodes) {
    if (node.output == graph->output) continue;
    EXPECT_TRUE(graph->values[node.output].quant) << node.name;
  }
  // Rows 1 and 3, columns 0 and 2 of each plane, as codes: -1.4 -> -1, 0.6 -> 1, 6.6 -> 7, 8.6 ->
  // 9; the largest of a zero above and row 1, then of rows 1 and 3; transposed.
  std::vector<float> image;
  for (int i = 0; i < 32; ++i) image.push_back(static_cast<float>(i % 16) - 5.4f);
  EXPECT_THAT(Evaluate(bytes, image), ElementsAre(0, 7, 1, 9, 0, 7, 1, 9));
}

TEST(ImportQuantizedTest, ASecondQuantisationWithOtherParametersRoundsAgain) {
  ModelBuilder m(13, {2, 1, 1});
  m.Weight("s", Floats({}, {1})).Weight("z", Bytes(TensorProto::UINT8, {}, {0}));
  m.Weight("s2", Floats({}, {4})).Weight("z2", Bytes(TensorProto::INT8, {}, {-128}));
  m.Node("QuantizeLinear", {"input", "s", "z"}, {"q"})
      .Node("DequantizeLinear", {"q", "s", "z"}, {"d"});
  m.Node("QuantizeLinear", {"d", "s2", "z2"}, {"q2"});
  m.Node("DequantizeLinear", {"q2", "s2", "z2"}, {"d2"});
  EXPECT_THAT(Evaluate(m.Finish("d2"), {5.6f, 8.9f}), ElementsAre(8, 8));  // 6 -> 1.5 -> 2; 9 -> 2
}

// ---- what cannot be held ----

void ExpectRefused(const std::string& bytes, absl::StatusCode code, const std::string& words) {
  const auto graph = Import(bytes);
  EXPECT_EQ(graph.status().code(), code) << graph.status();
  EXPECT_THAT(std::string(graph.status().message()), HasSubstr(words));
}

TEST(ImportQuantizedTest, RefusesWeightsThatAreNotSymmetric) {
  Convolution c;
  c.weights = Bytes(TensorProto::UINT8, {2, 2, 1, 1}, {255, 1, 131, 192});
  c.weight_zeros = Bytes(TensorProto::UINT8, {2}, {100, 128});
  ExpectRefused(c.Bytes_(), absl::StatusCode::kUnimplemented,
                "'Conv_5' (Conv): weight codes are up to 155 from their zero point");
  c = {};
  c.weights = Bytes(TensorProto::UINT8, {2, 2, 1, 1}, {255, 1, 131, 192});
  c.weight_zeros = Bytes(TensorProto::UINT8, {2}, {127, 128});  // 128 after subtraction
  ExpectRefused(c.Bytes_(), absl::StatusCode::kUnimplemented, "up to 128 from");
}

TEST(ImportQuantizedTest, RefusesScalesAlongOtherAxes) {
  Convolution c;
  c.axis = 1;
  ExpectRefused(c.Bytes_(), absl::StatusCode::kUnimplemented,
                "weight scales lie along axis 1, wanted one per output channel (axis 0)");
  ModelBuilder m(13, {2, 1, 1});
  m.Weight("s", Floats({2}, {1, 2})).Weight("z", Bytes(TensorProto::UINT8, {2}, {0, 0}));
  m.Node("QuantizeLinear", {"input", "s", "z"}, {"q"});
  ExpectRefused(m.Node("DequantizeLinear", {"q", "s", "z"}, {"d"}).Finish("d"),
                absl::StatusCode::kUnimplemented, "(QuantizeLinear): values have 2 scales");
}

TEST(ImportQuantizedTest, RefusesOperatorsOnCodes) {
  const auto start = [] {
    ModelBuilder m(13, {2, 2, 2});
    m.Weight("s", Floats({}, {1})).Weight("z", Bytes(TensorProto::UINT8, {}, {0}));
    m.Weight("i", List({0}));
    return m.Node("QuantizeLinear", {"input", "s", "z"}, {"q"});
  };
  ExpectRefused(start().Node("MaxPool", {"q"}, {"y"}, {{"kernel_shape", {1, 1}}}).Finish("y"),
                absl::StatusCode::kUnimplemented,
                "(MaxPool): input 0 is codes of QuantizeLinear, which only DequantizeLinear");
  ExpectRefused(
      start().Node("QLinearConv", {"q", "s", "z", "z", "s", "z", "s", "z"}, {"y"}).Finish("y"),
      absl::StatusCode::kUnimplemented, "QLinearConv is not supported");
  ExpectRefused(start().Node("Add", {"input", "z"}, {"y"}).Finish("y"),
                absl::StatusCode::kUnimplemented, "(Add): input 1 holds u8 codes");
  ModelBuilder m = start();
  m.graph().add_output()->set_name("q");
  ExpectRefused(m.model.SerializeAsString(), absl::StatusCode::kUnimplemented,
                "output 'q' is codes");
}

TEST(ImportQuantizedTest, RefusesParametersThatAreNone) {
  const auto build = [](TensorProto scale, TensorProto zero, TensorProto other_scale) {
    ModelBuilder m(13, {2, 1, 1});
    m.Weight("s", std::move(scale))
        .Weight("z", std::move(zero))
        .Weight("s2", std::move(other_scale));
    m.Node("QuantizeLinear", {"input", "s", "z"}, {"q"});
    return m.Node("DequantizeLinear", {"q", "s2", "z"}, {"d"}).Finish("d");
  };
  const TensorProto one = Floats({}, {1}), zero = Bytes(TensorProto::UINT8, {}, {0});
  for (const float scale : {0.0f, -1.0f, NAN, INFINITY}) {
    ExpectRefused(build(Floats({}, {scale}), zero, one), absl::StatusCode::kInvalidArgument,
                  "(QuantizeLinear): a scale is");
  }
  ExpectRefused(build(one, zero, Floats({}, {2})), absl::StatusCode::kUnimplemented,
                "are read with scale 2");
  ExpectRefused(build(one, Bytes(TensorProto::UINT8, {2}, {0, 0}), one),
                absl::StatusCode::kInvalidArgument, "got 2 zero points for 1 scales");
  ExpectRefused(build(one, Ints32({}, {0}), one), absl::StatusCode::kUnimplemented,
                "quantises values to element type 6");
  ExpectRefused(build(one, Floats({}, {0}), one), absl::StatusCode::kInvalidArgument,
                "the zero point holds no integers");
}

}  // namespace
}  // namespace tern::onnx
