// The networks on which Export is tested, here and against onnxruntime: the engine's zoo, which has
// every operator, and shapes that ONNX treats differently from the graph.
#ifndef TERN_TESTS_ONNX_EXPORT_ZOO_H_
#define TERN_TESTS_ONNX_EXPORT_ZOO_H_

#include <utility>
#include <vector>

#include "server/graph/passes.h"
#include "server/reference/execute.h"
#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"

namespace tern::onnx::testing {

// Networks end in a list of classes.
inline graph::Graph Flattened(graph::Graph graph) {
  graph::Node node;
  node.name = "classes";
  node.op = graph::OpType::kReshape;
  node.inputs = {graph.output};
  node.output = graph.AddValue({"logits", Shape{graph.classes()}, {}, {}});
  graph.output = node.output;
  graph.nodes.push_back(std::move(node));
  graph::Optimize(graph);
  return graph;
}

inline std::vector<engine::testing::NamedGraph> ExportZoo() {
  using engine::testing::GraphBuilder;
  using engine::testing::Window;
  using graph::OpType;
  using graph::PoolAttributes;
  using graph::ValueId;
  std::vector<engine::testing::NamedGraph> zoo = engine::testing::Zoo();
  const auto add = [&](std::string name, graph::Graph graph) {
    zoo.push_back({std::move(name), std::move(graph)});
  };
  // Ceil mode whose last window would start in the padding, ends inside the input, or is cut.
  for (const OpType op : {OpType::kMaxPool, OpType::kAveragePool}) {
    for (const bool include : {false, true}) {
      if (include && op == OpType::kMaxPool) continue;
      GraphBuilder b({4, 3, 8});
      PoolAttributes dropped = Window(2, 2, 1, true, include);
      PoolAttributes cut = Window(3, 2, 0, true, include);
      cut.pad_top = 1;
      cut.pad_right = 2;
      PoolAttributes gaps = Window(1, 2, 0, true, include);
      const ValueId x = b.Conv(b.input(), 8, 1);
      const ValueId y = b.Conv(b.Pool(op, x, cut), 8, 1);
      add(absl::StrCat("Ceil", graph::Name(op), include),
          b.Finish(b.Concat({b.Flatten(b.Pool(op, x, dropped)), b.Flatten(b.Pool(op, y, gaps))})));
    }
  }
  {
    GraphBuilder b({4, 5, 6});
    const ValueId x = b.Conv(b.input(), 4, 1);
    ValueId row = b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 6);  // [6] beside [4,5,6]
    ValueId y = b.Binary(OpType::kAdd, x, row, engine::testing::kReluRange);
    y = b.Binary(OpType::kSub, row, y);
    add("UnequalRanks", b.Finish(b.Conv(y, 8, 1)));
  }
  {
    GraphBuilder b({4, 5, 6});
    ValueId x = b.BatchNorm(b.input());
    for (const graph::ClipRange range :
         {graph::ClipRange{-engine::testing::kInfinity, 0.5f},
          graph::ClipRange{-0.75f, engine::testing::kInfinity},
          graph::ClipRange{-engine::testing::kInfinity, engine::testing::kInfinity}}) {
      x = b.Conv(x, 8, 1, {}, range);
    }
    x = b.BatchNorm(b.Flatten(b.GlobalAverage(x)));
    add("OpenClips", b.Finish(b.Softmax(b.ReduceMean(x, {}, {8}), 0)));
  }
  return zoo;
}

inline Tensor RandomInput(const graph::Graph& graph, int64_t n) {
  engine::testing::GraphBuilder random(Shape{1}, 7);
  return random.Random(graph.shape(graph.input).WithBatch(n), -2.0f, 2.0f);
}

// By direct rounding, ranges from `input`; cluster scales up to `max_scale`.
inline graph::Graph Quantised(const graph::Graph& graph, const Tensor& input, WeightScheme scheme,
                              int max_scale = 127) {
  const auto values = reference::ExecuteFloat(graph, input);
  EXPECT_TRUE(values.ok()) << values.status();
  engine::testing::QuantizeOptions options;
  options.scheme = scheme;
  options.max_scale = max_scale;
  return QuantizeGraph(graph, engine::testing::RangesOf(*values), options);
}

}  // namespace tern::onnx::testing

#endif  // TERN_TESTS_ONNX_EXPORT_ZOO_H_
