// The texts that go with a model at import: its preprocessing contract and its labels.
#ifndef TERN_CLIENT_CONTRACT_H_
#define TERN_CLIENT_CONTRACT_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tern/v1/model.pb.h"

namespace tern::client {

// `which` is a named contract (cifar10, imagenet, imagenet-299) or the path of a text-format
// tern.v1.Preprocessing file. NOT_FOUND if it is neither, listing the names; INVALID_ARGUMENT
// with line and column if the file does not parse.
absl::StatusOr<v1::Preprocessing> LoadPreprocessing(const std::string& which);

// One class name per line; a final newline is optional, carriage returns before it are dropped.
// NOT_FOUND if the file cannot be read; INVALID_ARGUMENT if it has no or an empty line.
absl::StatusOr<std::vector<std::string>> LoadLabels(const std::string& path);

// The whole file. NOT_FOUND if it cannot be opened, DATA_LOSS if reading fails,
// RESOURCE_EXHAUSTED if it is larger than `max_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes = size_t{1} << 30);

}  // namespace tern::client

#endif  // TERN_CLIENT_CONTRACT_H_
