#include "server/tensor/tensor.h"

#include <gtest/gtest.h>

#include <cmath>

#include "server/tensor/cluster.h"
#include "server/tensor/quant_params.h"
#include "server/tensor/quantized_weights.h"

namespace tern {
namespace {

TEST(ShapeTest, CountsAndPrints) {
  EXPECT_EQ((Shape{2, 3, 4}).elements(), 24);
  EXPECT_EQ(Shape().elements(), 1);
  EXPECT_EQ((Shape{2, 0}).elements(), 0);
  EXPECT_EQ((Shape{64, 3, 7, 7}).ToString(), "[64,3,7,7]");
  EXPECT_EQ(Shape({3, 4}).WithBatch(8), (Shape{8, 3, 4}));
  EXPECT_NE((Shape{1, 2}), (Shape{2, 1}));
}

TEST(TensorTest, StartsEmptyOrZero) {
  const Tensor none;
  EXPECT_TRUE(none.empty());
  EXPECT_EQ(none.elements(), 0);
  const Tensor tensor(DType::kS32, {2, 3});
  EXPECT_EQ(tensor.size_bytes(), 24u);
  for (int32_t value : tensor.data<int32_t>()) EXPECT_EQ(value, 0);
}

TEST(TensorTest, CopiesDoNotShareElements) {
  Tensor a = Tensor::Of<float>({2}, {1, 2});
  Tensor b = a;
  b.data<float>()[0] = 9;
  EXPECT_EQ(a.data<float>()[0], 1);
  const Tensor c = a.Reshaped({1, 2, 1});
  EXPECT_EQ(c.shape(), (Shape{1, 2, 1}));
  EXPECT_EQ(c.data<float>()[1], 2);
}

TEST(QuantParamsTest, RoundsHalvesToEvenAndSaturates) {
  const QuantParams q{0.5f, 10};
  EXPECT_EQ(q.Quantize(0.0f), 10);
  EXPECT_EQ(q.Quantize(0.25f), 10);  // 0.5 steps: to 0
  EXPECT_EQ(q.Quantize(0.75f), 12);  // 1.5 steps: to 2
  EXPECT_EQ(q.Quantize(-100.0f), 0);
  EXPECT_EQ(q.Quantize(1e30f), 255);
  EXPECT_EQ(q.Dequantize(10), 0.0f);
  for (int code = 0; code < 256; ++code) {
    EXPECT_EQ(q.Quantize(q.Dequantize(static_cast<uint8_t>(code))), code);
  }
}

TEST(QuantizedWeightsTest, DequantizeIsStepTimesScaleTimesCode) {
  QuantizedWeights w;
  w.scheme = WeightScheme::kTernaryCluster;
  w.cluster_size = 2;
  w.codes = Tensor(DType::kS8, {2, 5, 1, 2});
  const ClusterMap map(5, 2);
  ASSERT_EQ(map.clusters(), 3);
  w.cluster_scales = Tensor::Of<int8_t>({2, 3}, {3, 5, 7, 11, 13, 127});
  w.steps = {0.25f, 2.0f};
  for (int i = 0; i < 20; ++i) w.codes.data<int8_t>()[i] = static_cast<int8_t>(i % 3 - 1);
  const Tensor real = Dequantize(w);
  ASSERT_EQ(real.shape(), w.codes.shape());
  // Blocks of four channels: {0,1} and {2,3}; then {4}.
  const int cluster[] = {0, 0, 1, 1, 2};
  for (int o = 0; o < 2; ++o) {
    for (int c = 0; c < 5; ++c) {
      for (int t = 0; t < 2; ++t) {
        const int i = (o * 5 + c) * 2 + t;
        EXPECT_EQ(real.data<float>()[i],
                  w.steps[o] * w.cluster_scales.data<int8_t>()[o * 3 + cluster[c]] * (i % 3 - 1));
      }
    }
  }
}

TEST(QuantizedWeightsTest, Int8HasOneScalePerOutput) {
  QuantizedWeights w;
  w.codes = Tensor::Of<int8_t>({2, 2}, {63, -63, 1, 0});
  w.steps = {0.5f, 3.0f};
  const Tensor real = Dequantize(w);
  const float want[] = {31.5f, -31.5f, 3.0f, 0.0f};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(real.data<float>()[i], want[i]);
}

}  // namespace
}  // namespace tern
