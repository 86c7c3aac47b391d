// The .tern file: a quantised network with everything needed to serve it. The format is
// described in FORMAT.md.
#ifndef TERN_SERVER_ARTIFACT_ARTIFACT_H_
#define TERN_SERVER_ARTIFACT_ARTIFACT_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/graph/graph.h"
#include "tern/v1/model.pb.h"

namespace tern::artifact {

// An artifact in memory. A value type.
struct Artifact {
  graph::Graph graph;  // optimised and quantised
  v1::Preprocessing preprocessing;
  std::vector<std::string> labels;  // one per class, or empty
  v1::QuantizationReport report;
  std::string source_sha256;
  // A few stored inputs, f32 NCHW [n, c, h, w], and their logits f32 [n, classes]; may be empty.
  Tensor self_test_input;
  Tensor self_test_logits;
};

// The file's bytes; StoredBits (server/tensor/quantized_weights.h) counts those of weights.
// Deterministic: equal artifacts give equal bytes.
std::string Serialize(const Artifact& artifact);

// DATA_LOSS if any byte is damaged, missing or added (checksums over header and sections);
// UNIMPLEMENTED for a newer format version; INVALID_ARGUMENT if the content is intact but not a
// valid model (graph::Validate, code ranges, s32 overflow bound). `name` is for messages; `threads`
// share the work.
absl::StatusOr<Artifact> Parse(absl::string_view bytes, absl::string_view name, int threads = 1);

// Serialize + WriteFileAtomically.
absl::Status Write(const Artifact& artifact, const std::string& path);

// ReadFile + Parse; NOT_FOUND if there is no file.
absl::StatusOr<Artifact> Read(const std::string& path, int threads = 1);

}  // namespace tern::artifact

#endif  // TERN_SERVER_ARTIFACT_ARTIFACT_H_
