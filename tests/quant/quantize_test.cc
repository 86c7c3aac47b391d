#include "server/quant/quantize.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/quant/placement.h"
#include "server/quant/walk.h"
#include "tests/quant/networks.h"
#include "tests/quant/simulate.h"

namespace tern::quant {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const Shape kSample{3, 12, 12};

QuantizeOptions Options(v1::WeightType weights, int n = 4, v1::Method method = v1::COMPENSATED) {
  QuantizeOptions options;
  options.recipe.set_weights(weights);
  options.recipe.set_cluster_size(n);
  options.recipe.set_method(method);
  options.recipe.set_distillation(v1::DISTILL_OFF);  // has its own test
  return options;
}

QuantizeResult MustQuantize(const graph::Graph& graph, const Tensor& images,
                            const QuantizeOptions& options) {
  auto result = Quantize(graph, images, options);
  EXPECT_TRUE(result.ok()) << result.status();
  return *std::move(result);
}

// Signal to noise of the quantised logits on images that were not used for calibration.
double FreshSqnr(const graph::Graph& graph, const graph::Graph& quantised) {
  const Tensor images = SmoothImages(64, graph.shape(graph.input), 99);
  const Tensor wanted = Simulate(graph, images), got = Simulate(quantised, images);
  double signal = 0, noise = 0;
  for (size_t i = 0; i < wanted.data<float>().size(); ++i) {
    const double e = got.data<float>()[i] - wanted.data<float>()[i];
    signal += static_cast<double>(wanted.data<float>()[i]) * wanted.data<float>()[i];
    noise += e * e;
  }
  return 10 * std::log10(signal / noise);
}

const graph::Node& NodeNamed(const graph::Graph& graph, const std::string& name) {
  for (const graph::Node& node : graph.nodes) {
    if (node.name == name) return node;
  }
  ADD_FAILURE() << "no node " << name;
  return graph.nodes[0];
}

const std::optional<QuantParams>& ParamsOf(const graph::Graph& graph, const std::string& name) {
  return graph.values[NodeNamed(graph, name).output].quant;
}

bool IsPowerOfTwo(float v) {
  int exponent;
  return std::frexp(v, &exponent) == 0.5f;
}

TEST(QuantizeTest, EightBitNetworkIsCloseToTheFloatOne) {
  const graph::Graph graph = SmallNetwork();
  const QuantizeResult result =
      MustQuantize(graph, SmoothImages(128, kSample, 2), Options(v1::INT8));
  // Per layer, 7-bit weights give at least 35 dB and 8-bit activations about 40 dB; the noise of
  // eight layers and the input adds up to at most 10 log10(8 * (10^-3.5 + 10^-4)) = -24.8 dB.
  EXPECT_GT(FreshSqnr(graph, result.graph), 22.0);
  EXPECT_GT(result.report.sqnr_db(), 22.0);
  EXPECT_GT(result.report.calibration_agreement().value(), 0.95);
}

TEST(QuantizeTest, EveryWeightedLayerAndEveryValueButTheLogitsIsQuantised) {
  const graph::Graph graph = SmallNetwork();
  const QuantizeResult result =
      MustQuantize(graph, SmoothImages(32, kSample, 2), Options(v1::TERNARY_CLUSTER));
  EXPECT_TRUE(graph::Validate(result.graph).ok()) << graph::Validate(result.graph);
  for (const graph::Node& node : result.graph.nodes) {
    if (node.op == graph::OpType::kConv || node.op == graph::OpType::kFullyConnected) {
      ASSERT_TRUE(node.quantized) << node.name;
      EXPECT_TRUE(node.weight.empty()) << node.name;
      EXPECT_EQ(node.bias.elements(), node.quantized->codes.shape()[0]);
    }
    EXPECT_EQ(result.graph.values[node.output].quant.has_value(),
              node.output != result.graph.output)
        << node.name;
  }
  EXPECT_TRUE(result.graph.values[result.graph.input].quant);
  EXPECT_THAT(result.report.float_nodes(), IsEmpty());
}

TEST(QuantizeTest, ParametersPassThroughPoolsAndReshapesAndAreSharedByConcatenatedParts) {
  const graph::Graph quantised =
      MustQuantize(SmallNetwork(), SmoothImages(32, kSample, 2), Options(v1::TERNARY_CLUSTER))
          .graph;
  EXPECT_EQ(ParamsOf(quantised, "pool"), ParamsOf(quantised, "block.conv2"));
  EXPECT_EQ(ParamsOf(quantised, "flatten"), ParamsOf(quantised, "mean"));
  EXPECT_EQ(ParamsOf(quantised, "left"), ParamsOf(quantised, "concat"));
  EXPECT_EQ(ParamsOf(quantised, "right"), ParamsOf(quantised, "concat"));
  EXPECT_NE(ParamsOf(quantised, "grouped")->zero_point, 0);  // no ReLU: signed
  EXPECT_EQ(ParamsOf(quantised, "mixed")->zero_point, 0);
}

TEST(QuantizeTest, EndsAndGroupedLayersStayEightBit) {
  const graph::Graph graph = SmallNetwork();
  const Tensor images = SmoothImages(32, kSample, 2);
  QuantizeOptions options = Options(v1::TERNARY_CLUSTER);
  const auto schemes = [&] {
    std::map<std::string, std::string> result;
    const QuantizeResult quantised = MustQuantize(graph, images, options);
    for (const auto& layer : quantised.report.layers()) result[layer.name()] = layer.scheme();
    return result;
  };
  std::map<std::string, std::string> wanted = {{"stem", "int8"},
                                               {"block.conv1", "ternary-cluster"},
                                               {"block.conv2", "ternary-cluster"},
                                               {"left", "ternary-cluster"},
                                               {"right", "ternary-cluster"},
                                               {"grouped", "int8"},
                                               {"mixed", "ternary-cluster"},
                                               {"classifier", "int8"}};
  EXPECT_EQ(schemes(), wanted);
  options.recipe.set_quantize_first_and_last_to_weights(true);
  wanted["stem"] = wanted["classifier"] = "ternary-cluster";
  EXPECT_EQ(schemes(), wanted);
}

class ClusterSizeTest : public ::testing::TestWithParam<int> {};

// Odd sizes, short last clusters, and sizes beyond the channels.
TEST_P(ClusterSizeTest, GivesValidExactWeights) {
  const graph::Graph graph = SmallNetwork();
  for (auto type : {v1::TERNARY_CLUSTER, v1::INT3_CLUSTER, v1::INT4_CLUSTER}) {
    const QuantizeResult result =
        MustQuantize(graph, SmoothImages(32, kSample, 2), Options(type, GetParam()));
    for (const graph::Node& node : result.graph.nodes) {
      if (!node.quantized) continue;
      const QuantizedWeights& q = *node.quantized;
      const Tensor real = Dequantize(q);
      const int64_t outputs = q.codes.shape()[0], columns = q.codes.elements() / outputs;
      const int limit = q.scheme == WeightScheme::kInt8          ? 63
                        : q.scheme == WeightScheme::kInt4Cluster ? 7
                        : q.scheme == WeightScheme::kInt3Cluster ? 3
                                                                 : 1;
      if (q.scheme != WeightScheme::kInt8) {
        EXPECT_GE(q.cluster_size, 1);
        for (int8_t scale : q.cluster_scales.data<int8_t>()) {
          ASSERT_GE(scale, 1);
          if (q.scheme != WeightScheme::kInt4Cluster || GetParam() != v1::DFP8) {
            ASSERT_LE(scale * limit, 127);  // fits s8
          }
        }
      }
      for (int64_t o = 0; o < outputs; ++o) {
        ASSERT_GT(q.steps[o], 0);
        double sum = 0;
        for (int64_t j = 0; j < columns; ++j) {
          ASSERT_LE(std::abs(q.codes.data<int8_t>()[o * columns + j]), limit);
          sum += std::fabs(real.data<float>()[o * columns + j] / q.steps[o]);
        }
        ASSERT_LT(255 * sum, 2147483648.0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, ClusterSizeTest, ::testing::Values(0, 1, 3, 4, 7, 8, 64, 256));

TEST(QuantizeTest, CompensationBeatsCorrectionWhichBeatsNearestCodes) {
  const graph::Graph graph = SmallNetwork();
  const Tensor images = SmoothImages(200, kSample, 2);
  for (int n : {4, 64}) {
    std::map<v1::Method, double> sqnr;
    for (auto method : {v1::DIRECT, v1::CORRECTED, v1::COMPENSATED}) {
      sqnr[method] = FreshSqnr(
          graph, MustQuantize(graph, images, Options(v1::TERNARY_CLUSTER, n, method)).graph);
    }
    EXPECT_GT(sqnr[v1::COMPENSATED], sqnr[v1::CORRECTED] + 2) << "N = " << n;
    EXPECT_GT(sqnr[v1::CORRECTED], sqnr[v1::DIRECT] + 1) << "N = " << n;
  }
}

TEST(QuantizeTest, MoreBitsGiveLessNoise) {
  const graph::Graph graph = SmallNetwork();
  const Tensor images = SmoothImages(200, kSample, 2);
  const double ternary =
      FreshSqnr(graph, MustQuantize(graph, images, Options(v1::TERNARY_CLUSTER)).graph);
  const double four =
      FreshSqnr(graph, MustQuantize(graph, images, Options(v1::INT4_CLUSTER)).graph);
  const double eight = FreshSqnr(graph, MustQuantize(graph, images, Options(v1::INT8)).graph);
  EXPECT_GT(four, ternary + 3);
  EXPECT_GT(eight, four + 1);
}

TEST(QuantizeTest, DynamicFixedPointUsesPowersOfTwo) {
  QuantizeOptions options = Options(v1::TERNARY_CLUSTER);
  options.recipe.set_activations(v1::DFP8);
  for (auto method : {v1::COMPENSATED, v1::CORRECTED}) {
    options.recipe.set_method(method);
    const graph::Graph quantised =
        MustQuantize(SmallNetwork(), SmoothImages(64, kSample, 2), options).graph;
    for (const graph::Value& value : quantised.values) {
      if (!value.quant) continue;
      EXPECT_TRUE(IsPowerOfTwo(value.quant->scale)) << value.name << " " << value.quant->scale;
      EXPECT_TRUE(value.quant->zero_point == 0 || value.quant->zero_point == 128) << value.name;
    }
    for (const graph::Node& node : quantised.nodes) {
      if (!node.quantized || node.quantized->scheme == WeightScheme::kInt8) continue;
      for (float step : node.quantized->steps) {
        EXPECT_EQ(step, node.quantized->steps[0]) << node.name;
        EXPECT_TRUE(IsPowerOfTwo(step)) << node.name;
      }
    }
  }
}

// The quantiser leaves a valid fixed-point graph, and so does distillation, which moves scales and
// biases afterwards.
TEST(QuantizeTest, DynamicFixedPointNetworksRunOnIntegers) {
  for (auto weights : {v1::INT8, v1::INT4_CLUSTER, v1::INT3_CLUSTER, v1::TERNARY_CLUSTER}) {
    for (auto distillation : {v1::DISTILL_OFF, v1::DISTILL_NETWORK}) {
      QuantizeOptions options = Options(weights);
      options.recipe.set_activations(v1::DFP8);
      options.recipe.set_distillation(distillation);
      const graph::Graph quantised =
          MustQuantize(SmallNetwork(), SmoothImages(110, kSample, 2), options).graph;
      EXPECT_EQ(quantised.arithmetic, graph::Arithmetic::kFixedPoint);
      EXPECT_EQ(graph::Validate(quantised), absl::OkStatus());
    }
  }
  EXPECT_EQ(MustQuantize(SmallNetwork(), SmoothImages(32, kSample, 2), Options(v1::INT8))
                .graph.arithmetic,
            graph::Arithmetic::kFloatEpilogue);
}

std::string Fingerprint(const QuantizeResult& result) {
  std::string bytes;
  for (const graph::Node& node : result.graph.nodes) {
    if (!node.quantized) continue;
    const auto append = [&](const Tensor& t) {
      bytes.append(static_cast<const char*>(t.raw()), t.size_bytes());
    };
    append(node.quantized->codes);
    append(node.quantized->cluster_scales);
    append(node.bias);
    bytes.append(reinterpret_cast<const char*>(node.quantized->steps.data()),
                 4 * node.quantized->steps.size());
  }
  for (const graph::Value& value : result.graph.values) {
    if (value.quant)
      bytes.append(reinterpret_cast<const char*>(&*value.quant), sizeof(QuantParams));
  }
  return bytes;
}

TEST(QuantizeTest, IsDeterministic) {
  const graph::Graph graph = SmallNetwork();
  const Tensor images = SmoothImages(48, kSample, 2);
  for (int threads : {1, 2}) {
    QuantizeOptions options = Options(v1::TERNARY_CLUSTER);
    options.threads = threads;
    EXPECT_EQ(Fingerprint(MustQuantize(graph, images, options)),
              Fingerprint(MustQuantize(graph, images, options)));
  }
}

TEST(QuantizeTest, ReportAddsUp) {
  const graph::Graph graph = SmallNetwork();
  QuantizeOptions options = Options(v1::TERNARY_CLUSTER, 4);
  const v1::QuantizationReport report =
      MustQuantize(graph, SmoothImages(120, kSample, 2), options).report;
  double weights = 0, bits = 0, macs = 0, removed = 0;
  for (const auto& layer : report.layers()) {
    weights += layer.weights();
    bits += layer.bits_per_weight() * layer.weights();
    macs += layer.macs();
    removed += layer.multiplications_removed() * layer.macs();
    EXPECT_GT(layer.output_sqnr_db(), 3) << layer.name();
    EXPECT_LT(layer.output_clipped(), 0.02) << layer.name();
    if (layer.name() == "block.conv1") {
      EXPECT_EQ(layer.cluster_size(), 4u);
      // Ten channels make three clusters: {0,1,4,5}, {2,3,6,7}, {8,9}.
      EXPECT_DOUBLE_EQ(layer.bits_per_weight(), 1.6 + 7.0 * 3 / 90);
      EXPECT_DOUBLE_EQ(layer.multiplications_removed(), 1 - 3.0 / 90);
      EXPECT_EQ(layer.macs(), 144u * 90 * 10);
      EXPECT_GT(layer.output_scale(), 0);
    }
  }
  EXPECT_EQ(report.layers_size(), 8);
  EXPECT_EQ(report.calibration_images(), 120u);
  EXPECT_EQ(report.float_bytes(), 4 * weights);
  EXPECT_NEAR(report.bits_per_weight(), bits / weights, 1e-9);
  EXPECT_NEAR(report.multiplications_removed(), removed / macs, 1e-9);
  EXPECT_EQ(report.recipe().weights(), v1::TERNARY_CLUSTER);
  EXPECT_EQ(report.calibration_agreement().total(), 120u);
  EXPECT_LT(report.calibration_agreement().low(), report.calibration_agreement().value());
  EXPECT_GT(report.seconds(), 0);
}

TEST(QuantizeTest, WarnsOfFewImages) {
  const auto report =
      MustQuantize(SmallNetwork(), SmoothImages(3, kSample, 2), Options(v1::INT8)).report;
  EXPECT_THAT(report.warnings(), ::testing::Contains(HasSubstr("only 3 calibration images")));
}

TEST(QuantizeTest, ProgressCountsLayersUpToTheEnd) {
  QuantizeOptions options = Options(v1::TERNARY_CLUSTER);
  std::vector<Progress> seen;
  options.progress = [&](const Progress& progress) { seen.push_back(progress); };
  MustQuantize(SmallNetwork(), SmoothImages(32, kSample, 2), options);
  ASSERT_GE(seen.size(), 9u);
  EXPECT_EQ(seen.front().layers_done, 0);
  EXPECT_EQ(seen.back().layers_done, 8);
  for (size_t i = 0; i < seen.size(); ++i) {
    EXPECT_EQ(seen[i].layers, 8);
    EXPECT_GE(seen[i].layers_done, i > 0 ? seen[i - 1].layers_done : 0);
  }
  EXPECT_NEAR(seen.back().seconds_left, 0, 1e-9);
}

TEST(QuantizeTest, StopsWhenCancelledInAnyLayer) {
  const graph::Graph graph = SmallNetwork();
  const Tensor images = SmoothImages(32, kSample, 2);
  for (int layer = 0; layer < 8; ++layer) {
    std::atomic<bool> cancelled = false;
    QuantizeOptions options = Options(v1::TERNARY_CLUSTER);
    options.cancelled = &cancelled;
    options.progress = [&](const Progress& progress) { cancelled = progress.layers_done >= layer; };
    EXPECT_EQ(Quantize(graph, images, options).status().code(), absl::StatusCode::kCancelled)
        << layer;
  }
}

TEST(QuantizeTest, WhatFeedsASoftmaxStaysFloat) {
  Builder b(Shape{3, 6, 6});
  const auto conv = b.Conv("conv", b.graph().input, 4, 3, true);
  const auto flat = b.Simple("flatten", graph::OpType::kReshape, {conv}, Shape{144});
  const auto fc = b.FullyConnected("fc", flat, 5);
  const auto shares = b.Simple("softmax", graph::OpType::kSoftmax, {fc}, Shape{5});
  b.FullyConnected("classifier", shares, 4);
  const QuantizeResult result =
      MustQuantize(b.graph(), SmoothImages(16, Shape{3, 6, 6}, 2), Options(v1::INT8));
  EXPECT_THAT(result.report.float_nodes(), ElementsAre("softmax"));
  EXPECT_FALSE(ParamsOf(result.graph, "fc"));
  EXPECT_TRUE(ParamsOf(result.graph, "flatten"));
}

TEST(QuantizeTest, RefusesProbabilitiesInsteadOfLogits) {
  graph::Graph graph = SmallNetwork();
  graph::Node softmax;
  softmax.name = "probabilities";
  softmax.op = graph::OpType::kSoftmax;
  softmax.inputs = {graph.output};
  graph.output = softmax.output = graph.AddValue({.name = "out", .shape = Shape{5}});
  graph.nodes.push_back(softmax);
  const auto status = Quantize(graph, SmoothImages(16, kSample, 2), Options(v1::INT8)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("probabilities"));
}

TEST(QuantizeTest, RefusesParametersThatAreNotFinite) {
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::nanf("")}) {
    for (const bool bias : {false, true}) {
      graph::Graph graph = SmallNetwork();
      graph::Node& node = graph.nodes[1];  // a ReLU follows
      (bias ? node.bias : node.weight).data<float>()[2] = bad;
      EXPECT_EQ(Quantize(graph, SmoothImages(16, kSample, 2), Options(v1::INT8)).status().code(),
                absl::StatusCode::kInvalidArgument);
    }
  }
}

// Pictures of one colour make inputs of layers constant up to f32's rounding.
TEST(QuantizeTest, ImagesOfOneColourWillDo) {
  for (const float colour : {0.0f, 0.3f, -0.7f, 2.117904f}) {
    for (const v1::WeightType weights : {v1::INT8, v1::TERNARY_CLUSTER}) {
      Tensor images(DType::kF32, kSample.WithBatch(20));
      for (float& v : images.data<float>()) v = colour;
      const auto result = Quantize(SmallNetwork(), images, Options(weights));
      EXPECT_TRUE(result.ok()) << colour << ": " << result.status();
    }
  }
}

// As large as one value of the images in a batch may be, and as many images as memory holds beside
// what one batch works on.
TEST(WalkMemoryTest, CountsWhatIsHeldAndWhatALayerWorksOn) {
  constexpr int64_t kLimit = int64_t{2304} << 20;
  for (const int size : {8, 64, 512, 2048}) {
    Builder b(Shape{3, size, size});
    const auto stem = b.Conv("stem", b.graph().input, 64, 3, true);
    const auto sum = b.Conv("sum", stem, 64, 3, true, 1, stem);
    const auto mean = b.Simple("mean", graph::OpType::kGlobalAveragePool, {sum}, Shape{64, 1, 1});
    b.FullyConnected("fc", b.Simple("flat", graph::OpType::kReshape, {mean}, Shape{64}), 5);
    const WalkMemory memory = MemoryOf(b.graph());
    const int64_t value = int64_t{64} * size * size;
    EXPECT_GE(memory.batch, 1);
    EXPECT_LE(memory.batch, 128);
    EXPECT_LE(memory.batch * value, std::max<int64_t>(value, 1 << 24)) << size;
    // The input of `stem` dies before `sum`, whose input and output are held in 3 bytes each.
    EXPECT_EQ(memory.held, 2 * 3 * value) << size;
    // At least input, output and oneDNN's copies of both.
    EXPECT_GE(memory.working, memory.batch * 4 * 4 * value) << size;
    EXPECT_GE(memory.images, 1);
    EXPECT_TRUE(memory.images == 1 || memory.images * memory.held + memory.working <= kLimit)
        << size;
  }
}

TEST(QuantizeTest, AveragingToTheLogitsStaysFloat) {
  Builder b(Shape{3, 6, 6});
  const auto stem = b.Conv("stem", b.graph().input, 4, 3, true);
  const auto last = b.Conv("last", stem, 5, 1, true);
  const auto mean = b.Simple("mean", graph::OpType::kGlobalAveragePool, {last}, Shape{5, 1, 1});
  b.Simple("flatten", graph::OpType::kReshape, {mean}, Shape{5});
  const QuantizeResult result =
      MustQuantize(b.graph(), SmoothImages(16, Shape{3, 6, 6}, 2), Options(v1::INT8));
  EXPECT_THAT(result.report.float_nodes(), ElementsAre("mean", "flatten"));
  EXPECT_TRUE(ParamsOf(result.graph, "stem"));
  EXPECT_FALSE(ParamsOf(result.graph, "last"));
}

TEST(QuantizeTest, ConcatenationsOfConcatenationsShareParametersDownToTheParts) {
  Builder b(Shape{3, 6, 6});
  const auto p = b.Conv("p", b.graph().input, 4, 1, true);
  const auto q = b.Conv("q", b.graph().input, 4, 3, true);
  const auto r = b.Conv("r", b.graph().input, 4, 3, true);
  const auto inner = b.Simple("inner", graph::OpType::kConcat, {p, q}, Shape{8, 6, 6});
  const auto outer = b.Simple("outer", graph::OpType::kConcat, {inner, r}, Shape{12, 6, 6});
  b.FullyConnected("fc", b.Simple("flatten", graph::OpType::kReshape, {outer}, Shape{432}), 5);
  const QuantizeResult result =
      MustQuantize(b.graph(), SmoothImages(16, Shape{3, 6, 6}, 2), Options(v1::INT8));
  ASSERT_TRUE(ParamsOf(result.graph, "outer"));
  for (const char* name : {"p", "q", "r", "inner"}) {
    EXPECT_EQ(ParamsOf(result.graph, name), ParamsOf(result.graph, "outer")) << name;
  }
  for (const auto& layer : result.report.layers()) {
    if (layer.name() != "p") continue;
    EXPECT_EQ(layer.output_scale(), ParamsOf(result.graph, "outer")->scale);
  }
}

TEST(QuantizeTest, ARowOfZeroWeightsStaysZero) {
  graph::Graph graph = SmallNetwork();
  graph::Node& node = graph.nodes[1];
  for (int j = 0; j < 90; ++j) node.weight.data<float>()[3 * 90 + j] = 0.0f;
  for (auto method : {v1::DIRECT, v1::CORRECTED}) {
    const auto result =
        MustQuantize(graph, SmoothImages(16, kSample, 2), Options(v1::TERNARY_CLUSTER, 4, method));
    const auto codes = result.graph.nodes[1].quantized->codes.data<int8_t>();
    for (int j = 0; j < 90; ++j) ASSERT_EQ(codes[3 * 90 + j], 0);
  }
}

TEST(ValidateRecipeTest, NamesTheFieldTheValueAndTheLimit) {
  const auto message = [](auto change) {
    v1::Recipe recipe;
    recipe.set_weights(v1::TERNARY_CLUSTER);
    change(recipe);
    const absl::Status status = ValidateRecipe(recipe);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_TRUE(ValidateRecipe(Options(v1::INT4_CLUSTER, 0).recipe).ok());
  EXPECT_TRUE(ValidateRecipe(Options(v1::INT8, 256).recipe).ok());
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_weights(v1::FP32); }),
              HasSubstr("recipe.weights is FP32"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.clear_weights(); }),
              HasSubstr("WEIGHT_TYPE_UNSPECIFIED"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_weights(static_cast<v1::WeightType>(77)); }),
              HasSubstr("77"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_cluster_size(257); }),
              HasSubstr("257; wanted 1..256"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_method(static_cast<v1::Method>(9)); }),
              HasSubstr("recipe.method is 9"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_activations(static_cast<v1::ActivationType>(5)); }),
              HasSubstr("is 5"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_max_top1_drop(std::nan("")); }),
              HasSubstr("max_top1_drop"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_max_top1_drop(1.5); }), HasSubstr("1.5"));
  EXPECT_THAT(message([](v1::Recipe& r) { r.set_distillation(static_cast<v1::Distillation>(7)); }),
              HasSubstr("recipe.distillation is 7"));
}

TEST(ValidateRecipeTest, MixedNeedsOneBudgetAndNothingElseTakesOne) {
  const auto check = [](v1::WeightType weights, auto change) {
    v1::Recipe recipe;
    recipe.set_weights(weights);
    change(recipe);
    return ValidateRecipe(recipe);
  };
  EXPECT_TRUE(check(v1::MIXED, [](v1::Recipe& r) { r.set_target_bits(3.3); }).ok());
  EXPECT_TRUE(check(v1::MIXED, [](v1::Recipe& r) { r.set_target_ms(1.5); }).ok());
  EXPECT_TRUE(check(v1::MIXED, [](v1::Recipe& r) { r.set_max_top1_drop(0); }).ok());
  const auto refused = [&](v1::WeightType weights, auto change) {
    const absl::Status status = check(weights, change);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refused(v1::MIXED, [](v1::Recipe&) {}), HasSubstr("no budget"));
  EXPECT_THAT(refused(v1::MIXED, [](v1::Recipe& r) { r.set_max_top1_drop(-1); }),
              HasSubstr("no budget"));
  EXPECT_THAT(refused(v1::MIXED, [](v1::Recipe& r) { r.set_target_bits(3), r.set_target_ms(1); }),
              HasSubstr("two budgets"));
  EXPECT_THAT(refused(v1::MIXED, [](v1::Recipe& r) { r.set_target_bits(1.5); }),
              HasSubstr("target_bits is 1.5; wanted 1.6..8"));
  EXPECT_THAT(refused(v1::MIXED, [](v1::Recipe& r) { r.set_target_bits(std::nan("")); }),
              HasSubstr("target_bits"));
  EXPECT_THAT(refused(v1::MIXED, [](v1::Recipe& r) { r.set_target_ms(0); }),
              HasSubstr("target_ms is 0"));
  EXPECT_THAT(refused(v1::INT8, [](v1::Recipe& r) { r.set_target_ms(1); }),
              HasSubstr("target_ms is set for weights INT8"));
}

TEST(ValidateRecipeTest, LayersAreNamedOnceWithAWeightTypeEach) {
  const auto message = [](std::vector<std::tuple<std::string, v1::WeightType, uint32_t>> layers) {
    v1::Recipe recipe;
    recipe.set_weights(v1::INT8);
    for (const auto& [name, weights, n] : layers) {
      v1::LayerChoice* choice = recipe.add_layers();
      choice->set_layer(name);
      choice->set_weights(weights);
      choice->set_cluster_size(n);
    }
    return std::string(ValidateRecipe(recipe).message());
  };
  EXPECT_EQ(message({{"a", v1::INT8, 0}, {"b", v1::TERNARY_CLUSTER, 4}}), "");
  EXPECT_THAT(message({{"", v1::INT8, 0}}), HasSubstr("without a layer's name"));
  EXPECT_THAT(message({{"a", v1::INT8, 0}, {"a", v1::INT8, 0}}), HasSubstr("layers[a] is there"));
  EXPECT_THAT(message({{"a", v1::MIXED, 0}}), HasSubstr("layers[a].weights is MIXED (5)"));
  EXPECT_THAT(message({{"a", v1::FP32, 0}}), HasSubstr("FP32"));
  EXPECT_THAT(message({{"a", v1::INT4_CLUSTER, 257}}), HasSubstr("257; wanted 1..256"));
}

TEST(QuantizeTest, ALayerThatIsNotThereIsRefusedByName) {
  QuantizeOptions options = Options(v1::INT8);
  v1::LayerChoice* choice = options.recipe.add_layers();
  choice->set_layer("nowhere");
  choice->set_weights(v1::INT8);
  const graph::Graph graph = SmallNetwork();
  const auto result =
      Quantize(graph, Tensor(DType::kF32, graph.shape(graph.input).WithBatch(2)), options);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("nowhere"));
}

TEST(QuantizeTest, RefusesImagesOfAnotherShapeOrWithNonFiniteValues) {
  const graph::Graph graph = SmallNetwork();
  const auto code = [&](const Tensor& images) {
    return Quantize(graph, images, Options(v1::INT8)).status().code();
  };
  EXPECT_EQ(code(Tensor(DType::kF32, Shape{2, 3, 12, 13})), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Tensor(DType::kF32, Shape{3, 12, 12})), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Tensor(DType::kF32, Shape{0, 3, 12, 12})), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Tensor(DType::kU8, Shape{2, 3, 12, 12})), absl::StatusCode::kInvalidArgument);
  Tensor bad = SmoothImages(2, kSample, 1);
  bad.data<float>()[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
}

TEST(QuantizeTest, NamesTheLayerWhoseFloatOutputOverflows) {
  graph::Graph graph = SmallNetwork();
  for (float& v : graph.nodes[1].weight.data<float>()) v = 3e38f;
  const absl::Status status =
      Quantize(graph, SmoothImages(2, kSample, 1), Options(v1::INT8)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("block.conv1"));
}

TEST(QuantizeTest, RefusesAQuantisedNetworkAndOneWithoutWeights) {
  const Tensor images = SmoothImages(16, kSample, 2);
  const graph::Graph once = MustQuantize(SmallNetwork(), images, Options(v1::INT8)).graph;
  EXPECT_EQ(Quantize(once, images, Options(v1::INT8)).status().code(),
            absl::StatusCode::kInvalidArgument);
  Builder b(kSample);
  b.Simple("flatten", graph::OpType::kReshape, {b.graph().input}, Shape{432});
  EXPECT_EQ(Quantize(b.graph(), images, Options(v1::INT8)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::quant
