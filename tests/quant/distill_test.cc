#include "server/quant/distill.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "server/quant/measure.h"
#include "server/quant/quantize.h"
#include "server/quant/student.h"
#include "server/reference/execute.h"
#include "tests/quant/networks.h"

namespace tern::quant {
namespace {

std::vector<int64_t> Range(int64_t first, int64_t last) {
  std::vector<int64_t> result(last - first);
  std::iota(result.begin(), result.end(), first);
  return result;
}

class DistillTest : public ::testing::Test {
 protected:
  DistillTest() : reference_(SmallNetwork()), images_(SmoothImages(120, Shape{3, 12, 12}, 5)) {
    // Answers that differ from image to image.
    for (float& w : reference_.nodes.back().weight.data<float>()) w *= 4;
    QuantizeOptions options;
    options.recipe.set_weights(v1::TERNARY_CLUSTER);
    options.recipe.set_cluster_size(4);
    // Nearest codes leave much to repair.
    options.recipe.set_method(v1::DIRECT);
    quantised_ = Quantize(reference_, TakeImages(images_, Range(0, 80)), options)->graph;
  }

  Closeness On(const graph::Graph& graph, const std::vector<int64_t>& which) {
    return Compare(RunEngine(reference_, images_, which, {}, 1, nullptr).value(),
                   RunEngine(graph, images_, which, {}, 1, nullptr).value());
  }

  graph::Graph reference_, quantised_;
  Tensor images_;
};

TEST_F(DistillTest, WholeNetworkComesCloserToTheFloatOneOnFreshImages) {
  graph::Graph trained = quantised_;
  DistillOptions options;
  options.kind = v1::DISTILL_NETWORK;
  options.steps = 60;
  const auto report = Distill(reference_, images_, Range(0, 80), Range(80, 100), options, trained);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->kept());
  EXPECT_GT(report->steps(), 0u);
  const Closeness before = On(quantised_, Range(100, 120)), after = On(trained, Range(100, 120));
  EXPECT_LT(after.divergence, 0.8 * before.divergence);
  EXPECT_TRUE(graph::Validate(trained).ok());
}

// Compares a report with what the reference computes on all images: ratios within `tolerance` dB.
void ExpectReportOf(const graph::Graph& reference, const graph::Graph& quantised,
                    const Tensor& images, double tolerance, const v1::QuantizationReport& report) {
  const auto wanted = reference::ExecuteFloat(reference, images);
  const auto got = reference::ExecuteQuantized(quantised, images);
  ASSERT_TRUE(wanted.ok() && got.ok());
  const auto decibels = [&](graph::ValueId id) {
    const auto& params = quantised.values[id].quant;
    double signal = 0, noise = 0;
    for (int64_t i = 0; i < (*wanted)[id].elements(); ++i) {
      const double real = (*wanted)[id].data<float>()[i];
      const double own =
          params ? params->Dequantize((*got)[id].data<uint8_t>()[i]) : (*got)[id].data<float>()[i];
      signal += real * real;
      noise += (own - real) * (own - real);
    }
    return 10 * std::log10(signal / noise);
  };
  int layer = 0;
  for (const graph::Node& node : quantised.nodes) {
    if (!node.quantized) continue;
    const v1::LayerReport& entry = report.layers(layer++);
    EXPECT_EQ(entry.name(), node.name);
    EXPECT_NEAR(entry.output_sqnr_db(), decibels(node.output), tolerance) << node.name;
    EXPECT_LT(entry.output_clipped(), 0.05) << node.name;
  }
  EXPECT_EQ(layer, report.layers_size());
  EXPECT_NEAR(report.sqnr_db(), decibels(reference.output), tolerance);
}

TEST_F(DistillTest, OutputsAreMeasuredAsTheReferenceComputesThem) {
  v1::QuantizationReport report;
  for (const graph::Node& node : quantised_.nodes) {
    if (node.quantized) report.add_layers()->set_name(node.name);
  }
  const auto all = Range(0, 120);
  ASSERT_TRUE(MeasureOutputs(reference_, quantised_, images_, all, 1, nullptr, report).ok());
  ExpectReportOf(reference_, quantised_, images_, 0.05, report);
  EXPECT_EQ(report.calibration_agreement().total(), 120u);
  EXPECT_NEAR(report.calibration_agreement().value(), On(quantised_, all).agreement, 0.01);
}

// Its figures are of some of the images.
TEST_F(DistillTest, TheReportIsAboutTheDistilledNetwork) {
  QuantizeOptions options;
  options.recipe.set_weights(v1::TERNARY_CLUSTER);
  options.recipe.set_cluster_size(4);
  options.recipe.set_distillation(v1::DISTILL_NETWORK);
  const auto result = Quantize(reference_, images_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_TRUE(result->report.distillation().kept());
  ExpectReportOf(reference_, result->graph, images_, 0.8, result->report);
}

TEST_F(DistillTest, BlocksComeCloserToo) {
  graph::Graph trained = quantised_;
  DistillOptions options;
  options.kind = v1::DISTILL_BLOCKS;
  const auto report = Distill(reference_, images_, Range(0, 80), {}, options, trained);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->kept());
  EXPECT_EQ(report->kind(), v1::DISTILL_BLOCKS);
  EXPECT_LT(On(trained, Range(80, 120)).divergence, On(quantised_, Range(80, 120)).divergence);
}

TEST_F(DistillTest, CodesStayAndScalesAndBiasesMove) {
  graph::Graph trained = quantised_;
  DistillOptions options;
  options.kind = v1::DISTILL_NETWORK;
  options.steps = 5;
  ASSERT_TRUE(Distill(reference_, images_, Range(0, 80), {}, options, trained).ok());
  bool moved = false;
  for (size_t i = 0; i < trained.nodes.size(); ++i) {
    if (!trained.nodes[i].quantized) continue;
    const QuantizedWeights &before = *quantised_.nodes[i].quantized,
                           &after = *trained.nodes[i].quantized;
    EXPECT_EQ(before.codes.data<int8_t>(), after.codes.data<int8_t>());
    moved |= before.steps != after.steps;
    EXPECT_NE(trained.nodes[i].bias.data<float>(), quantised_.nodes[i].bias.data<float>());
  }
  EXPECT_TRUE(moved);
}

TEST_F(DistillTest, TheSameSeedGivesTheSameNetwork) {
  graph::Graph a = quantised_, b = quantised_;
  DistillOptions options;
  options.kind = v1::DISTILL_NETWORK;
  options.steps = 5;
  options.seed = 3;
  ASSERT_TRUE(Distill(reference_, images_, Range(0, 80), {}, options, a).ok());
  ASSERT_TRUE(Distill(reference_, images_, Range(0, 80), {}, options, b).ok());
  for (size_t i = 0; i < a.nodes.size(); ++i) {
    if (a.nodes[i].quantized) {
      EXPECT_EQ(a.nodes[i].quantized->steps, b.nodes[i].quantized->steps);
    }
  }
}

TEST_F(DistillTest, AutoKeepsNothingThatItCouldNotCheck) {
  // The held-out images are the judges; without any nothing is kept.
  graph::Graph trained = quantised_;
  DistillOptions options;
  options.kind = v1::DISTILL_AUTO;
  options.steps = 2;
  const auto report = Distill(reference_, images_, Range(0, 80), {}, options, trained);
  ASSERT_TRUE(report.ok());
  EXPECT_FALSE(report->kept());
  for (size_t i = 0; i < trained.nodes.size(); ++i) {
    if (trained.nodes[i].quantized) {
      EXPECT_EQ(trained.nodes[i].quantized->steps, quantised_.nodes[i].quantized->steps);
    }
  }
}

TEST_F(DistillTest, StopsWhenCancelled) {
  const std::atomic<bool> cancelled{true};
  DistillOptions options;
  options.kind = v1::DISTILL_NETWORK;
  options.cancelled = &cancelled;
  graph::Graph trained = quantised_;
  EXPECT_EQ(Distill(reference_, images_, Range(0, 80), {}, options, trained).status().code(),
            absl::StatusCode::kCancelled);
  options.kind = v1::DISTILL_BLOCKS;
  EXPECT_EQ(Distill(reference_, images_, Range(0, 80), {}, options, trained).status().code(),
            absl::StatusCode::kCancelled);
}

TEST_F(DistillTest, RefusesNetworksThatDoNotMatch) {
  graph::Graph other = quantised_;
  other.nodes.pop_back();
  EXPECT_EQ(Distill(reference_, images_, Range(0, 80), {}, DistillOptions{}, other).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(DistillTest, DivergenceIsThatOfTheDefinition) {
  const Tensor p = Tensor::Of<float>(Shape{1, 2}, {std::log(0.9f), std::log(0.1f)});
  const Tensor q = Tensor::Of<float>(Shape{1, 2}, {std::log(0.5f), std::log(0.5f)});
  const Closeness closeness = Compare(p, q);
  EXPECT_NEAR(closeness.divergence, 0.9 * std::log(0.9 / 0.5) + 0.1 * std::log(0.1 / 0.5), 1e-6);
  EXPECT_EQ(closeness.agreement, 1.0);
}

// The student's derivatives against differences of a loss, parameter by parameter, through a
// network with a residual, a concatenation, pools and a grouped layer.
TEST_F(DistillTest, ParametersMoveAgainstTheLoss) {
  Student student(quantised_, 1.0f, 1);
  const NodeRange whole = student.whole();
  const Tensor batch = TakeImages(images_, Range(0, 16));
  const Tensor wanted = RunEngine(reference_, images_, Range(0, 16), {}, 1, nullptr).value();
  const auto loss = [&] {
    const auto values = student.Forward(whole, batch, false).value();
    double sum = 0;
    for (int64_t i = 0; i < wanted.elements(); ++i) {
      const double d =
          static_cast<double>(values[whole.output].data<float>()[i]) - wanted.data<float>()[i];
      sum += d * d / 2;
    }
    return sum;
  };
  const double before = loss();
  for (int step = 0; step < 30; ++step) {
    const auto values = student.Forward(whole, batch, true).value();
    Tensor gradient = values[whole.output];
    for (int64_t i = 0; i < wanted.elements(); ++i)
      gradient.data<float>()[i] -= wanted.data<float>()[i];
    ASSERT_TRUE(student.Backward(whole, values, std::move(gradient)).ok());
    student.Step(whole, {2e-3f, 1e-3f});
  }
  EXPECT_LT(loss(), 0.7 * before);
}

TEST_F(DistillTest, BlocksPartitionTheNetworkAtSingleValues) {
  const Student student(quantised_, 1.0f, 1);
  const std::vector<NodeRange> blocks = student.Blocks();
  ASSERT_GE(blocks.size(), 3u);
  EXPECT_EQ(blocks.front().first, 0);
  EXPECT_EQ(blocks.back().last, static_cast<int>(quantised_.nodes.size()));
  EXPECT_EQ(blocks.back().output, quantised_.output);
  for (size_t k = 1; k < blocks.size(); ++k) {
    EXPECT_EQ(blocks[k].first, blocks[k - 1].last);
    EXPECT_EQ(blocks[k].input, blocks[k - 1].output);
  }
  // Block by block gives what the whole gives.
  const Tensor batch = TakeImages(images_, Range(0, 4));
  Tensor value = batch;
  for (const NodeRange& block : blocks)
    value = student.Forward(block, value, false).value()[block.output];
  const auto whole = student.Forward(student.whole(), batch, false).value();
  EXPECT_EQ(value.data<float>(), whole[quantised_.output].data<float>());
}

TEST_F(DistillTest, ReplayGivesWhatAChangedNetworkGives) {
  const Student student(quantised_, 1.0f, 1);
  const Tensor batch = TakeImages(images_, Range(0, 4));
  const auto values = student.Forward(student.whole(), batch, true).value();
  for (size_t i = 0; i < quantised_.nodes.size(); ++i) {
    if (!quantised_.nodes[i].quantized) continue;
    graph::Graph changed = quantised_;
    for (float& step : changed.nodes[i].quantized->steps) step *= 1.25f;
    for (float& b : changed.nodes[i].bias.data<float>()) b += 0.125f;
    const Student other(changed, 1.0f, 1);
    const auto wanted = other.Forward(other.whole(), batch, false).value();
    const Tensor got = student
                           .Replay(values, static_cast<int>(i),
                                   Dequantize(*changed.nodes[i].quantized), changed.nodes[i].bias)
                           .value();
    EXPECT_EQ(got.data<float>(), wanted[changed.output].data<float>()) << changed.nodes[i].name;
  }
}

}  // namespace
}  // namespace tern::quant
