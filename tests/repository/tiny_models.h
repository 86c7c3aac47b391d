// Networks of a few hundred weights for the repository's tests: as ONNX bytes and as an artifact.
#ifndef TERN_TESTS_REPOSITORY_TINY_MODELS_H_
#define TERN_TESTS_REPOSITORY_TINY_MODELS_H_

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "onnx/onnx_pb.h"
#include "server/artifact/artifact.h"
#include "server/engine/plan.h"
#include "server/graph/graph.h"
#include "server/tensor/cluster.h"

namespace tern::repository::testing {

inline constexpr int kSide = 8;
inline constexpr int kWidth = 8;  // channels of the only convolution

// Images of exactly kSide x kSide pixels, scaled to 0..1.
inline v1::Preprocessing Contract() {
  v1::Preprocessing contract;
  contract.set_scale(1.0f / 255);
  return contract;
}

inline std::vector<std::string> Labels(int classes = 4) {
  std::vector<std::string> labels;
  for (int i = 0; i < classes; ++i) labels.push_back(absl::StrCat("class ", i));
  return labels;
}

inline std::vector<float> RandomValues(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

// [N,channels,8,8] -> Conv 3x3 -> Relu -> GlobalAveragePool -> Flatten -> Gemm -> [N,classes].
inline std::string TinyOnnx(unsigned seed, int classes = 4, int channels = 3,
                            const std::string& activation = "Relu") {
  ::onnx::ModelProto model;
  model.set_ir_version(8);
  auto* opset = model.add_opset_import();
  opset->set_domain("");
  opset->set_version(13);
  ::onnx::GraphProto& graph = *model.mutable_graph();
  graph.set_name(absl::StrCat("tiny", seed));
  const auto describe = [](::onnx::ValueInfoProto* value, const char* name,
                           const std::vector<int64_t>& shape) {
    value->set_name(name);
    auto* tensor = value->mutable_type()->mutable_tensor_type();
    tensor->set_elem_type(::onnx::TensorProto::FLOAT);
    tensor->mutable_shape()->add_dim()->set_dim_param("N");
    for (int64_t extent : shape) tensor->mutable_shape()->add_dim()->set_dim_value(extent);
  };
  describe(graph.add_input(), "x", {channels, kSide, kSide});
  describe(graph.add_output(), "y", {classes});
  const auto weight = [&](const char* name, const std::vector<int64_t>& shape, unsigned offset) {
    auto* tensor = graph.add_initializer();
    tensor->set_name(name);
    tensor->set_data_type(::onnx::TensorProto::FLOAT);
    int64_t count = 1;
    for (int64_t extent : shape) {
      tensor->add_dims(extent);
      count *= extent;
    }
    for (float value : RandomValues(count, seed * 10 + offset)) tensor->add_float_data(value);
  };
  weight("w1", {kWidth, channels, 3, 3}, 1);
  weight("b1", {kWidth}, 2);
  weight("w2", {classes, kWidth}, 3);
  weight("b2", {classes}, 4);
  const auto node = [&](const char* op, const std::vector<std::string>& inputs,
                        const char* output) {
    auto* n = graph.add_node();
    n->set_op_type(op);
    n->set_name(absl::StrCat("node_", output));
    for (const std::string& input : inputs) n->add_input(input);
    n->add_output(output);
    return n;
  };
  auto* pads = node("Conv", {"x", "w1", "b1"}, "conv")->add_attribute();
  pads->set_name("pads");
  pads->set_type(::onnx::AttributeProto::INTS);
  for (int i = 0; i < 4; ++i) pads->add_ints(1);
  node(activation.c_str(), {"conv"}, "relu");
  node("GlobalAveragePool", {"relu"}, "pooled");
  node("Flatten", {"pooled"}, "flat");
  auto* transposed = node("Gemm", {"flat", "w2", "b2"}, "y")->add_attribute();
  transposed->set_name("transB");
  transposed->set_type(::onnx::AttributeProto::INT);
  transposed->set_i(1);
  return model.SerializeAsString();
}

// Random codes in the range of the scheme.
inline QuantizedWeights RandomWeights(Shape shape, WeightScheme scheme, unsigned seed) {
  const int limit = scheme == WeightScheme::kInt8          ? 63
                    : scheme == WeightScheme::kInt4Cluster ? 7
                    : scheme == WeightScheme::kInt3Cluster ? 3
                                                           : 1;
  std::mt19937 random(seed);
  QuantizedWeights weights;
  weights.scheme = scheme;
  weights.codes = Tensor(DType::kS8, shape);
  for (int8_t& code : weights.codes.data<int8_t>()) {
    code = static_cast<int8_t>(static_cast<int>(random() % (2 * limit + 1)) - limit);
  }
  weights.steps.assign(shape[0], scheme == WeightScheme::kInt8 ? 1.0f / 63 : 1.0f / 127 / limit);
  if (scheme != WeightScheme::kInt8) {
    weights.cluster_size = 4;
    const ClusterMap map(static_cast<int>(shape[1]), 4);
    weights.cluster_scales = Tensor(DType::kS8, {shape[0], map.clusters()});
    for (int8_t& scale : weights.cluster_scales.data<int8_t>())
      scale = static_cast<int8_t>(64 + random() % 64);
  }
  return weights;
}

// The same network with quantised weights (the convolution's scheme; the last layer int8) and a
// self-test of three images whose logits the engine computed.
inline artifact::Artifact TinyArtifact(unsigned seed,
                                       WeightScheme scheme = WeightScheme::kTernaryCluster,
                                       int classes = 4) {
  artifact::Artifact artifact;
  graph::Graph& graph = artifact.graph;
  graph.name = absl::StrCat("tiny", seed);
  const QuantParams signed_unit{1.0f / 127, 128};
  const QuantParams activations{8.0f / 255, 0};
  graph.input = graph.AddValue({"x", {3, kSide, kSide}, {}, signed_unit});
  const auto relu = graph.AddValue({"relu", {kWidth, kSide, kSide}, {}, activations});
  const auto pooled = graph.AddValue({"pooled", {kWidth, 1, 1}, {}, activations});
  const auto flat = graph.AddValue({"flat", {kWidth}, {}, activations});
  graph.output = graph.AddValue({"y", {classes}, {}, {}});

  graph::Node conv;
  conv.name = "conv";
  conv.op = graph::OpType::kConv;
  conv.inputs = {graph.input};
  conv.output = relu;
  conv.conv.pad_top = conv.conv.pad_left = conv.conv.pad_bottom = conv.conv.pad_right = 1;
  conv.clip = graph::ClipRange{0.0f, std::numeric_limits<float>::infinity()};
  conv.quantized = RandomWeights({kWidth, 3, 3, 3}, scheme, seed);
  conv.bias = Tensor::Of(Shape{kWidth}, RandomValues(kWidth, seed + 1));
  graph.nodes.push_back(std::move(conv));
  graph::Node pool;
  pool.name = "pool";
  pool.op = graph::OpType::kGlobalAveragePool;
  pool.inputs = {relu};
  pool.output = pooled;
  graph.nodes.push_back(std::move(pool));
  graph::Node flatten;
  flatten.name = "flatten";
  flatten.op = graph::OpType::kReshape;
  flatten.inputs = {pooled};
  flatten.output = flat;
  graph.nodes.push_back(std::move(flatten));
  graph::Node last;
  last.name = "last";
  last.op = graph::OpType::kFullyConnected;
  last.inputs = {flat};
  last.output = graph.output;
  last.quantized = RandomWeights({classes, kWidth}, WeightScheme::kInt8, seed + 2);
  last.bias = Tensor::Of(Shape{classes}, RandomValues(classes, seed + 3));
  graph.nodes.push_back(std::move(last));

  artifact.preprocessing = Contract();
  artifact.labels = Labels(classes);
  artifact.source_sha256 = std::string(64, 'a');
  const absl::Status valid = graph::Validate(graph);
  EXPECT_TRUE(valid.ok()) << valid;

  constexpr int kImages = 3;
  artifact.self_test_input = Tensor::Of(Shape{kImages, 3, kSide, kSide},
                                        RandomValues(kImages * 3 * kSide * kSide, seed + 4));
  const auto plan = engine::Plan::Create(graph, engine::PlanOptions());
  EXPECT_TRUE(plan.ok()) << plan.status();
  auto session = (*plan)->NewSession(1);
  EXPECT_TRUE(session.ok()) << session.status();
  engine::NchwToNhwc(artifact.self_test_input.data<float>().data(), kImages, 3, kSide, kSide,
                     session->input().data());
  const auto logits = session->Run(kImages);
  EXPECT_TRUE(logits.ok()) << logits.status();
  artifact.self_test_logits =
      Tensor::Of(Shape{kImages, classes},
                 std::vector<float>(logits->begin(), logits->begin() + kImages * classes));
  return artifact;
}

}  // namespace tern::repository::testing

#endif  // TERN_TESTS_REPOSITORY_TINY_MODELS_H_
