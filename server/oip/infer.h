// ModelInfer's messages <-> the classify pipeline's images and scores.
//
// One input, "image", in one of these forms (h x w is the network's input, N at most kMaxImages):
//   FP32   [N, 3, h, w] or [3, h, w]   what the network takes
//   UINT8  [N, h, w, 3] or [h, w, 3]   RGB pixels, resized and cropped; Tern normalises them
//   BYTES  [N] or [N, 1]               JPEG, PNG, WebP or BMP; Tern does everything
// Outputs "probabilities" (what comes if none is asked for) and "logits": FP32 [N, classes]; or,
// with the parameter "classification" = n, BYTES [N, min(n, classes)] of "value:index[:label]",
// best first. The N is left out where the input has none.
#ifndef TERN_SERVER_OIP_INFER_H_
#define TERN_SERVER_OIP_INFER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "inference/grpc_service.pb.h"
#include "server/serving/classify.h"

namespace tern::oip {

// Most images of one request.
inline constexpr int kMaxImages = 64;
inline constexpr char kInputName[] = "image";
inline constexpr char kProbabilities[] = "probabilities";
inline constexpr char kLogits[] = "logits";

struct OutputChoice {
  bool logits = false;  // else probabilities
  int classes = 0;      // of the classification extension; 0 = the dense tensor
};

// A checked ModelInferRequest.
struct InferPlan {
  std::vector<serving::ClassifyInput>
      images;                         // without request id, priority, wishes and what a Caller says
  bool batched = true;                // the input has the dimension N
  std::vector<OutputChoice> outputs;  // at least one
  std::optional<absl::Duration> timeout;
  uint32_t priority = 0;  // as serving::ClassifyInput's
  serving::Wishes wishes;
};

// INVALID_ARGUMENT saying what, got and wanted; UNIMPLEMENTED for tensors in shared memory.
absl::StatusOr<InferPlan> ParseInfer(const inference::ModelInferRequest& request,
                                     const repository::LoadedModel& model);

// `outputs` has one entry per image of `plan`, at least one. The receipt is in the parameters:
// scheme, isa, batch_size, decode_us, preprocess_us, queue_us, inference_us, total_us, each the
// largest of the images'.
inference::ModelInferResponse ToResponse(const InferPlan& plan, const std::string& id,
                                         const std::vector<serving::ClassifyOutput>& outputs);

// "" = 0, the default version. INVALID_ARGUMENT if it is not a positive number.
absl::StatusOr<uint64_t> ParseVersion(absl::string_view version);

// The elements of a BYTES tensor: each its length as uint32, little-endian, then its bytes.
// INVALID_ARGUMENT unless they are exactly `count` and fill `raw`; `count` is not trusted.
absl::StatusOr<std::vector<absl::string_view>> SplitBytes(absl::string_view raw, int64_t count);

}  // namespace tern::oip

#endif  // TERN_SERVER_OIP_INFER_H_
