// ONNX bytes -> a network whose output is a classifier's logits.
#ifndef TERN_SERVER_ONNX_CLASSIFIER_H_
#define TERN_SERVER_ONNX_CLASSIFIER_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/graph/graph.h"

namespace tern::onnx {

// Import(), for networks that choose one of several classes. Tern makes the probabilities itself, as
// the softmax of the output, so a softmax over the classes at the network's end is left out, with a
// line in the log: what comes before it are the logits.
//
// The errors of Import, and
// INVALID_ARGUMENT: fewer than two classes.
// UNIMPLEMENTED: an output that is no logits: Sigmoid or HardSigmoid (independent labels).
absl::StatusOr<graph::Graph> ImportClassifier(absl::string_view bytes);

}  // namespace tern::onnx

#endif  // TERN_SERVER_ONNX_CLASSIFIER_H_
