// The Open Inference Protocol's messages <-> the bodies of its HTTP form.
#ifndef TERN_SERVER_HTTP_INFERENCE_JSON_H_
#define TERN_SERVER_HTTP_INFERENCE_JSON_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"
#include "inference/grpc_service.pb.h"

namespace tern::http {

// A message as JSON: fields by their names in the .proto, 64-bit integers as numbers, every scalar
// also where it has its default; absent messages left out.
std::string MessageToJson(const google::protobuf::Message& message);

// The answer of POST /v2/repository/index: the list itself.
std::string IndexToJson(const inference::RepositoryIndexResponse& index);
// Its body: nothing, or an object whose "ready" says whether only ready models are wanted.
absl::StatusOr<bool> ParseIndexBody(absl::string_view body);

struct InferBody {
  inference::ModelInferRequest request;  // without model name and version
  std::vector<bool> binary;              // of each requested output; one entry if none is requested
};

// The body of POST .../infer. `json_bytes` is the header Inference-Header-Content-Length: so many
// bytes of JSON, then the contents of the inputs that have the parameter binary_data_size; absent:
// all JSON. 0: the whole body is one encoded image, and the answer is JSON. BYTES elements in JSON
// are base64, as a string or {"b64": string}. INVALID_ARGUMENT saying what, got and wanted. Time
// and memory are proportional to the body.
absl::StatusOr<InferBody> ParseInferBody(absl::string_view body,
                                         std::optional<uint64_t> json_bytes);

struct InferAnswer {
  std::string body;
  std::optional<uint64_t> json_bytes;  // the header, where outputs are binary
};

// `binary` as in InferBody. INTERNAL if an output in JSON has a value that is not finite.
absl::StatusOr<InferAnswer> FormatInferAnswer(const inference::ModelInferResponse& response,
                                              const std::vector<bool>& binary);

}  // namespace tern::http

#endif  // TERN_SERVER_HTTP_INFERENCE_JSON_H_
