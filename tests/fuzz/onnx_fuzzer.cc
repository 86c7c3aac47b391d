// Bytes -> ONNX import, passes, and back to ONNX: what RegistryService.Import and Export do.
#include <google/protobuf/stubs/logging.h>

#include "server/graph/passes.h"
#include "server/onnx/export.h"
#include "server/onnx/import.h"
#include "tests/fuzz/fuzzer.h"

namespace tern::onnx {
namespace {

void Run(absl::string_view bytes) {
  absl::StatusOr<graph::Graph> graph = Import(bytes);
  if (!graph.ok()) {
    fuzz::Check(absl::IsInvalidArgument(graph.status()) || absl::IsUnimplemented(graph.status()),
                graph.status().ToString());
    return;
  }
  graph::Optimize(*graph);
  const absl::Status valid = graph::Validate(*graph);
  fuzz::Check(valid.ok(), valid.ToString());
}

}  // namespace
}  // namespace tern::onnx

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  google::protobuf::SetLogHandler(nullptr);  // a line for each input that does not parse
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tern::onnx::Run(tern::fuzz::Text(data, size));
  return 0;
}
