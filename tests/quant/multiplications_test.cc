// The paper's trade-off on the real shapes: ResNet-50 and ResNet-101 at 224 x 224.

#include <gtest/gtest.h>

#include "server/graph/graph.h"
#include "server/quant/weights.h"

namespace tern::quant {
namespace {

// Shapes only: the codes of one layer at a time, all 0.
class ResNet {
 public:
  // `n`: cluster size of the ternary layers; the first and the last layer are int8.
  ResNet(const std::vector<int>& blocks, int n) : n_(n) {
    Add(64, 3, 7, 112, false);
    int channels = 64;
    for (int stage = 0; stage < 4; ++stage) {
      const int width = 64 << stage, size = 56 >> stage;
      for (int block = 0; block < blocks[stage]; ++block) {
        const bool strided = stage > 0 && block == 0;
        // Stride in the 3x3 convolution, as torchvision has it.
        Add(width, channels, 1, strided ? 2 * size : size, true);
        Add(width, width, 3, size, true);
        Add(4 * width, width, 1, size, true);
        if (block == 0) Add(4 * width, channels, 1, size, true);
        channels = 4 * width;
      }
    }
    Add(1000, channels, 0, 1, false);
  }

  double removed() const { return removed_ / macs_; }
  double macs() const { return macs_; }
  int layers() const { return layers_; }

 private:
  // A convolution of `outputs` x `size` x `size` from `inputs` channels; kernel 0: fully connected.
  void Add(int outputs, int inputs, int kernel, int size, bool ternary) {
    graph::Graph graph;
    graph::Node node;
    node.op = kernel == 0 ? graph::OpType::kFullyConnected : graph::OpType::kConv;
    node.output =
        graph.AddValue({.shape = kernel == 0 ? Shape{outputs} : Shape{outputs, size, size}});
    QuantizedWeights weights;
    weights.scheme = ternary ? WeightScheme::kTernaryCluster : WeightScheme::kInt8;
    weights.codes = Tensor(
        DType::kS8, kernel == 0 ? Shape{outputs, inputs} : Shape{outputs, inputs, kernel, kernel});
    if (ternary) {
      weights.cluster_size = n_;
      const int clusters = MakeClusterLayout(inputs, kernel * kernel, n_).clusters();
      weights.cluster_scales = Tensor(DType::kS8, Shape{outputs, clusters});
    }
    node.quantized = std::move(weights);
    const auto macs = static_cast<double>(graph::MultiplyAccumulates(graph, node));
    macs_ += macs;
    removed_ += MultiplicationsRemoved(*node.quantized) * macs;
    ++layers_;
  }

  const int n_;
  double macs_ = 0, removed_ = 0;
  int layers_ = 0;
};

const std::vector<int> kResNet50 = {3, 4, 6, 3}, kResNet101 = {3, 4, 23, 3};

TEST(MultiplicationsRemovedTest, TheShapesAreThoseOfTheRealNetworks) {
  const ResNet small(kResNet50, 4), large(kResNet101, 4);
  EXPECT_EQ(small.layers(), 54);  // 53 convolutions and one fully connected layer
  EXPECT_EQ(large.layers(), 105);
  EXPECT_NEAR(small.macs(), 4.089e9, 1e6);  // torchvision's model cards: 4.09 and 7.80 GMACs
  EXPECT_NEAR(large.macs(), 7.801e9, 1e6);
}

// Mellempudi et al. (2017), abstract and section 3.2: about 85 % for N = 4 and 98 % for N = 64.
TEST(MultiplicationsRemovedTest, ReproducesThePaperForResNet101) {
  EXPECT_NEAR(ResNet(kResNet101, 4).removed(), 0.847, 0.0005);
  EXPECT_NEAR(ResNet(kResNet101, 64).removed(), 0.976, 0.0005);
}

TEST(MultiplicationsRemovedTest, IsLessForResNet50WhoseFirstLayerWeighsMore) {
  EXPECT_NEAR(ResNet(kResNet50, 4).removed(), 0.8285, 0.0005);
  EXPECT_NEAR(ResNet(kResNet50, 64).removed(), 0.962, 0.0005);
}

}  // namespace
}  // namespace tern::quant
