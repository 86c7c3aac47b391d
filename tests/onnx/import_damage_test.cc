// Damaged files: every byte string gives a status, never a crash, a hang or a huge allocation.

#include <gtest/gtest.h>

#include <random>

#include "server/graph/passes.h"
#include "server/onnx/import.h"
#include "tests/onnx/model_builder.h"

namespace tern::onnx {
namespace {

using tern::testing::Bytes;
using tern::testing::Dims;
using tern::testing::Floats;
using tern::testing::Ints;
using tern::testing::Ints32;
using tern::testing::List;
using tern::testing::ModelBuilder;

// A valid model with most kinds of operators and attributes.
std::string Valid() {
  ModelBuilder m(13, {3, 8, 8});
  m.Weight("w", Floats({4, 3, 3, 3}, std::vector<float>(108, 0.1f)));
  m.Weight("b", Floats({4}, {1, 2, 3, 4}));
  m.Weight("fc", Floats({5, 16}, std::vector<float>(80, 0.2f)));
  m.Weight("zero", Ints({}, {0})).Weight("axis", List({0})).Weight("rest", List({-1}));
  m.Weight("starts", List({0, 0})).Weight("ends", List({100, INT64_MAX}));
  m.Weight("axes", List({2, 3})).Weight("steps", List({2, 1}));
  m.Weight("pads", List({0, 0, 0, 1, 0, 0, 0, 1})).Weight("six", Floats({}, {6}));
  m.Weight("low", Floats({}, {0}));
  m.Node("Conv", {"input", "w", "b"}, {"c"},
         {{"pads", {1, 1, 1, 1}}, {"kernel_shape", {3, 3}}, {"group", 1}, {"strides", {1, 1}}})
      .Node("BatchNormalization", {"c", "b", "b", "b", "b"}, {"n"}, {{"epsilon", 1e-5f}})
      .Node("Clip", {"n", "low", "six"}, {"r"})
      .Node("Slice", {"r", "starts", "ends", "axes", "steps"}, {"s"})
      .Node("Pad", {"s", "pads"}, {"p"}, {{"mode", "constant"}})
      .Node("MaxPool", {"p"}, {"m"},
            {{"kernel_shape", {2, 2}}, {"ceil_mode", 1}, {"strides", {2, 3}}})
      .Node("Split", {"m"}, {"a", "z"}, {{"axis", 1}})
      .Node("Concat", {"z", "a"}, {"j"}, {{"axis", 1}})
      .Node("Transpose", {"j"}, {"t"}, {{"perm", {0, 1, 3, 2}}})
      .Node("ReduceMean", {"t"}, {"g"}, {{"axes", Dims{2}}, {"keepdims", 1}})
      .Node("Concat", {"g", "g"}, {"gg"}, {{"axis", 3}})
      .Node("Shape", {"gg"}, {"shape"})
      .Node("Gather", {"shape", "zero"}, {"batch"}, {{"axis", 0}})
      .Node("Unsqueeze", {"batch", "axis"}, {"batch1"})
      .Node("Concat", {"batch1", "rest"}, {"target"}, {{"axis", 0}})
      .Node("Reshape", {"gg", "target"}, {"v"})
      .Node("Gemm", {"v", "fc"}, {"y"}, {{"transB", 1}, {"alpha", 0.5f}});
  return m.Finish("y");
}

// The same for quantised files: codes of every width, scales per tensor and per channel.
std::string ValidQuantized() {
  constexpr auto kU8 = ::onnx::TensorProto::UINT8, kS8 = ::onnx::TensorProto::INT8;
  ModelBuilder m(13, {3, 4, 4});
  m.Weight("s", Floats({}, {0.05f})).Weight("z", Bytes(kU8, {}, {128}));
  m.Weight("zs", Bytes(kS8, {}, {-5}));
  m.Weight("w", Bytes(kS8, {4, 3, 3, 3}, std::vector<int>(108, -77)));
  m.Weight("ws", Floats({4}, {0.1f, 0.2f, 0.3f, 0.4f})).Weight("wz", Bytes(kS8, {4}, {0, 0, 0, 0}));
  m.Weight("b", Ints32({4}, {1, -2, 3, -4}))
      .Weight("fc", Bytes(kU8, {4, 5}, std::vector<int>(20, 1)));
  m.Weight("real", Floats({4, 4, 1, 1}, std::vector<float>(16, 0.7f))).Weight("axis", List({2, 3}));
  m.Weight("fz", Bytes(kU8, {}, {127}));
  m.Node("QuantizeLinear", {"input", "s", "z"}, {"xq"});
  m.Node("DequantizeLinear", {"xq", "s", "z"}, {"x"});
  m.Node("DequantizeLinear", {"w", "ws", "wz"}, {"wd"}, {{"axis", 0}});
  m.Node("DequantizeLinear", {"b", "ws"}, {"bd"}, {{"axis", 0}});
  m.Node("Conv", {"x", "wd", "bd"}, {"c"}, {{"pads", {1, 1, 1, 1}}});
  m.Node("BatchNormalization", {"c", "ws", "ws", "ws", "ws"}, {"n"}).Node("Relu", {"n"}, {"r"});
  m.Node("QuantizeLinear", {"r", "s", "zs"}, {"rq"});
  m.Node("DequantizeLinear", {"rq", "s", "zs"}, {"rd"});
  m.Node("QuantizeLinear", {"real", "ws", "wz"}, {"vq"}, {{"axis", 0}});
  m.Node("DequantizeLinear", {"vq", "ws", "wz"}, {"v"}, {{"axis", 0}});
  m.Node("Conv", {"rd", "v", "bd"}, {"d"}).Node("Add", {"d", "rd"}, {"e"});
  m.Node("QuantizeLinear", {"e", "s", "z"}, {"eq"});
  m.Node("DequantizeLinear", {"eq", "s", "z"}, {"ed"});
  m.Node("GlobalAveragePool", {"ed"}, {"g"}).Node("Squeeze", {"g", "axis"}, {"f"});
  m.Node("DequantizeLinear", {"fc", "s", "fz"}, {"fd"}).Node("MatMul", {"f", "fd"}, {"y"});
  return m.Finish("y");
}

// Whatever is accepted must be a valid graph that the passes can take.
void Try(const std::string& bytes) {
  absl::StatusOr<graph::Graph> graph = Import(bytes);
  if (!graph.ok()) {
    EXPECT_TRUE(graph.status().code() == absl::StatusCode::kInvalidArgument ||
                graph.status().code() == absl::StatusCode::kUnimplemented)
        << graph.status();
    return;
  }
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
  graph::Optimize(*graph);
  EXPECT_EQ(graph::Validate(*graph), absl::OkStatus());
}

TEST(ImportDamageTest, TheUndamagedModelIsAccepted) {
  for (const std::string& valid : {Valid(), ValidQuantized()}) {
    const auto graph = Import(valid);
    ASSERT_TRUE(graph.ok()) << graph.status();
    EXPECT_EQ(graph->classes(), 5);
  }
}

TEST(ImportDamageTest, SurvivesTruncationAtEveryByte) {
  for (const std::string& valid : {Valid(), ValidQuantized()}) {
    for (size_t length = 0; length < valid.size(); ++length) Try(valid.substr(0, length));
  }
}

TEST(ImportDamageTest, SurvivesFlippedBits) {
  const std::string valid[] = {Valid(), ValidQuantized()};
  std::mt19937 random(1);
  for (int i = 0; i < 12000; ++i) {
    std::string bytes = valid[i % 2];
    const int flips = 1 + static_cast<int>(random() % 3);
    for (int f = 0; f < flips; ++f)
      bytes[random() % bytes.size()] ^= static_cast<char>(1 << random() % 8);
    Try(bytes);
  }
}

// Flipped bits mostly end in the protobuf parser or in weights; these reach the numbers.
TEST(ImportDamageTest, SurvivesRandomNumbersInEveryField) {
  std::mt19937_64 random(2);
  const std::string valid[] = {Valid(), ValidQuantized()};
  const int64_t interesting[] = {
      0,         1,        -1,   2,       3,         4,         5,
      7,         100,      -100, 1 << 20, INT32_MAX, INT32_MIN, int64_t{1} << 32,
      INT64_MAX, INT64_MIN};
  const auto number = [&] { return interesting[random() % std::size(interesting)]; };
  for (int i = 0; i < 12000; ++i) {
    ::onnx::ModelProto model;
    ASSERT_TRUE(model.ParseFromString(valid[i % 2]));
    auto& graph = *model.mutable_graph();
    for (int change = 0; change < 2; ++change) {
      auto& node = *graph.mutable_node(random() % graph.node_size());
      auto& tensor = *graph.mutable_initializer(random() % graph.initializer_size());
      switch (random() % 8) {
        case 0:
          if (node.attribute_size() > 0) {
            auto& attribute = *node.mutable_attribute(random() % node.attribute_size());
            attribute.set_i(number());
            if (attribute.ints_size() > 0) {
              attribute.set_ints(random() % attribute.ints_size(), number());
            }
          }
          break;
        case 1:
          if (tensor.dims_size() > 0) tensor.set_dims(random() % tensor.dims_size(), number());
          break;
        case 2:
          if (tensor.int64_data_size() > 0) {
            tensor.set_int64_data(random() % tensor.int64_data_size(), number());
          }
          break;
        case 3:
          // Another tensor that exists.
          node.set_input(random() % node.input_size(),
                         random() % 2 == 0 ? tensor.name()
                                           : graph.node(random() % graph.node_size()).output(0));
          break;
        case 4: {
          auto* shape =
              graph.mutable_input(0)->mutable_type()->mutable_tensor_type()->mutable_shape();
          shape->mutable_dim(random() % 4)->set_dim_value(number());
          break;
        }
        case 5:
          tensor.set_data_type(static_cast<int>(random() % 8));
          break;
        case 6:
          if (tensor.has_raw_data() && !tensor.raw_data().empty()) {
            auto& bytes = *tensor.mutable_raw_data();
            bytes[random() % bytes.size()] = static_cast<char>(number());
          } else if (tensor.int32_data_size() > 0) {
            tensor.set_int32_data(0, static_cast<int32_t>(number()));
          }
          break;
        default:
          node.set_op_type(graph.node(random() % graph.node_size()).op_type());
      }
    }
    Try(model.SerializeAsString());
  }
}

// Zero points are codes, which arithmetic does not take.
TEST(ImportDamageTest, AConstantOfShapeOfCodesIsRefusedWhereItIsRead) {
  for (auto type : {::onnx::TensorProto::INT8, ::onnx::TensorProto::UINT8}) {
    ModelBuilder m(13, {1, 2, 2});
    m.Weight("shape", List({2}));
    m.Node("ConstantOfShape", {"shape"}, {"filled"}, {{"value", Bytes(type, {1}, {3})}});
    const auto got = Import(m.Node("Add", {"input", "filled"}, {"y"}).Finish("y"));
    EXPECT_EQ(got.status().code(), absl::StatusCode::kUnimplemented) << got.status();
  }
}

TEST(ImportDamageTest, ASmallFileCannotMakeMoreNodesThanALargeOne) {
  ModelBuilder m(13, {4096, 1, 1});
  std::vector<int64_t> reversed(4096);
  for (size_t i = 0; i < reversed.size(); ++i) reversed[i] = 4095 - static_cast<int64_t>(i);
  m.Weight("order", List(reversed));
  std::string from = "input";
  for (int i = 0; i < 25; ++i) {  // 102,400 slices
    const std::string to = "g" + std::to_string(i);
    m.Node("Gather", {from, "order"}, {to}, {{"axis", 1}});
    from = to;
  }
  const auto got = Import(m.Finish(from));
  EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(got.status().message().find("more than 100000 nodes"), std::string::npos)
      << got.status();
}

TEST(ImportDamageTest, ComputedIntegersCountWithWhatTheyTake) {
  ModelBuilder m(13, {1, 1, 1});
  m.Weight("shape", List({65536}));
  for (int i = 0; i < 1100; ++i) {  // 1 MiB each
    m.Node("ConstantOfShape", {"shape"}, {"c" + std::to_string(i)}, {{"value", List({7})}});
  }
  const auto got = Import(m.Node("Relu", {"input"}, {"y"}).Finish("y"));
  EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(got.status().message().find("computed constants"), std::string::npos) << got.status();
}

TEST(ImportDamageTest, TheListOfPositionsOfASliceCounts) {
  ModelBuilder m(13, {1, 1, 1});
  m.Weight("shape", List({int64_t{1} << 27}));
  m.Weight("starts", List({0})).Weight("ends", List({int64_t{1} << 27}));
  m.Node("ConstantOfShape", {"shape"}, {"c"}).Node("Slice", {"c", "starts", "ends"}, {"s"});
  const auto got = Import(m.Node("Relu", {"input"}, {"y"}).Finish("y"));
  EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument) << got.status();
}

TEST(ImportDamageTest, RejectsBytesThatAreNoModel) {
  EXPECT_EQ(Import("").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Import("\x89PNG\r\n").status().code(), absl::StatusCode::kInvalidArgument);
  // Groups nested a thousand deep, as an unknown field.
  EXPECT_EQ(Import(std::string(1000, '\x7b')).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::onnx
