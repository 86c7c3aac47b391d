// A .tern file that the reader accepts -> plan, session, one run: what happens when a version is
// loaded. The engine may refuse a network; it may not read or write outside its memory.
#include <google/protobuf/stubs/logging.h>

#include <algorithm>

#include "server/artifact/artifact.h"
#include "server/engine/plan.h"
#include "tests/fuzz/fuzzer.h"

namespace tern::engine {
namespace {

constexpr int kBatch = 2;

// Larger networks take the same paths and seconds of time under the sanitizers.
bool Small(const graph::Graph& graph) {
  constexpr int64_t kMostElements = 1 << 14, kMostMacs = 1 << 20;
  if (graph.nodes.size() > 40) return false;
  for (const graph::Value& value : graph.values) {
    if (value.shape.elements() > kMostElements) return false;
  }
  for (const graph::Node& node : graph.nodes) {
    const Shape* weights = node.quantized         ? &node.quantized->codes.shape()
                           : !node.weight.empty() ? &node.weight.shape()
                                                  : nullptr;
    // Every output element is at most one row of the weights.
    if (weights != nullptr && weights->rank() > 0 &&
        weights->elements() / (*weights)[0] * graph.shape(node.output).elements() > kMostMacs) {
      return false;
    }
    const auto& pool = node.pool;
    if (int64_t{pool.kernel_h} * pool.kernel_w > 4096) return false;
  }
  return true;
}

void Run(absl::string_view bytes) {
  const auto artifact = artifact::Parse(bytes, "input");
  if (!artifact.ok() || !Small(artifact->graph)) return;
  PlanOptions options;
  options.max_batch = kBatch;
  const auto plan = Plan::Create(artifact->graph, options);
  if (!plan.ok()) {
    fuzz::Check(!absl::IsInternal(plan.status()), plan.status().ToString());
    return;
  }
  auto session = (*plan)->NewSession(1);
  fuzz::Check(session.ok(), session.status().ToString());
  absl::Span<float> input = session->input();
  for (size_t i = 0; i < input.size(); ++i) {
    input[i] = static_cast<float>(static_cast<uint8_t>(bytes[i % bytes.size()])) / 64 - 2;
  }
  const auto logits = session->Run(kBatch);
  fuzz::Check(logits.ok(), logits.status().ToString());
  fuzz::Check(static_cast<int64_t>(logits->size()) == kBatch * (*plan)->classes(),
              "not one logit per class");
}

}  // namespace
}  // namespace tern::engine

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  google::protobuf::SetLogHandler(nullptr);  // a line for each header that does not parse
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tern::engine::Run(tern::fuzz::Text(data, size));
  return 0;
}
