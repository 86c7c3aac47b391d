#include "server/onnx/import.h"

#include <onnx/onnx_pb.h>

#include <limits>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/onnx/importer.h"

namespace tern::onnx {
namespace {

constexpr int kLeastOpset = 7, kMostOpset = 17;

}  // namespace

absl::StatusOr<graph::Graph> Import(absl::string_view bytes) {
  if (bytes.size() > static_cast<size_t>(std::numeric_limits<int>::max())) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model has ", bytes.size(), " bytes; ONNX allows 2 GiB"));
  }
  ::onnx::ModelProto model;
  // protobuf itself bounds nesting (100 levels) and checks every length.
  if (!model.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::InvalidArgumentError("the bytes are not an ONNX model");
  }
  if (!model.has_graph() || model.opset_import_size() == 0) {
    return absl::InvalidArgumentError("the bytes are not an ONNX model: graph or opset is missing");
  }
  int64_t opset = 0;
  for (const auto& import : model.opset_import()) {
    if (import.domain().empty() || import.domain() == "ai.onnx") opset = import.version();
  }
  if (opset < kLeastOpset || opset > kMostOpset) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model has opset ", opset, ", wanted ", kLeastOpset, " to ", kMostOpset));
  }
  TERN_ASSIGN_OR_RETURN(graph::Graph graph, Importer(model, static_cast<int>(opset)).Run());
  TERN_RETURN_IF_ERROR(graph::Validate(graph));
  return graph;
}

}  // namespace tern::onnx
