// Bytes -> ModelInferRequest of the Open Inference Protocol -> checked request -> response, as
// GRPCInferenceService.ModelInfer does around the network. Bytes that begin with '{', which is the
// tag of no field, are the body of its HTTP form: JSON, then perhaps a zero and binary contents.
#include <google/protobuf/stubs/logging.h>

#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"
#include "server/http/inference_json.h"
#include "server/oip/infer.h"
#include "tests/fuzz/fuzzer.h"

namespace tern::oip {
namespace {

constexpr int kClasses = 5, kHeight = 2, kWidth = 3;

// Shapes are all that requests are checked against.
class ShapesOnly final : public engine::Plan {
 public:
  absl::StatusOr<engine::Session> NewSession(int threads) const override {
    return absl::UnimplementedError("shapes only");
  }
  const Shape& input_shape() const override { return shape_; }
  int64_t classes() const override { return kClasses; }
  int max_batch() const override { return 8; }
  const std::vector<engine::LayerInfo>& layers() const override { return layers_; }
  size_t weight_bytes() const override { return 0; }
  size_t activation_bytes() const override { return 0; }

 private:
  Shape shape_{3, kHeight, kWidth};
  std::vector<engine::LayerInfo> layers_;
};

const std::shared_ptr<const repository::LoadedModel>& Model() {
  static const auto* model = [] {
    auto made = std::make_shared<repository::LoadedModel>();
    made->info.model = "m";
    made->info.version = 1;
    made->labels = {"cat", "dog:1", "", "K\xc3\xa4se", "e"};
    made->plan = std::make_shared<ShapesOnly>();
    return new std::shared_ptr<const repository::LoadedModel>(std::move(made));
  }();
  return *model;
}

size_t BytesOf(serving::ImageForm form) {
  return form == serving::ImageForm::kTensor ? 3 * kHeight * kWidth * sizeof(float)
                                             : 3 * kHeight * kWidth;
}

// What `bytes` ask for; nothing if they are refused.
std::optional<http::InferBody> Read(absl::string_view bytes) {
  http::InferBody read;
  if (bytes.empty() || bytes[0] != '{') {
    if (!read.request.ParseFromArray(bytes.data(), static_cast<int>(bytes.size())))
      return std::nullopt;
    return read;
  }
  std::string body(bytes);
  std::optional<uint64_t> json_bytes;
  if (const size_t zero = body.find('\0'); zero != std::string::npos) {
    body.erase(zero, 1);
    json_bytes = zero;
  }
  absl::StatusOr<http::InferBody> parsed = http::ParseInferBody(body, json_bytes);
  if (parsed.ok()) return *std::move(parsed);
  fuzz::Check(absl::IsInvalidArgument(parsed.status()) && parsed.status().message().size() < 400,
              parsed.status().ToString());
  return std::nullopt;
}

void Run(absl::string_view bytes) {
  const std::optional<http::InferBody> read = Read(bytes);
  if (!read.has_value()) return;
  const inference::ModelInferRequest& request = read->request;
  const auto version = ParseVersion(request.model_version());
  fuzz::Check(version.ok() || absl::IsInvalidArgument(version.status()),
              version.status().ToString());
  const absl::StatusOr<InferPlan> plan = ParseInfer(request, *Model());
  if (!plan.ok()) {
    fuzz::Check(absl::IsInvalidArgument(plan.status()) && plan.status().message().size() < 400,
                plan.status().ToString());
    return;
  }
  fuzz::Check(!plan->images.empty() && plan->images.size() <= kMaxImages, "number of images");
  fuzz::Check(!plan->outputs.empty() && plan->outputs.size() <= 2, "number of outputs");
  fuzz::Check(!plan->timeout || *plan->timeout > absl::ZeroDuration(), "a timeout of nothing");
  std::vector<serving::ClassifyOutput> outputs(plan->images.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const serving::ClassifyInput& image = plan->images[i];
    fuzz::Check(
        image.form == serving::ImageForm::kEncoded || image.image.size() == BytesOf(image.form),
        "an image of another size than the network's");
    outputs[i].model = Model();
    outputs[i].logits = {1, -1e30f, INFINITY, NAN, static_cast<float>(i)};
  }
  const inference::ModelInferResponse response = ToResponse(*plan, request.id(), outputs);
  fuzz::Check(response.outputs_size() == static_cast<int>(plan->outputs.size()) &&
                  response.raw_output_contents_size() == response.outputs_size(),
              "one raw entry per output");
  for (int i = 0; i < response.outputs_size(); ++i) {
    int64_t elements = 1;
    for (int64_t dimension : response.outputs(i).shape()) elements *= dimension;
    const std::string& raw = response.raw_output_contents(i);
    fuzz::Check(response.outputs(i).datatype() == "FP32" ? raw.size() == elements * sizeof(float)
                                                         : SplitBytes(raw, elements).ok(),
                "contents that do not fit their shape");
  }
  const absl::StatusOr<http::InferAnswer> answer = http::FormatInferAnswer(response, read->binary);
  if (!answer.ok()) return fuzz::Check(absl::IsInternal(answer.status()), "code of an answer");
  const absl::string_view json =
      absl::string_view(answer->body).substr(0, answer->json_bytes.value_or(answer->body.size()));
  fuzz::Check(nlohmann::json::accept(json.begin(), json.end()), "an answer that is not JSON");
}

}  // namespace
}  // namespace tern::oip

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  google::protobuf::SetLogHandler(nullptr);  // a line for each request that does not parse
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tern::oip::Run(tern::fuzz::Text(data, size));
  return 0;
}
