#include "server/artifact/artifact.h"

#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "server/artifact/packing.h"
#include "server/base/file.h"
#include "server/graph/fixed_point.h"
#include "server/tensor/cluster.h"
#include "tern/v1/artifact.pb.h"
#include "tests/artifact/pieces.h"

namespace tern::artifact {
namespace {

using absl::StatusCode;
using graph::Graph;
using graph::Node;
using graph::OpType;
using graph::ValueId;

// ---------------------------------------------------------------- graphs

// Grows a graph node by node; shapes come from graph::InferShape.
class Builder {
 public:
  explicit Builder(uint32_t seed) : random_(seed) {}

  int Int(int low, int high) { return low + static_cast<int>(random_() % (high - low + 1)); }
  float Real() { return static_cast<float>(Int(-1000, 1000)) / 64.0f; }

  Tensor Floats(Shape shape) {
    Tensor tensor(DType::kF32, std::move(shape));
    for (float& value : tensor.data<float>()) value = Real();
    return tensor;
  }

  QuantizedWeights Quantized(Shape shape, WeightScheme scheme, int n) {
    QuantizedWeights weights;
    weights.scheme = scheme;
    const int limit = scheme == WeightScheme::kInt8          ? 63
                      : scheme == WeightScheme::kInt4Cluster ? 7
                      : scheme == WeightScheme::kInt3Cluster ? 3
                                                             : 1;
    weights.codes = Tensor(DType::kS8, shape);
    for (int8_t& code : weights.codes.data<int8_t>())
      code = static_cast<int8_t>(Int(-limit, limit));
    if (scheme != WeightScheme::kInt8) {
      weights.cluster_size = n;
      weights.cluster_scales =
          Tensor(DType::kS8, {shape[0], ClusterMap(static_cast<int>(shape[1]), n).clusters()});
      for (int8_t& scale : weights.cluster_scales.data<int8_t>())
        scale = static_cast<int8_t>(Int(1, 127));
    }
    for (int64_t o = 0; o < shape[0]; ++o)
      weights.steps.push_back(static_cast<float>(Int(1, 1000)) / 4096.0f);
    return weights;
  }

  ValueId Input(Shape shape) {
    graph.input = graph.AddValue({.name = "input", .shape = std::move(shape)});
    if (Int(0, 1)) graph.values[graph.input].quant = QuantParams{0.017f, 114};
    return graph.input;
  }
  ValueId Constant(Shape shape) {
    graph::Value value{.name = "constant", .shape = shape};
    value.constant = Floats(shape);
    return graph.AddValue(std::move(value));
  }
  // `declared` is the output's shape where it is not inferred.
  ValueId Add(OpType op, std::vector<ValueId> inputs,
              const std::function<void(Node&)>& set = nullptr,
              std::optional<Shape> declared = std::nullopt) {
    Node node;
    node.name = absl::StrCat(graph::Name(op), "_", graph.nodes.size());
    node.op = op;
    node.inputs = std::move(inputs);
    if (set) set(node);
    graph::Value value{.name = node.name + ":0"};
    if (declared) value.shape = *declared;
    if (Int(0, 1)) value.quant = QuantParams{static_cast<float>(Int(1, 100)) / 512.0f, Int(0, 255)};
    node.output = graph.AddValue(value);
    const auto shape = graph::InferShape(graph, node);
    EXPECT_TRUE(shape.ok()) << shape.status();
    if (shape.ok()) graph.values[node.output].shape = *shape;
    graph.output = node.output;
    graph.nodes.push_back(std::move(node));
    return graph.output;
  }

  Graph graph;

 private:
  std::mt19937 random_;
};

const WeightScheme kSchemes[] = {WeightScheme::kInt8, WeightScheme::kInt4Cluster,
                                 WeightScheme::kInt3Cluster, WeightScheme::kTernaryCluster};

// Every operator once or more, in an order that depends on the seed only through sizes and
// attributes.
Artifact EveryOperator(uint32_t seed) {
  Builder b(seed);
  b.graph.name = "every operator";
  const int c = 2 * b.Int(1, 5), size = b.Int(8, 12);
  ValueId x = b.Input({c, size, size});
  for (WeightScheme scheme : kSchemes) {
    const int n = b.Int(1, c + 2);
    x = b.Add(OpType::kConv, {x}, [&](Node& node) {
      node.quantized = b.Quantized({c, c, 3, 3}, scheme, n);
      node.bias = b.Floats({c});
      node.conv.pad_top = node.conv.pad_left = node.conv.pad_bottom = node.conv.pad_right = 1;
      if (b.Int(0, 1)) node.clip = graph::ClipRange{0.0f, std::numeric_limits<float>::infinity()};
    });
  }
  const ValueId skip = x;
  x = b.Add(OpType::kConv, {x, skip}, [&](Node& node) {
    node.weight = b.Floats({c, c / 2, 3, 1});
    node.bias = b.Floats({c});
    node.conv.groups = 2;
    node.conv.dilation_h = 2;
    node.conv.pad_top = node.conv.pad_bottom = 2;
    node.clip = graph::ClipRange{0.0f, 6.0f};
  });
  x = b.Add(OpType::kConv, {x}, [&](Node& node) {
    node.quantized = b.Quantized({c, c / 2, 1, 1}, WeightScheme::kInt8, 0);
    node.bias = b.Floats({c});
    node.conv.groups = 2;
    node.conv.stride_h = node.conv.stride_w = 1;
  });
  x = b.Add(OpType::kBatchNorm, {x}, [&](Node& node) {
    node.weight = b.Floats({c});
    node.bias = b.Floats({c});
  });
  x = b.Add(OpType::kRelu, {x});
  x = b.Add(OpType::kClip, {x}, [&](Node& node) {
    node.clip = graph::ClipRange{-1.0f, b.Real() + 100};
  });
  x = b.Add(OpType::kSigmoid, {x});
  x = b.Add(OpType::kHardSigmoid, {x}, [&](Node& node) { node.alpha = 0.2f, node.beta = 0.5f; });
  x = b.Add(OpType::kHardSwish, {x});
  x = b.Add(OpType::kSilu, {x});
  x = b.Add(OpType::kAdd, {x, skip}, [&](Node& node) { node.clip = graph::ClipRange{0.0f, 6.0f}; });
  x = b.Add(OpType::kSub, {x, b.Constant({c, 1, 1})});
  x = b.Add(OpType::kMul, {b.Constant({1}), x});
  x = b.Add(OpType::kDiv, {x, b.Constant({c, size, size})});
  x = b.Add(OpType::kConcat, {x, skip}, [](Node& node) { node.axis = 0; });
  x = b.Add(OpType::kMaxPool, {x},
            [&](Node& node) { node.pool = {3, 2, 1, 1, 1, 0, 1, 1, false, false}; });
  x = b.Add(OpType::kAveragePool, {x},
            [&](Node& node) { node.pool = {2, 2, 2, 2, 0, 1, 1, 0, b.Int(0, 1) == 1, true}; });
  x = b.Add(OpType::kPad, {x}, [&](Node& node) {
    node.pads_before = {0, b.Int(0, 2), 1};
    node.pads_after = {1, 0, b.Int(0, 2)};
    node.pad_value = b.Real();
  });
  x = b.Add(OpType::kSlice, {x},
            [&](Node& node) { node.axis = 0, node.start = 1, node.end = 2 * c, node.step = 2; });
  x = b.Add(OpType::kTranspose, {x}, [](Node& node) { node.perm = {0, 2, 1}; });
  const Shape shape = b.graph.shape(x);
  if (b.Int(0, 1)) {
    x = b.Add(
        OpType::kReduceMean, {x},
        [](Node& node) {
          node.axes = {1, 2};
        },
        Shape{shape[0], 1, 1});
  } else {
    x = b.Add(OpType::kGlobalAveragePool, {x});
  }
  x = b.Add(OpType::kGlobalAveragePool, {x});
  x = b.Add(
      OpType::kReduceMean, {x}, [](Node& node) { node.axes = {2}; }, Shape{shape[0], 1, 1});
  x = b.Add(OpType::kReshape, {x}, nullptr, Shape{shape[0]});
  for (WeightScheme scheme : kSchemes) {
    x = b.Add(OpType::kFullyConnected, {x}, [&](Node& node) {
      const int inputs = static_cast<int>(b.graph.shape(x)[0]);
      node.quantized = b.Quantized({5, inputs}, scheme, b.Int(1, inputs + 1));
      node.bias = b.Floats({5});
    });
  }
  x = b.Add(OpType::kFullyConnected, {x}, [&](Node& node) {
    node.weight = b.Floats({3, 5});
    node.bias = b.Floats({3});
  });
  x = b.Add(OpType::kSoftmax, {x}, [](Node& node) { node.axis = 0; });

  Artifact artifact;
  artifact.graph = std::move(b.graph);
  artifact.preprocessing.set_resize(v1::Preprocessing::SHORTER_SIDE);
  artifact.preprocessing.set_resize_size(size);
  artifact.preprocessing.add_mean(0.5f);
  artifact.preprocessing.set_jpeg_scaling(true);
  artifact.labels = {"cat", "K\xc3\xa4se", ""};
  artifact.report.set_source_model("source");
  artifact.report.add_layers()->set_name("Conv_0");
  artifact.report.set_sqnr_db(31.5);
  artifact.report.mutable_recipe()->set_max_top1_drop(0.01);
  artifact.source_sha256 = std::string(64, 'a');
  artifact.self_test_input = b.Floats({2, c, size, size});
  artifact.self_test_logits = b.Floats({2, 3});
  return artifact;
}

// A file of a few hundred bytes with every kind of section.
Artifact Small() {
  Builder b(1);
  ValueId x = b.Input({5});
  x = b.Add(OpType::kFullyConnected, {x}, [&](Node& node) {
    node.quantized = b.Quantized({3, 5}, WeightScheme::kTernaryCluster, 2);
    node.bias = b.Floats({3});
  });
  x = b.Add(OpType::kFullyConnected, {x}, [&](Node& node) {
    node.quantized = b.Quantized({2, 3}, WeightScheme::kInt4Cluster, 4);
    node.bias = b.Floats({2});
  });
  x = b.Add(OpType::kMul, {x, b.Constant({2})});
  Artifact artifact;
  artifact.graph = std::move(b.graph);
  artifact.labels = {"a", "b"};
  artifact.self_test_input = b.Floats({1, 5});
  artifact.self_test_logits = b.Floats({1, 2});
  return artifact;
}

void ExpectSame(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.dtype(), b.dtype());
  EXPECT_EQ(a.shape(), b.shape());
  ASSERT_EQ(a.size_bytes(), b.size_bytes());
  if (!a.empty()) {
    EXPECT_EQ(std::memcmp(a.raw(), b.raw(), a.size_bytes()), 0);
  }
}

void ExpectSame(const Artifact& a, const Artifact& b) {
  EXPECT_EQ(a.graph.name, b.graph.name);
  EXPECT_EQ(a.graph.input, b.graph.input);
  EXPECT_EQ(a.graph.output, b.graph.output);
  ASSERT_EQ(a.graph.values.size(), b.graph.values.size());
  for (size_t i = 0; i < a.graph.values.size(); ++i) {
    const graph::Value &v = a.graph.values[i], &w = b.graph.values[i];
    EXPECT_EQ(v.name, w.name);
    EXPECT_EQ(v.shape, w.shape);
    EXPECT_EQ(v.quant, w.quant);
    ASSERT_EQ(v.constant.has_value(), w.constant.has_value());
    if (v.constant) ExpectSame(*v.constant, *w.constant);
  }
  ASSERT_EQ(a.graph.nodes.size(), b.graph.nodes.size());
  for (size_t i = 0; i < a.graph.nodes.size(); ++i) {
    const Node &m = a.graph.nodes[i], &n = b.graph.nodes[i];
    SCOPED_TRACE(m.name);
    EXPECT_EQ(m.name, n.name);
    EXPECT_EQ(m.op, n.op);
    EXPECT_EQ(m.inputs, n.inputs);
    EXPECT_EQ(m.output, n.output);
    EXPECT_EQ(m.conv, n.conv);
    EXPECT_EQ(m.pool, n.pool);
    EXPECT_EQ(m.clip, n.clip);
    EXPECT_EQ(m.axis, n.axis);
    EXPECT_EQ(m.start, n.start);
    EXPECT_EQ(m.end, n.end);
    EXPECT_EQ(m.step, n.step);
    EXPECT_EQ(m.perm, n.perm);
    EXPECT_EQ(m.axes, n.axes);
    EXPECT_EQ(m.pads_before, n.pads_before);
    EXPECT_EQ(m.pads_after, n.pads_after);
    EXPECT_EQ(m.pad_value, n.pad_value);
    EXPECT_EQ(m.alpha, n.alpha);
    EXPECT_EQ(m.beta, n.beta);
    ExpectSame(m.weight, n.weight);
    ExpectSame(m.bias, n.bias);
    ASSERT_EQ(m.quantized.has_value(), n.quantized.has_value());
    if (m.quantized) {
      EXPECT_EQ(m.quantized->scheme, n.quantized->scheme);
      EXPECT_EQ(m.quantized->cluster_size, n.quantized->cluster_size);
      EXPECT_EQ(m.quantized->steps, n.quantized->steps);
      ExpectSame(m.quantized->codes, n.quantized->codes);
      ExpectSame(m.quantized->cluster_scales, n.quantized->cluster_scales);
    }
  }
  EXPECT_EQ(a.preprocessing.SerializeAsString(), b.preprocessing.SerializeAsString());
  EXPECT_EQ(a.report.SerializeAsString(), b.report.SerializeAsString());
  EXPECT_EQ(a.labels, b.labels);
  EXPECT_EQ(a.source_sha256, b.source_sha256);
  ExpectSame(a.self_test_input, b.self_test_input);
  ExpectSame(a.self_test_logits, b.self_test_logits);
}

// ---------------------------------------------------------------- tests

TEST(ArtifactTest, EveryOperatorSurvivesTheRoundTrip) {
  std::set<OpType> seen;
  for (uint32_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(seed);
    const Artifact artifact = EveryOperator(seed);
    ASSERT_TRUE(graph::Validate(artifact.graph).ok()) << graph::Validate(artifact.graph);
    for (const Node& node : artifact.graph.nodes) seen.insert(node.op);
    const auto back = Parse(Serialize(artifact), "file");
    ASSERT_TRUE(back.ok()) << back.status();
    ExpectSame(artifact, *back);
  }
  EXPECT_EQ(seen.size(), static_cast<size_t>(OpType::kSilu) + 1);
}

TEST(ArtifactTest, TheArithmeticSurvivesTheRoundTrip) {
  Builder b(1);
  b.Add(OpType::kFullyConnected, {b.Input({6})}, [&](Node& node) {
    node.quantized = b.Quantized({2, 6}, WeightScheme::kInt8, 0);
    node.bias = b.Floats({2});
  });
  b.graph.values[b.graph.input].quant = QuantParams{0.01f, 100};
  Artifact artifact;
  artifact.graph = std::move(b.graph);
  for (bool fixed_point : {false, true}) {
    if (fixed_point) {
      ASSERT_EQ(graph::RoundToFixedPoint(artifact.graph), absl::OkStatus());
    }
    const auto back = Parse(Serialize(artifact), "file");
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->graph.arithmetic,
              fixed_point ? graph::Arithmetic::kFixedPoint : graph::Arithmetic::kFloatEpilogue);
  }
  // Files from before the field existed have float epilogues: 0 is not written at all.
  v1::ArtifactHeader header;
  header.mutable_graph()->set_arithmetic(0);
  EXPECT_EQ(header.graph().ByteSizeLong(), 0u);
}

TEST(ArtifactTest, EqualArtifactsGiveEqualBytes) {
  const std::string bytes = Serialize(EveryOperator(3));
  EXPECT_EQ(bytes, Serialize(EveryOperator(3)));
  EXPECT_EQ(bytes, Serialize(*Parse(bytes, "file")));
  EXPECT_NE(bytes, Serialize(EveryOperator(4)));
}

// One fully connected layer of 32 x 64 codes, eight clusters.
Artifact OneLayer(WeightScheme scheme, int8_t most_scale = 127) {
  Builder b(1);
  b.Add(OpType::kFullyConnected, {b.Input({64})}, [&](Node& node) {
    node.quantized = b.Quantized({32, 64}, scheme, 8);
    for (int8_t& scale : node.quantized->cluster_scales.data<int8_t>())
      scale = static_cast<int8_t>(1 + scale % most_scale);
    if (scheme != WeightScheme::kInt8)
      node.quantized->cluster_scales.data<int8_t>()[3] = most_scale;
    node.bias = b.Floats({32});
  });
  Artifact artifact;
  artifact.graph = std::move(b.graph);
  return artifact;
}

TEST(ArtifactTest, CodesAndScalesTakeTheBitsTheyNeed) {
  const struct {
    WeightScheme scheme;
    uint32_t bits;
    size_t bytes;
  } cases[] = {{WeightScheme::kTernaryCluster, 0, (32 * 64 + 4) / 5},
               {WeightScheme::kInt4Cluster, 4, 32 * 64 / 2},
               {WeightScheme::kInt3Cluster, 3, 32 * 64 * 3 / 8},
               {WeightScheme::kInt8, 7, 32 * 64 * 7 / 8}};
  for (const auto& [scheme, bits, bytes] : cases) {
    for (auto [most, scale_bits] :
         {std::pair<int, uint32_t>{127, 7}, {64, 7}, {63, 6}, {18, 5}, {1, 1}}) {
      const Artifact artifact = OneLayer(scheme, static_cast<int8_t>(most));
      const std::string file = Serialize(artifact);
      const auto back = Parse(file, "file");
      ASSERT_TRUE(back.ok()) << back.status();
      ExpectSame(artifact, *back);
      const Pieces pieces = *TakeApart(file);
      const auto& weights = pieces.header.graph().nodes(0).quantized();
      EXPECT_EQ(weights.codes().bits(), bits);
      EXPECT_EQ(pieces.sections[weights.codes().section()].size(), bytes);
      size_t stored = bytes;
      if (scheme != WeightScheme::kInt8) {
        EXPECT_EQ(weights.cluster_scales().bits(), scale_bits);
        EXPECT_EQ(pieces.sections[weights.cluster_scales().section()].size(), 32 * scale_bits);
        stored += 32 * scale_bits;
      }
      EXPECT_EQ(StoredBits(*artifact.graph.nodes[0].quantized), static_cast<int64_t>(8 * stored));
    }
  }
}

TEST(ArtifactTest, AllEightBitsOfInt8CodesAreKept) {
  for (int8_t code : {int8_t{-128}, int8_t{-64}, int8_t{64}, int8_t{127}}) {
    Artifact artifact = OneLayer(WeightScheme::kInt8);
    artifact.graph.nodes[0].quantized->codes.data<int8_t>()[9] = code;
    const auto back = Parse(Serialize(artifact), "file");
    ASSERT_TRUE(back.ok()) << back.status();
    ExpectSame(artifact, *back);
    EXPECT_EQ(StoredBits(*artifact.graph.nodes[0].quantized), 8 * 32 * 64);
  }
}

// Version 1 had two bits for a ternary code and eight for an int8 code and a scale.
TEST(ArtifactTest, FilesOfVersion1AreRead) {
  for (WeightScheme scheme : kSchemes) {
    const Artifact artifact = OneLayer(scheme);
    const QuantizedWeights& stored = *artifact.graph.nodes[0].quantized;
    Pieces pieces = *TakeApart(Serialize(artifact));
    v1::ArtifactWeights& weights =
        *pieces.header.mutable_graph()->mutable_nodes(0)->mutable_quantized();
    const auto codes = stored.codes.data<int8_t>();
    std::string& section = pieces.sections[weights.codes().section()];
    if (scheme == WeightScheme::kInt8) {
      section.assign(codes.begin(), codes.end());
      weights.mutable_codes()->set_bits(8);
    } else if (scheme == WeightScheme::kTernaryCluster) {
      section.assign(codes.size() / 4, '\0');
      for (size_t i = 0; i < codes.size(); ++i)
        section[i / 4] = static_cast<char>(section[i / 4] | (codes[i] & 3) << (2 * (i % 4)));
      weights.mutable_codes()->set_bits(2);
    }
    if (scheme != WeightScheme::kInt8) {
      const auto scales = stored.cluster_scales.data<int8_t>();
      pieces.sections[weights.cluster_scales().section()].assign(scales.begin(), scales.end());
      weights.mutable_cluster_scales()->set_bits(8);
    }
    const auto back = Parse(PutTogether(pieces, nullptr, 1), "file");
    ASSERT_TRUE(back.ok()) << back.status();
    ExpectSame(artifact, *back);
  }
}

TEST(ArtifactTest, TheFileFollowsTheFormat) {
  const std::string file = Serialize(Small());
  EXPECT_EQ(file.substr(0, 8), std::string("TERN\2\0\0\0", 8));
  const Pieces pieces = *TakeApart(file);
  EXPECT_EQ(PutTogether(pieces), file);
  EXPECT_EQ(pieces.sections.size(), 11u);
}

TEST(ArtifactTest, DamageOfAnySingleByteIsFound) {
  const std::string file = Serialize(Small());
  ASSERT_TRUE(Parse(file, "file").ok());
  for (size_t i = 0; i < file.size(); ++i) {
    for (int flip : {0x01, 0x10, 0x80, 0xff}) {
      std::string damaged = file;
      damaged[i] = static_cast<char>(damaged[i] ^ flip);
      const auto result = Parse(damaged, "file");
      ASSERT_EQ(result.status().code(), StatusCode::kDataLoss)
          << "byte " << i << " xor " << flip << ": " << result.status();
    }
  }
}

TEST(ArtifactTest, AMissingOrAddedByteIsFound) {
  const std::string file = Serialize(Small());
  for (size_t size = 0; size < file.size(); ++size) {
    ASSERT_EQ(Parse(absl::string_view(file).substr(0, size), "file").status().code(),
              StatusCode::kDataLoss)
        << size;
  }
  for (int byte : {0, 1, 255}) {
    EXPECT_EQ(Parse(file + static_cast<char>(byte), "file").status().code(), StatusCode::kDataLoss);
  }
  EXPECT_EQ(Parse(file + file, "file").status().code(), StatusCode::kDataLoss);
  for (size_t i = 0; i < file.size(); ++i) {
    std::string shifted = file;
    shifted.erase(i, 1);
    ASSERT_EQ(Parse(shifted, "file").status().code(), StatusCode::kDataLoss) << i;
    shifted.insert(i, 2, file[i]);
    ASSERT_EQ(Parse(shifted, "file").status().code(), StatusCode::kDataLoss) << i;
  }
}

TEST(ArtifactTest, ANewerVersionIsToldFromDamage) {
  for (uint32_t version : {3u, 1000u, 0xffffffffu}) {
    const auto result = Parse(Seal("whatever comes", "", version), "file");
    EXPECT_EQ(result.status().code(), StatusCode::kUnimplemented) << result.status();
    EXPECT_NE(result.status().message().find("version"), std::string::npos);
  }
  EXPECT_EQ(Parse(Seal("", "", 0), "file").status().code(), StatusCode::kInvalidArgument);
}

TEST(ArtifactTest, MessagesNameTheFile) {
  EXPECT_EQ(
      Parse("nonsense", "models/a/1/model.tern").status().message().find("models/a/1/model.tern: "),
      0u);
}

// Files whose checksums are right but whose content is not a model.
TEST(ArtifactTest, HostileHeadersAreRefused) {
  const Pieces good = *TakeApart(Serialize(Small()));
  ASSERT_TRUE(Parse(PutTogether(good), "file").ok());
  using Header = v1::ArtifactHeader;
  const auto node = [](Header& h, int i) { return h.mutable_graph()->mutable_nodes(i); };
  const auto codes = [&](Header& h) { return node(h, 0)->mutable_quantized()->mutable_codes(); };
  const std::pair<const char*, std::function<void(Header&)>> cases[] = {
      {"no graph", [](Header& h) { h.clear_graph(); }},
      {"unknown arithmetic", [](Header& h) { h.mutable_graph()->set_arithmetic(2); }},
      {"fixed point off its grid", [](Header& h) { h.mutable_graph()->set_arithmetic(1); }},
      {"no nodes", [](Header& h) { h.mutable_graph()->clear_nodes(); }},
      {"no values", [](Header& h) { h.mutable_graph()->clear_values(); }},
      {"input out of range", [](Header& h) { h.mutable_graph()->set_input(99); }},
      {"output negative", [](Header& h) { h.mutable_graph()->set_output(-1); }},
      {"node input out of range", [&](Header& h) { node(h, 0)->set_inputs(0, 1 << 30); }},
      {"node output negative",
       [&](Header& h) { node(h, 0)->set_output(std::numeric_limits<int32_t>::min()); }},
      {"node without inputs", [&](Header& h) { node(h, 0)->clear_inputs(); }},
      {"two writers", [&](Header& h) { node(h, 1)->set_output(h.graph().nodes(0).output()); }},
      {"unknown operator", [&](Header& h) { node(h, 0)->set_op(200); }},
      {"operator of another kind",
       [&](Header& h) { node(h, 0)->set_op(static_cast<uint32_t>(OpType::kRelu)); }},
      {"operator beyond 8 bits", [&](Header& h) { node(h, 0)->set_op(256 + 1); }},
      {"short conv list", [&](Header& h) { node(h, 0)->add_conv(1); }},
      {"short pool list", [&](Header& h) { node(h, 0)->add_pool(1); }},
      {"half a clip", [&](Header& h) { node(h, 0)->add_clip(1); }},
      {"clip upside down", [&](Header& h) { node(h, 0)->add_clip(1), node(h, 0)->add_clip(0); }},
      {"clip NaN", [&](Header& h) { node(h, 0)->add_clip(NAN), node(h, 0)->add_clip(0); }},
      {"no bias", [&](Header& h) { node(h, 0)->clear_bias(); }},
      {"no weights", [&](Header& h) { node(h, 0)->clear_quantized(); }},
      {"unknown scheme", [&](Header& h) { node(h, 0)->mutable_quantized()->set_scheme(3); }},
      {"scheme of other bits", [&](Header& h) { node(h, 0)->mutable_quantized()->set_scheme(1); }},
      {"cluster size 0", [&](Header& h) { node(h, 0)->mutable_quantized()->set_cluster_size(0); }},
      {"cluster size 3", [&](Header& h) { node(h, 0)->mutable_quantized()->set_cluster_size(1); }},
      {"cluster size huge",
       [&](Header& h) { node(h, 0)->mutable_quantized()->set_cluster_size(0xffffffffu); }},
      {"no cluster scales",
       [&](Header& h) { node(h, 0)->mutable_quantized()->clear_cluster_scales(); }},
      {"codes of other bits", [&](Header& h) { codes(h)->set_bits(8); }},
      {"codes of 1 bit", [&](Header& h) { codes(h)->set_bits(1); }},
      {"codes of 2^32 - 1 bits", [&](Header& h) { codes(h)->set_bits(0xffffffffu); }},
      {"4-bit codes of 0 bits",
       [&](Header& h) { node(h, 1)->mutable_quantized()->mutable_codes()->set_bits(0); }},
      {"scales of 0 bits",
       [&](Header& h) { node(h, 0)->mutable_quantized()->mutable_cluster_scales()->set_bits(0); }},
      {"scales of 9 bits",
       [&](Header& h) { node(h, 0)->mutable_quantized()->mutable_cluster_scales()->set_bits(9); }},
      {"codes of f32", [&](Header& h) { codes(h)->set_dtype(0); }},
      {"codes without shape", [&](Header& h) { codes(h)->clear_shape(); }},
      {"codes with extent 0", [&](Header& h) { codes(h)->set_shape(0, 0); }},
      {"codes with extent -1", [&](Header& h) { codes(h)->set_shape(0, -1); }},
      {"codes with a huge extent",
       [&](Header& h) { codes(h)->set_shape(0, std::numeric_limits<int64_t>::max()); }},
      {"codes whose product overflows",
       [&](Header& h) {
         for (int i = 0; i < 6; ++i) codes(h)->add_shape(int64_t{1} << 40);
       }},
      {"codes of rank 9",
       [&](Header& h) {
         for (int i = 0; i < 7; ++i) codes(h)->add_shape(1);
       }},
      {"codes of rank 3", [&](Header& h) { codes(h)->add_shape(1); }},
      {"codes transposed",
       [&](Header& h) { codes(h)->set_shape(0, 5), codes(h)->set_shape(1, 3); }},
      {"section out of range", [&](Header& h) { codes(h)->set_section(1000); }},
      {"section used twice",
       [&](Header& h) {
         node(h, 1)->mutable_bias()->set_section(h.graph().nodes(0).bias().section());
       }},
      {"section unused", [](Header& h) { h.clear_self_test(); }},
      {"half a self test", [](Header& h) { h.mutable_self_test()->clear_logits(); }},
      {"self test of another shape",
       [](Header& h) { h.mutable_self_test()->mutable_input()->add_shape(1); }},
      {"a label too many", [](Header& h) { h.add_labels("c"); }},
      {"scale 0",
       [](Header& h) { h.mutable_graph()->mutable_values(0)->mutable_quant()->set_scale(0); }},
      {"scale infinite",
       [](Header& h) {
         h.mutable_graph()->mutable_values(0)->mutable_quant()->set_scale(INFINITY);
       }},
      {"zero point 256",
       [](Header& h) {
         h.mutable_graph()->mutable_values(0)->mutable_quant()->set_scale(1);
         h.mutable_graph()->mutable_values(0)->mutable_quant()->set_zero_point(256);
       }},
      {"value with extent 0",
       [](Header& h) { h.mutable_graph()->mutable_values(0)->set_shape(0, 0); }},
      {"value with a huge shape",
       [](Header& h) {
         for (int i = 0; i < 7; ++i) h.mutable_graph()->mutable_values(0)->add_shape(1 << 30);
       }},
      {"value of rank 100",
       [](Header& h) {
         for (int i = 0; i < 99; ++i) h.mutable_graph()->mutable_values(0)->add_shape(1);
       }},
      {"section beyond the file",
       [](Header& h) { h.mutable_sections(2)->set_bytes(uint64_t{1} << 40); }},
      {"section offset wraps",
       [](Header& h) { h.mutable_sections(2)->set_offset(0xffffffffffffffc0u); }},
      {"section length wraps",
       [](Header& h) { h.mutable_sections(2)->set_bytes(0xffffffffffffffffu); }},
      {"sections overlap",
       [](Header& h) { h.mutable_sections(2)->set_offset(h.sections(1).offset()); }},
      {"section not aligned",
       [](Header& h) { h.mutable_sections(2)->set_offset(h.sections(2).offset() + 1); }},
      {"section too many", [](Header& h) { *h.add_sections() = h.sections(0); }},
      {"section missing", [](Header& h) { h.mutable_sections()->RemoveLast(); }},
  };
  for (const auto& [what, touch] : cases) {
    const auto result = Parse(PutTogether(good, touch), "file");
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument)
        << what << ": " << result.status();
  }
}

TEST(ArtifactTest, CodesAndScalesOutOfRangeAreRefused) {
  const auto refused = [](const std::function<void(Pieces&)>& touch) {
    Pieces pieces = *TakeApart(Serialize(Small()));
    touch(pieces);
    const auto result = Parse(PutTogether(pieces), "file");
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument) << result.status();
    return std::string(result.status().message());
  };
  const auto section = [](Pieces& p, const v1::ArtifactTensor& tensor) -> std::string& {
    return p.sections[tensor.section()];
  };
  const auto weights = [](Pieces& p, int node) { return p.header.graph().nodes(node).quantized(); };
  EXPECT_NE(refused([&](Pieces& p) {
              section(p, weights(p, 0).codes())[0] = static_cast<char>(243);
            }).find("ternary code"),
            std::string::npos);
  EXPECT_NE(
      refused([&](Pieces& p) { section(p, weights(p, 1).codes())[0] = 8; }).find("4-bit code"),
      std::string::npos);
  EXPECT_NE(refused([&](Pieces& p) {
              section(p, weights(p, 0).cluster_scales())[0] = 0;
            }).find("scale is out of range"),
            std::string::npos);
  refused([&](Pieces& p) {
    v1::ArtifactTensor& scales =
        *p.header.mutable_graph()->mutable_nodes(0)->mutable_quantized()->mutable_cluster_scales();
    std::string& bytes = section(p, scales);
    bytes.assign(bytes.size() * 8 / scales.bits(), 5);
    bytes[0] = -5;
    scales.set_bits(8);
  });
  const float bad[] = {0.0f, -1.0f, INFINITY, NAN};
  for (float value : bad) {
    refused([&](Pieces& p) { std::memcpy(section(p, weights(p, 0).steps()).data(), &value, 4); });
  }
  const float nan = NAN;
  refused([&](Pieces& p) {
    std::memcpy(section(p, p.header.graph().nodes(0).bias()).data(), &nan, 4);
  });
}

TEST(ArtifactTest, SumsThatCouldOverflowAreRefused) {
  // 255 * 127 * 7 * 9474 inputs exceeds 2^31 - 1; one input less does not.
  for (int inputs : {9473, 9474}) {
    Builder b(1);
    b.Add(OpType::kFullyConnected, {b.Input({inputs})}, [&](Node& node) {
      node.quantized = b.Quantized({1, inputs}, WeightScheme::kInt4Cluster, 64);
      for (int8_t& code : node.quantized->codes.data<int8_t>()) code = -7;
      for (int8_t& scale : node.quantized->cluster_scales.data<int8_t>()) scale = 127;
      node.bias = b.Floats({1});
    });
    Artifact artifact;
    artifact.graph = std::move(b.graph);
    EXPECT_EQ(Parse(Serialize(artifact), "file").status().code(),
              inputs == 9473 ? StatusCode::kOk : StatusCode::kInvalidArgument);
  }
}

TEST(ArtifactTest, WhatDoesNotFitItsBitsIsNotChangedSilently) {
  Artifact artifact = Small();
  artifact.graph.nodes[0].quantized->codes.data<int8_t>()[0] = 2;
  EXPECT_EQ(Parse(Serialize(artifact), "file").status().code(), StatusCode::kInvalidArgument);
  for (int8_t scale : {int8_t{0}, int8_t{-5}, int8_t{-128}}) {
    artifact = Small();
    artifact.graph.nodes[0].quantized->cluster_scales.data<int8_t>()[0] = scale;
    EXPECT_EQ(Parse(Serialize(artifact), "file").status().code(), StatusCode::kInvalidArgument);
  }
}

TEST(ArtifactTest, RandomHeadersNeverCrash) {
  const std::string file = PutTogether(*TakeApart(Serialize(Small())));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data() + 8, 8);
  const std::string header = file.substr(32, header_bytes), rest = file.substr(32 + header_bytes);
  const google::protobuf::LogSilencer silence;  // it reports every broken string on stderr
  std::mt19937 random(11);
  int refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string damaged = header;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < changes; ++i)
      damaged[random() % damaged.size()] = static_cast<char>(random());
    const auto result = Parse(Seal(damaged, rest), "file");
    if (result.ok()) continue;  // a name, a report field
    ++refused;
    // DATA_LOSS: the section checksums are part of the header.
    EXPECT_TRUE(result.status().code() == StatusCode::kInvalidArgument ||
                result.status().code() == StatusCode::kDataLoss)
        << result.status();
  }
  EXPECT_GT(refused, 1000);
}

TEST(ArtifactTest, AHeaderThatIsNoMessageOrTooLongIsRefused) {
  EXPECT_EQ(Parse(Seal("\xff\xff\xff", ""), "file").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Parse(Seal("", ""), "file").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Parse(Seal(std::string((16 << 20) + 1, '\0'), ""), "file").status().code(),
            StatusCode::kInvalidArgument);
  for (uint64_t length : {uint64_t{1}, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 31}) {
    std::string preamble =
        absl::StrCat("TERN", Little(1, 4), Little(length, 8), Little(32, 8), Little(0, 4));
    preamble += Little(Crc32c(preamble), 4);
    EXPECT_EQ(Parse(preamble, "file").status().code(), StatusCode::kInvalidArgument) << length;
  }
}

class ArtifactFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "tern_artifact_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string folder_;
};

TEST_F(ArtifactFileTest, ReadsWhatItWrote) {
  const Artifact artifact = EveryOperator(5);
  ASSERT_TRUE(Write(artifact, folder_ + "/model.tern").ok());
  const auto back = Read(folder_ + "/model.tern");
  ASSERT_TRUE(back.ok()) << back.status();
  ExpectSame(artifact, *back);
}

TEST_F(ArtifactFileTest, AMissingFileIsNotFound) {
  EXPECT_EQ(Read(folder_ + "/none.tern").status().code(), StatusCode::kNotFound);
}

TEST_F(ArtifactFileTest, WhatCouldNotBeLoadedIsNotWritten) {
  const std::string path = folder_ + "/model.tern";
  ASSERT_TRUE(Write(Small(), path).ok());
  const std::string before = *ReadFile(path);
  Artifact no_output = Small();
  no_output.graph.output = graph::kNoValue;
  EXPECT_EQ(Write(no_output, path).code(), StatusCode::kInvalidArgument);
  Artifact latin1 = Small();
  latin1.labels[0] = "K\xe4se";
  EXPECT_EQ(Write(latin1, path).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(*ReadFile(path), before);
}

TEST(PackingTest, EveryCodeAndLengthComesBack) {
  std::mt19937 random(2);
  for (int bits = 2; bits <= 7; ++bits) {
    const int limit = (1 << (bits - 1)) - 1;
    for (size_t size = 0; size < 40; ++size) {
      std::vector<int8_t> codes(size), back(size);
      for (int8_t& code : codes)
        code = static_cast<int8_t>(static_cast<int>(random() % (2 * limit + 1)) - limit);
      const std::string packed = Pack(codes, bits);
      EXPECT_EQ(packed.size(), (size * bits + 7) / 8);
      EXPECT_TRUE(UnpackCodes(packed, bits, absl::MakeSpan(back)));
      EXPECT_EQ(codes, back);
    }
  }
}

TEST(PackingTest, EveryScaleAndLengthComesBack) {
  std::mt19937 random(3);
  for (int bits = 1; bits <= 7; ++bits) {
    for (size_t size = 0; size < 40; ++size) {
      std::vector<int8_t> scales(size), back(size);
      for (int8_t& scale : scales) scale = static_cast<int8_t>(1 + random() % ((1 << bits) - 1));
      const std::string packed = Pack(scales, bits);
      EXPECT_EQ(packed.size(), (size * bits + 7) / 8);
      EXPECT_TRUE(UnpackScales(packed, bits, absl::MakeSpan(back)));
      EXPECT_EQ(scales, back);
    }
  }
}

TEST(PackingTest, EveryTernaryCodeAndLengthComesBack) {
  std::mt19937 random(4);
  for (size_t size = 0; size < 40; ++size) {
    std::vector<int8_t> codes(size), back(size);
    for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random() % 3) - 1);
    const std::string packed = PackTernary(codes);
    EXPECT_EQ(packed.size(), (size + 4) / 5);
    EXPECT_TRUE(UnpackTernary(packed, absl::MakeSpan(back)));
    EXPECT_EQ(codes, back);
  }
}

TEST(PackingTest, WhatNoValueStandsForIsRefused) {
  for (int bits = 2; bits <= 7; ++bits) {
    // Each of eleven codes in turn, behind a whole group too, is the most negative number.
    for (size_t at = 0; at < 11; ++at) {
      std::vector<int8_t> codes(11, 1);
      codes[at] = static_cast<int8_t>(-(1 << (bits - 1)));
      EXPECT_FALSE(UnpackCodes(Pack(codes, bits), bits, absl::MakeSpan(codes)))
          << bits << " " << at;
    }
  }
  for (int bits = 1; bits <= 7; ++bits) {
    for (size_t at = 0; at < 11; ++at) {
      std::vector<int8_t> scales(11, 1);
      scales[at] = 0;
      EXPECT_FALSE(UnpackScales(Pack(scales, bits), bits, absl::MakeSpan(scales)))
          << bits << " " << at;
    }
    // 11 numbers leave bits of the last byte unused, unless they take 8.
    std::vector<int8_t> values(11, 1);
    std::string packed = Pack(values, bits);
    packed.back() = static_cast<char>(packed.back() | 0x80);
    EXPECT_FALSE(UnpackScales(packed, bits, absl::MakeSpan(values))) << bits;
    if (bits > 1) {
      EXPECT_FALSE(UnpackCodes(packed, bits, absl::MakeSpan(values))) << bits;
    }
  }
  std::vector<int8_t> codes(20);
  for (int byte = 243; byte < 256; ++byte) {
    for (size_t at = 0; at < 4; ++at) {
      std::string packed(4, '\0');
      packed[at] = static_cast<char>(byte);
      EXPECT_FALSE(UnpackTernary(packed, absl::MakeSpan(codes))) << byte << " " << at;
    }
  }
  // Of the last byte only as many digits as there are codes left.
  for (auto [left, values] : {std::pair<size_t, int>{1, 3}, {2, 9}, {3, 27}, {4, 81}, {5, 243}}) {
    const auto some = absl::MakeSpan(codes).subspan(0, 10 + left);
    const auto unpack = [&](int last) {
      return UnpackTernary(std::string("\0\0", 2) + static_cast<char>(last), some);
    };
    EXPECT_TRUE(unpack(values - 1));
    EXPECT_FALSE(unpack(values));
  }
}

TEST(PackingTest, TheFirstValueIsInTheLowestBitsOrDigits) {
  const std::vector<int8_t> ternary = {1, -1, 0, 1, -1};
  EXPECT_EQ(Pack(ternary, 2), std::string("\x4d\x03", 2));
  // 2 + 0 * 3 + 1 * 9 + 2 * 27 + 0 * 81
  EXPECT_EQ(PackTernary(ternary), std::string("\x41", 1));
  const std::vector<int8_t> four = {7, -7, -1};
  EXPECT_EQ(Pack(four, 4), std::string("\x97\x0f", 2));
  // 0010010 then 1111111: bits 0..6 and 7..13.
  const std::vector<int8_t> seven = {18, 127};
  EXPECT_EQ(Pack(seven, 7), std::string("\x92\x3f", 2));
}

}  // namespace
}  // namespace tern::artifact
