// Files of one version -> a network ready to run.
#ifndef TERN_SERVER_REPOSITORY_LOAD_H_
#define TERN_SERVER_REPOSITORY_LOAD_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/repository/repository.h"

namespace tern::repository {

// Whether a version is new here, or has served before. A new one runs all of its self-test; one
// that is loaded again a part: one image at least, more where that is cheap.
enum class Origin { kNew, kKnown };

// Reads config, labels and network, checks that they fit each other, plans, and runs the self-test.
// The result's identity (model, version, is_default, metric_labels) is the caller's to fill in; its
// state is kReady. Errors are those of the parts, naming the file, or of a new version the part.
// Thread safe.
absl::StatusOr<std::shared_ptr<LoadedModel>> LoadVersion(const std::string& model_folder,
                                                         const std::string& version_folder,
                                                         Origin origin,
                                                         const RepositoryOptions& options);

// Whether an error of LoadVersion says that the network is whole and computes something else here
// than where it was made.
bool IsFailedSelfTest(const absl::Status& status);

// INVALID_ARGUMENT unless the graph takes [3, h, w] images that `contract` can make.
absl::Status CheckContract(const graph::Graph& graph, const v1::Preprocessing& contract);

// Whether a weight or a value is held as codes.
bool IsQuantized(const graph::Graph& graph);

// Keys and values that say in an exported ONNX file where it comes from: tern.scheme ("int8",
// "ternary-cluster N=4"), tern.source_sha256, and in protobuf text format tern.preprocessing and
// tern.report (the report without its lists).
std::vector<std::pair<std::string, std::string>> MetadataOf(const artifact::Artifact& artifact);

// What the gauges show of a report.
metrics::ReportGauges GaugesOf(const v1::QuantizationReport& report);

}  // namespace tern::repository

#endif  // TERN_SERVER_REPOSITORY_LOAD_H_
