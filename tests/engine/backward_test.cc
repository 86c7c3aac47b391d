#include "server/engine/backward.h"

#include <gtest/gtest.h>

#include <cmath>

#include "server/engine/ops.h"
#include "tests/engine/graph_builder.h"

namespace tern::engine {
namespace {

using namespace testing;  // NOLINT: the builder's names

constexpr int kBatch = 2;

// Compares every derivative of the last node of `graph` with central differences of the loss
// sum(r * y), r random. Elements that feed a value next to a kink (clips, maxima) disagree; at most
// `kinks` may, a small share of all.
class BackwardTest : public ::testing::Test {
 protected:
  void Check(GraphBuilder& b, int kinks = 0) {
    const Graph& graph = b.graph();
    const Node& node = graph.nodes.back();
    std::vector<Tensor> inputs;
    std::vector<const Tensor*> pointers;
    BackwardOptions options;
    for (ValueId id : node.inputs) {
      const Value& value = graph.values[id];
      inputs.push_back(value.constant ? *value.constant : b.Random(value.shape.WithBatch(kBatch)));
      options.inputs.push_back(!value.constant);
    }
    for (const Tensor& t : inputs) pointers.push_back(&t);
    const bool weighted = node.op == OpType::kConv || node.op == OpType::kFullyConnected;
    options.weight = weighted;
    const Tensor y = RunFloatNode(graph, node, pointers, 1).value();
    const Tensor r = b.Random(y.shape());
    const auto gradients = RunBackward(graph, node, pointers, y, r, options);
    ASSERT_TRUE(gradients.ok()) << gradients.status();

    Node changed = node;
    const auto loss = [&] {
      const Tensor out = RunFloatNode(graph, changed, pointers, 1).value();
      double sum = 0;
      for (int64_t i = 0; i < out.elements(); ++i)
        sum += static_cast<double>(out.data<float>()[i]) * r.data<float>()[i];
      return sum;
    };
    int wrong = 0, checked = 0;
    const auto compare = [&](Tensor& of, const Tensor& got, const char* what) {
      ASSERT_EQ(got.shape(), of.shape()) << what;
      for (int64_t i = 0; i < of.elements(); ++i) {
        constexpr float kStep = 1.0f / 128;
        float& v = of.data<float>()[i];
        const float before = v;
        v = before + kStep;
        const double up = loss();
        v = before - kStep;
        const double down = loss();
        v = before;
        const double wanted = (up - down) / (2 * kStep);
        ++checked;
        if (std::fabs(wanted - got.data<float>()[i]) > 2e-3 * (1 + std::fabs(wanted))) {
          ++wrong;
          if (wrong > kinks) {
            ADD_FAILURE() << node.name << " " << what << "[" << i << "]: got "
                          << got.data<float>()[i] << ", differences give " << wanted;
          }
        }
        if (wrong > kinks + 3) return;
      }
    };
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (options.inputs[k]) {
        compare(inputs[k], gradients->inputs[k], "input");
      } else {
        EXPECT_TRUE(gradients->inputs[k].empty());
      }
    }
    if (weighted) {
      compare(changed.weight, gradients->weight, "weight");
      compare(changed.bias, gradients->bias, "bias");
    }
    EXPECT_GT(checked, 0);
  }
};

TEST_F(BackwardTest, ConvolutionsOfEveryAttribute) {
  {
    GraphBuilder b({5, 6, 7});
    b.Conv(b.input(), 9, 3, {.pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1});
    Check(b);
  }
  {
    GraphBuilder b({3, 9, 8});
    b.ConvRect(b.input(), 10, 3, 5,
               {.stride_h = 2,
                .stride_w = 2,
                .pad_top = 0,
                .pad_left = 2,
                .pad_bottom = 1,
                .pad_right = 1});
    Check(b);
  }
  {
    GraphBuilder b({8, 8, 8});
    b.Conv(b.input(), 8, 3,
           {.pad_top = 2,
            .pad_left = 2,
            .pad_bottom = 2,
            .pad_right = 2,
            .dilation_h = 2,
            .dilation_w = 2,
            .groups = 8});
    Check(b);
  }
  {
    GraphBuilder b({12, 5, 5});
    b.Conv(b.input(), 8, 1, {.groups = 4}, kRelu6Range);
    Check(b, 40);
  }
}

TEST_F(BackwardTest, AFusedResidualAndReluShareTheMaskedDerivative) {
  GraphBuilder b({4, 5, 5});
  const ValueId skip = b.Conv(b.input(), 6, 1);
  b.Conv(b.input(), 6, 3, {.pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1},
         kReluRange, skip);
  Check(b, 60);
}

TEST_F(BackwardTest, FullyConnectedWithAndWithoutResidual) {
  GraphBuilder b({11});
  const ValueId a = b.FullyConnected(b.input(), 7);
  Check(b);
  b.FullyConnected(b.input(), 7, kReluRange, a);
  Check(b, 4);
}

TEST_F(BackwardTest, ArithmeticWithBroadcastingAndConstants) {
  for (OpType op : {OpType::kAdd, OpType::kSub, OpType::kMul, OpType::kDiv}) {
    GraphBuilder b({3, 4, 5});
    const ValueId whole = b.Unary(OpType::kRelu, b.input());
    const ValueId small = b.GlobalAverage(b.input());
    if (op != OpType::kDiv) {
      b.Binary(op, whole, b.input());
      Check(b);
      b.Binary(op, small, whole);
      Check(b);
    }
    b.Binary(op, whole, b.Constant({3, 1, 1}));
    Check(b);
    b.Binary(op, b.Constant({4, 5}), b.Unary(OpType::kSigmoid, whole));
    if (op != OpType::kDiv) Check(b);
  }
  GraphBuilder b({2, 3, 3});
  b.Binary(OpType::kAdd, b.Unary(OpType::kSigmoid, b.input()), b.input(), kReluRange);
  Check(b, 3);
}

TEST_F(BackwardTest, FunctionsOfOneVariable) {
  for (OpType op : {OpType::kRelu, OpType::kClip, OpType::kSigmoid, OpType::kHardSigmoid,
                    OpType::kHardSwish, OpType::kSilu}) {
    GraphBuilder b({3, 4, 5}, static_cast<unsigned>(op) + 1);
    b.Unary(op, b.input());
    Check(b, op == OpType::kRelu || op == OpType::kClip ? 5 : 0);
  }
  GraphBuilder b({3, 4, 5});
  b.BatchNorm(b.input(), kReluRange);
  Check(b, 3);
}

TEST_F(BackwardTest, PoolsOfEveryKind) {
  for (bool counted : {false, true}) {
    for (bool ceil : {false, true}) {
      GraphBuilder b({3, 7, 8});
      b.Pool(OpType::kAveragePool, b.input(),
             {.kernel_h = 3,
              .kernel_w = 2,
              .stride_h = 2,
              .stride_w = 2,
              .pad_top = 1,
              .pad_left = 1,
              .pad_bottom = 1,
              .pad_right = 0,
              .ceil_mode = ceil,
              .count_include_pad = counted});
      Check(b);
      b.Pool(OpType::kMaxPool, b.input(),
             {.kernel_h = 3,
              .kernel_w = 3,
              .stride_h = 2,
              .stride_w = 2,
              .pad_top = 1,
              .pad_left = 1,
              .pad_bottom = 1,
              .pad_right = 1,
              .ceil_mode = ceil});
      Check(b, 6);
    }
  }
  GraphBuilder b({3, 7, 8});
  b.GlobalAverage(b.input());
  Check(b);
}

TEST_F(BackwardTest, OperatorsThatMoveElements) {
  GraphBuilder b({4, 5, 6});
  const ValueId other = b.Conv(b.input(), 3, 1);
  b.Concat({b.input(), other, b.input()}, 0);
  Check(b);
  b.Slice(b.input(), 1, 1, 5, 2);
  Check(b);
  b.Pad(b.input(), {1, 0, 2}, {0, 3, 1}, 0.0f);
  Check(b);
  b.Transpose(b.input(), {2, 0, 1});
  Check(b);
  b.Reshape(b.input(), {20, 6});
  Check(b);
}

TEST_F(BackwardTest, SoftmaxAndMeansOverAxes) {
  GraphBuilder b({4, 3, 5});
  b.Softmax(b.input(), 0);
  Check(b);
  b.Softmax(b.input(), 2);
  Check(b);
  b.ReduceMean(b.input(), {1, 2}, {4});
  Check(b);
  b.ReduceMean(b.input(), {0, 2}, {1, 3, 1});
  Check(b);
}

TEST_F(BackwardTest, RefusesWhatDoesNotFit) {
  GraphBuilder b({4, 5, 6});
  b.Unary(OpType::kRelu, b.input());
  const Graph& graph = b.graph();
  const Tensor x = b.Random({1, 4, 5, 6}), small = b.Random({1, 4, 5, 5});
  BackwardOptions options;
  options.inputs = {true};
  EXPECT_EQ(RunBackward(graph, graph.nodes[0], {&x}, x, small, options).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RunBackward(graph, graph.nodes[0], {&small}, x, x, options).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RunBackward(graph, graph.nodes[0], {}, x, x, options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::engine
